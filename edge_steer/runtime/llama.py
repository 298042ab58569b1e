"""SteeredLlama: a llama_cpp.Llama whose activations are turned as it runs.

This file is the one seam into llama-cpp-python. It relies on: `Llama.__init__` making the model from
`self.model_params` and the context from `self.context_params`; `eval`, `generate`, `save_state`, `load_state` as the
only ways tokens enter the cache; `input_ids`, `n_tokens` and `_requires_eval` describing what is cached;
`_init_sampler` making what chooses a token. native.py checks the version.

The cache rule: a cached token is valid only for the steering state that computed it. Every cached token bears the
state it was computed under; before an answer, the cache is cut at the first token that does not fit.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import llama_cpp
import numpy as np
from llama_cpp import Llama
from llama_cpp.llama_chat_format import ChatFormatterResponse, chat_formatter_to_chat_completion_handler
from numpy.typing import NDArray

from edge_steer.contrast import ChatTemplate
from edge_steer.errors import NoEffectError, SteerError
from edge_steer.model_file import read_model
from edge_steer.rotation import Action
from edge_steer.runtime.arguments import adapter_path, check_arguments, context_length
from edge_steer.runtime.dials import (
    FILE_DEFAULT,
    Dials,
    FileDefault,
    SteeringLike,
    first_dials,
    load_steerings,
    warn_of_overlap,
)
from edge_steer.runtime.engines import Engine, EngineName, HookEngine, LoraEngine, choose_engine
from edge_steer.runtime.llama_log import llama_errors, reason
from edge_steer.runtime.native import Hook, Record
from edge_steer.runtime.rpc import connect
from edge_steer.runtime.sampling import Penalties, Sampler
from edge_steer.runtime.tokens import Tokenizer
from edge_steer.sites import Site, architecture

Message = Mapping[str, Any]  # role and content
Scope = Literal["all", "response"]

_OFF = 0  # the number of the state in which nothing acts
_UNKNOWN = -1  # of a token cached by something else


def _is_jinja(template: str) -> bool:
    """Whether a template is Jinja's text, not the name of one of llama.cpp's."""
    return "{" in template or "\n" in template


def _refused(reason: str, **_: Any) -> Any:
    """A chat handler for a template that does not render."""
    raise SteerError(reason)


class _Closed:
    """In place of what has been freed: llama-cpp-python hands llama.cpp a null pointer, or one to where it lay."""

    def __getattr__(self, name: str) -> NoReturn:
        raise SteerError("expected an open model, got one after close(); make another SteeredLlama")


class SteeredLlama(Llama):  # type: ignore[misc]
    """A llama_cpp.Llama with steerings.

    steering: one or several, as values or paths; they apply in the order given. None: those that the model's file
              embeds, if any; () is none.
    angle:    the dial of the one steering; None is off; left out, the file's default, or off where it has none.
    angles:   the dials by name, where there are several.
    scope:    "all": every token is steered; "response": the last prompt token and everything after it.
    engine:   "hook": the native callback; "lora": llama.cpp's adapters, for linear operators; "auto": the hook,
              unless every layer is on a GPU and the operators are linear.
    template: a chat template in place of the model's: Jinja text, or the name of one of llama.cpp's.
    rpc:      "host:port" of llama.cpp's RPC servers: the layers that n_gpu_layers asks for are spread over them and
              this machine's GPUs; every layer, where n_gpu_layers is left out.
    Everything else goes to llama_cpp.Llama, with verbose=False unless told otherwise.

    Raises SteerError where a steering does not fit the model.
    """

    n_tokens: int  # cached

    def __init__(
        self,
        model_path: str | Path,
        *,
        steering: SteeringLike | Sequence[SteeringLike] | None = None,
        angle: float | FileDefault | None = FILE_DEFAULT,
        angles: Mapping[str, float | None] | None = None,
        scope: Scope = "all",
        engine: EngineName = "auto",
        rpc: Sequence[str] = (),
        template: str | None = None,
        **llama: Any,
    ) -> None:
        file = read_model(model_path)
        check_arguments(file, llama)
        arch = architecture(file.architecture, (tensor.name for tensor in file.tensors))
        sites = arch.sites(file.block_count, ",".join(arch.kinds))
        embedded = model_path if "steering.count" in file.metadata else ()
        self.steerings = load_steerings(embedded if steering is None else steering)
        for each in self.steerings:
            if warning := each.check_fits(file.base):
                warnings.warn(warning, stacklevel=2)
            if unknown := [site for site in each.steered if site not in sites]:
                raise NoEffectError(f"steering {each.name!r} acts at {unknown[0]}, which {file.architecture} lacks")
        warn_of_overlap(self.steerings)
        self._angles = first_dials(self.steerings, angle, angles)
        self.scope = scope

        self._template = template
        self._made = False
        self._rpc = tuple(rpc)
        devices = connect(self._rpc) if self._rpc else ()
        self._devices = (ctypes.c_void_p * (len(devices) + 1))(*devices)  # ends with a null; llama.cpp reads it once
        if self._rpc:
            llama.setdefault("n_gpu_layers", -1)
        self._hook = Hook(arch, sites, file.embedding_length)
        self._states = {"": _OFF}  # key, the same in every process, to number
        self._numbered: dict[tuple[tuple[Action | None, ...], bool], int] = {}
        self._latest_actions: tuple[Action | None, ...] | None = None  # what `_state` was asked for last, and said
        self._latest_response, self._latest_state = False, _OFF
        self._answer: object | None = None  # the answer that has the cache
        self._answering = False
        self._lock = threading.RLock()  # held while llama.cpp works: threads that share this object take turns
        self._pieces: dict[int, bytes | None] = {}

        llama.setdefault("verbose", False)
        llama["n_ctx"] = context_length(file, llama.get("n_ctx", 512))
        own_adapter = adapter_path(llama.pop("lora_path", None))
        with llama_errors() as errors:
            try:
                super().__init__(str(model_path), **llama)
                self._load_own_adapter(own_adapter, errors)
            except ValueError as error:
                if not str(error).startswith("Failed to"):  # what llama-cpp-python says of the model and its context
                    raise
                raise SteerError(
                    f"{model_path}: expected a model that llama.cpp loads, got: "
                    f"{reason(errors) or str(error).split(':')[0]}; "
                    "fetch it again, or give less --ctx or --gpu-layers where memory is short"
                ) from None
        self._made = True
        self.tokenizer_ = Tokenizer(self)
        # Which state computed a cached token, and where a response began; meaningful below n_tokens.
        self._stamps = np.zeros(len(self.input_ids), np.int32)
        self._opens = np.zeros(len(self.input_ids), np.bool_)
        everywhere = self.model_params.n_gpu_layers > file.block_count and llama_cpp.llama_supports_gpu_offload()
        self.engine = choose_engine(engine, self.steerings, offloaded=everywhere)
        self._engine: Engine = (
            HookEngine(self._hook, self.steerings) if self.engine == "hook" else LoraEngine(self, file, self.steerings)
        )
        self._chose_chat_format = not (llama.get("chat_format") or llama.get("chat_handler"))
        if self._chose_chat_format:
            self._choose_chat_format()

    # --- the dial ---------------------------------------------------------------------------------------------

    @property
    def angle(self) -> float | None:
        """The dial of the one steering; None is off. A new value acts from the next token on that this object
        evaluates: who calls llama_decode on its context himself calls `eval` first, which puts it in place."""
        return self._angles[self._only()]

    @angle.setter
    def angle(self, value: float | None) -> None:
        self._angles[self._only()] = value

    @property
    def angles(self) -> Dials:
        """The dials by name: `llm.angles["happy"] = -5`."""
        return self._angles

    @angles.setter
    def angles(self, values: Mapping[str, float | None]) -> None:
        self._angles.update(values)

    @property
    def scope(self) -> Scope:
        """Which tokens are steered. A new value acts from the next answer on."""
        return self._scope

    @scope.setter
    def scope(self, value: Scope) -> None:
        if value not in ("all", "response"):
            raise SteerError(f"expected the scope all or response, got {value!r}")
        self._scope: Scope = value

    @property
    def sites_hit(self) -> int:
        """Sites at which at least one token was turned since the model was loaded."""
        return self._engine.sites_hit()

    def _only(self) -> str:
        if len(self.steerings) != 1:
            raise SteerError(f"angle is for one steering, this model has {len(self.steerings)}; use angles")
        return self.steerings[0].name

    # --- making the model and the context ---------------------------------------------------------------------

    @property
    def model_params(self) -> Any:
        """llama.cpp's model parameters. Llama fills them in; the devices of RPC servers are named as they arrive."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        if self._rpc:
            params.devices = ctypes.addressof(self._devices)
        self._model_params = params

    @property
    def context_params(self) -> Any:
        """llama.cpp's context parameters. Llama fills them in; the hook is put in place as they arrive."""
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        callback_type = type(params.cb_eval)
        params.cb_eval = callback_type(self._hook.callback)
        params.cb_eval_user_data = self._hook.user_data
        self._context_params = params

    def _load_own_adapter(self, path: str | None, errors: list[str]) -> None:
        """Attach the adapter that lora_path names. (Llama itself goes on with a null pointer where it is refused.)"""
        if path is None:
            return
        adapter = llama_cpp.llama_adapter_lora_init(self._model.model, path.encode())
        if not adapter:
            raise SteerError(f"{path}: expected an adapter for this model, got: {reason(errors) or 'one it refuses'}")
        self._stack.callback(llama_cpp.llama_adapter_lora_free, adapter)
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        if llama_cpp.llama_set_adapters_lora(self._ctx.ctx, pointers, 1, (ctypes.c_float * 1)(self.lora_scale)):
            raise SteerError(f"{path}: expected an adapter that llama.cpp attaches, got one that it refuses")
        self.lora_path, self._lora_adapter = path, adapter

    @property
    def metadata(self) -> dict[str, str]:
        """The model's metadata. While Llama is made, without chat templates: it would compile them unbounded."""
        return self._metadata if self._made else {k: v for k, v in self._metadata.items() if "chat_template" not in k}

    @metadata.setter
    def metadata(self, values: dict[str, str]) -> None:
        self._metadata = values

    def _choose_chat_format(self) -> None:
        """Chat completions use the model's own template, or the plain one, as `chat_tokens` does; never another
        model's.

        llama-cpp-python adds no BOS to a rendered chat; where the model wants one and its template writes none, it is
        written here, so that a chat has the tokens that were calibrated on.
        """
        try:
            template = self.chat_template
        except SteerError as error:
            self.chat_handler = partial(_refused, str(error))  # it may be wanted for anything but chats
            return
        bos = self._token_text(self.token_bos()) if self._model.add_bos_token() else ""
        eos = self._token_text(self.token_eos())

        def formatted(messages: Sequence[Message], **more: Any) -> ChatFormatterResponse:
            text = template.render(messages, **more)
            head = "" if template.starts_with_bos(text) else bos
            return ChatFormatterResponse(head + text, stop=[eos] if eos else [], added_special=True)

        self.chat_handler = chat_formatter_to_chat_completion_handler(formatted)

    def _token_text(self, token: int) -> str:
        return "" if token < 0 else str(self._model.token_get_text(token))

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """How this model's chats are written."""
        if self._template is not None and not _is_jinja(self._template):
            return ChatTemplate.builtin(self._template, self._token_text(self.token_bos()))
        return ChatTemplate.from_gguf(
            self._template or self.metadata.get("tokenizer.chat_template"),
            self._token_text(self.token_bos()),
            self._token_text(self.token_eos()),
        )

    def text_tokens(self, text: str) -> list[int]:
        """Tokens of a rendered text; a BOS that it does not bear is added where the model wants one."""
        return list(self.tokenize(text.encode(), add_bos=not self.chat_template.starts_with_bos(text), special=True))

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a chat, generation prompt included."""
        return self.text_tokens(self.chat_template.render(messages))

    def piece(self, token: int) -> bytes | None:
        """A generated token's part of the text; None where it ends the answer."""
        if token not in self._pieces:
            ends = llama_cpp.llama_vocab_is_eog(self._model.vocab, token)
            self._pieces[token] = None if ends else self.detokenize([token])
        return self._pieces[token]

    def close(self) -> None:
        """Free the engine, the context, the model, then the hook that the context calls."""
        if isinstance(self.__dict__.get("_ctx"), _Closed):
            return
        self._answer = None
        if engine := self.__dict__.get("_engine"):
            engine.close()
        super().close()
        closed: Any = _Closed()
        self._model = self._ctx = self._engine = self.tokenizer_ = closed
        if hook := self.__dict__.get("_hook"):
            hook.close()

    def __del__(self) -> None:
        if "_stack" in self.__dict__:  # a constructor that failed early has nothing to close
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        own: dict[str, Any] = {
            "steering": self.steerings,
            "angles": dict(self._angles),
            "scope": self._scope,
            "engine": self.engine,
            "rpc": self._rpc,
            "template": self._template,
        }
        if self._chose_chat_format:  # a closure, and chosen again when it is made again
            own |= {"chat_format": None, "chat_handler": None}
        return {**super().__getstate__(), **own}

    # --- sampling ---------------------------------------------------------------------------------------------

    def _init_sampler(
        self,
        *,
        repeat_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        logits_processor: Any = None,
        grammar: Any = None,
        **how: Any,
    ) -> Any:
        """Llama's sampler, quicker where nothing of Python's comes before the penalties."""
        penalties = Penalties(self.last_n_tokens_size, repeat_penalty, frequency_penalty, presence_penalty)
        if logits_processor is not None:
            charges = {f"{name}_penalty": getattr(penalties, name) for name in ("repeat", "frequency", "presence")}
            return super()._init_sampler(**how, **charges, logits_processor=logits_processor, grammar=grammar)
        greedy = grammar is None and how.get("temp") == 0
        return Sampler(self._n_vocab, penalties, None if greedy else super()._init_sampler(**how, grammar=grammar))

    # --- the cache rule ---------------------------------------------------------------------------------------

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens under the dials as they stand now.

        With scope "response", all but the last token of a prompt are evaluated unsteered.
        """
        with self._lock:
            actions = self._angles.actions()
            response = self._scope == "response"
            if response and not self._answering:
                self._eval_under(self._all_off, tokens[:-1])
                tokens = tokens[-1:]
            begin = self.n_tokens
            self._eval_under(actions, tokens, response)
            if response and not self._answering:
                self._opens[begin : self.n_tokens] = True
            self._answering = self._answer is not None

    @property
    def _all_off(self) -> tuple[Action | None, ...]:
        return (None,) * len(self.steerings)

    def _eval_under(
        self,
        actions: tuple[Action | None, ...],
        tokens: Sequence[int],
        response: bool = False,
        evaluate: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        """Evaluate tokens under `actions` and stamp them with that state."""
        if len(tokens) == 0:
            return
        self._engine.apply(actions)
        begin = self.n_tokens
        try:
            (evaluate or super().eval)(tokens)
            self._engine.check()
        except SteerError:
            self.reset()
            raise
        finally:
            self._stamps[begin : self.n_tokens] = self._state(actions, response)
            self._opens[begin : self.n_tokens] = False

    def _state(self, actions: tuple[Action | None, ...], response: bool) -> int:
        """Number of a steering state. States that act alike are one; off is always the same."""
        if actions is self._latest_actions and response == self._latest_response:
            return self._latest_state
        number = self._numbered.get((actions, response))
        if number is None:
            acting = [
                f"{steering.fingerprint} {action}"
                for steering, action in zip(self.steerings, actions, strict=True)
                if action is not None
            ]
            digest = hashlib.sha256("\n".join(acting).encode()).hexdigest()
            key = f"{'response' if response else 'all'} {digest}" if acting else ""
            number = self._states.setdefault(key, len(self._states))
            self._numbered[actions, response] = number
        self._latest_actions, self._latest_response, self._latest_state = actions, response, number
        return number

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As llama_cpp.Llama.generate; cached tokens that another steering state computed are evaluated again.

        There is one cache: an answer that was left when another began cannot go on, and raises SteerError.
        """
        tokens, answer = list(tokens), object()
        if not tokens:
            raise SteerError("expected a prompt of at least one token, got none; this model adds no BOS of its own")
        with self._lock:
            if kwargs.get("reset", True):
                self._cut_cache(tokens)
            self._answer, self._answering = answer, False
        try:
            with closing(super().generate(tokens, *args, **kwargs)) as stream:
                follow = self._continued if self._plain(*args, **kwargs) else self._followed
                yield from follow(answer, stream)
        except (Exception, KeyboardInterrupt):
            if self._answer is answer:
                self._requires_eval = True  # a decode may have ended without being noted
            raise
        finally:
            if self._answer is answer:
                self._leave()

    def _leave(self) -> None:
        """No answer has the cache any more."""
        self._answer, self._answering = None, False

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The cache for something else than an answer."""
        with self._lock:
            self._leave()
            yield

    def _demand_turn(self, answer: object) -> None:
        if self._answer is not answer:
            raise SteerError(
                "this answer was left when the model began something else or was closed; end a stream before the "
                "next, or give each its own SteeredLlama"
            )

    def _plain(self, *args: Any, **how: Any) -> bool:
        """Whether an answer goes on as `_continued` has it: nothing but the sampler decides on a token."""
        extras = (how.get("stopping_criteria"), how.get("logits_processor"), self.draft_model)
        return not args and not self._logits_all and extras == (None, None, None)

    def _followed(
        self, answer: object, stream: Generator[int, Sequence[int] | None, None]
    ) -> Generator[int, Sequence[int] | None, None]:
        """An answer as Llama.generate goes on."""
        sent = None
        while True:
            with self._lock:
                self._demand_turn(answer)
                try:
                    token = stream.send(sent)
                except StopIteration:
                    return
            sent = yield token

    def _continued(
        self, answer: object, stream: Generator[int, Sequence[int] | None, None]
    ) -> Generator[int, Sequence[int] | None, None]:
        """An answer whose first token is the stream's. As Llama.generate goes on, with fewer calls for each token: a
        decode leaves none of Python in the processor's caches, and each costs ten times what it costs in a loop of its
        own."""
        with self._lock:
            self._demand_turn(answer)
            token = next(stream)
        sampler, context, lock = self._sampler, self._ctx, self._lock
        while True:
            sent = yield token
            with lock:
                if self._answer is not answer:
                    self._demand_turn(answer)
                if sent is None:
                    self._step(token)
                else:
                    self.eval([token, *sent])
                token = sampler.sample(context, -1)

    def _step(self, token: int) -> None:
        """`eval` of one token of an answer."""
        actions, at = self._angles.actions(), self.n_tokens
        self._engine.apply(actions)
        try:
            self._ctx.kv_cache_seq_rm(-1, at, -1)
            self._batch.set_batch([token], at, False)
            self._ctx.decode(self._batch)
            self._engine.check()
        except SteerError:
            self.reset()
            raise
        self.input_ids[at] = token
        self._stamps[at] = self._state(actions, self._scope == "response")
        self._opens[at] = False
        self.n_tokens += 1

    def _cut_cache(self, tokens: list[int]) -> None:
        """Forget the cached tokens from the first on that an answer to `tokens` must not use."""
        shared = self._shared(tokens)
        stamps = self._stamps[:shared]
        now = self._state(self._angles.actions(), self._scope == "response")
        if self._scope == "all":
            fits = stamps == now
        else:
            written = [number for key, number in self._states.items() if key.startswith("response ")]
            fits = (stamps == _OFF) | np.isin(stamps, written)
            if shared == len(tokens):
                fits[-1:] = stamps[-1:] == now
        keep = shared if fits.all() else int(np.flatnonzero(~fits)[0])
        # A former last prompt token without its answer is a prompt token again, which is not steered.
        if self._scope == "response" and 0 < keep < len(tokens) and self._opens[keep - 1] and stamps[keep - 1] != _OFF:
            keep -= 1
        ready = keep == len(tokens) == self.n_tokens and not self._requires_eval  # its logits are there
        if not ready and self._slid_past(min(keep, len(tokens) - 1)):
            keep = 0
        if keep < shared:
            self.n_tokens = keep
            self._requires_eval = True

    def _slid_past(self, count: int) -> bool:
        """Whether a sliding window that is kept no larger than it must be (swa_full=False) has lost what the token
        behind the first `count` looks back to. llama.cpp cuts such a cache without a word."""
        window = llama_cpp.llama_model_n_swa(self._model.model)
        first = llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(self._ctx.ctx), 0) if window else 0
        return bool(first > max(0, count - window + 1))

    def save_state(self) -> Any:
        """As llama_cpp.Llama.save_state, with the steering state of every cached token."""
        state = super().save_state()
        names = {number: key for key, number in self._states.items()}
        stamps = self._stamps[: self.n_tokens]
        state.steering = {
            "stamps": [names.get(int(number)) for number in stamps],
            "opens": self._opens[: self.n_tokens].tolist(),
        }
        return state

    def load_state(self, state: Any) -> None:
        """As llama_cpp.Llama.load_state. Tokens saved under another steering state are evaluated again when used."""
        super().load_state(state)
        known = getattr(state, "steering", None)
        if known is None:  # saved by a plain Llama: unsteered, and good for that only
            self._stamps[: self.n_tokens] = _UNKNOWN if any(self._angles.actions()) else _OFF
            self._opens[: self.n_tokens] = False
            return
        numbers = [
            _UNKNOWN if key is None else self._states.setdefault(key, len(self._states)) for key in known["stamps"]
        ]
        self._stamps[: self.n_tokens] = numbers
        self._opens[: self.n_tokens] = known["opens"]

    # --- measuring and recording ------------------------------------------------------------------------------

    def logits(self, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        """What the model expects in place of tokens[start:], under the dials: logits (len(tokens) − start, vocabulary).

        tokens[:start] count as the prompt, the rest as the answer. Cached tokens that fit are not evaluated again.
        """
        tokens = list(tokens)
        if not 0 < start < len(tokens) <= self.n_ctx():
            raise SteerError(
                f"expected 0 < start < tokens <= {self.n_ctx()}, got {start} and {len(tokens)}; {self.longer()}"
            )
        with self._alone():
            self._cut_cache(tokens[:start])
            self._keep(min(self._shared(tokens), start - 1))
            actions, response = self._angles.actions(), self._scope == "response"
            self._eval_under(self._all_off if response else actions, tokens[self.n_tokens : start - 1])
            found: list[NDArray[np.float32]] = []

            def evaluate(part: Sequence[int]) -> None:
                # As Llama.eval, with a row of logits for every token; few at a time, a row can be a megabyte.
                self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
                for i in range(0, len(part), min(64, self.n_batch)):
                    batch = part[i : i + min(64, self.n_batch)]
                    self._batch.set_batch(batch=batch, n_past=self.n_tokens, logits_all=True)
                    self._ctx.decode(self._batch)
                    self.input_ids[self.n_tokens : self.n_tokens + len(batch)] = batch
                    self.n_tokens += len(batch)
                    found.append(
                        np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(batch), self._n_vocab)).copy()
                    )

            self._eval_under(actions, tokens[start - 1 : -1], response, evaluate)
            if response:
                self._opens[start - 1] = True
            self._requires_eval = True  # what Llama would sample from are not the logits of the last token alone
            return np.concatenate(found)

    def longer(self) -> str:
        """What to do about a text that is longer than the context."""
        trained = int(self._model.n_ctx_train())
        return "raise --ctx or shorten it" if trained > self.n_ctx() else f"shorten it: the model takes {trained}"

    def _shared(self, tokens: Sequence[int]) -> int:
        """How many of the first tokens are cached, whatever state computed them."""
        n = min(self.n_tokens, len(tokens))
        differ = np.flatnonzero(self.input_ids[:n] != np.asarray(tokens[:n], self.input_ids.dtype))
        return int(differ[0]) if len(differ) else n

    def _keep(self, count: int) -> None:
        """Cut the cache to its first `count` tokens, or to none where a sliding window has moved past them."""
        if count and not self._slid_past(count) and self._ctx.kv_cache_seq_rm(-1, count, -1):
            self.n_tokens = count
            self._requires_eval = True
        else:
            self.reset()

    def observe(self, tokens: Sequence[int], record: Record, *, steered: bool = False) -> None:
        """Evaluate a prompt and record the activations of its last token at every site of `hook_sites`.

        Unsteered, or where `steered` under the dials: then a site's activation is what it was before it was turned
        there itself. Tokens it shares with the last prompt are not evaluated again. Raises SteerError where it exceeds
        the context.
        """
        tokens = list(tokens)
        if not 0 < len(tokens) <= self.n_ctx():
            raise SteerError(
                f"expected a prompt of 1 to {self.n_ctx()} tokens, the context, got {len(tokens)}; {self.longer()}"
            )
        with self._alone():
            actions = self._angles.actions() if steered else self._all_off
            shared = self._shared(tokens[:-1])
            usable = self._stamps[:shared] == self._state(actions, False)
            self._keep(shared if usable.all() else int(np.flatnonzero(~usable)[0]))
            # The last micro-batch on its own: the only one whose last row is the prompt's last token.
            last = min(len(tokens) - self.n_tokens, int(self.context_params.n_ubatch))
            self._eval_under(actions, tokens[self.n_tokens : len(tokens) - last])
            self._hook.record(record)
            try:
                self._eval_under(actions, tokens[len(tokens) - last :])
            finally:
                self._hook.record(None)

    @property
    def hook_sites(self) -> tuple[Site, ...]:
        """Every site of the model that the hook knows, in the order of a Record's rows."""
        return self._hook.sites

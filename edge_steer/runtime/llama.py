"""SteeredLlama: a llama_cpp.Llama whose activations are turned as it runs.

hooked_llama.py holds the seam into llama-cpp-python, cache.py the rule that is kept here.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edge_steer.architectures import architecture
from edge_steer.errors import NoEffectError, SteerError
from edge_steer.model_file import read_model
from edge_steer.rotation import Action
from edge_steer.runtime.arguments import NO_EMBEDDINGS, check_arguments
from edge_steer.runtime.cache import CacheStamps, Scope
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
from edge_steer.runtime.hook import Record
from edge_steer.runtime.hooked_llama import Closed, HookedLlama, Message
from edge_steer.runtime.measuring import read_logits, record_activations
from edge_steer.runtime.reading import Float32, TokenReadings, prompt_tokens, read_tokens
from edge_steer.runtime.rpc import check_servers
from edge_steer.runtime.self_check import check_graph_path

Stream = Generator[int, Sequence[int] | None, None]
Actions = tuple[Action | None, ...]  # of the steerings, in their order; None is off


class Cancelled(Exception):
    """An evaluation that `SteeredLlama.cancelled` ended between two batches; what was evaluated stays cached."""


class SteeredLlama(HookedLlama):
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

    Raises SteerError if a steering does not fit the model.
    """

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
        embedded = model_path if file.embeds_steerings else ()
        self.steerings = load_steerings(embedded if steering is None else steering)
        for each in self.steerings:
            if warning := each.check_fits(file.base):
                warnings.warn(warning, stacklevel=2)
            if unknown := [site for site in each.steered if site not in sites]:
                raise NoEffectError(f"steering {each.name!r} acts at {unknown[0]}, which {file.architecture} lacks")
        warn_of_overlap(self.steerings)
        self._angles = first_dials(self.steerings, angle, angles)
        self.scope = scope

        self.cancelled: Callable[[], bool] | None = None  # asked before each batch; true ends it with Cancelled
        self._answer: object | None = None  # the answer that has the cache
        self._answering = False
        self._lock = threading.RLock()  # held while llama.cpp works: threads that share this object take turns
        super().__init__(model_path, file, arch, rpc=rpc, template=template, **llama)
        self._cache_stamps = CacheStamps(len(self.input_ids), [each.fingerprint for each in self.steerings])
        self.token_readings = TokenReadings(self._hook, self.steerings, len(self.input_ids))
        everywhere = self.model_params.n_gpu_layers > file.block_count and llama_cpp.llama_supports_gpu_offload()
        self.engine = choose_engine(engine, self.steerings, offloaded=everywhere)
        self._engine: Engine = (
            HookEngine(self._hook, self.steerings) if self.engine == "hook" else LoraEngine(self, file, self.steerings)
        )
        if self.engine == "hook":
            check_graph_path(self)

    # --- the dial ---------------------------------------------------------------------------------------------

    @property
    def angle(self) -> float | None:
        """The dial of the one steering; None is off. A new value acts from the next token on."""
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

    @contextmanager
    def steer(self, **angles: float | None) -> Iterator[None]:
        """The dials at `angles` within the block, and behind it as they were: `with llm.steer(happy=8): ...`"""
        before = dict(self._angles)
        try:
            self._angles.update(angles)
            yield
        finally:
            self._angles.update(before)

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
    def ctx(self) -> Any:
        """llama.cpp's context, for who calls llama_decode on it himself: at each look the dials are put in place.

        What is decoded there is steered whatever the scope, and neither checked nor stamped.
        """
        if engine := self.__dict__.get("_engine"):  # not while the model is made
            with self._lock:
                engine.apply(self._angles.actions())
        return super().ctx

    @property
    def sites_hit(self) -> int:
        """Sites at which at least one token was turned since the model was loaded."""
        return self._engine.sites_hit()

    def _only(self) -> str:
        if len(self.steerings) != 1:
            raise SteerError(f"angle is for one steering, this model has {len(self.steerings)}; use angles")
        return self.steerings[0].name

    def close(self) -> None:
        """Free the engine, the context, the model, then the hook that the context calls."""
        if isinstance(self.__dict__.get("_ctx"), Closed):
            return
        self._answer = None
        if engine := self.__dict__.get("_engine"):
            engine.close()
        super().close()
        closed: Any = Closed()
        self._model = self._ctx = self._engine = self.tokenizer_ = closed
        if hook := self.__dict__.get("_hook"):
            hook.close()

    def __del__(self) -> None:
        # A constructor that failed early has nothing to close; a module's names are None where Python is ending.
        if "_stack" in self.__dict__ and Closed is not None:
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

    # --- evaluating -------------------------------------------------------------------------------------------

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens under the dials as they stand now.

        With scope "response", all but the last token of a prompt are evaluated unsteered.
        """
        with self._lock:
            actions, response = self._angles.actions(), self._scope == "response"
            opens = response and not self._answering
            if opens:
                self.evaluate(self.all_off, tokens[:-1])
                tokens = tokens[-1:]
            self.evaluate(actions, tokens, response, opens=opens)
            self._answering = self._answer is not None

    def evaluate(
        self,
        actions: Actions,
        tokens: Sequence[int],
        response: bool = False,
        *,
        opens: bool = False,
        every_row: bool = False,
    ) -> list[NDArray[np.float32]]:
        """Evaluate tokens under `actions` and stamp them with that state; opens: a response begins with the first.

        every_row: returns the logits behind each token, (n, vocabulary) for each batch; only the last token's are kept
        otherwise, or every token's in `scores` with logits_all. Raises SteerError if a steering fails to act.
        """
        rows: list[NDArray[np.float32]] = []
        if len(tokens) == 0:
            return rows
        if self._rpc:
            check_servers(self._rpc)
        self._engine.apply(actions)
        begin = self.n_tokens
        try:
            self._ctx.kv_cache_seq_rm(-1, begin, -1)
            for first in range(0, len(tokens), self.n_batch):
                if self.cancelled is not None and self.cancelled():
                    raise Cancelled
                batch, at = tokens[first : first + self.n_batch], self.n_tokens
                self._batch.set_batch(batch, at, every_row or self._logits_all)
                self.token_readings.expect(at)
                self._ctx.decode(self._batch)
                self.token_readings.note(at, at + len(batch))
                self.input_ids[at : at + len(batch)] = batch
                if every_row or self._logits_all:
                    found = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(batch), self._n_vocab))
                    if self._logits_all:
                        self.scores[at : at + len(batch)] = found
                    rows += [found.copy()] if every_row else []
                self.n_tokens = at + len(batch)
            self._engine.check()
        except SteerError:
            self.reset()
            raise
        finally:
            if self.n_tokens > begin:
                self._cache_stamps.stamp(begin, self.n_tokens, self._cache_stamps.state(actions, response), opens=opens)
        self._requires_eval = every_row  # what Llama would sample from are then not the logits of the last token alone
        return rows

    @property
    def all_off(self) -> Actions:
        """What the steerings do where all are off."""
        return (None,) * len(self.steerings)

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Stream:
        """As llama_cpp.Llama.generate; cached tokens that another steering state computed are evaluated again.

        There is one cache: an answer that was left when another began cannot go on, and raises SteerError.
        """
        tokens, answer = list(tokens), object()
        if not tokens:
            raise SteerError("expected a prompt of at least one token, got none; this model adds no BOS of its own")
        with self._lock:
            if kwargs.get("reset", True):
                self.cut_cache(tokens)
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
    def without_answer(self) -> Iterator[None]:
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

    def _followed(self, answer: object, stream: Stream) -> Stream:
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

    def _continued(self, answer: object, stream: Stream) -> Stream:
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
                self._demand_turn(answer)
                self.eval([token] if sent is None else [token, *sent])
                token = sampler.sample(context, -1)

    # --- the cache --------------------------------------------------------------------------------------------

    def usable(self, shared: int, length: int, actions: Actions, scope: Scope) -> int:
        """How many of the first `shared` cached tokens, which a prompt of `length` tokens begins with, an answer under
        `actions` may use."""
        now = self._cache_stamps.state(actions, scope == "response")
        return self._cache_stamps.usable(shared, length, now, scope)

    def cut_cache(self, tokens: Sequence[int]) -> None:
        """Forget the cached tokens from the first on that an answer to `tokens` must not use."""
        shared = self.shared(tokens)
        keep = self.usable(shared, len(tokens), self._angles.actions(), self._scope)
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

    def shared(self, tokens: Sequence[int]) -> int:
        """How many of the first tokens are cached, whatever state computed them."""
        n = min(self.n_tokens, len(tokens))
        differ = np.flatnonzero(self.input_ids[:n] != np.asarray(tokens[:n], self.input_ids.dtype))
        return int(differ[0]) if len(differ) else n

    def keep(self, count: int) -> None:
        """Cut the cache to its first `count` tokens, or to none where a sliding window has moved past them."""
        if count and not self._slid_past(count) and self._ctx.kv_cache_seq_rm(-1, count, -1):
            self.n_tokens = count
            self._requires_eval = True
        else:
            self.reset()

    def save_state(self) -> Any:
        """As llama_cpp.Llama.save_state, with the steering state of every cached token."""
        state = super().save_state()
        state.steering = self._cache_stamps.save(self.n_tokens)
        return state

    def load_state(self, state: Any) -> None:
        """As llama_cpp.Llama.load_state. Tokens saved under another steering state are evaluated again when used."""
        super().load_state(state)
        self.token_readings.forget()
        saved = getattr(state, "steering", None)
        self._cache_stamps.load(self.n_tokens, saved, unsteered=not any(self._angles.actions()))

    def embed(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refused, as SteeredLlama(embedding=True) is: it empties the cache past the rule."""
        raise SteerError(NO_EMBEDDINGS)

    # --- measuring and recording ------------------------------------------------------------------------------

    def logits(self, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        """What the model expects in place of tokens[start:], under the dials: logits (len(tokens) − start, vocabulary).

        tokens[:start] count as the prompt, the rest as the answer. Cached tokens that fit are not evaluated again.
        """
        with self.without_answer():
            return read_logits(self, tokens, start)

    def observe(self, tokens: Sequence[int], record: Record, *, steered: bool = False) -> None:
        """Evaluate a prompt and record the activations of its last token at every site of `hook_sites`.

        Unsteered, or where `steered` under the dials: then a site's activation is what it was before it was turned
        there itself. Tokens it shares with the last prompt are not evaluated again. Raises SteerError if it exceeds
        the context.
        """
        with self.without_answer():
            record_activations(self, tokens, record, steered=steered)

    def read(
        self, prompt: str | Sequence[int] | Sequence[Message], names: Sequence[str] | None = None
    ) -> dict[str, Float32]:
        """The readings (n,) of the n tokens of a text, a chat (with its generation prompt) or tokens, by steering.

        A reading is h·b1 where `token_readings.site` says, before it is turned there: −1 the mean of the negative
        class, +1 that of the positive. Dials that are on act as on a prompt, so what earlier sites turn is in it.
        names: of the steerings to read; None: all. Raises SteerError where a steering's file holds no class means.
        """
        wanted = [each.name for each in self.steerings] if names is None else list(names)
        with self.without_answer():
            return read_tokens(self, prompt_tokens(self, prompt), wanted)

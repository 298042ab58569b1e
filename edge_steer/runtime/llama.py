"""SteeredLlama: a llama_cpp.Llama whose activations are turned as it runs.

It stands on three classes, each of which is a llama_cpp.Llama: hooked_llama.py has the hook, cached_llama.py the cache,
answering_llama.py the answer and its gates.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_steer.architectures import architecture
from edge_steer.errors import NoEffectError, SteerError
from edge_steer.gate import Gate
from edge_steer.model_file import read_model
from edge_steer.runtime.answering_llama import AnsweringLlama
from edge_steer.runtime.arguments import NO_EMBEDDINGS, check_arguments
from edge_steer.runtime.cache import Scope
from edge_steer.runtime.cached_llama import Cancelled as Cancelled
from edge_steer.runtime.dials import (
    FILE_DEFAULT,
    Dials,
    FileDefault,
    SteeringLike,
    first_dials,
    load_steerings,
    warn_of_overlap,
)
from edge_steer.runtime.engines import EngineName
from edge_steer.runtime.gates_by_name import Gates, first_gates
from edge_steer.runtime.hook import Record
from edge_steer.runtime.hooked_llama import Closed, Message
from edge_steer.runtime.measuring import map_logits, read_logits, record_activations, record_each
from edge_steer.runtime.reading import Float32, prompt_tokens, read_tokens
from edge_steer.runtime.self_check import check_graph_path

T = TypeVar("T")


class SteeredLlama(AnsweringLlama):
    """A llama_cpp.Llama with steerings.

    steering: one or several, as values or paths; they apply in the order given. None: those that the model's file
              embeds, if any; () is none.
    angle:    the dial of the one steering; None is off; left out, the file's default, or off where it has none.
    angles:   the dials by name, where there are several.
    scope:    "all": every token is steered; "response": the last prompt token and everything after it.
    gates:    when each steering acts in an answer, by name, such as {"happy": "@after-thinking@first:50"}; None, or
              "@all", is always. Left out, what its file says.
    engine:   "hook": the native callback; "lora": llama.cpp's adapters, for linear operators; "auto": the hook,
              unless every layer is on a GPU and the operators are linear.
    template: a chat template in place of the model's: Jinja text, or the name of one of llama.cpp's.
    sequences: how many texts `map_logits` and `observe_each` may evaluate together.
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
        gates: Mapping[str, Gate | str | None] | None = None,
        engine: EngineName = "auto",
        rpc: Sequence[str] = (),
        template: str | None = None,
        sequences: int = 1,
        **llama: Any,
    ) -> None:
        file = read_model(model_path)
        check_arguments(file, llama)
        arch = architecture(file.architecture, (tensor.name for tensor in file.tensors))
        sites = arch.sites(file.block_count, ",".join(arch.kinds))
        embedded = model_path if file.embeds_steerings else ()
        steerings = load_steerings(embedded if steering is None else steering)
        for each in steerings:
            if warning := each.check_fits(file.base):
                warnings.warn(warning, stacklevel=2)
            if unknown := [site for site in each.steered if site not in sites]:
                raise NoEffectError(f"steering {each.name!r} acts at {unknown[0]}, which {file.architecture} lacks")
        warn_of_overlap(steerings)
        dials, first = first_dials(steerings, angle, angles), first_gates(steerings, gates)
        super().__init__(
            model_path, file, arch, steerings, dials, engine=engine, scope=scope, rpc=rpc, template=template,
            sequences=sequences, **llama,
        )  # fmt: skip
        self._gates.set(first)
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
    def gates(self) -> Gates:
        """The gates by name: `llm.gates["happy"] = "@response"`. A new one acts from the next answer on."""
        return self._gates

    @gates.setter
    def gates(self, values: Mapping[str, Gate | str | None]) -> None:
        self._gates.set(values)

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
            "gates": dict(self._gates),
            "engine": self.engine,
            "rpc": self._rpc,
            "template": self._template,
            "sequences": self._sequences,
        }
        if self._chose_chat_format:  # a closure, and chosen again when it is made again
            own |= {"chat_format": None, "chat_handler": None}
        return {**super().__getstate__(), **own}

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

    def map_logits(
        self, texts: Sequence[tuple[Sequence[int], int]], of: Callable[[int, NDArray[np.float32]], T]
    ) -> list[T]:
        """`of` each text's number and its `logits`; a text is its tokens and start. Many short ones at once are quicker
        than one by one, where the model was made with `sequences`."""
        with self.without_answer():
            return map_logits(self, texts, of)

    def observe_each(self, prompts: Sequence[Sequence[int]]) -> Generator[Record]:
        """What `observe` records of each prompt, unsteered and in order: a Record for every few of them, its `rows` (S,
        R, d) those of R prompts. As quick as `map_logits`. Close it where it is left before its end."""
        with self.without_answer():
            yield from record_each(self, prompts)

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

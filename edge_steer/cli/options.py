"""Options that several verbs share, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edge_steer.cli.numbers import COUNT, GPU_LAYERS, SEED, THREADS, FiniteRange

if TYPE_CHECKING:
    from edge_steer.runtime.answer import Sampling
    from edge_steer.runtime.cache import Scope
    from edge_steer.runtime.engines import EngineName
    from edge_steer.steering import Steering

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class SteeringOptions:
    """What the options say of steerings: which, where their dials stand, how they are applied."""

    steering: tuple[str, ...] = ()
    angle: float | None = None
    strength: float | None = None
    scope: Scope = "all"
    engine: EngineName = "auto"

    @property
    def names_gates(self) -> bool:
        """Whether they say when a steering acts."""
        from edge_steer.runtime.dials import split_argument

        return any(split_argument(each)[2] is not None for each in self.steering)

    @property
    def names_dials(self) -> bool:
        """Whether they say where a dial stands."""
        from edge_steer.runtime.dials import split_argument

        given = any(split_argument(each)[1] is not None for each in self.steering)
        return given or self.angle is not None or self.strength is not None


@dataclass(frozen=True)
class RunOptions:
    """What the options say of how a model runs."""

    ctx: int | None = None
    gpu_layers: int = 0
    threads: int | None = None
    seed: int = 0
    chat_template: str | None = None
    rpc: tuple[str, ...] = ()


@dataclass(frozen=True)
class SamplingOptions:
    """What the options say of how tokens are chosen."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repeat_penalty: float

    def with_seed(self, seed: int) -> Sampling:
        """The parameters of an answer."""
        from edge_steer.runtime.answer import Sampling

        return Sampling(**asdict(self), seed=seed)


def _gather(name: str, made: type, *options: Callable[[F], F]) -> Callable[[F], F]:
    """These options, handed to a verb as one argument `name`: a `made` of those that the verb has."""
    own = {field.name for field in fields(made)}

    def decorate(function: F) -> F:
        @wraps(function)
        def gathering(**given: Any) -> Any:
            taken = {option: given.pop(option) for option in own & set(given)}
            return function(**given, **{name: made(**taken)})

        result: Any = gathering
        for option in reversed(options):
            result = option(result)
        return result  # type: ignore[no-any-return]

    return decorate


model_option = click.option(
    "-m", "--model", required=True, metavar="MODEL", help="A .gguf file or a name from `edge-steer models`."
)

steering_options = _gather(
    "steered", SteeringOptions,
    click.option(
        "-s", "--steering", multiple=True, metavar="FILE[:ANGLE][@GATE]",
        help="A steering, with its angle and when it acts, as happy.gguf:8@response: a file, PACK.zip/NAME, "
        "hub:USER/REPO/NAME, or the NAME of a measured one; repeats.",
    ),
    click.option("--angle", type=float, help="Angle in degrees (the coefficient for addition), for the one steering."),
    click.option(
        "--strength", type=FiniteRange(-1, 1), help="Share of the stored range, instead of an angle."
    ),
    click.option(
        "--scope", type=click.Choice(["all", "response"]), default="all", show_default=True,
        help="Steer every token, or the answer only.",
    ),
    click.option(
        "--engine", type=click.Choice(["auto", "hook", "lora"]), default="auto", show_default=True,
        help="Native callback or llama.cpp's adapters; auto is the hook, unless all layers are on a GPU.",
    ),
)  # fmt: skip

run_options = _gather(
    "run",
    RunOptions,
    click.option(
        "-c",
        "--ctx",
        type=click.IntRange(1),
        help="Context in tokens, in steps of 256.  [default: 4096, or the model's]",
    ),
    click.option(
        "-ngl", "--gpu-layers", type=GPU_LAYERS, default=0, show_default=True, help="Layers on a GPU; -1 for all."
    ),
    click.option("-t", "--threads", type=THREADS, help="Threads.  [default: llama-cpp-python's]"),
    click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of all that is random."),
    click.option(
        "--chat-template",
        metavar="FILE|NAME",
        help="Chat template in place of the model's: a Jinja file, or one of llama.cpp's by name, such as chatml.",
    ),
)

rpc_option = click.option(
    "--rpc", multiple=True, metavar="HOST:PORT", help="Put --gpu-layers, or all, on a llama.cpp RPC server; repeats."
)

sampling_options = _gather(
    "sampling",
    SamplingOptions,
    click.option("-n", "--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest answer."),
    click.option(
        "--temp",
        "--temperature",
        "temperature",
        type=FiniteRange(0),
        default=0.0,
        show_default=True,
        help="0 is greedy.",
    ),
    click.option("--top-p", type=FiniteRange(0, 1), default=0.95, show_default=True),
    click.option("--top-k", type=COUNT, default=40, show_default=True),
    click.option("--min-p", type=FiniteRange(0, 1), default=0.05, show_default=True),
    click.option("--repeat-penalty", type=FiniteRange(0, min_open=True), default=1.1, show_default=True),
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
force_option = click.option("--force", is_flag=True, help="Overwrite an existing output.")


def note_gates(steerings: Sequence[Steering], where: str) -> None:
    """Say of gated steerings that their gates do not act."""
    for each in steerings:
        if each.gate:
            note(f"the gate {each.gate} of {each.name!r} does not act in {where}")


def note(text: str) -> None:
    """A line beside the output, on standard error."""
    click.echo(f"note: {text}", err=True)


def note_plain_template(plain: bool) -> None:
    """Say that a model brings no chat template."""
    from edge_steer.chat_template import PLAIN_TEMPLATE_NOTE

    if plain:
        note(PLAIN_TEMPLATE_NOTE)

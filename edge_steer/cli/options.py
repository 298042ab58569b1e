"""Options that several verbs share, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from edge_steer.cli.numbers import COUNT, GPU_LAYERS, SEED, THREADS, FiniteRange

if TYPE_CHECKING:
    from edge_steer.runtime.answer import Sampling
    from edge_steer.runtime.cache import Scope
    from edge_steer.runtime.engines import EngineName
    from edge_steer.runtime.llama import SteeredLlama
    from edge_steer.steering import Steering

F = TypeVar("F", bound=Callable[..., Any])


def _all(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


model_option = click.option(
    "-m", "--model", required=True, metavar="MODEL", help="A .gguf file or a name from `edge-steer models`."
)

steering_options = _all(
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

run_options = _all(
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

sampling_options = _all(
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


def run_parameters(
    model: str,
    *,
    ctx: int | None,
    gpu_layers: int,
    threads: int | None,
    seed: int,
    chat_template: str | None = None,
    rpc: Sequence[str] = (),
) -> tuple[str, dict[str, Any]]:
    """The path of a model, fetched if need be, and the parameters of SteeredLlama that the run options stand for."""
    from edge_steer.cli.abort import tell_of_aborts
    from edge_steer.cli.progress import fetching
    from edge_steer.errors import SteerError
    from edge_steer.fetch import resolve
    from edge_steer.model_file import read_model

    if rpc:
        from edge_steer.runtime.rpc import parse_endpoint

        for server in rpc:  # before a model is fetched
            parse_endpoint(server)
    with fetching(model) as progress:
        path = resolve(model, fetch=True, progress=progress)
    if path.is_dir():
        raise SteerError(f"{path}: expected a .gguf file, got a Hugging Face directory; convert it to GGUF first")
    trained = read_model(path).context_length
    if ctx is not None and ctx > trained:
        raise SteerError(f"expected --ctx of at most {trained}, what the model was trained for, got {ctx}")
    _keep_warnings_quiet()
    tell_of_aborts()
    return str(path), {
        # llama.cpp rounds it up itself, llama-cpp-python's own arrays do not.
        "n_ctx": -(-(ctx or min(4096, trained)) // 256) * 256,
        "n_gpu_layers": gpu_layers or (-1 if rpc else 0),
        "n_threads": threads,
        "n_threads_batch": threads,
        "seed": seed,
        **({"rpc": tuple(rpc)} if rpc else {}),
        **({"template": _template(chat_template)} if chat_template else {}),
    }


def _template(given: str) -> str:
    """The text of a template's file, or the name of one of llama.cpp's."""
    from pathlib import Path

    from edge_steer.chat_template import ChatTemplate
    from edge_steer.prompt_files import read_text

    if Path(given).is_file():
        return read_text(Path(given))
    ChatTemplate.builtin(given, "")  # refuses an unknown name before a model is loaded
    return given


def _keep_warnings_quiet() -> None:
    """llama-cpp-python takes level 3 for an error, which to llama.cpp is a warning, and prints it over an answer."""
    import logging

    from llama_cpp import _logger

    _logger.GGML_LOG_LEVEL_TO_LOGGING_LEVEL[3] = logging.WARNING


def open_model(
    model: str,
    steering: Sequence[str],
    *,
    angle: float | None,
    strength: float | None,
    scope: str,
    engine: str,
    may_be_off: bool = False,
    **run: Any,
) -> SteeredLlama:
    """The model that the options name, steered as they say; without -s, by the steerings that its file embeds.

    may_be_off: a steering that has no angle is off; else it is an error.
    """
    from edge_steer.model_file import read_model
    from edge_steer.runtime.dials import named_steerings

    if angle is not None and strength is not None:
        raise click.UsageError("expected --angle or --strength, got both")
    if steering:  # before a model is fetched
        steerings, dials = named_steerings(steering, angle=angle, strength=strength, may_be_off=may_be_off, model=model)
    path, parameters = run_parameters(model, **run)
    if not steering:
        embedded = [path] if read_model(path).embeds_steerings else []
        if not embedded and (angle is not None or strength is not None):
            raise click.UsageError("--angle and --strength turn a steering; give one with -s FILE")
        steerings, dials = named_steerings(embedded, angle=angle, strength=strength, may_be_off=may_be_off)
    from edge_steer.runtime.llama import SteeredLlama

    llm = SteeredLlama(
        path,
        steering=steerings,
        angles=dials,
        scope=cast("Scope", scope),
        engine=cast("EngineName", engine),
        **parameters,
    )
    note_plain_template(llm.chat_template.is_plain)
    return llm


def names_angles(steering: Sequence[str], angle: float | None, strength: float | None) -> bool:
    """Whether the steering options say where a dial stands."""
    from edge_steer.runtime.dials import split_argument

    return angle is not None or strength is not None or any(split_argument(each)[1] is not None for each in steering)


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


def sampling(
    *, max_tokens: int, temperature: float, top_p: float, top_k: int, min_p: float, repeat_penalty: float, seed: int
) -> Sampling:
    """The sampling options as one value."""
    from edge_steer.runtime.answer import Sampling

    return Sampling(temperature, top_p, top_k, min_p, repeat_penalty, max_tokens, seed)

"""From the options of a verb to its model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edge_steer.cli.options import RunOptions, SteeringOptions, note_plain_template

if TYPE_CHECKING:
    from edge_steer.runtime.llama import SteeredLlama


def run_parameters(model: str, run: RunOptions) -> tuple[str, dict[str, Any]]:
    """The path of a model, fetched if need be, and the parameters of SteeredLlama that the run options stand for."""
    from edge_steer.cli.abort import tell_of_aborts
    from edge_steer.cli.progress import fetching
    from edge_steer.errors import SteerError
    from edge_steer.fetch import resolve
    from edge_steer.model_file import read_model

    if run.rpc:
        from edge_steer.runtime.rpc import parse_endpoint

        for server in run.rpc:  # before a model is fetched
            parse_endpoint(server)
    with fetching(model) as progress:
        path = resolve(model, fetch=True, progress=progress)
    if path.is_dir():
        raise SteerError(f"{path}: expected a .gguf file, got a Hugging Face directory; convert it to GGUF first")
    trained = read_model(path).context_length
    if run.ctx is not None and run.ctx > trained:
        raise SteerError(f"expected --ctx of at most {trained}, what the model was trained for, got {run.ctx}")
    _keep_warnings_quiet()
    tell_of_aborts()
    return str(path), {
        # llama.cpp rounds it up itself, llama-cpp-python's own arrays do not.
        "n_ctx": -(-(run.ctx or min(4096, trained)) // 256) * 256,
        "n_gpu_layers": run.gpu_layers or (-1 if run.rpc else 0),
        "n_threads": run.threads,
        "n_threads_batch": run.threads,
        "seed": run.seed,
        **({"rpc": run.rpc} if run.rpc else {}),
        **({"template": _template(run.chat_template)} if run.chat_template else {}),
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


def open_model(model: str, steered: SteeringOptions, run: RunOptions, *, may_be_off: bool = False) -> SteeredLlama:
    """The model that the options name, steered as they say; without -s, by the steerings that its file embeds.

    may_be_off: a steering that has no angle is off; else it is an error.
    """
    from edge_steer.model_file import read_model
    from edge_steer.runtime.dials import named_steerings

    at: dict[str, Any] = {"angle": steered.angle, "strength": steered.strength}
    if steered.angle is not None and steered.strength is not None:
        raise click.UsageError("expected --angle or --strength, got both")
    if steered.steering:  # before a model is fetched
        steerings, dials = named_steerings(steered.steering, **at, may_be_off=may_be_off, model=model)
    path, parameters = run_parameters(model, run)
    if not steered.steering:
        embedded = [path] if read_model(path).embeds_steerings else []
        if not embedded and set(at.values()) != {None}:
            raise click.UsageError("--angle and --strength turn a steering; give one with -s FILE")
        steerings, dials = named_steerings(embedded, **at, may_be_off=may_be_off)
    from edge_steer.runtime.llama import SteeredLlama

    llm = SteeredLlama(path, steering=steerings, angles=dials, scope=steered.scope, engine=steered.engine, **parameters)
    note_plain_template(llm.chat_template.is_plain)
    return llm

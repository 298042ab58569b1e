"""`edge-steer chat`: a conversation in the terminal, with the dial live."""

from __future__ import annotations

from typing import Any

import click

from edge_steer.cli import options


@click.command()
@options.model_option
@options.steering_options
@click.option("--system", help="System prompt.")
@options.sampling_options
@options.run_options
@options.rpc_option
def chat(
    model: str,
    steering: tuple[str, ...],
    angle: float | None,
    strength: float | None,
    scope: str,
    engine: str,
    system: str | None,
    ctx: int | None,
    gpu_layers: int,
    threads: int | None,
    seed: int,
    chat_template: str | None,
    rpc: tuple[str, ...],
    **sampling: Any,
) -> None:
    """Chat in the terminal, with the dial live.

    Reads one question or command a line; /help lists the commands. Answers go to standard output, notes to standard
    error, so that it also works in a pipe.

    \b
    edge-steer chat -m smollm2-135m -s happy.gguf:8
    """
    import sys
    from contextlib import suppress
    from functools import partial

    from edge_steer.contrast import check_text
    from edge_steer.errors import SteerError
    from edge_steer.runtime.chat import Chat
    from edge_steer.runtime.repl import Repl

    if sys.stdin is None:
        raise SteerError("expected standard input to read from, got it closed")
    if system is not None:
        check_text("system", system)
    llm = options.open_model(
        model, steering, angle=angle, strength=strength, scope=scope, engine=engine,
        ctx=ctx, gpu_layers=gpu_layers, threads=threads, seed=seed, chat_template=chat_template, rpc=rpc,
    )  # fmt: skip
    note = partial(click.echo, err=True)
    interactive = sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty()

    def read() -> str:
        if interactive:
            try:
                return input(f"{repl.shown_dials()}> ")
            except EOFError:
                note("")
                raise
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removeprefix("\ufeff")  # the mark that some editors and shells put first

    repl = Repl(
        Chat(llm, options.sampling(seed=seed, **sampling), system, note=note),
        read, say=partial(click.echo, nl=False), note=note,
    )  # fmt: skip
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  line editing and history for input(), where the platform has it

        note("/help lists the commands")
    repl.run()

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
@click.option("--resume", metavar="FILE", help="Go on with a conversation that /save wrote, at its dials.")
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
    resume: str | None,
    **sampling: Any,
) -> None:
    """Chat in the terminal, with the dial live.

    Reads one question or command a line; /help lists the commands. Answers go to standard output, notes to standard
    error, so that it also works in a pipe.

    \b
    edge-steer chat -m smollm2-135m -s happy.gguf
    """
    import sys
    from contextlib import suppress
    from functools import partial
    from pathlib import Path

    from edge_steer.cli.readings import coloured, summary
    from edge_steer.errors import SteerError
    from edge_steer.prompts import check_text
    from edge_steer.runtime import rpc as rpc_servers
    from edge_steer.runtime import transcript
    from edge_steer.runtime.chat import Chat
    from edge_steer.runtime.repl import Repl

    if sys.stdin is None:
        raise SteerError("expected standard input to read from, got it closed")
    earlier = None if resume is None else transcript.read_transcript(Path(resume))
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

    conversation = Chat(llm, options.sampling(seed=seed, **sampling), system, note=note)
    if earlier:
        transcript.resume(conversation, earlier)
        if not options.names_angles(steering, angle, strength):
            llm.angles.update({name: dial for name, dial in earlier.angles.items() if name in llm.angles})
    rpc_servers.last_words.append(lambda: transcript.save_beside(conversation))
    repl = Repl(conversation, read, say=partial(click.echo, nl=False), note=note, show=coloured, sum_up=summary)
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  line editing and history for input(), where the platform has it

        note("/help lists the commands")
    repl.run()

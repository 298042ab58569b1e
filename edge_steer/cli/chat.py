"""`edge-steer chat`: a conversation in the terminal, with the dial live."""

from __future__ import annotations

import click

from edge_steer.cli import options
from edge_steer.cli.opening import open_model


@click.command()
@options.model_option
@options.steering_options
@click.option("--system", help="System prompt.")
@options.sampling_options
@options.run_options
@options.rpc_option
@click.option("--resume", metavar="FILE", help="Go on with a conversation that /save wrote, at its dials and gates.")
def chat(
    model: str,
    steered: options.SteeringOptions,
    run: options.RunOptions,
    sampling: options.SamplingOptions,
    system: str | None,
    resume: str | None,
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

    from edge_steer.cli.readings import colour_piece, summary
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
    llm = open_model(model, steered, run)
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

    conversation = Chat(llm, sampling.with_seed(run.seed), system, note=note)
    if earlier:
        transcript.resume(conversation, earlier)
        if not steered.names_dials:
            llm.angles.update({name: dial for name, dial in earlier.angles.items() if name in llm.angles})
        if not steered.names_gates:
            llm.gates.update({name: gate for name, gate in earlier.gates.items() if name in llm.gates})
    rpc_servers.last_words.append(lambda: transcript.save_beside(conversation))
    repl = Repl(conversation, read, say=partial(click.echo, nl=False), note=note, show=colour_piece, sum_up=summary)
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  line editing and history for input(), where the platform has it

        note("/help lists the commands")
    repl.run()

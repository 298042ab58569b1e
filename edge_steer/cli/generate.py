"""`edge-steer generate`: one answer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from edge_steer.cli import options
from edge_steer.cli.opening import open_model

if TYPE_CHECKING:
    from edge_steer.runtime.answer import Answer
    from edge_steer.runtime.llama import SteeredLlama


@click.command()
@options.model_option
@options.steering_options
@click.argument("text", required=False, metavar="[PROMPT]")
@click.option("-p", "--prompt", help="What to ask, as an option; - reads it from standard input.")
@click.option("--system", help="System prompt.")
@options.sampling_options
@options.run_options
@options.rpc_option
@click.option("--read", is_flag=True, help="Read every token: its colour says how far it lies toward the positive end.")
@click.option("--site", metavar="SITE", help="Read at this site, such as blk.12.attn_norm.  [default: the clearest]")
@options.json_option
def generate(
    model: str,
    steered: options.SteeringOptions,
    run: options.RunOptions,
    sampling: options.SamplingOptions,
    text: str | None,
    prompt: str | None,
    system: str | None,
    read: bool,
    site: str | None,
    as_json: bool,
) -> None:
    """Answer one prompt, steered.

    \b
    edge-steer generate -m smollm2-135m -s happy.gguf "How was your day?"
    """
    from dataclasses import replace

    from edge_steer.cli import readings
    from edge_steer.prompts import Prompt
    from edge_steer.runtime.chat import generate_answer, silent

    if (text is None) == (prompt is None):
        raise click.UsageError('expected one prompt, as in: edge-steer generate -m MODEL "How was your day?"')
    if site is not None and not read:
        raise click.UsageError("--site says where --read reads; give both")
    given = text if prompt is None else prompt
    asked = Prompt(standard_input() if given == "-" else str(given), system=system)
    llm = open_model(model, steered, run)
    how = sampling.with_seed(run.seed)
    if read:
        how = replace(how, read=readings.choose_sites(llm, site))
    if read and not as_json:
        click.echo(readings.legend(llm), err=True)
    say = silent if as_json else lambda piece: click.echo(readings.colour_piece(piece), nl=False)
    answer = generate_answer(llm, asked.messages(), how, say)
    if not answer.generated_tokens:
        options.note("the answer is empty: the model ended it with its first token")
    if as_json:
        click.echo(json.dumps(_record(llm, answer, read=read), ensure_ascii=False))
        return
    click.echo()
    if read:
        click.echo(readings.summary(answer), err=True)


def _record(llm: SteeredLlama, answer: Answer, *, read: bool) -> dict[str, Any]:
    from edge_steer.cli.readings import as_json

    # A file's default is a float32; its further digits are no one's.
    dials = {name: None if dial is None else round(dial, 4) for name, dial in llm.angles.items()}
    return {
        "text": answer.text,
        "angle": next(iter(dials.values())) if len(dials) == 1 else dials or None,
        "gates": {name: str(gate) for name, gate in llm.gates.items() if gate},
        "scope": llm.scope,
        "prompt_tokens": answer.prompt_tokens,
        "generated_tokens": answer.generated_tokens,
        "tokens_per_second": round(answer.tokens_per_second, 2),
        "sites_hit": llm.sites_hit,
        **({"readings": as_json(llm, answer)} if read else {}),
    }


def standard_input(what: str = "a prompt") -> str:
    """What stands on standard input. Raises SteerError if it is closed or no UTF-8."""
    import sys

    from edge_steer.errors import SteerError

    if sys.stdin is None:
        raise SteerError(f"expected {what} on standard input, got it closed; give a file or an option instead")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise SteerError("expected UTF-8 on standard input, got other bytes; convert it first") from None

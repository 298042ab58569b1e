"""`edge-steer generate`: one answer."""

from __future__ import annotations

import json
from typing import Any

import click

from edge_steer.cli import options


@click.command()
@options.model_option
@options.steering_options
@click.argument("text", required=False, metavar="[PROMPT]")
@click.option("-p", "--prompt", help="What to ask, as an option; - reads it from standard input.")
@click.option("--system", help="System prompt.")
@options.sampling_options
@options.run_options
@options.rpc_option
@options.json_option
def generate(
    model: str,
    steering: tuple[str, ...],
    angle: float | None,
    strength: float | None,
    scope: str,
    engine: str,
    text: str | None,
    prompt: str | None,
    system: str | None,
    as_json: bool,
    ctx: int | None,
    gpu_layers: int,
    threads: int | None,
    seed: int,
    chat_template: str | None,
    rpc: tuple[str, ...],
    **sampling: Any,
) -> None:
    """Answer one prompt, steered.

    \b
    edge-steer generate -m smollm2-135m -s happy.gguf "How was your day?"
    """
    from functools import partial

    from edge_steer.prompts import Prompt
    from edge_steer.runtime.chat import generate_answer, silent

    if (text is None) == (prompt is None):
        raise click.UsageError('expected one prompt, as in: edge-steer generate -m MODEL "How was your day?"')
    given = text if prompt is None else prompt
    asked = Prompt(_standard_input() if given == "-" else str(given), system=system)
    llm = options.open_model(
        model, steering, angle=angle, strength=strength, scope=scope, engine=engine,
        ctx=ctx, gpu_layers=gpu_layers, threads=threads, seed=seed, chat_template=chat_template, rpc=rpc,
    )  # fmt: skip
    say = silent if as_json else partial(click.echo, nl=False)
    answer = generate_answer(llm, asked.messages(), options.sampling(seed=seed, **sampling), say)
    if not answer.generated_tokens:
        options.note("the answer is empty: the model ended it with its first token")
    if not as_json:
        click.echo()
        return
    # A file's default is a float32; its further digits are no one's.
    dials = {name: None if dial is None else round(dial, 4) for name, dial in llm.angles.items()}
    found = {
        "text": answer.text,
        "angle": next(iter(dials.values())) if len(dials) == 1 else dials or None,
        "scope": scope,
        "prompt_tokens": answer.prompt_tokens,
        "generated_tokens": answer.generated_tokens,
        "tokens_per_second": round(answer.tokens_per_second, 2),
        "sites_hit": llm.sites_hit,
    }
    click.echo(json.dumps(found, ensure_ascii=False))


def _standard_input() -> str:
    import sys

    from edge_steer.errors import SteerError

    if sys.stdin is None:
        raise SteerError("expected a prompt on standard input, got it closed; give one with -p")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise SteerError("expected UTF-8 on standard input, got other bytes; convert it first") from None

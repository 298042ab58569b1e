"""`edge-steer read`: texts told apart by a steering's direction."""

from __future__ import annotations

import json
from typing import Any

import click

from edge_steer.cli import options
from edge_steer.cli.opening import open_model


@click.command()
@options.model_option
@click.option(
    "-s", "--steering", multiple=True, metavar="FILE[:ANGLE]", help="A steering file; off without an angle. Repeats."
)
@click.argument("file", metavar="FILE|-")
@click.option("--site", metavar="SITE", help="Read at this site, such as blk.12.attn_norm.  [default: the clearest]")
@click.option(
    "--score",
    type=click.Choice(["mean", "last"]),
    help="The mean over all tokens but the first, or the last token's reading.  [default: mean; with --chat last]",
)
@click.option("--chat", "as_chat", is_flag=True, help="Read each text as a user's question, as calibration does.")
@click.option("--tokens", "each_token", is_flag=True, help="With --json, also the reading of every token.")
@options.run_options
@options.rpc_option
@options.json_option
def read(
    model: str,
    steering: tuple[str, ...],
    file: str,
    site: str | None,
    score: str | None,
    as_chat: bool,
    each_token: bool,
    as_json: bool,
    run: options.RunOptions,
) -> None:
    """Tell how far each text lies toward a steering's positive end.

    FILE has a text a line; - is standard input. A reading of +1 is the mean of the positive prompts that the steering
    was calibrated on, -1 that of the negative ones.

    \b
    edge-steer read -m smollm2-135m -s happy.gguf texts.txt
    """
    from edge_steer.cli.readings import choose_sites

    if each_token and not as_json:
        raise click.UsageError("--tokens adds to --json; give both")
    texts = _lines(file)
    steered = options.SteeringOptions(steering)
    llm = open_model(model, steered, run, may_be_off=True)
    if not steered.names_dials:
        llm.angles.update(dict.fromkeys(llm.angles))
    names = choose_sites(llm, site)
    last = (score or ("last" if as_chat else "mean")) == "last"
    for text in texts:
        asked: Any = [{"role": "user", "content": text}] if as_chat else text
        found = llm.read(asked, names)
        # The first token is what all others lean on, whatever it is.
        scores = {name: float(each[-1] if last or len(each) == 1 else each[1:].mean()) for name, each in found.items()}
        if not as_json:
            shown = [f"{each:+.2f}" if len(scores) == 1 else f"{name} {each:+.2f}" for name, each in scores.items()]
            click.echo("\t".join([*shown, text]))
            continue
        record: dict[str, Any] = {"text": text, "readings": {name: round(each, 4) for name, each in scores.items()}}
        if each_token:
            record["tokens"] = {name: [round(float(value), 4) for value in each] for name, each in found.items()}
        click.echo(json.dumps(record, ensure_ascii=False))


def _lines(file: str) -> list[str]:
    """The texts of a file, a line each; blank lines are passed over."""
    from pathlib import Path

    from edge_steer.cli.generate import standard_input
    from edge_steer.errors import SteerError
    from edge_steer.prompt_files import read_text

    text = standard_input("texts") if file == "-" else read_text(Path(file))
    if not (found := [line.strip() for line in text.splitlines() if line.strip()]):
        raise SteerError(f"{file}: expected a text a line, got none")
    return found

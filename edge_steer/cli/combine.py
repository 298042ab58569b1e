"""`edge-steer combine`: one steering made of several."""

from __future__ import annotations

import click

from edge_steer.cli import options, outputs


@click.command()
@click.argument("expression")
@click.option(
    "-s",
    "--steering",
    multiple=True,
    required=True,
    metavar="[NAME=]FILE[:ANGLE]",
    help="A steering by its own name or by NAME, and the angle that a weight of 1 stands for; repeats.",
)
@click.option("-m", "--model", metavar="MODEL", help="Whose measured steerings are meant by a name without a file.")
@click.option("--name", help="Name of the result.  [default: that of the output]")
@click.option("-o", "--output", required=True, metavar="FILE", help="Steering file to write.")
@options.force_option
def combine(
    expression: str, steering: tuple[str, ...], model: str | None, name: str | None, output: str, force: bool
) -> None:
    """Make one steering of several: add them with weights, or take one out of another.

    \b
    a - 0.5*b   both, b at half its angle to the other side
    a ~ b       a, with b projected out
    a | b       the component of a along b
    ~ and | bind as * does; brackets group. Begin with 0 or a bracket where a minus would come first.

    \b
    edge-steer combine "0.3*honest - 0.2*verbose" -s honest.gguf -s verbose.gguf -o new.gguf
    edge-steer combine "(a ~ b) + 0.5*c" -s a=happy.gguf -s b=formal.gguf -s c=warm.gguf:2 -o new.gguf
    """
    from edge_steer.combining import combine as combine_steerings
    from edge_steer.combining.names import bind_names
    from edge_steer.runtime.dials import split_dial

    files = [split_dial(each.partition("=")[2] or each)[0] for each in steering]
    path = outputs.output_path(output, force, *files)
    steerings, dials = bind_names(steering, model)
    made = combine_steerings(expression, steerings, angles=dials, name=name or path.stem, note=options.note)
    made.save(path, force=force)
    unit = "" if made.operator == "addition" else "°"
    options.note(
        f"{made.name}: {len(made.sites)} sites, {made.angle:+.3g}{unit} as written; no range yet, "
        f"`edge-steer sweep -m MODEL -s {path} --write` measures one"
    )
    click.echo(path)

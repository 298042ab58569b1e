"""`edge-steer convert`: a Hugging Face directory to GGUF, quantized, with a steering baked in."""

from __future__ import annotations

import click

from edge_steer.cli import options, outputs
from edge_steer.cli.numbers import THREADS


@click.command()
@click.argument("directory", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="GGUF file to write.")
@click.option(
    "--type",
    "kind",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    help="Type of the weights, or of those that --quantize reads.  [default: bf16 from bf16, else f16]",
)
@click.option("--quantize", metavar="TYPE", help="Q4_K_M or any other type of llama.cpp's quantizer.")
@click.option("--pre", metavar="NAME", help="llama.cpp's name for the pre-tokenizer, where it is not recognised.")
@click.option(
    "--allow-other-tokens",
    is_flag=True,
    help="Go on where llama.cpp splits some texts otherwise than the tokenizer; they are told.",
)
@click.option("-s", "--steering", multiple=True, metavar="FILE[:ANGLE]", help="A steering to bake in; repeats.")
@click.option("--embed", is_flag=True, help="Put the steering beside the weights instead, for `chat -m` to turn.")
@click.option("--threads", type=THREADS, help="Threads of the quantizer.  [default: all]")
@options.force_option
def convert(
    directory: str,
    output: str,
    kind: str | None,
    quantize: str | None,
    pre: str | None,
    allow_other_tokens: bool,
    steering: tuple[str, ...],
    embed: bool,
    threads: int | None,
    force: bool,
) -> None:
    """Convert a Hugging Face directory to a GGUF file.

    \b
    edge-steer convert SmolLM2-135M-Instruct/ -o smollm2.gguf --quantize Q4_K_M
    edge-steer convert SmolLM2-135M-Instruct/ -o happy.gguf --quantize Q4_K_M -s happy.steer.gguf:8
    """
    from pathlib import Path

    from edge_steer.cli.progress import bar
    from edge_steer.converters.baking import baking
    from edge_steer.converters.source import read
    from edge_steer.converters.write import write
    from edge_steer.errors import SteerError
    from edge_steer.runtime.dials import named_steerings, split_argument

    if embed and not steering:
        raise click.UsageError("--embed puts a steering into the file; give one with -s FILE")
    target = Path(output)
    if target.exists() and not force:
        raise SteerError(f"{target} exists; give --force to overwrite it, or another -o")
    outputs.check_not_an_input([target], *(split_argument(each)[0] for each in steering), *Path(directory).glob("*"))
    steerings, dials = named_steerings(steering)
    if not embed:
        options.note_gates(steerings, "what is written: it acts on every token")
    source = read(directory, pre=pre)
    dialled = [(each, dials[each.name]) for each in steerings]
    source, changes = (source, None) if embed else baking(source, dialled)
    write(
        source, target, type=kind, quantize=quantize, threads=threads, force=force, progress=bar,
        changes=changes, allow_other_tokens=allow_other_tokens,
        embed=[each.with_(angle=dial) if dial is not None else each for each, dial in dialled] if embed else (),
    )  # fmt: skip
    how = quantize or kind or source.type
    what = ", ".join(f"{each.name} at {dial:g}" for each, dial in dialled if dial is not None)
    click.echo(
        f"{target}: {source.family.arch}, {len(source.weights)} tensors as {how.upper()}, "
        f"{target.stat().st_size / 1e6:.1f} MB, tokenizer {source.vocabulary.pre}"
        + (f"; {'embedded' if embed else 'baked in'}: {what}" if what else ""),
        err=True,
    )
    click.echo(target)

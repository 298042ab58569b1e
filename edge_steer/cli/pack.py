"""`edge-steer pack`: steerings with a card, to share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edge_steer.cli import options, outputs

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("files", metavar="FILE|FOLDER...", nargs=-1, required=True)
@click.option("--licence", metavar="TEXT", help="Under what others may use them; what the model's licence allows.")
@click.option(
    "--results", metavar="FILE", help="JSON for the card: an object of what was measured, by the steerings' names."
)
@click.option("-o", "--output", required=True, metavar="PACK", help="A .zip to write, or a folder to upload.")
@options.force_option
def pack(files: tuple[str, ...], licence: str | None, results: str | None, output: str, force: bool) -> None:
    """Put steerings for one model into a pack: a .zip or a folder, with a card and a README.

    A pack is used as it is, from a file or from the Hugging Face hub.

    \b
    edge-steer pack happy.gguf formal.gguf --licence Apache-2.0 -o tones.zip
    edge-steer chat -m MODEL -s tones.zip/happy
    edge-steer pack steerings/ -o tones && hf upload USER/tones tones
    edge-steer chat -m MODEL -s hub:USER/tones/happy
    """
    from pathlib import Path

    from edge_steer.json_file import read_json
    from edge_steer.sharing.pack import write_pack
    from edge_steer.steering import Steering

    path = Path(output)
    sources = [file for each in files for file in _steering_files(Path(each))]
    if path.suffix.lower() == ".zip":
        path = outputs.output_path(output, force, *sources)
    found: dict[str, Any] = {} if results is None else read_json(Path(results))
    steerings = [each for file in sources for each in Steering.load_all(file)]
    write_pack(steerings, path, licence=licence, results=found, sources=sources, force=force)
    options.note(f"{len(steerings)} steerings for {steerings[0].base.name or steerings[0].base.architecture}")
    click.echo(path)


def _steering_files(given: Path) -> list[Path]:
    from edge_steer.errors import SteerError

    if not given.is_dir():
        return [given]
    found = sorted(given.glob("*.gguf"))
    if not found:
        raise SteerError(f"expected steering files in {given}, got no .gguf; give another folder")
    return found

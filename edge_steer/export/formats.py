"""The formats that a steering is exported in: one table, which the command line offers and follows.

Writers are imported where they are used: `--help` needs the names only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_steer.export.progress import Progress

if TYPE_CHECKING:
    from edge_steer.export.baked import Baked
    from edge_steer.steering import Steering

Written = tuple[list[Path], str]  # the paths, and a line that says what they are


@dataclass(frozen=True)
class ExportJob:
    """What is written, and where. steerings: with the dials that were given, None for a steering without one.

    model: a GGUF or a Hugging Face directory. steered_type: of baked quantized weights, None for their own.
    """

    model: Path
    output: Path
    steerings: Sequence[tuple[Steering, float | None]]
    steered_type: str | None
    force: bool
    progress: Progress

    @property
    def is_pair(self) -> bool:
        """Whether `lora` is a pair of adapters that serves every angle: one steering, at no dial."""
        return len(self.steerings) == 1 and self.steerings[0][1] is None and self.steerings[0][0].operator != "ablation"

    @property
    def at_dials(self) -> list[tuple[Steering, float | None]]:
        """The steerings at the dials given, or at their own default ones."""
        return [(each, each.default_dial() if dial is None else dial) for each, dial in self.steerings]


@dataclass(frozen=True)
class ExportFormat:
    """write: writes a job. reads_folder: from a Hugging Face directory, not from a GGUF. writes_folder: replaced as a
    whole. endings: of the files written beside each other, in place of `.gguf`; none for the output as it is named.
    pair_endings: of those that a pair of adapters is.
    """

    write: Callable[[ExportJob], Written]
    reads_folder: bool = False
    writes_folder: bool = False
    endings: tuple[str, ...] = ()
    pair_endings: tuple[str, ...] = ()

    def replaced_files(self, job: ExportJob) -> list[Path]:
        """The files that an export may replace."""
        if self.writes_folder:
            return [each for each in job.output.rglob("*") if each.is_file()]
        stem = str(job.output).removesuffix(".gguf")
        endings = self.pair_endings if job.is_pair else self.endings
        return [Path(f"{stem}{ending}") for ending in endings] or [job.output]


def _write_lora(job: ExportJob) -> Written:
    from edge_steer.export.lora import export_adapter, export_pair

    steering, _ = job.steerings[0]
    if job.is_pair:
        pair = export_pair(job.model, job.output, steering, force=job.force, progress=job.progress)
        return pair, f"{pair[0]}, {pair[1]}: {steering.name} at any angle for {job.model.name}; {pair[2].name} says how"
    dialled = job.at_dials
    one = export_adapter(job.model, job.output, dialled, force=job.force, progress=job.progress)
    return one, f"{one[0]}: {_names(dialled)} as one adapter for {job.model.name}, for scale 1"


def _write_peft(job: ExportJob) -> Written:
    from edge_steer.export.peft import export_peft

    dialled = job.at_dials
    path = export_peft(job.model, job.output, dialled, force=job.force, progress=job.progress)
    return [path], f"{path}: {_names(dialled)} as a PEFT adapter for {job.model.name}"


def _write_control_vector(job: ExportJob) -> Written:
    from edge_steer.export.control_vector import control_vector

    dialled = job.at_dials
    path = control_vector(job.model, job.output, dialled, force=job.force)
    return [path], f"{path}: {_names(dialled)} as a control vector for {job.model.name}, for scale 1"


def _write_gguf(job: ExportJob) -> Written:
    from edge_steer.export.baked import bake_gguf

    dialled = job.at_dials
    baked = bake_gguf(
        job.model, job.output, dialled, steered_type=job.steered_type, force=job.force, progress=job.progress
    )
    return [baked.path], _describe_baked(baked, _names(dialled))


def _write_hf(job: ExportJob) -> Written:
    from edge_steer.export.hf import bake_hf

    dialled = job.at_dials
    baked = bake_hf(job.model, job.output, dialled, force=job.force, progress=job.progress)
    return [baked.path], _describe_baked(baked, _names(dialled))


def _write_embedded(job: ExportJob) -> Written:
    from edge_steer.export.embedded import embed

    path = embed(job.model, job.output, job.steerings, force=job.force, progress=job.progress)
    return [path], f"{path}: {job.model.name} with {_names(job.steerings)} in its metadata"


def _names(steerings: Sequence[tuple[Steering, float | None]]) -> str:
    return ", ".join(f"{each.name}:{dial:g}" if dial is not None else each.name for each, dial in steerings)


def _describe_baked(baked: Baked, names: str) -> str:
    rounding = ", ".join(f"{kind} {error:.1e}" for kind, error in baked.rounding.items() if error)
    untied = ", the head, which was the embedding, now a weight of its own" if baked.untied else ""
    rounded = f"; relative rounding: {rounding}" if rounding else ""
    return f"{baked.path}: {names} in {baked.weights} weights{untied}{rounded}"


FORMATS = {
    "lora": ExportFormat(_write_lora, endings=(".gguf", ".Modelfile"), pair_endings=("-cos.gguf", "-sin.gguf", ".md")),
    "peft": ExportFormat(_write_peft, reads_folder=True, writes_folder=True),
    "control-vector": ExportFormat(_write_control_vector),
    "gguf": ExportFormat(_write_gguf),
    "hf": ExportFormat(_write_hf, reads_folder=True, writes_folder=True),
    "embedded": ExportFormat(_write_embedded),
}

"""Steerings folded into a GGUF's weights: tensors that the folding changes are written anew, all else byte for byte.

A quantized weight is written back in its own type by llama.cpp's quantizer, which rounds it a second time; the report
says by how much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edge_steer import tensor_types
from edge_steer.errors import SteerError
from edge_steer.export.changes import Changes
from edge_steer.export.folding import EMBEDDING, HEAD, fold_gguf
from edge_steer.export.gguf_bytes import change_types, copy_bytes, head, map_model, size_of
from edge_steer.export.progress import Progress, no_progress
from edge_steer.export.readers import Dialled, linear_actions
from edge_steer.gguf_tensors import TensorInfo
from edge_steer.model_file import read_model
from edge_steer.whole_file import whole_file


@dataclass(frozen=True)
class Baked:
    """What was written: how many weights were turned, and by type what rounding them cost, ‖W″ − W′‖ / ‖W′‖.

    untied: the head was the embedding, and is a weight of its own now.
    """

    path: Path
    weights: int
    rounding: dict[str, float]
    untied: bool = False


def bake_gguf(
    model_path: str | Path,
    out: str | Path,
    steerings: Sequence[Dialled],
    *,
    steered_type: str | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Baked:
    """Write the GGUF `model_path` with the steerings folded in to `out`, whole or not at all.

    Metadata and tensors that do not change are copied byte for byte. Steered ones keep their type, or take
    `steered_type` where theirs is a quantized one.
    Raises SteerError if the steerings cannot be exact in these weights, before anything is written.
    """
    model, out = read_model(model_path), Path(out)
    on, actions = linear_actions(steerings)
    source = map_model(model)
    changes = Changes(fold_gguf(on, source), actions, source.vector)
    untied = changes.folding.untied
    before = {tensor.name: tensor for tensor in model.tensors}
    if untied:
        before[HEAD] = replace(before[EMBEDDING], name=HEAD)
    wanted = None if steered_type is None else tensor_types.type_number(steered_type)
    kinds = {name: _target(before[name], wanted) for name in changes.folding.parts}
    for name, kind in kinds.items():
        tensor_types.check_writable(kind, before[name].shape[0], name)
    check_not_source(model_path, out)
    changed = untied or any(before[name].type != kind for name, kind in kinds.items())
    tensors = change_types(source, kinds, [before[HEAD]] if untied else []) if changed else list(model.tensors)

    rounding: dict[str, list[float]] = {}
    with whole_file(out, force=force) as part, part.open("wb") as file, progress("rotating", len(changes)) as step:
        start = file.write(head(source, tensors))
        for tensor in sorted(tensors, key=lambda each: each.offset):
            file.write(bytes(start + tensor.offset - file.tell()))
            old = before[tensor.name]
            if tensor.name in changes:
                sums = rounding.setdefault(tensor_types.type_name(tensor.type), [0.0, 0.0])
                rows = changes.rows(tensor.name, partial(source.blocks, old))
                _write_rows(rows, tensor.type, file, sums)
                step(1)
            else:
                copy_bytes(source.bytes_of(old), file)
        file.write(bytes(-file.tell() % source.alignment))
    lost = {kind: math.sqrt(error / max(size, 1e-300)) for kind, (error, size) in sorted(rounding.items())}
    return Baked(out, len(changes.folding.weights), lost, untied)


def _target(tensor: TensorInfo, wanted: int | None) -> int:
    size_of(tensor)  # refuses a type that is not known
    return wanted if wanted is not None and tensor_types.is_quantized(tensor.type) else tensor.type


def _write_rows(blocks: Iterator[NDArray[np.float32]], kind: int, file: BinaryIO, sums: list[float]) -> None:
    """Write rows as ggml type `kind`; adds ‖W″ − W′‖² and ‖W′‖² to `sums`."""
    for rows in blocks:
        written = tensor_types.from_float(kind, rows)
        sums[1] += float(np.vdot(rows, rows))
        lost = rows - tensor_types.to_float(kind, written, rows.shape[1])
        sums[0] += float(np.vdot(lost, lost))
        file.write(written.data)


def check_not_source(model: str | Path, out: Path) -> None:
    """Raise SteerError where the output would replace the model it is made from."""
    if out.exists() and out.samefile(model):
        raise SteerError(f"{out} is the model itself; give another -o")

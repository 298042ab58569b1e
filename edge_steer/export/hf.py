"""Steerings folded into a Hugging Face directory: each shard is copied, and the weights that read a steered site are
turned in place in the copy, some rows at a time, in their own type."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edge_steer.export.baked import Baked, weight_factors
from edge_steer.export.factors import Factor
from edge_steer.export.hf_weights import from_float32, read_checkpoint, to_float32
from edge_steer.export.progress import Progress, no_progress
from edge_steer.export.readers import Dialled, linear_actions
from edge_steer.export.whole_folder import whole_folder

_ROWS = 1 << 22  # values turned at once
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def bake_hf(
    folder: str | Path,
    out: str | Path,
    steerings: Sequence[Dialled],
    *,
    force: bool = False,
    progress: Progress = no_progress,
) -> Baked:
    """Write the Hugging Face directory `folder` with the steerings folded in to `out`, whole or not at all.

    Tokenizer, configuration and the index are copied; weights in any other form than safetensors are not.
    Raises SteerError where the steerings cannot be exact in these weights, before anything is written.
    """
    source, out = read_checkpoint(folder), Path(out)
    on, _ = linear_actions(steerings)
    factors = weight_factors(steerings, source.readers(on))
    shards = {tensor.shard for tensor in source.tensors.values()}
    with whole_folder(out, source.folder, force=force) as part, progress("rotating", len(factors)) as step:
        for each in sorted(source.folder.iterdir()):
            if each.is_file() and (each in shards or each.suffix not in _WEIGHTS):
                shutil.copyfile(each, part / each.name)
        for name, factor in factors.items():
            tensor = source.tensors[name]
            _turn(tensor.memory(part / tensor.shard.name, "r+"), factor)
            step(1)
    return Baked(out, len(factors), {})


def _turn(weight: NDArray[Any], factor: Factor) -> None:
    rows = weight.reshape(-1, weight.shape[-1])
    at_once = max(1, _ROWS // rows.shape[1])
    for first in range(0, len(rows), at_once):
        block = rows[first : first + at_once]
        block[:] = from_float32(factor.turn(to_float32(block)), block.dtype)

"""Steerings folded into a Hugging Face directory: each shard is copied, and the tensors that change are written anew in
the copy, some rows at a time, in their own type. A head that was the embedding becomes a tensor of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.checkpoint import CONFIG, INDEX, WHOLE
from edge_steer.export.baked import Baked
from edge_steer.export.changes import Changes
from edge_steer.export.folding import EMBEDDING, HEAD, Norm
from edge_steer.export.hf_weights import Checkpoint, read_checkpoint
from edge_steer.export.progress import Progress, no_progress
from edge_steer.export.readers import Dialled, linear_actions
from edge_steer.export.whole_folder import whole_folder
from edge_steer.json_file import read_json
from edge_steer.safetensors_file import Tensor, from_float32, new_safetensors, to_float32

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
    Raises SteerError if the steerings cannot be exact in these weights, before anything is written.
    """
    source, out = read_checkpoint(folder), Path(out)
    on, actions = linear_actions(steerings)
    changes = Changes(source.fold(on), actions, source.values, _rounding(source))
    changed = {tensor: name for tensor, name in source.names.items() if name in changes}
    untied = changes.folding.untied
    shards = {tensor.path for tensor in source.tensors.values()}
    with whole_folder(out, source.folder, force=force) as part, progress("rotating", len(changed) + untied) as step:
        for each in sorted(source.folder.iterdir()):
            if each.is_file() and (each in shards or each.suffix not in _WEIGHTS):
                shutil.copyfile(each, part / each.name)
        for tensor, name in changed.items():
            old = source.tensors[tensor]
            offset = source.norm_offset if isinstance(changes.folding.parts[name], Norm) else 0.0
            _write(old.memory(part / old.path.name, "r+"), changes, name, old, offset)
            step(1)
        if untied:
            _untie(part, source, changes)
            step(1)
        if HEAD in changes:
            _say_untied(part / CONFIG)
    return Baked(out, len(changes.folding.weights), {}, untied)


def _rounding(source: Checkpoint) -> Any:
    """A norm's weight as its type holds it, less and plus what is added to it."""
    norm = next((source.tensors[tensor] for tensor, name in source.names.items() if name == "output_norm.weight"), None)

    def rounded(gain: NDArray[np.float64]) -> NDArray[np.float64]:
        assert norm is not None
        dtype = norm.memory().dtype
        stored = from_float32((gain - source.norm_offset).astype(np.float32), dtype)
        return to_float32(stored).astype(np.float64) + source.norm_offset

    return rounded


def _write(to: NDArray[Any], changes: Changes, name: str, old: Tensor, offset: float = 0.0) -> None:
    """Write the new rows of `old` to `to`, which is a copy of it or as large."""
    flat = to.reshape(-1, to.shape[-1])
    done = 0
    for rows in changes.rows(name, old.rows):
        flat[done : done + len(rows)] = from_float32(rows - np.float32(offset), flat.dtype)
        done += len(rows)


def _untie(folder: Path, source: Checkpoint, changes: Changes) -> None:
    """Write the head, turned, into a shard of its own, and an index that names it."""
    embedding = next(source.tensors[tensor] for tensor, name in source.names.items() if name == EMBEDDING)
    name = f"{source.architecture.head}.weight"
    index = folder / INDEX
    if index.exists():
        written = read_json(index)
        file = "model-head.safetensors"
    else:
        first, file = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
        (folder / WHOLE).rename(folder / first)
        size = sum(each.stop - each.start for each in source.tensors.values())
        written = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(source.tensors, first)}
    head = new_safetensors(folder / file, name, embedding)
    _write(head, changes, HEAD, embedding)
    written["weight_map"][name] = file
    if isinstance(total := written.get("metadata", {}).get("total_size"), int):
        written["metadata"]["total_size"] = total + head.nbytes
    index.write_text(json.dumps(written, indent=2), encoding="utf-8")


def _say_untied(path: Path) -> None:
    config = read_json(path)
    for each in (config, config.get("text_config")):
        if isinstance(each, dict) and (each is config or "tie_word_embeddings" in each):
            each["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")

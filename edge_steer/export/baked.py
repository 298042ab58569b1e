"""Steerings folded into weights: W′ = W R(θ) in every weight that reads a steered site, all else byte for byte.

A quantized weight is written back in its own type by llama.cpp's quantizer, which rounds it a second time; the report
says by how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import SteerError
from edge_steer.export import ggml
from edge_steer.export.factors import Factor, factor_at
from edge_steer.export.gguf_bytes import Mapped, copy_bytes, head, map_model, retyped, size_of
from edge_steer.export.progress import Progress, no_progress
from edge_steer.export.readers import Dialled, check_model, linear_actions, steered_readers
from edge_steer.gguf_metadata import TensorInfo
from edge_steer.model_file import read_model
from edge_steer.sites import Architecture, Site, architecture
from edge_steer.whole_file import whole_file

Baker = Callable[[str, NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class Baked:
    """What was written: how many weights were turned, and by type what rounding them cost, ‖W″ − W′‖ / ‖W′‖."""

    path: Path
    weights: int
    rounding: dict[str, float]


def baker(steerings: Sequence[Dialled], architecture: Architecture, tensor_names: Collection[str]) -> Baker:
    """A function that turns a model's weights one by one: (GGUF name, W (…, d) float32) → W R float32.

    It returns those that read no steered site as they are. Several steerings act one after another.
    Raises SteerError where the steerings cannot be exact in these weights.
    """
    on, _ = linear_actions(steerings)
    factors = weight_factors(steerings, steered_readers(on, architecture, tensor_names))
    return lambda name, weight: factors[name].turn(weight) if name in factors else weight


def weight_factors(steerings: Sequence[Dialled], readers: dict[str, Site]) -> dict[str, Factor]:
    """The factor with which each weight of `readers` is turned."""
    on, actions = linear_actions(steerings)
    at = {site: factor_at(site, on, actions) for site in set(readers.values())}
    return {name: at[site] for name, site in readers.items()}


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

    Metadata and weights that read no steered site are copied byte for byte. Steered ones keep their type, or take
    `steered_type` where theirs is a quantized one.
    Raises SteerError where the steerings cannot be exact in these weights, before anything is written.
    """
    model, out = read_model(model_path), Path(out)
    arch = architecture(model.architecture, [tensor.name for tensor in model.tensors])
    on, _ = linear_actions(steerings)
    factors = weight_factors(steerings, check_model(on, model, arch))
    source = map_model(model)
    wanted = None if steered_type is None else ggml.type_number(steered_type)
    kinds = {tensor.name: _target(tensor, wanted) for tensor in model.tensors if tensor.name in factors}
    for name, kind in kinds.items():
        ggml.check_writable(kind, model.embedding_length, name)
    check_not_source(model_path, out)
    before = {tensor.name: tensor for tensor in model.tensors}
    changed = any(before[name].type != kind for name, kind in kinds.items())
    tensors = retyped(source, kinds) if changed else list(model.tensors)

    rounding: dict[str, list[float]] = {}
    with whole_file(out, force=force) as part, part.open("wb") as file, progress("rotating", len(factors)) as step:
        start = file.write(head(source, tensors))
        for tensor in sorted(tensors, key=lambda each: each.offset):
            file.write(bytes(start + tensor.offset - file.tell()))
            if factor := factors.get(tensor.name):
                sums = rounding.setdefault(ggml.type_name(tensor.type), [0.0, 0.0])
                _write_turned(source, before[tensor.name], tensor.type, factor, file, sums)
                step(1)
            else:
                copy_bytes(source.bytes_of(before[tensor.name]), file)
        file.write(bytes(-file.tell() % source.alignment))
    lost = {kind: math.sqrt(error / max(size, 1e-300)) for kind, (error, size) in sorted(rounding.items())}
    return Baked(out, len(factors), lost)


def _target(tensor: TensorInfo, wanted: int | None) -> int:
    size_of(tensor)  # refuses a type that is not known
    return wanted if wanted is not None and ggml.is_quantized(tensor.type) else tensor.type


def _write_turned(
    source: Mapped, tensor: TensorInfo, kind: int, factor: Factor, file: BinaryIO, sums: list[float]
) -> None:
    """Write a weight, turned, as ggml type `kind`; adds ‖W″ − W′‖² and ‖W′‖² to `sums`."""
    for rows in source.blocks(tensor):
        turned = factor.turn(rows)
        written = ggml.from_float(kind, turned)
        sums[1] += float(np.vdot(turned, turned))
        turned -= ggml.to_float(kind, written, turned.shape[1])
        sums[0] += float(np.vdot(turned, turned))
        file.write(written.data)


def check_not_source(model: str | Path, out: Path) -> None:
    """Raise SteerError where the output would replace the model it is made from."""
    if out.exists() and out.samefile(model):
        raise SteerError(f"{out} is the model itself; give another -o")

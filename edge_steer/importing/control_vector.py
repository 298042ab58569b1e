"""Control vectors of llama.cpp and repeng: `addition` at `layer_out`, whose coefficient 1 is llama.cpp's scale 1.

llama.cpp adds `direction.N` to the output of block N, counted from 0, before the node `l_out-N` that the hook acts on;
block 0 has none.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from edge_steer._version import __version__
from edge_steer.architectures import ARCHITECTURES, MODEL_TYPES
from edge_steer.errors import FormatError, NoEffectError, SteerError, quote
from edge_steer.gguf_metadata import read_gguf
from edge_steer.gguf_tensors import TensorInfo
from edge_steer.importing.target import Target
from edge_steer.provenance import Made
from edge_steer.sites import Site
from edge_steer.steering import Steering

_TYPES = {int(GGMLQuantizationType.F32): "<f4", int(GGMLQuantizationType.F16): "<f2"}


def import_control_vector(source: Path, target: Target, name: str) -> Steering:
    """The control vector in the GGUF `source`, for the model `target`.

    Its vectors have lengths of their own, which `mean_norm` carries: r_s = ‖direction‖, so that α = 1 adds them as they
    are. A block whose vector is zero is left out.
    Raises FormatError if the file is malformed, MismatchError where it is for another model.
    """
    head = read_gguf(source, lambda key: key in ("general.architecture", "controlvector.model_hint"))
    kind, hint = (
        str(head.values[key].value) if key in head.values else ""
        for key in ("general.architecture", "controlvector.model_hint")
    )
    if kind != "controlvector":
        raise SteerError(f"{source}: expected a control vector, got a GGUF of architecture {quote(kind)}")
    # repeng writes Hugging Face's model_type, and what others write here nobody reads: only a known name is held to.
    meant = MODEL_TYPES.get(hint, hint)
    if meant in ARCHITECTURES:
        target.check(source, "architecture", meant, target.base.architecture)
    sites = {_site(source, tensor): tensor for tensor in head.tensors}
    if len(sites) != len(head.tensors):
        raise FormatError(f"{source}: expected one direction for each block, got two for one")
    directions: dict[Site, NDArray[np.float64]] = {}
    for site in sorted(sites):
        if site.layer >= target.base.block_count:
            target.check(source, "last block", site.layer, target.base.block_count - 1)
        direction = _vector(source, sites[site], head.data_start, target)
        if direction.any():
            directions[site] = direction
    if not directions:
        raise NoEffectError(f"{source}: expected directions that are not zero, got none")
    norms = np.array([np.linalg.norm(direction) for direction in directions.values()])
    units = np.stack(list(directions.values())) / norms[:, None]
    return Steering(
        name=name,
        operator="addition",
        plane="local",
        sites=tuple(directions),
        mask=np.ones(len(norms), np.bool_),
        site_plane=np.arange(len(norms), dtype=np.uint32),
        basis=units[:, None].astype(np.float32),
        base=target.base,
        mean_norm=norms,
        angle=1.0,
        made=Made(recorder="control vector", model=meant if meant in ARCHITECTURES else "", version=__version__),
    )


def _site(source: Path, tensor: TensorInfo) -> Site:
    match = re.fullmatch(r"direction\.([1-9]\d{0,5})", tensor.name)
    if match is None:
        raise FormatError(f"{source}: expected tensors direction.1, direction.2 …, got {quote(tensor.name)}")
    return Site(int(match[1]), "layer_out")


def _vector(source: Path, tensor: TensorInfo, data_start: int, target: Target) -> NDArray[np.float64]:
    """The values (d,) of a tensor whose extent was checked against the file when its head was read."""
    if tensor.type not in _TYPES:
        raise FormatError(f"{source}: expected {tensor.name} as F32 or F16, got ggml type {tensor.type}")
    if not tensor.shape or any(length != 1 for length in tensor.shape[1:]):
        raise FormatError(f"{source}: expected {tensor.name} of one dimension, got shape {tensor.shape}")
    width = target.base.embedding_length
    target.check(source, "width", tensor.shape[0], width)
    values = np.fromfile(source, _TYPES[tensor.type], width, offset=data_start + tensor.offset).astype(np.float64)
    if len(values) != width or not np.isfinite(values).all():
        raise FormatError(f"{source}: expected {width} finite values in {tensor.name}, got others")
    return values

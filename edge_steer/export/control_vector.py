"""llama.cpp's control vectors: for `addition` to the residual stream, the baseline of the field.

llama.cpp adds `direction.N` to the output of block N (counted from 0) and has none for block 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from edge_steer.errors import NoEffectError, SteerError
from edge_steer.export.gguf_bytes import text, write_float32
from edge_steer.export.readers import Dialled
from edge_steer.gguf_metadata import Value
from edge_steer.model_file import read_model
from edge_steer.rotation import Add
from edge_steer.whole_file import whole_file


def control_vector(
    model_path: str | Path, out: str | Path, steerings: Sequence[Dialled], *, force: bool = False
) -> Path:
    """Write the sum of the steerings, coefficients included, as a control vector for scale 1.

    Raises SteerError if one of them is something else than an addition to blocks from 1 on.
    """
    model = read_model(model_path)
    directions: dict[int, NDArray[np.float64]] = {}
    for steering, dial in steerings:
        steering.check_fits(model.base)
        if steering.operator != "addition":
            raise SteerError(
                f"steering {steering.name!r}: a control vector adds, {steering.operator} does not; export it with --to "
                "lora, or calibrate with --sites layer_out --operator addition"
            )
        action = steering.action(dial)
        for site, on, mean_norm in zip(steering.sites, steering.mask, steering.mean_norm, strict=True):
            if not on or not isinstance(action, Add):
                continue
            if site.kind != "layer_out":
                raise SteerError(
                    f"steering {steering.name!r} adds at {site}, a control vector only to a block's output; calibrate "
                    "with --sites layer_out"
                )
            if site.layer == 0:
                raise SteerError(
                    f"steering {steering.name!r} adds at {site}, but llama.cpp has no control vector for block 0; "
                    "calibrate without that site"
                )
            step = action.alpha * float(mean_norm) * steering.basis_at(site)[0].astype(np.float64)
            directions[site.layer] = directions.get(site.layer, 0) + step
    if not directions:
        raise NoEffectError("every steering is off; give a coefficient: -s FILE:0.3 or --angle 0.3")
    metadata = {
        "general.architecture": text("controlvector"),
        "controlvector.model_hint": text(model.architecture),
        "controlvector.layer_count": Value(GGUFValueType.INT32, len(directions)),
    }
    tensors = {f"direction.{layer}": directions[layer].astype(np.float32) for layer in sorted(directions)}
    with whole_file(Path(out), force=force) as part:
        write_float32(part, metadata, tensors)
    return Path(out)

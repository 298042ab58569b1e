"""The model's own GGUF with the steerings' metadata: edge-steer steers it live, everything else runs it unsteered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_steer.errors import SteerError
from edge_steer.export.baked import check_not_source
from edge_steer.export.gguf_bytes import copy_bytes, head, map_model
from edge_steer.export.progress import Progress, no_progress
from edge_steer.export.readers import Dialled
from edge_steer.model_file import read_model
from edge_steer.steering import metadata
from edge_steer.whole_file import whole_file


def embed(
    model_path: str | Path,
    out: str | Path,
    steerings: Sequence[Dialled],
    *,
    force: bool = False,
    progress: Progress = no_progress,
) -> Path:
    """Write the GGUF `model_path` with `steerings` in its metadata to `out`; every tensor stays as it is.

    A dial that is given becomes that steering's default. The steerings bear this model as the one they are for.
    Raises SteerError if a steering does not fit, or the model embeds some already.
    """
    model, out = read_model(model_path), Path(out)
    for steering, _ in steerings:
        steering.check_fits(model.base)
    if model.embeds_steerings:
        raise SteerError(f"{model_path} embeds steerings already; give the model it was made from")
    check_not_source(model_path, out)
    fitted = [
        steering.with_(base=model.base, **({} if dial is None or steering.operator == "ablation" else {"angle": dial}))
        for steering, dial in steerings
    ]
    source = map_model(model)
    beginning = head(source, model.tensors, metadata(fitted))
    with whole_file(out, force=force) as part, part.open("wb") as file, progress("copying", 1) as step:
        file.write(beginning)
        copy_bytes(source.data[model.data_start :], file)
        step(1)
    return out

"""The calibrations published with the method (arXiv 2601.19375): plane.pt, and beside it directions.pt, config.json and
metadata.json, where they are.

Needs torch, for its pickles. They may be hostile: torch loads them with weights_only, which runs no code, and nothing
is believed that was not looked at.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edge_steer._version import __version__
from edge_steer.choices import Operator
from edge_steer.errors import FormatError, MismatchError, SteerError
from edge_steer.importing.archive import check_archive
from edge_steer.importing.target import Target
from edge_steer.json_file import read_json
from edge_steer.provenance import CONTROL_CHARACTERS, Made
from edge_steer.rotation import orthonormal
from edge_steer.sites import Site, site_of_module
from edge_steer.steering import Steering

_LARGEST = 1 << 30
_MODES: tuple[Operator, ...] = ("selective", "standard", "adaptive")


def import_published(plane: Path, target: Target, name: str) -> Steering:
    """The calibration in the file `plane`, for the model `target`.

    Its plane was stored in bfloat16, so it is made orthonormal again, in float64; sign and mask stay as published, and
    every site it was calibrated on, post-norms included. Separation and mean norms were not published.
    Raises FormatError if a file is malformed, MismatchError where it is for another model.
    """
    found = _load(plane)
    basis = _basis(plane, found.get("basis"), target)
    beside = (plane.with_name(name) for name in ("config.json", "metadata.json"))
    config, metadata = (read_json(path) if path.is_file() else {} for path in beside)
    extra = _dict(plane, "extra_info", found.get("extra_info"))
    mask, modules = _mask(plane, extra)
    steered = _sites(plane, mask, modules, target)
    how = _dict(plane, "steering in config.json", config.get("steering", {}))
    operator = how.get("mode", "standard") if "layer_steering_mask" not in extra else "selective"
    if operator not in _MODES:
        raise FormatError(f"{plane}: expected the mode {', '.join(_MODES)} in config.json, got {operator!r:.80}")
    counts = [_count(metadata.get(f"{side}_samples")) for side in ("harmful", "harmless")]
    positive, negative = ("harmful", "harmless") if all(counts) else ("positive", "negative")
    return Steering(
        name=name,
        operator=cast(Operator, operator),
        plane="global",
        sites=tuple(steered),
        mask=np.array(list(steered.values()), np.bool_),
        site_plane=np.zeros(len(steered), np.uint32),
        basis=basis[None].astype(np.float32),
        base=target.base,
        positive=positive,
        negative=negative,
        threshold=_threshold(plane, how.get("threshold", 0.0)) if operator == "adaptive" else float("nan"),
        made=Made(
            recorder="published",
            model=_text(_dict(plane, "model in config.json", config.get("model", {})).get("name")),
            version=__version__,
            positive_count=counts[0],
            negative_count=counts[1],
        ),
    )


def _load(path: Path) -> dict[str, Any]:
    """What torch finds in the file `path`, without running anything."""
    try:
        import torch
    except ImportError:
        raise SteerError(f"reading {path} takes torch; install it: pip install 'edge-steer[torch]'") from None
    if not path.is_file():
        raise SteerError(f"expected a published calibration at {path}, got no such file; give its folder or plane.pt")
    if path.stat().st_size > _LARGEST:
        raise FormatError(f"{path}: expected at most {_LARGEST} bytes, got {path.stat().st_size}")
    check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, weights_only=True, map_location="cpu")
    except MemoryError:
        raise FormatError(
            f"{path}: expected a calibration, got a file that asks for more memory than there is"
        ) from None
    except Exception as error:  # an unpickler that is fed nonsense raises anything
        code = re.search(r"GLOBAL (\S+)", str(error)) or re.search(
            r"Unsupported (?:class|operand|global) (\S+)", str(error)
        )
        got = f"a pickle that asks for {code[1]:.80}, which is refused" if code else "something else, or one cut short"
        raise FormatError(f"{path}: expected a calibration of tensors and names, got {got}; fetch it again") from None
    return _dict(path, "a published file", found)


def _basis(plane: Path, pair: Any, target: Target) -> NDArray[np.float64]:
    """The published plane (2, d), orthonormal again; its first vector is looked up among the directions beside it."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise FormatError(f"{plane}: expected two vectors as 'basis', got {_kind(pair)}")
    b1, b2 = (_vector(plane, f"basis[{number}]", each, target) for number, each in enumerate(pair))
    _check_directions(plane.with_name("directions.pt"), b1, target)
    try:
        return orthonormal(b1, b2)
    except ValueError as error:
        raise FormatError(f"{plane}: {error}") from None


def _vector(path: Path, what: str, value: Any, target: Target) -> NDArray[np.float64]:
    """A tensor as float64 (d,)."""
    import torch

    # A stored tensor can be of any kind, and claim more elements than its file holds: looked at before it is touched.
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    if not plain or value.ndim != 1 or not value.is_floating_point():
        raise FormatError(f"{path}: expected a vector as {what}, got {_kind(value)}")
    target.check(path, "width", len(value), target.base.embedding_length)
    vector = np.asarray(value.detach().double().numpy())
    if not np.isfinite(vector).all():
        raise FormatError(f"{path}: expected finite values in {what}, got NaN or infinity")
    return vector


def _mask(path: Path, extra: dict[str, Any]) -> tuple[dict[str, bool], list[str]]:
    """Which modules are steered, and all that were calibrated. Without a mask, all of them are steered."""
    modules = extra.get("target_layers", [])
    if not isinstance(modules, (list, tuple)) or not all(isinstance(module, str) for module in modules):
        raise FormatError(f"{path}: expected names of modules as 'target_layers', got {_kind(modules)}")
    mask = _dict(path, "layer_steering_mask", extra.get("layer_steering_mask", dict.fromkeys(modules, True)))
    if not all(isinstance(module, str) and isinstance(on, bool) for module, on in mask.items()):
        raise FormatError(f"{path}: expected names of modules with true or false as 'layer_steering_mask', got others")
    if not mask:
        raise FormatError(f"{path}: expected 'layer_steering_mask' or 'target_layers' in 'extra_info', got neither")
    return mask, [*modules, *mask]


def _sites(path: Path, mask: Mapping[str, bool], modules: list[str], target: Target) -> dict[Site, bool]:
    """Whether each site is steered, in network order; refuses a calibration of a model with other norms or layers."""
    known, found = target.architecture, {}
    for module in dict.fromkeys(modules):
        site = site_of_module(known, module)
        on = mask.get(module, False)
        if site is not None and site.kind != "layer_out":
            if site in found:
                raise FormatError(f"{path}: expected every site once, got {site} twice")
            found[site] = on
        elif on:
            raise MismatchError(f"{path}: steers {module!r:.120}, which {known.name} does not have")
    # The published code calibrates on every module of this name. Llama and Gemma mean different ones by one of them.
    wanted = sorted({site.kind for site in found})
    there = sorted(name for name, kind in known.kinds.items() if "layernorm" in kind.module)
    if wanted != there:
        target.check(path, "set of norms", ", ".join(wanted) or "none", ", ".join(there))
    target.check(path, "number of layers", max(site.layer for site in found) + 1, target.base.block_count)
    return {site: found[site] for site in sorted(found)}


def _check_directions(path: Path, b1: NDArray[np.float64], target: Target) -> None:
    """The plane's first vector is the chosen direction, where the directions were published too."""
    if not path.exists():
        return
    chosen = _vector(path, "selected_direction", _load(path).get("selected_direction"), target)
    cosine = float(b1 @ chosen / max(np.linalg.norm(b1) * np.linalg.norm(chosen), 1e-300))
    if cosine < 0.99:
        raise FormatError(f"{path}: expected the direction of plane.pt, got one at a cosine of {cosine:.3f} from it")


def _dict(path: Path, what: str, value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a dictionary as {what}, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)!s:.80}" if hasattr(value, "shape") else ""
    return f"{type(value).__name__}{shape}" if value is not None else "nothing"


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32 else 0


def _text(value: Any) -> str:
    return re.sub(CONTROL_CHARACTERS, " ", value)[:256] if isinstance(value, str) else ""


def _threshold(path: Path, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FormatError(f"{path}: expected a number as threshold in config.json, got {_kind(value)}")
    try:
        return float(value)
    except OverflowError:
        raise FormatError(f"{path}: expected a number as threshold in config.json, got one too large") from None

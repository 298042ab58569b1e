"""What makes a Steering sound: its parts have the shapes and bounds that they say, and do not contradict each other.

Every check raises FormatError, as the parts may come from a file.
"""

from __future__ import annotations

import math
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.choices import OPERATORS, PLANES, RANK
from edge_steer.errors import FormatError, SteerError, quote
from edge_steer.gate import Gate
from edge_steer.provenance import CONTROL_CHARACTERS, MAX_NAME
from edge_steer.sites import KINDS

if TYPE_CHECKING:
    from edge_steer.steering import Steering

FLOAT32 = (float(np.finfo(np.float32).min), float(np.finfo(np.float32).max))
BOOL, UINT32 = (0, 1), (0, 2**32 - 1)
_OFF_ORTHONORMAL = 1e-4


def demand(steering: Steering, truth: bool, expected: str, got: object) -> None:
    """Raise FormatError, naming the steering, where `truth` is none."""
    if not truth:
        raise FormatError(f"steering {quote(steering.name)}: expected {expected}, got {got}")


def frozen(
    steering: Steering, name: str, dtype: Any, given: Any, kinds: str = "fiu", span: tuple[float, float] = FLOAT32
) -> NDArray[Any]:
    """A read-only copy of `given`, which is to be the steering's `name`. Refuses what `dtype` would silently make
    something else of; NaN may pass."""
    array = np.asarray(given)
    fits = array.size == 0 or (array.dtype.kind in kinds and not ((array < span[0]) | (array > span[1])).any())
    bounds = f"{np.dtype(dtype)} from {span[0]:g} to {span[1]:g}"
    demand(steering, fits, f"{name} of {bounds}", f"{array.dtype} beyond that")
    copy = np.array(array, dtype=dtype)
    copy.flags.writeable = False
    return copy


def check(steering: Steering) -> None:
    """Raise FormatError where the parts of `steering` contradict each other."""
    _check_texts(steering)
    _check_numbers(steering)
    demand(steering, steering.operator in OPERATORS, f"an operator among {', '.join(OPERATORS)}",
           quote(steering.operator))  # fmt: skip
    demand(steering, steering.plane in PLANES, f"a plane among {', '.join(PLANES)}", quote(steering.plane))
    _check_sites(steering)
    _check_planes(steering)
    _check_measures(steering)


def _texts(steering: Steering) -> list[tuple[str, str]]:
    owners = (("", steering), ("base.", steering.base), ("made.", steering.made))
    found = [(prefix + part.name, getattr(owner, part.name)) for prefix, owner in owners for part in fields(owner)]
    several = [(name, each) for name, value in found if isinstance(value, tuple) for each in value]
    return [(name, value) for name, value in [*found, *several] if isinstance(value, str)]


def _check_texts(steering: Steering) -> None:
    for name, text in _texts(steering):
        found = re.search(CONTROL_CHARACTERS, text.replace("\n", "") if name == "description" else text)
        demand(steering, found is None, f"{name} without control characters", quote(text))
    length = len(steering.name)
    demand(steering, 0 < length <= MAX_NAME, f"a name of 1 to {MAX_NAME} characters", f"{length}")
    try:
        parsed = Gate.parse(steering.gate) if steering.gate else None
    except SteerError as error:
        raise FormatError(f"steering {quote(steering.name)}: {error}") from None
    demand(steering, not steering.gate or parsed is not None, "a gate, or none for always", quote(steering.gate))
    demand(steering, bool(steering.base.architecture), "the architecture it is for", "none")
    for name in ("architecture", "name"):
        length = len(getattr(steering.base, name))
        demand(steering, length <= MAX_NAME, f"base.{name} of at most {MAX_NAME} characters", length)


def _check_numbers(steering: Steering) -> None:
    base, made = steering.base, steering.made
    numbers = {
        "block_count": base.block_count, "embedding_length": base.embedding_length,
        "positive_count": made.positive_count, "negative_count": made.negative_count,
    }  # fmt: skip
    for name, number in numbers.items():
        demand(steering, 0 <= number < 2**32, f"{name} from 0 to 2^32 - 1", number)


def _check_sites(steering: Steering) -> None:
    sites, count = steering.sites, len(steering.sites)
    demand(steering, count > 0, "at least one site", "none")
    for site in sites:
        demand(steering, site.kind in KINDS and site.layer >= 0, f"sites of kinds {', '.join(KINDS)}", site)
    demand(steering, len(set(sites)) == count, "every site once", "a site twice")
    demand(steering, list(sites) == sorted(sites), "sites in network order", "another order")
    for name in ("mask", "site_plane", "separation", "mean_norm"):
        shape = getattr(steering, name).shape
        demand(steering, shape == (count,), f"{name} of one value per site ({count})", f"shape {shape}")
    shape = steering.class_means.shape
    demand(steering, shape == (count, 2), f"class_means of two values per site ({count})", f"shape {shape}")


def _check_planes(steering: Steering) -> None:
    basis, base = steering.basis, steering.base
    demand(steering, basis.ndim == 3, "basis of planes × rank × width", f"shape {basis.shape}")
    planes, rank, width = basis.shape
    wanted = RANK[steering.operator]
    demand(steering, rank == wanted, f"rank {wanted} for {steering.operator}", rank)
    demand(steering, width == base.embedding_length, f"basis vectors of width {base.embedding_length}", width)
    demand(steering, planes > 0, "at least one plane", planes)
    largest = int(steering.site_plane.max())
    demand(steering, largest < planes, f"plane numbers below {planes}", largest)
    last = max(site.layer for site in steering.sites)
    demand(steering, last < base.block_count, f"sites in blocks below {base.block_count}", f"block {last}")
    demand(steering, bool(np.isfinite(basis).all()), "a finite basis", "NaN or infinity")
    gram = np.einsum("prd,pqd->prq", basis.astype(np.float64), basis.astype(np.float64))
    error = float(np.abs(gram - np.eye(rank)).max())
    demand(steering, error < _OFF_ORTHONORMAL, "orthonormal planes", f"planes that miss it by {error:.2g}")


def _check_measures(steering: Steering) -> None:
    low, high = steering.angle_min, steering.angle_max
    demand(steering, not (low > 0 or high < 0), "a safe range around 0", f"{low} … {high}")
    negative = bool((steering.mean_norm < 0).any())
    demand(steering, not negative, "mean norms that are not negative", "a negative one")
    if steering.operator == "adaptive":
        demand(steering, not math.isnan(steering.threshold), "a threshold for adaptive", "NaN")
    if steering.operator == "addition":
        norms = steering.mean_norm[steering.mask]
        demand(steering, bool(np.isfinite(norms).all()), "a mean norm at every steered site for addition", "NaN")

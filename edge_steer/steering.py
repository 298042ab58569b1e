"""The Steering: one frozen value that says where, in which plane and how activations are turned.

Letters: S sites, L planes, rank 1 or 2, d model width. Angles are degrees.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer import steering_file
from edge_steer.choices import OPERATORS as OPERATORS
from edge_steer.choices import PLANES as PLANES
from edge_steer.choices import Operator as Operator
from edge_steer.choices import Plane as Plane
from edge_steer.errors import FormatError, MismatchError, SteerError, quote
from edge_steer.gguf_metadata import Value
from edge_steer.provenance import BaseModel, Made
from edge_steer.rotation import Ablate, Action, Add, TurnBy, TurnTo
from edge_steer.sites import Site
from edge_steer.steering_checks import BOOL, UINT32, check, frozen


@dataclass(frozen=True, eq=False)
class Steering:
    """What `calibrate` makes and every engine applies. Raises FormatError if its parts contradict each other.

    sites:      S sites in network order, all that were calibrated.
    mask:       (S,) bool, steered or not.
    site_plane: (S,) uint32, which plane a site uses.
    basis:      (L, rank, d) float32, orthonormal rows b1 (and b2) of each plane.
    separation: (S,) float32, distance of the class means along b1 in pooled standard deviations; NaN: not measured.
    mean_norm:  (S,) float32, mean ‖h‖ at the site; NaN: not measured.
    class_means: (S, 2) float32, mean h·b1 of the negative and of the positive class, b1 as in `basis`; NaN: not
                measured. What a steering does is the same without them.
    threshold:  of `adaptive`. angle: default dial. angle_min, angle_max: safe range. NaN: not measured. All four are
                rounded to float32, as the file holds them.
    provisional: whether the range is calibration's quick measure; `sweep --write` replaces it.
    gate: when it acts in an answer, such as "@response"; "": always. See docs/gates.md.
    """

    name: str
    operator: Operator
    plane: Plane
    sites: tuple[Site, ...]
    mask: NDArray[np.bool_]
    site_plane: NDArray[np.uint32]
    basis: NDArray[np.float32]
    base: BaseModel
    separation: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    mean_norm: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    class_means: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 2), np.float32))
    description: str = ""
    positive: str = "positive"
    negative: str = "negative"
    threshold: float = math.nan
    angle: float = math.nan
    angle_min: float = math.nan
    angle_max: float = math.nan
    provisional: bool = False
    gate: str = ""
    made: Made = field(default_factory=Made)

    def __post_init__(self) -> None:
        count = len(self.sites)
        unmeasured = {"separation": (count,), "mean_norm": (count,), "class_means": (count, 2)}
        parts: dict[str, Any] = {
            "sites": tuple(self.sites),
            "mask": frozen(self, "mask", np.bool_, self.mask, "b", BOOL),
            "site_plane": frozen(self, "site_plane", np.uint32, self.site_plane, "iu", UINT32),
            "basis": frozen(self, "basis", np.float32, self.basis),
        }
        for name, shape in unmeasured.items():
            given = getattr(self, name)
            parts[name] = frozen(self, name, np.float32, given if len(given) else np.full(shape, np.nan))
        for name in ("threshold", "angle", "angle_min", "angle_max"):
            parts[name] = float(frozen(self, name, np.float32, getattr(self, name)))
        for name, value in parts.items():
            object.__setattr__(self, name, value)
        check(self)

    # --- what it does -------------------------------------------------------------------------------------------

    @property
    def steered(self) -> tuple[Site, ...]:
        """The sites at which it acts."""
        return tuple(site for site, on in zip(self.sites, self.mask, strict=True) if on)

    def action(self, dial: float | None) -> Action | None:
        """What it does to an activation with its dial at `dial`; None where it is off.

        The dial is degrees for `selective` (turn by), `standard` and `adaptive` (turn to), the coefficient for
        `addition`; `ablation` is on at any number. None is off for all, 0 also for `selective`.
        """
        if dial is None:
            return None
        if isinstance(dial, bool) or not math.isfinite(dial):
            raise SteerError(f"steering {self.name!r}: expected a finite number or None for its dial, got {dial!r}")
        match self.operator:
            case "selective":
                return TurnBy(dial) if dial != 0 else None
            case "standard":
                return TurnTo(dial)
            case "adaptive":
                return TurnTo(dial, self.threshold)
            case "ablation":
                return Ablate()
            case "addition":
                return Add(dial) if dial != 0 else None

    @property
    def has_default(self) -> bool:
        """Whether there is a dial to use where none is given."""
        return self.operator == "ablation" or not math.isnan(self.angle)

    def default_dial(self) -> float:
        """The dial to use where none is given. Raises SteerError if the file has none."""
        if self.operator == "ablation":
            return 1.0
        if math.isnan(self.angle):
            raise SteerError(
                f"steering {self.name!r} has no default angle: give one (FILE:8, --angle 8), or store a measured "
                "range with `edge-steer sweep --write`"
            )
        return self.angle

    def at_strength(self, strength: float) -> float:
        """The dial at `strength` in −1…1 of the safe range. Raises SteerError if none was measured."""
        if not -1 <= strength <= 1:
            raise SteerError(f"expected a strength from -1 to 1, got {strength}")
        end = self.angle_max if strength >= 0 else self.angle_min
        if math.isnan(end):
            raise SteerError(
                f"steering {self.name!r} has no measured safe range: run `edge-steer sweep --write` or give an angle"
            )
        return abs(strength) * end

    def basis_at(self, site: Site) -> NDArray[np.float32]:
        """The basis (rank, d) in use at `site`."""
        basis: NDArray[np.float32] = self.basis[self.site_plane[self.sites.index(site)]]
        return basis

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that changes what the steering does at a given dial: two that are equal here act alike."""
        digest = hashlib.sha256()
        mask = self.mask
        for part in (
            self.operator, " ".join(site.name for site in self.steered), repr(self.basis.shape),
            repr(self.threshold if self.operator == "adaptive" else None),
        ):  # fmt: skip
            digest.update(part.encode() + b"\0")
        digest.update(self.basis[self.site_plane[mask]].tobytes())
        if self.operator == "addition":
            digest.update(self.mean_norm[mask].tobytes())
        return digest.hexdigest()

    def with_(self, **changes: Any) -> Steering:
        """A copy with some fields changed."""
        return replace(self, **changes)

    # --- does it fit --------------------------------------------------------------------------------------------

    def check_fits(self, model: BaseModel) -> str | None:
        """Raise MismatchError, naming both values, where the steering is not for `model`.

        Returns a warning where only the tokenizer differs, else None.
        """
        pairs = (
            ("architecture", self.base.architecture, model.architecture),
            ("width", self.base.embedding_length, model.embedding_length),
            ("layers", self.base.block_count, model.block_count),
        )
        for what, wanted, found in pairs:
            if wanted != found:
                raise MismatchError(
                    f"steering {self.name!r} is for {self.base.name or self.base.architecture}: "
                    f"its {what} is {wanted}, the model's is {found}"
                )
        if not self.steered:
            raise SteerError(f"steering {self.name!r} steers no site; calibrate it again with --mask all")
        mine, theirs = self.base.tokenizer_sha256, model.tokenizer_sha256
        if mine and theirs and mine != theirs:
            return f"steering {self.name!r} was calibrated with another tokenizer ({mine[:12]}, not {theirs[:12]})"
        return None

    # --- its file -----------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Steering:
        """The one steering in the GGUF file `path`. Raises FormatError if it holds none or several."""
        found = cls.load_all(path)
        if len(found) != 1:
            names = ", ".join(quote(steering.name) for steering in found[:5])
            raise FormatError(f"{path}: expected one steering, found {len(found)} ({names}); use Steering.load_all")
        return found[0]

    @classmethod
    def load_all(cls, path: str | Path) -> list[Steering]:
        """Every steering in the GGUF file `path`, in order: a steering file, or a model that embeds steerings.

        Raises FormatError if it holds none or one that is malformed, SteerError where it cannot be read.
        """
        found: list[Steering] = []
        for parts in steering_file.read(Path(path)):
            try:
                found.append(_from_fields(parts))
            except SteerError as error:
                raise FormatError(f"{path}: {error}") from None
        name, times = Counter(steering.name for steering in found).most_common(1)[0]
        if times > 1:
            raise FormatError(f"{path}: expected steerings of different names, got {quote(name)} {times} times")
        return found

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write a steering file of this one steering, whole or not at all.

        Raises SteerError if `path` exists and `force` is not given, or the system refuses to write.
        """
        save_all([self], path, force=force)


def save_all(steerings: Sequence[Steering], path: str | Path, *, force: bool = False) -> None:
    """Write a steering file of several steerings for one model, whole or not at all."""
    steering_file.write([_to_fields(steering) for steering in steerings], Path(path), force=force)


def metadata(steerings: Sequence[Steering]) -> dict[str, Value]:
    """The `steering.*` keys of `steerings`, to embed in a model's GGUF with `steering_file.add_metadata`."""
    return steering_file.metadata([_to_fields(steering) for steering in steerings])


def _to_fields(steering: Steering) -> steering_file.Fields:
    parts = {part.name: getattr(steering, part.name) for part in fields(steering)}
    sites = [site.name for site in steering.sites]
    return {**parts, "sites": sites, "base": asdict(steering.base), "made": asdict(steering.made)}


def _from_fields(parts: steering_file.Fields) -> Steering:
    sites = tuple(Site.parse(name) for name in parts["sites"])
    return Steering(**{**parts, "sites": sites, "base": BaseModel(**parts["base"]), "made": Made(**parts["made"])})

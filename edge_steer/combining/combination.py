"""From an expression over steerings to one steering.

Letters: S sites, d model width. At each site the direction u = unit(v) with v = Σ w_i θ_i b1_i, θ_i the dial of
steering i and b1_i its unit direction; projections act on the b1_i. The second axis is b2 = unit(G u), G u being where
the turns, one after another, move u to first order (`turn.py`). Where the steerings share b2, as those do that lean on
the site's mean activation, this is their b2 and one plane holds the whole sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timezone

import numpy as np
from numpy.typing import NDArray

from edge_steer._version import __version__
from edge_steer.choices import Operator
from edge_steer.combining.expression import Expression, evaluate, parse
from edge_steer.combining.turn import CANCELLED, Float64, Turn, turn_of, unit
from edge_steer.errors import MismatchError, NoEffectError, SteerError, quote
from edge_steer.provenance import MAX_NAME, Made
from edge_steer.rotation import orthonormal
from edge_steer.sites import Site
from edge_steer.steering import Steering

RECORDER = "combine"
_OPERATORS = ("selective", "addition")
# One dial turns all sites by one angle. A site where the sum is shorter than half the longest would turn more than
# twice too far; left out, it turns at most half too little.
_SHORT = 0.5
# Below this share, the planes are too unlike for one to stand for them all.
_HELD = 0.9


def combine(
    expression: str,
    steerings: Mapping[str, Steering] | Sequence[Steering],
    *,
    angles: Mapping[str, float] | None = None,
    name: str | None = None,
    note: Callable[[str], object] = lambda _: None,
) -> Steering:
    """The steering that `expression` makes of others, such as `0.3*honest - 0.2*verbose`, `a ~ b` or `a | b`.

    steerings: by the names in the expression, or a sequence of steerings that go by their own names.
    angles: the dial that a weight of 1 stands for, by those names; where none is given, the steering's default.
    name: of the result; None is the expression.
    note: called with a line for each thing that the result leaves out.
    The default dial of the result is the expression as written, in degrees (the coefficient for `addition`). No range:
    `edge-steer sweep --write` measures one. Raises SteerError where the expression is none, where steerings are for
    different models, of different operators or of sites that one dial does not suit, MismatchError and NoEffectError
    among it.
    """
    parsed = parse(expression)
    named = _steerings_by_name(parsed, steerings)
    operator = _check_alike(named)
    dials = {key: (angles or {}).get(key, math.nan) for key in named}
    dials = {key: named[key].default_dial() if math.isnan(dial) else float(dial) for key, dial in dials.items()}
    sites = tuple(sorted({site for each in named.values() for site in each.steered}))
    turn = evaluate(parsed, {key: turn_of(each, dials[key], sites) for key, each in named.items()})

    norms = _mean_norms(named.values(), sites)
    length = np.linalg.norm(turn.sum, axis=-1)
    if operator == "addition":
        length = np.divide(length, norms, out=np.zeros_like(length), where=norms > 0)
    kept = _select_sites(parsed, length, operator, sites, note)
    turn, norms, length = turn.at(kept), norms[kept], length[kept]
    sites = tuple(sites[number] for number in kept)
    u = unit(turn.sum)
    if operator == "addition":
        basis, dial = u[:, None, :], float(length.max())
        norms = norms * length / dial  # what a dial of 1 adds at the site: so each gets its own share, exactly
    else:
        basis, dial = _planes(parsed, turn, u, sites, note), float(length.mean())
    made = _steering(named[parsed.names[0]], sites, basis, norms)
    return made.with_(
        name=parsed.text[:MAX_NAME] if name is None else name,
        description=_description(parsed, dials),
        positive=parsed.text,
        negative="its opposite",
        angle=dial,
    )


def _steering(first: Steering, sites: tuple[Site, ...], basis: Float64, norms: Float64) -> Steering:
    """A steering of these planes, for the model and of the operator of `first`."""
    planes, site_plane = _distinct(basis.astype(np.float32))
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Steering(
        name=RECORDER,
        operator=first.operator,
        plane="shared" if len(planes) == 1 else "local",
        sites=sites,
        mask=np.ones(len(sites), np.bool_),
        site_plane=site_plane,
        basis=planes,
        base=first.base,
        mean_norm=norms.astype(np.float32),
        made=Made(recorder=RECORDER, model=first.base.name, version=__version__, date=date),
    )


def _steerings_by_name(
    parsed: Expression, steerings: Mapping[str, Steering] | Sequence[Steering]
) -> dict[str, Steering]:
    """The steerings by the names in the expression, in its order."""
    pairs = list(steerings.items() if isinstance(steerings, Mapping) else ((each.name, each) for each in steerings))
    known = dict(pairs)
    if len(known) != len(pairs):
        raise SteerError(f"expected steerings of different names, got {', '.join(key for key, _ in pairs)}; rename one")
    for key in parsed.names:
        if key not in known:
            raise SteerError(
                f"expected names among {', '.join(known) or '(none)'} in {quote(parsed.text)}, got {key!r}"
            )
    if unused := [key for key in known if key not in parsed.names]:
        raise SteerError(f"expected {unused[0]!r} in {quote(parsed.text)}, where it is not; leave the steering out")
    return {key: known[key] for key in parsed.names}


def _check_alike(named: Mapping[str, Steering]) -> Operator:
    """The operator that all have. Raises SteerError where they are not for one model or one dial."""
    key, first = next(iter(named.items()))
    for other, each in named.items():
        if each.base != first.base:
            raise MismatchError(
                f"expected steerings for one model, got {key!r} for {first.base.name or first.base.architecture!r} and "
                f"{other!r} for {each.base.name or each.base.architecture!r}; calibrate both on one"
            )
        if each.operator != first.operator:
            raise SteerError(
                f"expected steerings of one operator, got {first.operator} ({key}) and {each.operator} ({other}); "
                f"use them side by side: -s {key} -s {other}"
            )
    if first.operator not in _OPERATORS:
        raise SteerError(
            f"expected {' or '.join(_OPERATORS)} to combine, got {first.operator}, which turns to an angle or is on or "
            "off and has no sum; calibrate another operator"
        )
    streams = {key: {site.kind == "layer_out" for site in each.steered} for key, each in named.items()}
    if first.operator == "selective" and len(set().union(*streams.values())) > 1:
        raise SteerError(
            f"expected all at norms or all at layer_out, got {' and '.join(named)} at both: one dial does not suit "
            f"both; calibrate them with the same --sites, or use them side by side: "
            f"{' '.join(f'-s {each}' for each in named)}"
        )
    return first.operator


def _mean_norms(steerings: Collection[Steering], sites: Sequence[Site]) -> Float64:
    """(S,) the mean of what the steerings measured at each site; NaN where none did."""
    found: list[float] = []
    for site in sites:
        norms = [float(each.mean_norm[each.sites.index(site)]) for each in steerings if site in each.sites]
        measured = [norm for norm in norms if not math.isnan(norm)]
        found.append(sum(measured) / len(measured) if measured else math.nan)
    return np.array(found)


def _select_sites(
    parsed: Expression, length: Float64, operator: str, sites: Sequence[Site], note: Callable[[str], object]
) -> NDArray[np.intp]:
    """Which of the S sites the result steers. Raises NoEffectError where the sum has cancelled at all."""
    if not length.any():
        raise NoEffectError(f"{quote(parsed.text)} cancels at every site and would do nothing; change the expression")
    least = 0.0 if operator == "addition" else _SHORT * length.max()
    kept = np.flatnonzero((length > 0) & (length >= least))
    if gone := len(sites) - len(kept):
        names = ", ".join(str(site) for number, site in enumerate(sites) if number not in kept)
        note(f"{gone} of {len(sites)} sites are left out, as little is left of the sum there: {names}")
    return kept


def _planes(
    parsed: Expression, turn: Turn, u: Float64, sites: Sequence[Site], note: Callable[[str], object]
) -> Float64:
    """B (S, 2, d) with b1 = u and b2 = unit(G u)."""
    moved = turn.apply_generator(u)
    angle, whole = np.linalg.norm(moved, axis=-1), turn.generator_norm()
    if (weak := angle <= CANCELLED * turn.size).any():
        raise NoEffectError(
            f"{quote(parsed.text)} turns nothing at {sites[int(weak.argmax())]}, where the planes are turned against "
            "each other; use the steerings side by side"
        )
    held = angle / whole
    if held.min() < _HELD:
        note(
            f"one plane holds {held.min():.0%} of the sum at {sites[int(held.argmin())]}; side by side (-s, -s) the "
            "steerings do all of it"
        )
    return np.stack([orthonormal(*pair) for pair in zip(u, moved, strict=True)])


def _distinct(planes: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.uint32]]:
    """Each plane once, in the order of the sites, and which of them a site has."""
    numbers: dict[bytes, int] = {}
    which = [numbers.setdefault(plane.tobytes(), len(numbers)) for plane in planes]
    return planes[[which.index(number) for number in range(len(numbers))]], np.array(which, np.uint32)


def _description(parsed: Expression, dials: Mapping[str, float]) -> str:
    return f"{parsed.text}, with " + ", ".join(f"{key} at {dial:.4g}" for key, dial in dials.items())

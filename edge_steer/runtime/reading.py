"""Reading: how far a token's activation lies toward the positive class of a steering.

A reading is h·b1 at one site of the steering, before h is turned there, in units of class separation: −1 is the mean
of the negative class, +1 that of the positive. What turns at earlier sites is in it, so with dials on it tells what
flows. Its site is that of the largest separation before the last block, of which llama.cpp computes no more than the
rows it samples from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import SteerError
from edge_steer.runtime.hook import Hook, Reading
from edge_steer.sites import Site
from edge_steer.steering import Steering

if TYPE_CHECKING:
    from edge_steer.runtime.llama import SteeredLlama

Float32 = NDArray[np.float32]


def read_site(steering: Steering) -> Site:
    """Where a steering is read unless told otherwise. Raises SteerError if it can be read nowhere."""
    readable = [number for number, site in enumerate(steering.sites) if _unreadable(steering, site) is None]
    if not readable:
        raise SteerError(_unreadable(steering, steering.sites[0]))
    return steering.sites[max(readable, key=lambda number: np.nan_to_num(steering.separation[number]))]


def reading_at(steering: Steering, site: Site, to: Float32) -> Reading:
    """What the hook is to read of `steering` at `site`. Raises SteerError if it cannot be read there."""
    if why := _unreadable(steering, site):
        raise SteerError(why)
    negative, positive = steering.class_means[steering.sites.index(site)].astype(np.float64)
    apart = float(positive - negative)
    axis = np.ascontiguousarray(steering.basis_at(site)[0])
    return Reading(site, axis, 2 / apart, -float(positive + negative) / apart, to)


def _unreadable(steering: Steering, site: Site) -> str | None:
    """Why a steering cannot be read at a site, in one line; None where it can."""
    if np.isnan(steering.class_means).all():
        return f"steering {steering.name!r} holds no class means, which a reading is in units of; calibrate it again"
    if site not in steering.sites:
        known = f"{steering.sites[0]} to {steering.sites[-1]}"
        return f"expected a site of steering {steering.name!r} to read it at ({known}), got {site}"
    if site.layer == steering.base.block_count - 1:
        return f"expected a site of steering {steering.name!r} before the last block to read it at, got {site}"
    negative, positive = steering.class_means[steering.sites.index(site)]
    if not (np.isfinite(negative) and np.isfinite(positive) and negative != positive):
        return f"expected two class means of steering {steering.name!r} at {site}, got {negative:g} and {positive:g}"
    return None


class TokenReadings:
    """The readings of the cached tokens, by steering, while somebody wants them. NaN: not read."""

    def __init__(self, hook: Hook, steerings: Sequence[Steering], length: int) -> None:
        """length: of the context, in tokens."""
        self._hook = hook
        self._steerings = {each.name: each for each in steerings}
        self._length = length
        self._values: dict[str, Float32] = {}
        self._sites: dict[str, Site] = {}
        self._wanted: Counter[str] = Counter()
        self._read: tuple[str, ...] = ()

    # --- who reads what -----------------------------------------------------------------------------------------

    def choose(self, name: str, site: Site | None) -> None:
        """Read steering `name` at `site`, or where it is read unless told otherwise."""
        steering = self._steering(name)
        self._sites[name] = read_site(steering) if site is None else site
        if name in self._values:
            self._values[name].fill(np.nan)
        if name in self._read:
            self._tell()

    def site(self, name: str) -> Site:
        """Where steering `name` is read."""
        if name not in self._sites:
            self.choose(name, None)
        return self._sites[name]

    def check(self, names: Iterable[str]) -> None:
        """Raise SteerError if one of the steerings `names` cannot be read where it is to be."""
        for name in names:
            reading_at(self._steering(name), self.site(name), np.empty(0, np.float32))

    @contextmanager
    def of(self, names: Iterable[str]) -> Iterator[None]:
        """Within it, every token evaluated is read for the steerings `names`. May be nested."""
        wanted = tuple(names)
        if not wanted:
            yield
            return
        self.check(wanted)
        self._wanted.update(wanted)
        self._tell()
        try:
            yield
        finally:
            self._wanted.subtract(wanted)
            self._tell()

    def _steering(self, name: str) -> Steering:
        if name not in self._steerings:
            raise SteerError(f"expected a steering among {', '.join(self._steerings) or '(none)'}, got {name!r}")
        return self._steerings[name]

    def _tell(self) -> None:
        """Tell the hook what is wanted now."""
        self._read = tuple(name for name in self._steerings if self._wanted[name] > 0)
        for name in self._read:
            if name not in self._values:
                self._values[name] = np.full(self._length, np.nan, np.float32)
        self._hook.read(
            [reading_at(self._steerings[name], self._sites[name], self._values[name]) for name in self._read]
        )

    @property
    def active(self) -> bool:
        """Whether anybody wants readings now."""
        return bool(self._read)

    # --- while tokens are evaluated -----------------------------------------------------------------------------

    def expect(self, begin: int) -> None:
        """The tokens evaluated next stand in the cache from `begin` on."""
        if self._read:
            self._hook.read_from(begin)

    def note(self, begin: int, end: int) -> None:
        """The tokens begin…end have been evaluated. Raises SteerError where one of them was not read."""
        if self._read:
            self._hook.check_read(end)
        if len(self._values) > len(self._read):
            for name, values in self._values.items():
                if name not in self._read:
                    values[begin:end] = np.nan

    def forget(self) -> None:
        """The cache holds tokens from elsewhere."""
        for values in self._values.values():
            values.fill(np.nan)

    # --- what was read ------------------------------------------------------------------------------------------

    def at(self, name: str, place: int) -> float:
        """The reading of the cached token at `place`; NaN where it was not read."""
        return float(self._values[name][place]) if name in self._values else float("nan")

    def first(self, name: str, count: int) -> Float32:
        """The readings of the first `count` cached tokens: a copy."""
        unread = np.full(count, np.nan, np.float32)
        return self._values[name][:count].copy() if name in self._values else unread

    def count_known(self, names: Iterable[str], count: int) -> int:
        """How many of the first `count` cached tokens have been read for all of `names`."""
        unread = [np.isnan(self.first(name, count)) for name in names]
        return min((int(each.argmax()) if each.any() else count for each in unread), default=count)


def read_tokens(llm: SteeredLlama, tokens: Sequence[int], names: Sequence[str]) -> dict[str, Float32]:
    """The readings (n,) of a prompt's n tokens, under the dials as an answer to it would begin.

    Cached tokens that fit and were read are not evaluated again. Raises SteerError if the prompt exceeds the context.
    """
    tokens = list(tokens)
    if not 0 < len(tokens) <= llm.n_ctx():
        raise SteerError(f"expected a text of 1 to {llm.n_ctx()} tokens, got {len(tokens)}; {llm.longer()}")
    readings = llm.token_readings
    with readings.of(names):
        cut_unread(llm, tokens, names)
        if rest := tokens[llm.n_tokens :]:
            llm.eval(rest)
        return {name: readings.first(name, len(tokens)) for name in names}


def cut_unread(llm: SteeredLlama, tokens: Sequence[int], names: Iterable[str]) -> None:
    """Forget the cached tokens from the first on that an answer to `tokens` must not use, or that was not read."""
    llm.cut_cache(tokens, llm.usable_in(tokens, llm.open_gates(tokens)))
    shared = llm.shared(tokens)
    known = llm.token_readings.count_known(names, shared)
    if known < len(tokens) or llm.n_tokens > len(tokens):
        llm.keep(known)


def prompt_tokens(llm: SteeredLlama, prompt: Any) -> list[int]:
    """Tokens of what `SteeredLlama.read` takes: a text, a chat with its generation prompt, or tokens."""
    if isinstance(prompt, str):
        return llm.text_tokens(prompt)
    given = list(prompt)
    return llm.chat_tokens(given) if given and not isinstance(given[0], (int, np.integer)) else given

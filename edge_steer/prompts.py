"""What a steering is computed from: prompts of two sides, and probes that measure it."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property

from edge_steer.errors import FormatError, SteerError, quote

PROMPT_KEYS = ("prompt", "system", "prefix")
_LOPSIDED = 10  # times as many prompts on one side as on the other
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0]"
)


def check_text(what: str, value: object) -> None:
    """Raise FormatError where `value` is no text that says something."""
    if not isinstance(value, str):
        raise FormatError(f"expected text as {what}, got {quote(value)}; write it as a string")
    if not value.strip():
        raise FormatError(f"expected text as {what}, got a blank; write some or leave it out")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FormatError(f"expected Unicode text as {what}, got half of a surrogate pair: {quote(value)}") from None


@dataclass(frozen=True)
class Prompt:
    """What a user says, the system message over it, how the answer begins. Raises FormatError if one is blank.

    origin: the file and line that it comes from, where it comes from one.
    """

    prompt: str
    system: str | None = None
    prefix: str | None = None
    origin: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in PROMPT_KEYS:
            value = getattr(self, name)
            if name == "prompt" or value is not None:
                check_text(name, value)

    def messages(self) -> list[dict[str, str]]:
        """The chat so far: the system message if there is one, and the user's. `prefix` is not in it."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, {"role": "user", "content": self.prompt}]


@dataclass(frozen=True)
class Probe:
    """A prompt with an answer from each side: how far their log-probabilities lie apart measures a steering."""

    prompt: str
    positive: str
    negative: str

    def __post_init__(self) -> None:
        for name in ("prompt", "positive", "negative"):
            check_text(name, getattr(self, name))


@dataclass(frozen=True)
class PromptSet:
    """The two sides that a steering is computed from. In a preset, prompt i of one side pairs with i of the other.

    Raises SteerError if a side is empty or both hold the same prompts.
    """

    name: str
    description: str
    positive_name: str
    negative_name: str
    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...]
    probes: tuple[Probe, ...] = ()

    def __post_init__(self) -> None:
        if not (self.positive and self.negative):
            side = "negative" if self.positive else "positive"
            raise SteerError(f"prompts {self.name!r}: expected prompts on both sides, got no {side} one; add some")
        # The class means know no order.
        if Counter(self.positive) == Counter(self.negative):
            raise SteerError(f"prompts {self.name!r}: the two sides are the same; give two that differ")

    def warnings(self) -> list[str]:
        """What makes a steering of these prompts doubtful, a line each."""
        found = []
        sides = {"positive": self.positive, "negative": self.negative}
        for name, side in sides.items():
            if len(side) == 1:
                found.append(f"one {name} prompt: the direction is that of its words; give some twenty")
            if blank := [prompt for prompt in side if not _INVISIBLE.sub("", prompt.prompt).strip()]:
                found.append(f"{len(blank)} {name} prompts look blank (such as {blank[0].prompt!a})")
        counts = sorted(map(len, sides.values()))
        if counts[1] >= _LOPSIDED * counts[0] and counts[0] > 1:
            found.append(
                f"{len(self.positive)} positive prompts against {len(self.negative)}: give about as many of each"
            )
        if both := set(self.positive) & set(self.negative):
            some = quote(min(each.prompt for each in both))
            found.append(f"{len(both)} prompts are on both sides (such as {some}), where they cancel out")
        return found

    def first(self, count: int) -> PromptSet:
        """The first `count` prompts of each side."""
        return replace(self, positive=self.positive[:count], negative=self.negative[:count])

    @cached_property
    def sha256(self) -> str:
        """Hash of every prompt of both sides, in order: counts and lengths go in, so that no two sets run together."""
        digest = hashlib.sha256()
        for side in (self.positive, self.negative):
            digest.update(len(side).to_bytes(8, "little"))
            for prompt in side:
                for text in (prompt.prompt, prompt.system, prompt.prefix):
                    data = b"" if text is None else text.encode()  # no text is blank, so 0 bytes are None alone
                    digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

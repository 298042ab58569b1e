"""Gates: when, within an answer, a steering acts. A Gate is a value; what it says of an answer is `runtime/gates.py`'s.

A gate is written as its conditions, all of which must hold: `@after-thinking@first:50`. See docs/gates.md.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from edge_steer.errors import SteerError, quote

ALL = "@all"  # no gate: what turns a file's own off
LONGEST = 1024  # characters of a gate
_MOST = 1 << 20  # tokens: no context is longer
_WORDS = ("response", "thinking", "after-thinking", "first:", "after:", "decay:", "text", "when ")
_CONDITION = re.compile(rf"@(?={'|'.join(map(re.escape, _WORDS))})")
_WHEN = re.compile(r"when\s+(?P<name>.+?)\s*(?P<sign>[<>])\s*(?P<value>[^<>:\s]+?)\s*(?P<running>:\s*running)?", re.S)
Thinking = Literal["", "inside", "after"]


@dataclass(frozen=True)
class When:
    """A bound on the reading of the steering `name`. running: looked at behind every token, not once on the prompt."""

    name: str
    above: bool
    bound: float
    running: bool = False

    def __str__(self) -> str:
        return f"@when {self.name}{'>' if self.above else '<'}{self.bound!r}{':running' if self.running else ''}"

    def holds(self, reading: float, *, held: bool = False, slack: float = 0.0) -> bool:
        """Whether a reading keeps to the bound; one that `held` before may pass it by `slack`."""
        beyond = reading - self.bound if self.above else self.bound - reading
        return beyond > (-slack if held else 0.0)


@dataclass(frozen=True)
class Gate:
    """When a steering acts in an answer; `Gate()` is @response. Every gate leaves the prompt alone but for its last
    token, which decides on the answer's first.

    thinking: only between the markers of thinking, or after them. first, after: only the first tokens, only those after
    so many. decay: the dial falls in a line to 0 over so many tokens. text: not in calls of tools. when: see When.
    Tokens are counted where `thinking` lets the steering act.
    """

    thinking: Thinking = ""
    first: int | None = None
    after: int | None = None
    decay: int | None = None
    text: bool = False
    when: When | None = None

    @classmethod
    def parse(cls, text: str) -> Gate | None:
        """The gate that `text` writes; None for "@all". Raises SteerError."""
        if text.strip() == ALL:
            return None
        if not text.startswith("@") or len(text) > LONGEST:
            raise SteerError(f"expected a gate such as @response or @after-thinking@first:50, got {quote(text)}")
        gate = cls()
        seen: set[str] = set()
        for part in _CONDITION.split(f"@{text[1:].strip()}"):
            if part:
                gate = gate._with(part.strip().removeprefix("@"), seen)
        return gate

    def __str__(self) -> str:
        parts = [{"": "", "inside": "@thinking", "after": "@after-thinking"}[self.thinking]]
        parts += [f"@{name}:{n}" for name in ("first", "after", "decay") if (n := getattr(self, name)) is not None]
        parts += ["@text"] if self.text else []
        parts += [str(self.when)] if self.when else []
        return "".join(parts) or "@response"

    @property
    def reads_text(self) -> bool:
        """Whether it asks for the text of the answer's tokens."""
        return bool(self.thinking) or self.text

    def _with(self, part: str, seen: set[str]) -> Gate:
        """This gate with one more condition. seen: the kinds it has, each of which it takes once."""
        word, _, number = part.partition(":")
        kind = "thinking" if word.endswith("thinking") else word.split(" ")[0]
        if kind in seen:
            raise SteerError(f"expected one condition of each kind in a gate, got @{part} beside another")
        seen.add(kind)
        if kind == "when":
            return replace(self, when=_when(part))
        if part in ("response", "text", "thinking", "after-thinking"):
            inside: dict[str, Thinking] = {"thinking": "inside", "after-thinking": "after"}
            return replace(self, thinking=inside.get(part, self.thinking), text=self.text or part == "text")
        if kind in ("first", "after", "decay"):
            if not (number.isascii() and number.isdigit() and 0 < int(number[:9]) <= _MOST):
                raise SteerError(f"expected @{kind}:N with N from 1 to {_MOST} tokens, got @{quote(part)[1:-1]}")
            counts: dict[str, Any] = {kind: int(number[:9])}
            return replace(self, **counts)
        known = [f"@{each}N" if each.endswith(":") else f"@{each}" for each in _WORDS[:-1]]
        near = difflib.get_close_matches(f"@{word}", [each.rstrip("N:") for each in known], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SteerError(f"expected a condition among {', '.join(known)}, @when NAME>x, got @{quote(part)[1:-1]}{hint}")


def _when(part: str) -> When:
    found = _WHEN.fullmatch(part)
    try:
        bound = float(found["value"]) if found else math.nan
    except ValueError:
        bound = math.nan
    if found is None or not math.isfinite(bound):
        raise SteerError(f"expected @when NAME>x or @when NAME<x, with :running if you like, got @{quote(part)[1:-1]}")
    return When(found["name"], found["sign"] == ">", bound, bool(found["running"]))


def split_gate(argument: str) -> tuple[str, str | None]:
    """`FILE:8@response` as what stands before its gate, and the gate as it is written; None where there is none.

    A gate begins at the first condition that is known.
    """
    found = _CONDITION.search(argument) or re.search(r"@all\s*\Z", argument)
    return (argument[: found.start()], argument[found.start() :]) if found else (argument, None)

"""What gates say in one answer, token by token. Nothing here knows a model: it is fed the text of each token.

A step is the evaluation of one token, which decides on the next: step 0 is the prompt's last token, step k the answer's
k-th. The factor of a step is what a dial is multiplied with in it, from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edge_steer.gate import Gate

# A running @when that holds goes on until the reading is this far beyond its bound, in units of class separation.
SLACK = 0.25

Marker = tuple[bytes, bytes]  # what opens and what closes

# How models mark thinking. The first that a model's template or vocabulary has is its own.
THINKING: tuple[Marker, ...] = (
    (b"<think>", b"</think>"),  # Qwen, DeepSeek, GLM, SmolLM3, Granite
    (b"[THINK]", b"[/THINK]"),  # Magistral
    (b"<|channel|>analysis<|message|>", b"<|end|>"),  # gpt-oss
    (b"<seed:think>", b"</seed:think>"),  # Seed
    (b"<thought>", b"</thought>"),  # EXAONE
    (b"<|START_THINKING|>", b"<|END_THINKING|>"),  # Command A
    ("◁think▷".encode(), "◁/think▷".encode()),  # Kimi
    (b"<|inner_prefix|>", b"<|inner_suffix|>"),  # Apertus
    (b"<thinking>", b"</thinking>"),
    (b"<reasoning>", b"</reasoning>"),
)
# How models mark calls of tools; b"": to the end of the answer. An answer that begins with { is one too (Llama).
CALLS: tuple[Marker, ...] = (
    (b"<tool_call>", b"</tool_call>"),  # Qwen, Hermes, GLM
    (b"[TOOL_CALLS]", b""),  # Mistral
    (b"<|python_tag|>", b""),  # Llama
    (b"<function=", b"</function>"),  # Llama, Qwen3-Coder
    (b"<|tool_call|>", b"<|/tool_call|>"),  # Phi-4
    ("<｜tool▁calls▁begin｜>".encode(), "<｜tool▁calls▁end｜>".encode()),  # DeepSeek
    (b"<|tool_calls_section_begin|>", b"<|tool_calls_section_end|>"),  # Kimi
    (b"<|tool_call_start|>", b"<|tool_call_end|>"),  # LFM2
    (b"<|START_ACTION|>", b"<|END_ACTION|>"),  # Command
    (b"<start_function_call>", b"<end_function_call>"),  # FunctionGemma
    (b"<|channel|>commentary", b"<|call|>"),  # gpt-oss
)
_TO_THE_END = b"\0"
_KEPT = max(len(each) for opens in (*THINKING, *CALLS) for each in opens) - 1  # bytes that may begin a marker


@dataclass(frozen=True)
class Place:
    """Where an answer is, in the text of one model. marker: of its thinking; None: it does not mark it.

    thinking: "before" until the answer shows whether it begins with thinking. call: what closes the call that one is
    in, b"" outside. begun: whether the answer itself has. tail: the last bytes, which may begin a marker.
    """

    marker: Marker | None
    thinking: Literal["before", "inside", "after"] = "before"
    call: bytes = b""
    begun: bool = False
    tail: bytes = b""

    @classmethod
    def behind(cls, prompt: bytes, marker: Marker | None) -> Place:
        """Where an answer begins. prompt: the prompt's end, from where the model's turn begins: a template may open
        the thinking there, or close it."""
        place = cls(marker, "before" if marker else "after", begun=True, tail=b"")._pass_markers(prompt)
        return replace(place, begun=False, tail=b"")

    def feed(self, piece: bytes) -> Place:
        """Where the answer is behind the next piece of its text."""
        return self._pass_markers(self.tail + piece)._look()

    def _pass_markers(self, text: bytes) -> Place:
        """Behind every marker that is whole in `text`."""
        place = self
        while (found := place._next(text)) is not None:
            end, place = found
            text = text[end:]
        return replace(place, tail=text[-_KEPT:])

    def _next(self, text: bytes) -> tuple[int, Place] | None:
        """The first marker in `text`: where it ends, and the place behind it."""
        if self.call:
            at = -1 if self.call == _TO_THE_END else text.find(self.call)
            return None if at < 0 else (at + len(self.call), replace(self, call=b""))
        inside = self.thinking == "inside"
        found = [(at, opens, closes) for opens, closes in CALLS if (at := text.find(opens)) >= 0]
        if self.marker and (at := text.find(turn := self.marker[inside])) >= 0:
            found.append((at, turn, b""))
        if not found:
            return None
        at, sign, closes = min(found)
        end = at + len(sign)
        if self.marker and sign == self.marker[inside]:
            return end, replace(self, thinking="after" if inside else "inside")
        return end, replace(self, thinking="inside" if inside else "after", call=closes or _TO_THE_END, begun=True)

    def _look(self) -> Place:
        """With what the answer's first characters show."""
        place = self
        head = self.tail.lstrip()
        if place.thinking == "before" and head and self.marker and not self.marker[0].startswith(head):
            place = replace(place, thinking="after")
        if place.thinking == "after" and not place.begun and not place.call and head:
            place = replace(place, begun=True, call=_TO_THE_END if head.startswith(b"{") else b"")
        return place


class AnswerGates:
    """The gates of several steerings in one answer, None for one without: a factor for each, step by step.

    place: where the answer begins. readings: of the prompt, of every steering that a @when names.
    """

    def __init__(self, gates: Sequence[Gate | None], place: Place, readings: Mapping[str, float] | None = None) -> None:
        self.gates = tuple(gates)
        self.gated = tuple(gate is not None for gate in gates)
        self.on_prompt = tuple(0.0 if each else 1.0 for each in self.gated)  # the factors of all but its last token
        self.constant = all(gate in (None, Gate()) for gate in gates)  # every factor in the answer is 1
        self.reads_text = any(gate is not None and gate.reads_text for gate in gates)
        self.reads = tuple(dict.fromkeys(gate.when.name for gate in gates if gate is not None and gate.when))
        self.runs = any(gate is not None and gate.when and gate.when.running for gate in gates)
        held = (False,) * len(self.gates)
        self._steps = [_Step(place, (0,) * len(self.gates), held)]
        if readings:
            self.decide(readings)

    @property
    def step(self) -> int:
        """The step that is next: how many tokens of the answer were fed."""
        return len(self._steps) - 1

    def decide(self, readings: Mapping[str, float]) -> None:
        """Let every @when stand as the prompt's readings say."""
        held = tuple(gate is not None and gate.when is not None and gate.when.holds(readings[gate.when.name])
                     for gate in self.gates)  # fmt: skip
        self._steps[0] = replace(self._steps[0], held=held)

    def feed(self, piece: bytes, readings: Mapping[str, float] | None = None) -> None:
        """Go on to the step that evaluates the answer's next token. piece: its text. readings: of the step before."""
        last = self._steps[-1]
        counts = tuple(count + _counts(gate, last.place) for gate, count in zip(self.gates, last.counts, strict=True))
        place = last.place.feed(piece) if self.reads_text else last.place
        held = last.held
        if self.runs and readings:
            held = tuple(_still(gate, was, readings) for gate, was in zip(self.gates, held, strict=True))
        self._steps.append(_Step(place, counts, held))

    def back(self, step: int) -> None:
        """Forget the tokens behind those that lead to `step`: they were drafts that were not taken."""
        del self._steps[max(1, step + 1) :]

    def factors(self) -> tuple[float, ...]:
        """What each dial is multiplied with in the step that is next; 1 for a steering without a gate."""
        step = self._steps[-1]
        return tuple(
            1.0 if gate is None else _factor(gate, step.place, count, held)
            for gate, count, held in zip(self.gates, step.counts, step.held, strict=True)
        )


@dataclass(frozen=True)
class _Step:
    """counts: for each gate, the steps before this one in which its thinking condition let it act; held: its @when."""

    place: Place
    counts: tuple[int, ...]
    held: tuple[bool, ...]


def _counts(gate: Gate | None, place: Place) -> bool:
    return gate is not None and gate.thinking in ("", place.thinking)


def _still(gate: Gate | None, was: bool, readings: Mapping[str, float]) -> bool:
    if gate is None or gate.when is None or not gate.when.running:
        return was
    return gate.when.holds(readings[gate.when.name], held=was, slack=SLACK)


def _factor(gate: Gate, place: Place, count: int, held: bool) -> float:
    shut = (
        not _counts(gate, place)
        or (gate.text and place.call)
        or (gate.when is not None and not held)
        or (gate.first is not None and count >= gate.first)
        or (gate.after is not None and count < gate.after)
    )
    if shut:
        return 0.0
    return 1.0 if gate.decay is None else max(0.0, 1.0 - count / gate.decay)

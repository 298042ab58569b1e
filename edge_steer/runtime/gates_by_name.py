"""The gates of a model's steerings, by name: checked against what the steerings and the model can."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import llama_cpp

from edge_steer.errors import SteerError
from edge_steer.gate import Gate
from edge_steer.runtime.cache import Scope
from edge_steer.runtime.gates import THINKING, Marker, Place
from edge_steer.runtime.reading import read_site
from edge_steer.steering import Steering

RESPONSE = Gate()


class Gates(MutableMapping[str, "Gate | None"]):
    """The gates of several steerings, by name; None is none. A text is parsed; a new one acts from the next answer on.

    marker: finds how the model marks its thinking.
    """

    def __init__(self, steerings: Sequence[Steering], marker: Callable[[], Marker | None]) -> None:
        self._steerings = {each.name: each for each in steerings}
        self._marker = marker
        self._values: dict[str, Gate | None] = dict.fromkeys(self._steerings)

    def __getitem__(self, name: str) -> Gate | None:
        self._demand(name)
        return self._values[name]

    def __setitem__(self, name: str, value: Gate | str | None) -> None:
        self._values[name] = self.check(name, value)

    def __delitem__(self, name: str) -> None:
        raise SteerError(f"a gate cannot be removed; set gates[{name!r}] = None to be without")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr({name: None if gate is None else str(gate) for name, gate in self._values.items()})

    def check(self, name: str, value: Gate | str | None) -> Gate | None:
        """The gate that `value` is, for the steering `name`. Raises SteerError where it cannot be one."""
        self._demand(name)
        gate = Gate.parse(value) if isinstance(value, str) else value
        if gate is None:
            return None
        operator = self._steerings[name].operator
        if gate.decay is not None and operator not in ("selective", "addition"):
            raise SteerError(
                f"@decay is for steerings whose dial fades to nothing (selective, addition), {name!r} is {operator}; "
                "use @first:N"
            )
        if gate.when is not None:
            self._demand(gate.when.name)
            read_site(self._steerings[gate.when.name])  # refuses one that cannot be read
        if gate.thinking and self._marker() is None:
            if gate.thinking == "inside":
                raise SteerError("expected a model that marks its thinking, got one without; use @response")
            warnings.warn(f"this model marks no thinking, so {gate} acts from the answer's start", stacklevel=4)
        return gate

    def set(self, values: Mapping[str, Gate | str | None]) -> None:
        """Set several, or none of them where one cannot be."""
        self._values |= {name: self.check(name, value) for name, value in values.items()}

    def in_answer(self, scope: Scope) -> tuple[Gate | None, ...]:
        """The gate of each steering in an answer, in order; () where there is none."""
        if scope == "response":
            return tuple(gate or RESPONSE for gate in self._values.values())
        found = tuple(self._values.values())
        return found if any(gate is not None for gate in found) else ()

    def _demand(self, name: str) -> None:
        if name not in self._steerings:
            raise SteerError(f"expected a steering among {', '.join(self._steerings) or '(none)'}, got {name!r}")


def first_gates(
    steerings: Sequence[Steering], given: Mapping[str, Gate | str | None] | None
) -> dict[str, Gate | str | None]:
    """The gates to start with: what is given, else each file's. Raises SteerError for what is none."""
    found: dict[str, Gate | str | None] = {each.name: each.gate or None for each in steerings}
    for name, value in (given or {}).items():
        if name not in found:
            raise SteerError(f"expected a steering among {', '.join(found) or '(none)'}, got {name!r}")
        found[name] = Gate.parse(value) if isinstance(value, str) else value
    return found


def thinking_marker(llm: Any) -> Marker | None:
    """How the model marks its thinking: as its chat template has it, else as its vocabulary."""
    template = (llm.chat_template.source or "").encode()
    for marker in THINKING:
        # gpt-oss closes with what others end a message with.
        if any(each in template for each in marker if each != b"<|end|>"):
            return marker
    for marker in THINKING:
        if all(len(llm.tokenize(each, add_bos=False, special=True)) == 1 for each in marker):
            return marker
    return None


def answer_place(llm: Any, prompt: Sequence[int], marker: Marker | None) -> Place:
    """Where the answer to a prompt begins: its template may have opened the thinking, or a call."""
    pieces: list[bytes] = []
    for token in reversed(prompt):
        piece = llm.detokenize([token], special=True)
        if llama_cpp.llama_vocab_is_control(llm._model.vocab, token) and piece not in (marker or ()):
            break
        pieces.append(piece)
    return Place.behind(b"".join(reversed(pieces)), marker)

"""When a steering acts, in the field `steering`: {"happy": {"angle": 8, "when": "@response"}} or "happy:8@response"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge_steer.errors import quote
from edge_steer.gate import Gate, split_gate
from edge_steer.runtime.gates_by_name import Gates

WHEN = "when"


def split_gates(value: Any) -> tuple[Any, dict[str, Any]]:
    """The value of a field `steering` without its gates, and the gates by name as they are written."""
    gates: dict[str, Any] = {}
    if isinstance(value, str):
        parts = [split_gate(part) for part in value.split(",")]
        gates = {part.strip().rpartition(":")[0] or part.strip(): gate for part, gate in parts if gate is not None}
        return ",".join(part for part, _ in parts), gates
    if isinstance(value, dict):
        gates = {name: each[WHEN] for name, each in value.items() if isinstance(each, dict) and WHEN in each}
        plain = {name: _without(each) if name in gates else each for name, each in value.items()}
        return plain, gates
    return value, gates


def split_alias(name: str) -> tuple[str, str]:
    """ "MODEL@happy:8@response" as the model and what follows; "" where nothing does."""
    base, sign, _ = split_gate(name)[0].rpartition("@")
    return (base, name[len(base) + 1 :]) if sign else (name, "")


def read_gates(given: Mapping[str, Any], gates: Gates) -> dict[str, Gate | None]:
    """The gates that a request gives, "" and None for none. Raises SteerError where the model cannot have one."""
    return {
        name: gates.check(name, None if text in (None, "") else text if isinstance(text, str) else quote(text))
        for name, text in given.items()
    }


def shown_gates(dials: Mapping[str, Any], gates: Mapping[str, Gate | None]) -> dict[str, Any]:
    """Dials as a field `steering` has them, with their gates."""
    return {
        name: dial if gates.get(name) is None else {"angle": dial, WHEN: str(gates[name])}
        for name, dial in dials.items()
    }


def _without(given: dict[str, Any]) -> Any:
    """What turns the dial, in an object that also says when; {} stands for the file's default."""
    return {key: each for key, each in given.items() if key != WHEN}

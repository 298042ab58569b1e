"""Messages as chat templates know them."""

from __future__ import annotations

import json
from typing import Any

from edge_steer.errors import SteerError
from edge_steer.serve.fields import Message


def for_template(message: Message) -> dict[str, Any]:
    """A message as chat templates know it."""
    found: dict[str, Any] = message.model_dump(exclude_none=True)
    found.setdefault("content", None)
    if message.role == "developer":
        found["role"] = "system"
    for call in found.get("tool_calls", ()):
        try:
            arguments = json.loads(call["function"]["arguments"])
        except ValueError:
            raise SteerError(f"expected the arguments of {call['function']['name']} as JSON, got other text") from None
        call["function"]["arguments"] = arguments
    return found

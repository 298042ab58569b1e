"""outlines: from_llamacpp, free and bound to a JSON schema."""

import sys
from typing import Any

import outlines
from pydantic import BaseModel
from steered import GREEDY, QUESTION, answer, pair, works


class Day(BaseModel):
    summary: str


models = pair()
model = outlines.from_llamacpp(models.given)
models.demand_same("free", lambda: model(QUESTION, **GREEDY), answer)

# Bound by a logits processor of outlines': SteeredLlama itself is asked with the same one.
own = outlines.from_llamacpp(models.own)


def bound(model: Any) -> str:
    text = str(model(QUESTION, Day, **GREEDY))
    if not text.startswith("{"):
        sys.exit(f"expected JSON, got {text!r}")
    return text


models.demand_same("as JSON", lambda: bound(model), lambda _: bound(own))
works("outlines")

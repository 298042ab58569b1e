"""The operators that a steering may have, and the kinds of planes, by name. What they do is `rotation.py`'s."""

from __future__ import annotations

from typing import Literal, get_args

Operator = Literal["selective", "standard", "adaptive", "ablation", "addition"]
# local: each site its own plane. shared: one for all, made at one site. global: one for all, as published.
Plane = Literal["local", "shared", "global"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)
PLANES: tuple[Plane, ...] = get_args(Plane)
# Vectors in the basis of a plane.
RANK = {"selective": 2, "standard": 2, "adaptive": 2, "ablation": 1, "addition": 1}

"""The choices that the library's types and the command line's options share. Free of numpy: `--help` needs them."""

from __future__ import annotations

from typing import Literal, get_args

Operator = Literal["selective", "standard", "adaptive", "ablation", "addition"]
# local: each site its own plane. shared: one for all, made at one site. global: one for all, as published.
Plane = Literal["local", "shared", "global"]
Mask = Literal["site", "layer", "all"]
# Of transformers.
Device = Literal["auto", "cpu", "cuda", "mps"]
DType = Literal["auto", "bfloat16", "float16", "float32"]

OPERATORS: tuple[Operator, ...] = get_args(Operator)
PLANES: tuple[Plane, ...] = get_args(Plane)
MASKS: tuple[Mask, ...] = get_args(Mask)
DEVICES: tuple[Device, ...] = get_args(Device)
DTYPES: tuple[DType, ...] = get_args(DType)
# Vectors in the basis of a plane.
RANK = {"selective": 2, "standard": 2, "adaptive": 2, "ablation": 1, "addition": 1}

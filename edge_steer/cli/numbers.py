"""Numbers as options take them: finite, and no larger than what llama.cpp holds them in."""

from __future__ import annotations

import math
from typing import Any

import click


class FiniteRange(click.FloatRange):
    """A number in a range. click takes NaN, which is neither below nor above anything, and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"expected a finite number, got {value}", param, ctx)
        return number


_MOST_INT32 = (1 << 31) - 1  # ctypes cuts off what is larger, in silence

COUNT = click.IntRange(0, _MOST_INT32)
GPU_LAYERS = click.IntRange(-1, _MOST_INT32)
SEED = click.IntRange(0, (1 << 32) - 2)  # the last one is llama.cpp's word for a random seed
THREADS = click.IntRange(1, 512)  # GGML_MAX_N_THREADS; thousands end in a segmentation fault

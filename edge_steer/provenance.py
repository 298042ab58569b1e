"""Where a steering comes from: the model that it is for, and how it was made."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_steer.errors import FormatError

# What no line of a terminal should be given, and what UTF-8 cannot hold.
CONTROL_CHARACTERS = "[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
MAX_NAME = 256


@dataclass(frozen=True)
class BaseModel:
    """The model a steering is for. `tokenizer_sha256` is None where it was not calibrated on a GGUF."""

    architecture: str
    name: str
    block_count: int
    embedding_length: int
    tokenizer_sha256: str | None = None


@dataclass(frozen=True)
class Made:
    """How a steering was made. `date` is ISO 8601, `version` that of edge-steer.

    orthogonal_to: what was projected out of its directions.
    candidates:    the choices of sites and planes that were measured, this one first, each with its dials at one
                   divergence (candidate_min, candidate_max) and how far each moves the gap (candidate_negative,
                   candidate_positive); NaN: not measured.
    """

    recorder: str = ""
    model: str = ""
    prompts_sha256: str = ""
    version: str = ""
    date: str = ""
    positive_count: int = 0
    negative_count: int = 0
    orthogonal_to: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    candidate_min: tuple[float, ...] = ()
    candidate_max: tuple[float, ...] = ()
    candidate_negative: tuple[float, ...] = ()
    candidate_positive: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("orthogonal_to", "candidates"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("candidate_min", "candidate_max", "candidate_negative", "candidate_positive"):
            given = np.asarray(getattr(self, name), np.float32)  # as the file holds it
            object.__setattr__(self, name, tuple(map(float, given)))
            if len(given) != len(self.candidates):
                raise FormatError(f"expected {name} for {len(self.candidates)} candidates, got {len(given)}")

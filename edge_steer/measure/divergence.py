"""How far a steered model's predictions are from its unsteered ones: KL divergence on neutral text.

Letters: n tokens, V vocabulary, K tokens whose probability is kept. Log-probabilities are natural logarithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_steer.measure.evaluation_set import pick_evenly
from edge_steer.measure.measured_model import MeasuredModel, set_dial
from edge_steer.measure.metrics import log_softmax, plain_tokens
from edge_steer.preset import neutral_passages

PASSAGES, LENGTH = 4, 32
# Next tokens of which a reference keeps the probability; the rest is kept as one. On neutral passages this took less
# than a thousandth off the divergence (4,096 took half a hundredth), and it is 128 kB a token in place of a megabyte.
KEPT = 16384


@dataclass(frozen=True, eq=False)
class ReferenceDistribution:
    """What a model expects next at n places: its K likeliest tokens, and the mass of all others as one.

    tokens: (n, K) int32. log_p: (n, K) float32. rest: (n,) float64, the log-probability of all other tokens together;
    −inf where there are none.
    """

    tokens: NDArray[np.int32]
    log_p: NDArray[np.float32]
    rest: NDArray[np.float64]

    @classmethod
    def of(cls, log_p: NDArray[np.float32], keep: int = KEPT) -> ReferenceDistribution:
        """Of log-probabilities (n, V)."""
        keep = min(keep, log_p.shape[-1])
        tokens = np.argpartition(-log_p, keep - 1, axis=-1)[:, :keep].astype(np.int32)
        kept = np.take_along_axis(log_p, tokens, axis=-1)
        return cls(tokens, kept, _rest(kept, log_p.shape[-1]))

    def divergence(self, log_q: NDArray[np.float32]) -> NDArray[np.float64]:
        """KL(p‖q) in nats at each of the n places, p the expectation kept here, q of log-probabilities (n, V).

        Σ p (log p − log q) over the kept tokens and the rest as one more: exact where all are kept, else no more than
        the exact one (the log-sum inequality).
        """
        other = np.take_along_axis(log_q, self.tokens, axis=-1)
        found = (np.exp(self.log_p) * (self.log_p - other)).sum(axis=-1, dtype=np.float64)
        there = np.isfinite(self.rest)
        rest = np.where(there, self.rest, 0.0)
        found += np.where(there, np.exp(rest) * (rest - _rest(other, log_q.shape[-1])), 0.0)
        return np.asarray(np.maximum(found, 0.0))


def _rest(kept: NDArray[np.float32], vocabulary: int) -> NDArray[np.float64]:
    """Log of the probability mass (n,) that log-probabilities (n, K) of a vocabulary leave over."""
    if kept.shape[-1] == vocabulary:
        return np.full(len(kept), -np.inf)
    return np.asarray(np.log(np.maximum(1 - np.exp(kept).sum(axis=-1, dtype=np.float64), 1e-9)))


class Divergence:
    """KL(unsteered ‖ steered) of a model on the first LENGTH tokens of some texts, mean over their tokens.

    texts: None for PASSAGES of the neutral passages that ship.
    """

    def __init__(self, model: MeasuredModel, texts: Sequence[str] | None = None) -> None:
        self._model = model
        texts = pick_evenly(neutral_passages(), PASSAGES) if texts is None else texts
        self._texts = [(plain_tokens(model, text)[: min(LENGTH + 1, model.n_ctx())], 1) for text in texts]
        set_dial(model, None, None)
        self._expected = model.map_logits(self._texts, lambda _, rows: ReferenceDistribution.of(log_softmax(rows)))

    def at(self, name: str, angle: float) -> float:
        """With the steering `name` at `angle` and all others off."""
        set_dial(self._model, name, angle)
        return self.now()

    def now(self) -> float:
        """Under the dials as they stand."""
        found = self._model.map_logits(
            self._texts, lambda number, rows: self._expected[number].divergence(log_softmax(rows))
        )
        return float(np.concatenate(found).mean())

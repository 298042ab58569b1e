"""Whether turning inside llama.cpp's graph comes to the same as stopping at every site, asked of a model once it is
loaded.

The quick way (native/steer_graph.c) changes nodes that llama.cpp is about to compute. It rests on how llama.cpp plans
and runs its graph, which no interface promises: a release that fuses such a node with another, or computes it before it
asks, would leave it unturned without a word. So every steering is turned on, far out, and two tokens are evaluated in
both ways. They agree to the bit where all is well. One site of SmolLM2, Qwen-0.5B or Gemma-270M that stays unturned
makes 6e-3 of the logits' range or more.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_steer.choices import Operator
from edge_steer.errors import SteerError
from edge_steer.rotation import Ablate, Action, Add, TurnBy, TurnTo

if TYPE_CHECKING:
    from edge_steer.runtime.llama import SteeredLlama

# Two: what is turned may spare the first token of a text, as planes of the residual stream do.
_TOKENS = (0, 1)
_TOLERANCE = 1e-3  # of the logits' range
_FAR: dict[Operator, Action] = {
    "selective": TurnBy(30), "standard": TurnTo(90, None), "adaptive": TurnTo(90, None), "ablation": Ablate(),
    "addition": Add(0.5),
}  # fmt: skip


def check_graph_path(llm: SteeredLlama) -> None:
    """Let the hook stop at its sites, and warn, where turning inside the graph gives other logits.

    For a model that has just been loaded; leaves it as it was. A failure of both ways is left to the first answer.
    """
    hook = llm._hook
    if hook.path != "auto" or not llm.steerings or llm.model_params.vocab_only:
        return
    for number, steering in enumerate(llm.steerings):
        hook.dial(number, _FAR[steering.operator])
    inside = _logits(llm)
    if hook.went_inside:
        hook.path = "stop"
        stopping = _logits(llm)
        if stopping is None or _agree(inside, stopping):
            hook.path = "auto"
        else:
            warnings.warn(
                "turning inside llama.cpp's graph gives other logits than stopping at every site; this model is "
                "steered by stopping, some percent slower. EDGE_STEER_HOOK=stop chooses that without this check",
                stacklevel=3,
            )
    for number in range(len(llm.steerings)):
        hook.dial(number, None)
    llm._ctx.kv_cache_seq_rm(-1, 0, -1)
    hook.reached[:] = hook.turned[:] = 0


def _logits(llm: SteeredLlama) -> NDArray[np.float32] | None:
    """Of the token after the two, with nothing but llama.cpp's own context used; None where that fails."""
    try:
        llm._ctx.kv_cache_seq_rm(-1, 0, -1)
        for at in range(0, len(_TOKENS), llm.n_batch):
            llm._batch.set_batch(_TOKENS[at : at + llm.n_batch], at, False)
            llm._ctx.decode(llm._batch)
        llm._hook.check_status()
    except (SteerError, RuntimeError):  # the second is what llama-cpp-python says of a decode that failed
        return None
    return np.array(np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm._n_vocab,)), np.float32)


def _agree(one: NDArray[np.float32] | None, other: NDArray[np.float32]) -> bool:
    """False also where a logit is not finite in one of them alone."""
    if one is None:
        return False
    if np.array_equal(one, other, equal_nan=True):
        return True
    with np.errstate(invalid="ignore"):
        return bool(np.abs(one - other).max() <= _TOLERANCE * np.ptp(other))

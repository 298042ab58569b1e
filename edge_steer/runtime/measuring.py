"""What is read off a SteeredLlama: logits under its dials, and the activations of a prompt's last token.

Both keep to the cache rule, so that texts which begin alike are not evaluated twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import SteerError
from edge_steer.runtime.cache import Actions
from edge_steer.runtime.gates import AnswerGates
from edge_steer.runtime.hook import Record

if TYPE_CHECKING:
    from edge_steer.runtime.llama import SteeredLlama

_ROWS = 64  # rows of logits at a time: one can be a megabyte


def read_logits(llm: SteeredLlama, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
    """What the model expects in place of tokens[start:]: logits (len(tokens) − start, vocabulary).

    tokens[:start] count as the prompt, the rest as the answer. Raises SteerError if they exceed the context.
    """
    tokens = list(tokens)
    if not 0 < start < len(tokens) <= llm.n_ctx():
        raise SteerError(f"expected 0 < start < tokens <= {llm.n_ctx()}, got {start} and {len(tokens)}; {llm.longer()}")
    gates = llm.open_gates(tokens[:start])
    llm.cut_cache(tokens[:start], llm.usable_in(tokens[:start], gates))
    llm.keep(min(llm.shared(tokens), start - 1))
    if gates is not None:
        return np.concatenate(_gated_rows(llm, gates, tokens, start))
    actions = llm.angles.actions()
    llm.evaluate(actions, tokens[llm.n_tokens : start - 1])
    rows: list[NDArray[np.float32]] = []
    for first in range(start - 1, len(tokens) - 1, _ROWS):
        rows += llm.evaluate(actions, tokens[first : min(first + _ROWS, len(tokens) - 1)], every_row=True)
    return np.concatenate(rows)


def _gated_rows(llm: SteeredLlama, gates: AnswerGates, tokens: list[int], start: int) -> list[NDArray[np.float32]]:
    """As read_logits: tokens that the same acts on are evaluated at once."""
    llm.evaluate_head(gates, tokens[llm.n_tokens : start])
    rows: list[NDArray[np.float32]] = []
    actions: list[Actions] = []
    for at in range(start - 1, len(tokens) - 1):
        if at >= start:
            llm.feed(gates, tokens[at])
        actions.append(llm.gated_actions(gates))
        if gates.runs:  # what it says next is known when this token is evaluated
            rows += llm.evaluate_gated(gates, [tokens[at]], opens=at < start, every_row=True)
    if gates.runs:
        return rows
    begin = 0
    for end in range(1, len(actions) + 1):
        if end == len(actions) or actions[end] != actions[begin] or end - begin == _ROWS:
            part = tokens[start - 1 + begin : start - 1 + end]
            rows += llm.evaluate(actions[begin], part, gates.gated, opens=begin == 0, every_row=True)
            begin = end
    return rows


def record_activations(llm: SteeredLlama, tokens: Sequence[int], record: Record, *, steered: bool = False) -> None:
    """Evaluate a prompt and record the activations of its last token at every site of `hook_sites`.

    Unsteered, or where `steered` under the dials: then a site's activation is what it was before it was turned there
    itself. Raises SteerError if the prompt exceeds the context.
    """
    tokens = list(tokens)
    if not 0 < len(tokens) <= llm.n_ctx():
        raise SteerError(
            f"expected a prompt of 1 to {llm.n_ctx()} tokens, the context, got {len(tokens)}; {llm.longer()}"
        )
    actions = llm.angles.actions() if steered else llm.all_off
    llm.keep(llm.usable(llm.shared(tokens[:-1]), len(tokens), actions))
    # The last micro-batch on its own: the only one whose last row is the prompt's last token.
    last = min(len(tokens) - llm.n_tokens, int(llm.context_params.n_ubatch))
    llm.evaluate(actions, tokens[llm.n_tokens : len(tokens) - last])
    with llm.recording(record):
        llm.evaluate(actions, tokens[len(tokens) - last :])

"""What is read off a SteeredLlama: logits under its dials, and the activations of a prompt's last token.

Of one text both keep to the cache rule, so that texts which begin alike are not evaluated twice. Of several, where the
model was opened for that (`sequences`), as many are evaluated at once as fit (together.py), and nothing stays cached.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import SteerError
from edge_steer.runtime.cache import Actions
from edge_steer.runtime.gates import AnswerGates
from edge_steer.runtime.hook import Record
from edge_steer.runtime.together import ROWS, TOKENS, Text, TokenTree, batches, head_length

if TYPE_CHECKING:
    from edge_steer.runtime.llama import SteeredLlama

T = TypeVar("T")


def read_logits(llm: SteeredLlama, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
    """What the model expects in place of tokens[start:]: logits (len(tokens) − start, vocabulary).

    tokens[:start] count as the prompt, the rest as the answer. Raises SteerError if they exceed the context.
    """
    tokens = list(tokens)
    _check_start(llm, tokens, start)
    gates = llm.open_gates(tokens[:start])
    llm.cut_cache(tokens[:start], llm.usable_in(tokens[:start], gates))
    llm.keep(min(llm.shared(tokens), start - 1))
    if gates is not None:
        return np.concatenate(_gated_rows(llm, gates, tokens, start))
    actions = llm.angles.actions()
    llm.evaluate(actions, tokens[llm.n_tokens : start - 1])
    rows: list[NDArray[np.float32]] = []
    for first in range(start - 1, len(tokens) - 1, ROWS):
        rows += llm.evaluate(actions, tokens[first : min(first + ROWS, len(tokens) - 1)], every_row=True)
    return np.concatenate(rows)


def _check_start(llm: SteeredLlama, tokens: Sequence[int], start: int) -> None:
    if not 0 < start < len(tokens) <= llm.n_ctx():
        raise SteerError(f"expected 0 < start < tokens <= {llm.n_ctx()}, got {start} and {len(tokens)}; {llm.longer()}")


def check_length(llm: SteeredLlama, tokens: Sequence[int]) -> None:
    """Raise SteerError unless a prompt is one, and fits into the context."""
    if not 0 < len(tokens) <= llm.n_ctx():
        raise SteerError(
            f"expected a prompt of 1 to {llm.n_ctx()} tokens, the context, got {len(tokens)}; {llm.longer()}"
        )


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
        if end == len(actions) or actions[end] != actions[begin] or end - begin == ROWS:
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
    check_length(llm, tokens)
    actions = llm.angles.actions() if steered else llm.all_off
    llm.keep(llm.usable(llm.shared(tokens[:-1]), len(tokens), actions))
    # The last micro-batch on its own: the only one whose last row is the prompt's last token.
    last = min(len(tokens) - llm.n_tokens, int(llm.context_params.n_ubatch))
    llm.evaluate(actions, tokens[llm.n_tokens : len(tokens) - last])
    with llm.recording(record):
        llm.evaluate(actions, tokens[len(tokens) - last :])


# --- several texts at once --------------------------------------------------------------------------------------------


def map_logits(
    llm: SteeredLlama, asked: Sequence[tuple[Sequence[int], int]], of: Callable[[int, NDArray[np.float32]], T]
) -> list[T]:
    """`of` each text's number and its logits, as read_logits has them of its tokens and start."""
    for tokens, start in asked:
        _check_start(llm, tokens, start)
    texts = [Text(tokens[:-1], start - 1) for tokens, start in asked]
    if not _fit_together(llm, texts) or llm.open_gates(texts[0].tokens) is not None:
        return [of(number, read_logits(llm, *each)) for number, each in enumerate(asked)]
    actions = llm.angles.actions()
    found: list[T] = []
    with closing(_trees(llm, texts, actions)) as trees:
        for tree in trees:
            logits = llm.evaluate_tree(actions, tree)
            for rows in tree.rows:
                found.append(of(len(found), logits[rows]))
    return found


def record_each(llm: SteeredLlama, prompts: Sequence[Sequence[int]]) -> Generator[Record]:
    """The unsteered activations of the last tokens of all prompts, in their order: a Record for every few of them."""
    sites, width = len(llm.hook_sites), llm.hook_width
    for tokens in prompts:
        check_length(llm, tokens)
    texts = [Text(tokens, len(tokens) - 1) for tokens in prompts]
    if not _fit_together(llm, texts):
        for tokens in prompts:
            record = Record.zeros(sites, width)
            record_activations(llm, tokens, record)
            yield record
        return
    with closing(_trees(llm, texts, llm.all_off)) as trees:
        for tree in trees:
            record = Record.zeros(sites, width, len(tree.rows))
            with llm.recording(record):
                llm.evaluate_tree(llm.all_off, tree)
            yield record


def _fit_together(llm: SteeredLlama, texts: Sequence[Text]) -> bool:
    """Whether each text fits into one batch, and into the model's sliding window: what slid out of one text's window
    would be missing from the head that all share."""
    if not len(texts) > 1 < llm.sequences or llm.token_readings.active:
        return False
    longest = max(len(text.tokens) for text in texts)
    rows = max(len(text.tokens) - text.wanted for text in texts)
    return rows <= ROWS and longest <= min(_room(llm), llm.window or longest)


def _room(llm: SteeredLlama) -> int:
    """Tokens in a batch: one micro-batch, so that all its rows are known together."""
    return int(min(TOKENS, llm.n_batch, llm.context_params.n_ubatch))


def _trees(llm: SteeredLlama, texts: Sequence[Text], actions: Actions) -> Generator[TokenTree]:
    """All texts, in batches that whoever is given them evaluates; what all begin with is evaluated under `actions`.

    To be closed by whom it is given to: only then does the cache hold nothing of theirs.
    """
    head = head_length(texts)
    llm.forget()
    try:
        if head:
            llm.evaluate_tree(actions, TokenTree.head(texts[0].tokens[:head], min(llm.sequences, len(texts))))
        room = min(_room(llm), llm.n_ctx() - head)
        for batch in batches([text.behind(head) for text in texts], room, llm.sequences):
            yield TokenTree.of(batch, head)
            llm.forget(head)
    finally:
        llm.forget()

"""Several texts in one decode say what each says alone, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny
from devices import EXACT, TOLERANCE
from planted import DIAL, random_steering

from edge_steer import SteerError
from edge_steer.architectures import architecture
from edge_steer.choices import OPERATORS, Operator
from edge_steer.model_file import read_model
from edge_steer.runtime.hook import Record
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.runtime.together import ROWS, SEQUENCES, Text, TokenTree, batches, head_length
from edge_steer.steering import Steering

if TYPE_CHECKING:
    from numpy.typing import NDArray

Texts = list[tuple[list[int], int]]


def some_texts(head: int = 12, pairs: int = 30) -> Texts:
    """Pairs of texts that share a prompt, all of which begin alike: more than one batch of them."""
    rng = np.random.default_rng(1)
    begin = rng.integers(1, 250, head).tolist()
    found = []
    for pair in range(pairs):
        prompt = [*begin, *rng.integers(1, 250, 2 + pair % 5).tolist()]
        found += [([*prompt, *rng.integers(1, 250, 3 + pair % 2).tolist()], len(prompt)) for _ in range(2)]
    return found


def steering_for(path: Path, operator: Operator) -> Steering:
    file = read_model(path)
    sites = architecture(file.architecture).sites(file.block_count)
    return random_steering(file.base, sites, operator, seed=3)


def opened(path: Path, sequences: int, operator: Operator | None = None, **llama: Any) -> SteeredLlama:
    steerings = [] if operator is None else [steering_for(path, operator)]
    dials = {each.name: DIAL[each.operator] for each in steerings}
    how = {"n_ctx": 512, **EXACT, **llama}
    return SteeredLlama(path, steering=steerings, angles=dials, engine="hook", sequences=sequences, **how)


def rows_of(llm: SteeredLlama, texts: Texts) -> list[NDArray[np.float32]]:
    found = llm.map_logits(texts, lambda number, rows: (number, rows))
    assert [number for number, _ in found] == list(range(len(texts)))
    return [rows for _, rows in found]


def assert_close(found: list[NDArray[np.float32]], expected: list[NDArray[np.float32]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= TOLERANCE * np.ptp(other)


class Decodes:
    """How many decodes a model makes while this is watched."""

    def __init__(self, llm: SteeredLlama, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        decode = llm._ctx.decode

        def count(batch: Any) -> None:
            self.sizes.append(batch.n_tokens())
            decode(batch)

        monkeypatch.setattr(llm._ctx, "decode", count)


@pytest.mark.parametrize("operator", [None, *OPERATORS])
def test_logits_of_texts_together_are_those_of_each_alone(
    model: Path, operator: Operator | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, many = opened(model, 1, operator), opened(model, SEQUENCES, operator)
    texts = some_texts()
    decodes = Decodes(many, monkeypatch)
    found = rows_of(many, texts)
    assert len(decodes.sizes) < len(texts) / 4
    assert decodes.sizes[0] == 12  # what all begin with, once
    assert_close(found, [one.logits(*each) for each in texts])


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "phi", "gemma"])
def test_activations_of_prompts_together_are_those_of_each_alone(
    models: Callable[[str], tiny.TinyModel], family: str
) -> None:
    path = models(family).gguf_path
    llm = opened(path, SEQUENCES)
    prompts = [tokens for tokens, _ in some_texts()]
    prompts += [prompts[0], prompts[0][:-1]]  # one again, and what it begins with
    records = list(llm.observe_each(prompts))
    assert len(records) < len(prompts) / 4
    rows = np.concatenate([each.rows for each in records], axis=1)
    total = Record.zeros(len(llm.hook_sites), llm.hook_width)
    for each in records:
        total.add(each)
    expected = Record.zeros(len(llm.hook_sites), llm.hook_width)
    for number, prompt in enumerate(prompts):
        llm.observe(prompt, expected)
        longest = np.abs(expected.rows).max()
        assert np.abs(rows[:, number] - expected.rows[:, 0]).max() <= TOLERANCE * longest
    assert (total.count == expected.count).all()
    for name in ("sum", "sum_unit", "sum_norm"):
        one, other = getattr(total, name), getattr(expected, name)
        assert np.abs(one - other).max() <= TOLERANCE * np.abs(other).max()


def test_they_leave_nothing_behind(model: Path) -> None:
    """An answer and a text's logits afterwards are those of a model that has evaluated nothing."""
    llm, fresh = opened(model, SEQUENCES, "selective"), opened(model, 1, "selective")
    texts = some_texts(pairs=4)
    llm.logits(*texts[3])
    rows_of(llm, texts)
    assert llm.n_tokens == 0
    assert_close([llm.logits(*texts[2])], [fresh.logits(*texts[2])])
    list(llm.observe_each([tokens for tokens, _ in texts]))
    tokens = texts[1][0]
    assert next(llm.generate(tokens, temp=0)) == next(fresh.generate(tokens, temp=0))


def test_who_leaves_in_the_middle_leaves_nothing_behind(model: Path) -> None:
    """While the error, and with it the frames that failed, is still held."""
    llm, fresh = opened(model, SEQUENCES, "selective"), opened(model, 1, "selective")
    texts = some_texts()

    def fail(number: int, rows: NDArray[np.float32]) -> None:
        if number == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as left:
        llm.map_logits(texts, fail)
    memory = llama_cpp.llama_get_memory(llm._ctx.ctx)
    assert [llama_cpp.llama_memory_seq_pos_max(memory, number) for number in range(SEQUENCES)] == [-1] * SEQUENCES
    assert_close([llm.logits(*texts[5])], [fresh.logits(*texts[5])])
    del left
    assert llm.n_tokens > 0


def test_what_does_not_go_together_is_evaluated_alone(
    models: Callable[[str], tiny.TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts longer than a micro-batch, than a sliding window, answers that are gated, tokens that are read."""
    path = models("llama").gguf_path
    texts = some_texts(pairs=3)
    for llm, asked in (
        (opened(path, SEQUENCES, n_ubatch=16), texts),
        (opened(path, SEQUENCES, "selective", scope="response"), texts),
        (opened(path, 1), texts),
        (opened(path, SEQUENCES), [([7] * (ROWS + 3), 1), *texts]),
        (opened(models("gemma3").gguf_path, SEQUENCES), [([*range(2, 90)], 80), ([*range(3, 90)], 80)]),
    ):
        decodes = Decodes(llm, monkeypatch)
        found = rows_of(llm, asked)
        assert len(decodes.sizes) >= len(asked)
        assert_close(found, [llm.logits(*each) for each in asked])


@pytest.mark.parametrize(("tokens", "start"), [([1, 2], 2), ([1, 2], 0), ([3] * 513, 4)])
def test_a_text_that_cannot_be_measured_is_told_before_any_is_evaluated(
    model: Path, tokens: list[int], start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = opened(model, SEQUENCES)
    decodes = Decodes(llm, monkeypatch)
    with pytest.raises(SteerError, match="0 < start < tokens <= 512"):
        llm.map_logits([*some_texts(pairs=2), (tokens, start)], lambda _, rows: rows)
    with pytest.raises(SteerError, match="prompt of 1 to 512 tokens"):
        list(llm.observe_each([[1, 2], [3] * 513]))
    assert decodes.sizes == []


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8), st.data())
def test_a_tree_holds_every_text_and_nothing_twice(texts: list[list[int]], data: st.DataObject) -> None:
    asked = [Text(each, data.draw(st.integers(0, len(each) - 1))) for each in texts]
    tree = TokenTree.of(asked, begin=5)
    places = [[at for at, of in enumerate(tree.sequences) if number in of] for number in range(len(texts))]
    assert [[tree.tokens[at] for at in each] for each in places] == texts
    assert all([tree.positions[at] for at in each] == list(range(5, 5 + len(each))) for each in places)
    last = len(tree.tokens) - len(texts)
    assert tree.sequences[last:] == [[number] for number in range(len(texts))]
    heads = {tuple(each[:count]) for each in texts for count in range(1, len(each))}
    assert last == len(heads)
    wanted = [at for at, is_wanted in enumerate(tree.wanted) if is_wanted]
    for each, path, rows in zip(asked, places, tree.rows, strict=True):
        assert [wanted[row] for row in rows] == path[each.wanted :]


def test_batches_keep_the_order_and_the_limits() -> None:
    texts = [Text([1] * (3 + number % 40), 2) for number in range(100)]
    found = list(batches(texts, tokens=100, sequences=7))
    assert [text for batch in found for text in batch] == texts
    for batch in found:
        assert len(batch) <= 7
        assert sum(len(text.tokens) for text in batch) <= 100
        assert sum(len(text.tokens) - text.wanted for text in batch) <= ROWS


def test_a_head_is_what_all_begin_with_and_none_asks_for() -> None:
    texts = [Text([*range(20), number], 20) for number in range(3)]
    assert head_length(texts) == 20
    assert head_length([*texts, Text(list(range(30)), 9)]) == 9
    assert head_length([*texts, Text([*range(12), 99, 98], 13)]) == 12
    assert head_length([*texts, Text([5, 6, 7], 2)]) == 0

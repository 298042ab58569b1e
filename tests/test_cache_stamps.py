"""The cache rule as arithmetic on states, without a model."""

from __future__ import annotations

import pickle

from edge_steer.rotation import TurnBy
from edge_steer.runtime.cache import _MOST, OFF, CacheStamps, State, Wanted

EIGHT, FOUR = TurnBy(8.0), TurnBy(4.0)
GATED = (True,)


def always(state: State) -> Wanted:
    """What an answer under `state` wants where nothing is gated."""
    return Wanted(state, state)


def response(last: State) -> Wanted:
    """What an answer wants whose only steering is gated, and stands at `last` as the answer begins."""
    return Wanted(OFF, last, frozenset(["a"]))


def stamps_of(*states: object, opens: int | None = None) -> CacheStamps:
    """Ten tokens or fewer, each under its state."""
    stamps = CacheStamps(10, ["a"])
    for at, state in enumerate(states):
        stamps.stamp(at, at + 1, state, opens=at == opens)  # type: ignore[arg-type]
    return stamps


def test_states_are_one_where_what_acts_is_the_same() -> None:
    stamps = CacheStamps(10, ["a", "b"])
    assert stamps.state((None, None)) == stamps.state((None, None), (True, False)) == OFF
    assert stamps.state((EIGHT, None)) == CacheStamps(10, ["a", "b"]).state((TurnBy(8.0), None))
    different = [
        stamps.state((EIGHT, None)),
        stamps.state((FOUR, None)),
        stamps.state((None, EIGHT)),
        stamps.state((EIGHT, None), (True, False)),
        CacheStamps(10, ["c", "b"]).state((EIGHT, None)),
    ]
    assert len(set(different)) == len(different)


def test_a_cache_is_usable_up_to_the_first_token_of_another_state() -> None:
    eight, four = (CacheStamps(10, ["a"]).state((each,)) for each in (EIGHT, FOUR))
    stamps = stamps_of(eight, eight, four, eight)
    assert stamps.usable(4, 9, always(eight)) == 2
    assert stamps.usable(4, 9, always(four)) == 0
    assert stamps.usable(2, 9, always(eight)) == 2
    assert stamps.usable(4, 9, always(OFF)) == 0


def test_under_the_scope_response_a_prompt_is_unsteered_and_earlier_answers_stay_as_written() -> None:
    eight, four = (CacheStamps(10, ["a"]).state((each,), GATED) for each in (EIGHT, FOUR))
    stamps = stamps_of(OFF, eight, eight, OFF, OFF, opens=1)
    assert stamps.usable(5, 9, response(four)) == 5
    # The same prompt again: its last token must be steered as now, not as it was.
    assert stamps.usable(2, 2, response(eight)) == 2
    assert stamps.usable(2, 2, response(four)) == 1
    # Where the next prompt goes another way behind the token that opened an answer, it is a prompt token again.
    assert stamps.usable(2, 9, response(eight)) == 1


def test_a_saved_state_means_the_same_in_another_process() -> None:
    eight = CacheStamps(10, ["a"]).state((EIGHT,))
    saved = pickle.loads(pickle.dumps(stamps_of(OFF, eight, eight).save(3)))
    other = CacheStamps(10, ["a"])
    other.load(3, saved, unsteered=False)
    assert other.usable(3, 9, always(eight)) == 0
    assert other.usable(1, 9, always(OFF)) == 1
    assert other.save(3) == saved


def test_what_a_plain_llama_cached_fits_only_where_nothing_acts() -> None:
    eight = CacheStamps(10, ["a"]).state((EIGHT,))
    for unsteered, fits in ((True, 5), (False, 0)):
        stamps = CacheStamps(10, ["a"])
        stamps.load(5, None, unsteered=unsteered)
        assert stamps.usable(5, 9, always(OFF)) == fits
        assert stamps.usable(5, 9, always(eight)) == 0
        assert stamps.usable(5, 9, response(OFF)) == fits


def test_states_that_no_cached_token_bears_are_forgotten() -> None:
    stamps = CacheStamps(10, ["a"])
    first = stamps.state((TurnBy(-1.0),))
    stamps.stamp(0, 1, first)
    for step in range(2 * _MOST):
        stamps.stamp(1, 2, stamps.state((TurnBy(float(step)),)))
    assert len(stamps._numbers) <= _MOST
    assert stamps.usable(1, 9, always(first)) == 1

"""Metrics against cases computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edge_steer.measure import text_quality
from edge_steer.measure.capability import confidence, is_correct, load_questions
from edge_steer.measure.divergence import ReferenceDistribution
from edge_steer.measure.metrics import log_softmax, pick_log_probabilities, shared_prefix
from edge_steer.sweep.point_metrics import compute_metrics


def log_of(*rows: list[float]) -> np.ndarray:
    return np.log(np.array(rows, np.float32))


def test_log_softmax_is_that_of_the_book() -> None:
    found = log_softmax(np.array([[0.0, math.log(3)]], np.float32))
    assert np.exp(found) == pytest.approx(np.array([[0.25, 0.75]]))


def test_the_chosen_token_of_each_row_is_picked() -> None:
    assert pick_log_probabilities(np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), [1, 0]).tolist() == [2.0, 3.0]


def test_divergence_is_the_kullback_leibler_divergence() -> None:
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    by_hand = 0.5 * math.log(2) + 0.25 * math.log(1) + 0.25 * math.log(0.5)
    assert ReferenceDistribution.of(log_of(p)).divergence(log_of(q)) == pytest.approx([by_hand])


def test_the_divergence_of_a_model_from_itself_is_0() -> None:
    p = log_softmax(np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32))
    assert ReferenceDistribution.of(p).divergence(p) == pytest.approx(np.zeros(5), abs=1e-6)
    assert ReferenceDistribution.of(p, keep=7).divergence(p) == pytest.approx(np.zeros(5), abs=1e-6)


def test_tokens_that_are_not_kept_count_as_one() -> None:
    p, q = [0.5, 0.3, 0.1, 0.1], [0.4, 0.2, 0.1, 0.3]
    by_hand = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.2) + 0.2 * math.log(0.2 / 0.4)
    assert ReferenceDistribution.of(log_of(p), keep=2).divergence(log_of(q)) == pytest.approx([by_hand], rel=1e-5)


def test_a_cut_divergence_is_never_above_the_exact_one() -> None:
    rng = np.random.default_rng(1)
    p, q = (log_softmax(3 * rng.standard_normal((20, 200)).astype(np.float32)) for _ in range(2))
    exact, cut = ReferenceDistribution.of(p).divergence(q), ReferenceDistribution.of(p, keep=20).divergence(q)
    assert (cut <= exact + 1e-5).all()
    assert (cut > 0).all()


def test_a_shared_prefix_ends_where_the_first_token_differs() -> None:
    assert shared_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert shared_prefix([1, 2], [1, 2, 3]) == 2
    assert shared_prefix([], [1]) == 0


def test_repetition_counts_4_grams_of_words_that_stood_before() -> None:
    assert text_quality.repetition("a b c d e f g h") == 0.0
    # abcd bcda cdab dabc abcd: 5 of which 4 are distinct.
    assert text_quality.repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert text_quality.repetition("no no no no no no") == pytest.approx(2 / 3)
    assert text_quality.repetition("three words only") == 0.0


def test_language_consistency_is_the_share_of_latin_and_ascii() -> None:
    assert text_quality.language_consistency("Größe, naïve!") == 1.0
    assert text_quality.language_consistency("ab 你好") == 0.5
    assert text_quality.language_consistency(" ") == 1.0


def test_repeated_text_compresses() -> None:
    varied = "The quick brown fox jumps over the lazy dog near a quiet river bank."
    assert text_quality.compression_ratio("so it goes. " * 40) < 0.1 < text_quality.compression_ratio(varied)
    assert text_quality.compression_ratio("") == 1.0


def test_violations_are_a_perplexity_above_2_and_strictly_also_repetition() -> None:
    assert [text_quality.violates(p) for p in (1.5, 2.0, 2.1)] == [False, False, True]
    assert [text_quality.violates_strictly(1.5, r) for r in (0.3, 0.31)] == [False, True]
    assert text_quality.violates_strictly(2.1, 0.0)


def test_an_answer_is_right_where_it_scores_above_every_other_option() -> None:
    scores = [[-1.0, -2.0, -3.0], [-1.0, -0.5], [-1.0, -1.0]]
    assert is_correct(scores).tolist() == [True, False, False]


def test_confidence_is_the_share_of_the_answer_among_the_options() -> None:
    scores = [[math.log(0.6), math.log(0.1), math.log(0.1)], [-800.0, -800.0]]
    assert confidence(scores) == pytest.approx([0.75, 0.5])


def test_the_question_set_has_200_different_questions_with_one_answer_among_plausible_options() -> None:
    questions = load_questions()
    assert len(questions) >= 200
    assert len({question.prompt for question in questions}) == len(questions)
    assert min(sum(each.kind == kind for each in questions) for kind in {each.kind for each in questions}) >= 20
    for question in questions:
        assert len(set(question.options)) == len(question.options) >= 4, question
        assert all(option == option.strip() for option in question.options), question


def parts(gaps: list[float], kl: list[list[float]], scores: list[list[float]], texts: list[str]) -> dict[str, object]:
    return {
        "probes": {"gaps": gaps},
        "text": {"kl": kl, "log_p": [[-1.0] * len(each) for each in kl]},
        "questions": {"scores": scores},
        "answers": {"texts": texts, "log_p": [-0.5] * len(texts)},
    }


OFF = parts([1.0, 2.0], [[0.0, 0.0], [0.0]], [[0.0, -1.0]] * 4, ["a b c d e", "f g h i j"])
ON = parts([1.5, 2.7], [[0.1, 0.3], [0.5]], [[0.0, -1.0]] * 3 + [[-1.0, 0.0]], ["a a a a a", "f g h i j"])


def test_figures_are_means_over_items_and_changes_from_off() -> None:
    found = compute_metrics(4.0, ON, OFF)  # type: ignore[arg-type]
    assert found.gap == found.effect == pytest.approx(0.6)
    assert found.gap_error == pytest.approx(0.1)  # changes 0.5 and 0.7: deviation √0.02, over √2
    assert found.kl == pytest.approx(0.3)  # over all tokens alike
    assert found.kl_error == pytest.approx(0.15)  # passage means 0.2 and 0.5: deviation 0.212, over √2
    assert found.perplexity == pytest.approx(math.e)
    assert found.accuracy == found.retention == 0.75
    assert found.retention_error == 0.25  # one of four right answers turned
    assert found.repetition == pytest.approx(0.25)  # aaaa twice in the first answer, none in the second
    assert found.repetition_error == pytest.approx(0.25)  # 0.5 and 0: √(2 · 0.25²) / √2
    assert found.answer_perplexity == pytest.approx(math.exp(0.5))
    assert found.violations == 0
    assert found.strict_violations == 0.5
    assert found.shift is found.self_read is None
    assert found.complete


def test_a_half_has_every_other_item() -> None:
    first, second = (compute_metrics(4.0, ON, OFF, half) for half in (0, 1))  # type: ignore[arg-type]
    assert (first.gap, second.gap) == (pytest.approx(0.5), pytest.approx(0.7))
    assert (first.kl, second.kl) == (pytest.approx(0.2), pytest.approx(0.5))
    assert (first.retention, second.retention) == (1.0, 0.5)
    assert (first.repetition, second.repetition) == (0.5, 0.0)


def test_held_out_prompts_shift_by_1_where_they_move_as_far_as_the_classes_lie_apart() -> None:
    off = {"held_out": {"positive": [[1.0, 2.0]], "negative": [[0.0, 1.0]]}}
    on = {"held_out": {"positive": [[1.5, 2.5]], "negative": [[0.5, 1.5]]}}
    assert compute_metrics(1.0, on, off).shift == pytest.approx(0.5)


def test_figures_of_a_part_that_was_not_measured_are_none() -> None:
    found = compute_metrics(4.0, {"probes": ON["probes"]}, OFF)  # type: ignore[arg-type,dict-item]
    assert found.kl is found.retention is None
    assert not found.complete

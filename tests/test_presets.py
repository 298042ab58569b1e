"""The presets that ship, and the verb that shows them."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from edge_steer.cli.presets import presets
from edge_steer.errors import SteerError
from edge_steer.preset import PRESETS, load_axis, load_preset, neutral_passages, preset_names

NAMES = ("confidence", "formality", "refusal", "sentiment", "verbosity", "warmth")


def test_the_six_presets_ship() -> None:
    assert preset_names() == NAMES


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_has_enough_pairs_that_differ_and_none_twice(name: str) -> None:
    preset = load_preset(name)
    assert preset.name == name
    assert len(preset.positive) == len(preset.negative) >= 48
    pairs = list(zip(preset.positive, preset.negative, strict=True))
    assert all(positive != negative for positive, negative in pairs)
    prompts = [*preset.positive, *preset.negative]
    assert len(set(prompts)) == len(prompts)
    assert preset.description.endswith(".")
    assert preset.positive_name != preset.negative_name


@pytest.mark.parametrize("name", preset_names())
def test_the_probes_of_a_preset_are_enough_distinct_and_unseen(name: str) -> None:
    preset = load_preset(name)
    assert len(preset.probes) >= 16
    asked = [probe.prompt for probe in preset.probes]
    assert len(set(asked)) == len(asked)
    assert not set(asked) & {prompt.prompt for prompt in (*preset.positive, *preset.negative)}
    assert all(probe.positive != probe.negative for probe in preset.probes)


def test_there_are_neutral_passages_enough_and_none_twice() -> None:
    passages = neutral_passages()
    assert len(set(passages)) == len(passages) >= 40
    assert all(passage == passage.strip() != "" for passage in passages)


def test_an_apology_is_asked_for_in_answers_to_questions_of_no_preset() -> None:
    axis = load_axis("apology")
    assert len(axis.positive) == len(axis.negative) >= 8
    questions = (PRESETS / "apology.txt").read_text(encoding="utf-8").splitlines()
    for sorry, plain, question in zip(axis.positive, axis.negative, questions, strict=True):
        assert sorry.prompt != plain.prompt
        assert sorry.prompt.endswith(question)
        assert plain.prompt.endswith(question)
    used = {probe.prompt for name in NAMES for probe in load_preset(name).probes}
    used |= set((PRESETS / "open_ended.txt").read_text(encoding="utf-8").splitlines())
    assert not used & set(questions)  # on what steerings are measured on, nothing is made
    assert load_axis("warmth") == load_preset("warmth")


@pytest.mark.parametrize("name", ["none", "", "..", "../presets/sentiment"])
def test_an_unknown_preset_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(SteerError, match="sentiment, verbosity, warmth"):
        load_preset(name)


def test_the_verb_lists_the_presets_and_shows_one() -> None:
    run = CliRunner().invoke
    lines = run(presets, []).stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["name", *NAMES]
    rows = json.loads(run(presets, ["--json"]).stdout)
    assert [row["name"] for row in rows] == list(NAMES)
    assert rows[0]["pairs"] == len(load_preset(NAMES[0]).positive)

    first = load_preset("sentiment")
    shown = run(presets, ["sentiment"]).stdout
    assert first.description in shown
    for i in range(3):
        for text in (first.positive[i].prompt, first.negative[i].prompt, first.probes[i].prompt):
            assert text in shown
    one = json.loads(run(presets, ["sentiment", "--json"]).stdout)
    assert one["example_pairs"][0] == {"positive": first.positive[0].prompt, "negative": first.negative[0].prompt}
    assert one["example_probes"][2] == vars(first.probes[2])

    assert isinstance(run(presets, ["none"]).exception, SteerError)

"""Gates as logic: what is parsed, and the factor of each step of an answer, without a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_steer.errors import SteerError
from edge_steer.gate import Gate, When, split_gate
from edge_steer.runtime.gates import CALLS, SLACK, THINKING, AnswerGates, Place

THINK = THINKING[0]
HARMONY = next(each for each in THINKING if b"channel" in each[0])


def gate(text: str) -> Gate:
    parsed = Gate.parse(text)
    assert parsed is not None
    return parsed


def factors(text: str, pieces: list[bytes], prompt: bytes = b"", marker: tuple[bytes, bytes] | None = THINK) -> str:
    """The factor of every step, a character each: 0, 1, or - between."""
    gates = AnswerGates([gate(text)], Place.behind(prompt, marker))
    shown = []
    for piece in [None, *pieces]:
        if piece is not None:
            gates.feed(piece)
        shown.append({0.0: "0", 1.0: "1"}.get(gates.factors()[0], "-"))
    return "".join(shown)


# --- what is written ----------------------------------------------------------------------------------------------

_conditions = st.fixed_dictionaries(
    {},
    optional={
        "thinking": st.sampled_from(["inside", "after"]),
        "first": st.integers(1, 1 << 20),
        "after": st.integers(1, 1 << 20),
        "decay": st.integers(1, 1 << 20),
        "text": st.just(True),
        "when": st.builds(
            When,
            st.text("ab c-:.0", min_size=1).map(str.strip).filter(bool),
            st.booleans(),
            st.floats(allow_nan=False, allow_infinity=False),
            st.booleans(),
        ),
    },
)


@given(_conditions)
def test_a_gate_is_read_as_it_is_written(conditions: dict[str, object]) -> None:
    made = Gate(**conditions)  # type: ignore[arg-type]
    assert Gate.parse(str(made)) == made
    assert split_gate(f"happy.gguf:8{made}") == ("happy.gguf:8", str(made))


def test_all_is_no_gate_and_response_the_one_without_further_conditions() -> None:
    assert Gate.parse("@all") is None
    assert gate("@response") == gate(" @response".strip()) == Gate()
    assert str(gate("@response@first:3")) == "@first:3"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("response", "expected a gate such as @response"),
        ("", "expected a gate such as @response"),
        ("@respons", "did you mean @response?"),
        ("@after-thinkng", "did you mean @after-thinking?"),
        ("@first", "expected @first:N with N from 1"),
        ("@first:0", "expected @first:N with N from 1"),
        ("@decay:-3", "expected @decay:N with N from 1"),
        ("@after:99999999999999", "expected @after:N with N from 1"),
        ("@first:٣", "expected @first:N with N from 1"),
        ("@first:3@first:4", "one condition of each kind"),
        ("@thinking@after-thinking", "one condition of each kind"),
        ("@when", "expected @when NAME>x"),
        ("@when harm", "expected @when NAME>x"),
        ("@when harm>nan", "expected @when NAME>x"),
        ("@when harm>1:walking", "expected @when NAME>x"),
        ("@first:3" + "@" * 2000, "expected a gate such as"),
    ],
)
def test_what_is_no_gate_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(SteerError, match=said.replace("?", r"\?")) as error:
        Gate.parse(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_a_gate_begins_at_the_first_condition_that_is_known() -> None:
    assert split_gate("me@home/happy.gguf:8@first:3@text") == ("me@home/happy.gguf:8", "@first:3@text")
    assert split_gate("me@home/happy.gguf") == ("me@home/happy.gguf", None)
    assert split_gate("happy.gguf@all") == ("happy.gguf", "@all")


# --- counting -----------------------------------------------------------------------------------------------------


def test_first_and_after_count_the_tokens_of_the_answer() -> None:
    pieces = [b"x"] * 5
    assert factors("@response", pieces) == "111111"
    assert factors("@first:2", pieces) == "110000"
    assert factors("@after:2", pieces) == "001111"
    assert factors("@after:1@first:3", pieces) == "011000"


def test_decay_falls_in_a_line_to_nothing() -> None:
    gates = AnswerGates([gate("@decay:4")], Place(None))
    found = []
    for _ in range(6):
        found.append(gates.factors()[0])
        gates.feed(b"x")
    assert found == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_a_steering_without_a_gate_always_acts() -> None:
    gates = AnswerGates([None, gate("@first:1")], Place(None))
    gates.feed(b"x")
    assert gates.factors() == (1.0, 0.0)
    assert gates.on_prompt == (1.0, 0.0)
    assert gates.gated == (False, True)


def test_tokens_that_are_taken_back_are_not_counted() -> None:
    gates = AnswerGates([gate("@first:3@text")], Place(None))
    for piece in (b"a", b"<tool_call>", b"b"):
        gates.feed(piece)
    assert gates.factors() == (0.0,)
    gates.back(1)
    assert gates.step == 1
    assert gates.factors() == (1.0,)
    gates.feed(b"a")
    gates.feed(b"a")
    assert gates.factors() == (0.0,)


# --- thinking -----------------------------------------------------------------------------------------------------


def test_thinking_is_between_its_markers_also_where_tokens_split_them() -> None:
    whole = [b"<think>", b"a", b"b", b"</think>", b"x", b"y"]
    assert factors("@thinking", whole) == "0111000"
    assert factors("@after-thinking", whole) == "0000111"
    split = [b"<th", b"ink>a", b"</", b"thi", b"nk>", b"x"]
    assert factors("@thinking", split) == "0011100"
    assert factors("@after-thinking", split) == "0000011"


def test_a_prompt_may_open_the_thinking_or_close_it() -> None:
    assert factors("@thinking", [b"a", b"</think>", b"x"], b"assistant\n<think>\n") == "1100"
    assert factors("@after-thinking", [b"a", b"</think>", b"x"], b"assistant\n<think>\n") == "0011"
    assert factors("@after-thinking", [b"a", b"b"], b"assistant\n<think>\n\n</think>\n\n") == "111"
    assert factors("@thinking", [b"a", b"b"], b"assistant\n<think>\n\n</think>\n\n") == "000"


def test_an_answer_that_begins_without_thinking_is_after_it_once_that_is_seen() -> None:
    assert factors("@after-thinking", [b"\n", b"<", b"b>", b"x"]) == "00011"
    assert factors("@after-thinking", [b"Hi", b"x"]) == "011"


def test_a_model_that_marks_no_thinking_is_after_it_from_the_start() -> None:
    assert factors("@after-thinking", [b"<think>", b"x"], marker=None) == "111"


def test_counts_begin_where_thinking_lets_a_steering_act() -> None:
    pieces = [b"<think>", b"a", b"b", b"</think>", b"x", b"y", b"z"]
    assert factors("@after-thinking@first:2", pieces) == "00001100"
    assert factors("@thinking@after:1", pieces) == "00110000"
    assert factors("@after-thinking@decay:2", pieces) == "00001-00"


def test_thinking_in_channels() -> None:
    pieces = [b"<|channel|>", b"analysis", b"<|message|>", b"a", b"<|end|>", b"<|start|>", b"assistant", b"x"]
    assert factors("@thinking", pieces, marker=HARMONY) == "000110000"
    assert factors("@after-thinking", pieces, marker=HARMONY) == "000001111"
    assert factors("@after-thinking", [b"<|channel|>", b"final", b"x"], marker=HARMONY) == "0011"


# --- calls of tools -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS, ids=lambda each: each[0].decode())
def test_text_is_not_in_calls_of_any_form(call: tuple[bytes, bytes]) -> None:
    begin, end = call
    pieces = [b"a", begin, b"b", end or b"c", b"d"]
    assert factors("@text", pieces) == ("110011" if end else "110000")


def test_an_answer_that_begins_with_a_brace_is_a_call_and_one_in_the_middle_is_text() -> None:
    assert factors("@text", [b" ", b'{"name', b'"', b"}"]) == "11000"
    assert factors("@text", [b"a ", b"{", b"}"]) == "1111"
    assert factors("@text", [b"<think>", b"{", b"</think>", b"{"]) == "11110"


def test_a_marker_of_thinking_in_a_call_is_the_calls_text() -> None:
    assert factors("@text", [b"<tool_call>", b"<think>", b"</tool_call>", b"x"]) == "10011"


def test_a_call_in_thinking_is_a_call_and_thinking_goes_on_behind_it() -> None:
    pieces = [b"<think>", b"<tool_call>", b"a", b"</tool_call>", b"b", b"</think>", b"c"]
    assert factors("@text", pieces) == "11001111"
    assert factors("@thinking", pieces) == "01111100"


@given(st.lists(st.sampled_from([b"<think>", b"</think>", b"<tool_call>", b"</tool_call>", b"{", b"a", b" "])))
def test_how_text_is_split_into_tokens_does_not_matter(parts: list[bytes]) -> None:
    text = b"".join(parts)
    whole = AnswerGates([gate("@thinking"), gate("@text")], Place(THINK))
    split = AnswerGates([gate("@thinking"), gate("@text")], Place(THINK))
    for part in parts:
        whole.feed(part)
        for at in range(len(part)):
            split.feed(part[at : at + 1])
        assert whole.factors() == split.factors()
    assert len(text) == split.step


# --- readings -----------------------------------------------------------------------------------------------------


def test_when_decides_on_the_prompt_once() -> None:
    gates = AnswerGates([gate("@when harm>0.5"), gate("@when harm<0.5")], Place(None))
    assert gates.reads == ("harm",)
    assert not gates.runs
    gates.decide({"harm": 0.7})
    assert gates.factors() == (1.0, 0.0)
    gates.feed(b"x", {"harm": -3.0})
    assert gates.factors() == (1.0, 0.0)
    gates.decide({"harm": 0.5})
    gates.back(0)
    assert gates.factors() == (0.0, 0.0)


def test_a_running_when_follows_the_readings_with_slack() -> None:
    gates = AnswerGates([gate("@when harm>1:running"), gate("@when harm<1:running")], Place(None))
    assert gates.runs
    gates.decide({"harm": 0.0})
    found = [gates.factors()]
    for reading in (1.01, 1 - SLACK / 2, 1 - SLACK * 1.1, 1 - SLACK / 2, 1 + SLACK / 2, 1 + SLACK * 1.1):
        gates.feed(b"x", {"harm": reading})
        found.append(gates.factors())
    above, below = ("".join(str(int(each)) for each in column) for column in zip(*found, strict=True))
    assert above == "0110011"
    assert below == "1111110"

"""Gates on a model: each token of an answer is evaluated as its gate says, by whichever way the answer comes, and a
cached token is only used where it fits. The model is tiny and its answers are prescribed, so that they hold markers."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_cpp import LogitsProcessorList
from numpy.typing import NDArray
from planted import random_steering

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny

from edge_steer import SteeredLlama, SteerError
from edge_steer.architectures import architecture
from edge_steer.gate import Gate
from edge_steer.model_file import read_model
from edge_steer.rotation import Action
from edge_steer.runtime.answer import Sampling, stream_pieces
from edge_steer.runtime.engines import EngineName
from edge_steer.steering import Operator, Steering

EXACT: dict[str, Any] = {
    "type_k": llama_cpp.GGML_TYPE_F32,
    "type_v": llama_cpp.GGML_TYPE_F32,
    "n_threads": 1,
    "n_threads_batch": 1,
}
THINKS = tiny.CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>{{ '<think>' if think }}{% endif %}")
Actions = tuple[Action | None, ...]
HELLO = "<|bos|><|user|>hello there<|end|><|assistant|>"


@pytest.fixture(scope="module", name="model")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("llama", tmp_path_factory.mktemp("tiny")).gguf_path


def steering_for(model: Path, name: str, seed: int = 0, operator: Operator = "selective") -> Steering:
    """With class means, so that it can be read."""
    file = read_model(model)
    made = random_steering(
        file.base, architecture(file.architecture).sites(file.block_count), operator, seed=seed, name=name
    )
    return made.with_(class_means=np.tile([-0.5, 0.5], (len(made.sites), 1)), separation=np.ones(len(made.sites)))


def gated(model: Path, *, engine: EngineName = "hook", **how: Any) -> SteeredLlama:
    """happy at 40 degrees, calm at 20, harm off; THINKS as its template."""
    three = [steering_for(model, name, seed) for seed, name in enumerate(("happy", "calm", "harm"))]
    made: dict[str, Any] = {"angles": {"happy": 40, "calm": 20, "harm": None}, "n_ctx": 256, "template": THINKS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SteeredLlama(model, steering=three, engine=engine, **{**made, **EXACT, **how})


class Watched:
    """What acted on each cached token, seen from outside: every evaluation is noted as it is asked for."""

    def __init__(self, llm: SteeredLlama) -> None:
        self.llm = llm
        self.tokens: list[int] = []
        self.actions: list[Actions] = []
        self.opened = 0  # where the last token of the prompt stands
        self.written: list[bool] = []  # as part of an answer, that token included
        evaluate = llm.evaluate

        def noted(actions: Actions, tokens: Sequence[int], *args: Any, **how: Any) -> Any:
            begin = llm.n_tokens
            rows = evaluate(actions, tokens, *args, **how)
            self.tokens[begin:] = list(tokens)
            self.actions[begin:] = [actions] * len(tokens)
            self.written[begin:] = [at >= self.opened for at in range(begin, begin + len(tokens))]
            return rows

        llm.evaluate = noted  # type: ignore[method-assign]


def force(tokens: Sequence[int]) -> LogitsProcessorList:
    """The answer `tokens`, whatever the model would say."""
    left = iter(tokens)

    def choose(_: Any, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        forced = np.full_like(logits, -np.inf)
        forced[next(left)] = 0
        return forced

    return LogitsProcessorList([choose])


def split(llm: SteeredLlama, text: str) -> list[int]:
    """The tokens of a text."""
    return list(llm.tokenize(text.encode(), add_bos=False, special=True))


def answer(llm: SteeredLlama, prompt: Sequence[int], text: Sequence[int]) -> None:
    """An answer of these tokens, of which all but the last are evaluated."""
    stream: Iterator[int] = llm.generate(list(prompt), temp=0.0, logits_processor=force(text))
    assert [next(stream) for _ in text] == list(text)
    stream.close()  # type: ignore[attr-defined]


def logits_by_hand(llm: SteeredLlama, tokens: Sequence[int], actions: Sequence[Actions]) -> NDArray[np.float32]:
    """Behind tokens that are evaluated one by one in a cache that holds nothing else."""
    llm.reset()
    for token, each in zip(tokens, actions, strict=True):
        SteeredLlama.evaluate(llm, each, [token])
    return llm.last_logits()


def expected_factor(gate: Gate | None, opened: str, pieces: Sequence[str], step: int) -> float:
    """By looking at the whole text anew. opened: "<think>" where the prompt ends so. pieces: of the answer."""
    if gate is None:
        return 1.0

    def acts(count: int) -> bool:
        text = opened + "".join(pieces[:count])
        thinks = bool(re.search(r"<think>((?!</think>).)*$", text))
        said = re.sub(r"^\s*<think>.*?</think>", "", text)
        begun = said != text or not "<think>".startswith(said.lstrip())
        return {"": True, "inside": thinks, "after": begun and not thinks}[gate.thinking]

    count, so_far = sum(acts(each) for each in range(step)), "".join(pieces[:step])
    shut = (
        not acts(step)
        or (gate.text and bool(re.search(r"<tool_call>((?!</tool_call>).)*$", so_far)))
        or (gate.text and not opened and so_far.lstrip().startswith("{"))
        or (gate.first is not None and count >= gate.first)
        or (gate.after is not None and count < gate.after)
    )
    return 0.0 if shut else max(0.0, 1 - count / gate.decay) if gate.decay else 1.0


TEXTS = ("ab cd", "<think>no</think>ab", "a<tool_call>{}</tool_call>b", '{"name": 1}', "no</think> yes")
GATES = (
    None, "@response", "@first:2", "@after:2", "@decay:4", "@thinking", "@after-thinking", "@after-thinking@first:2",
    "@text", "@text@after:1@decay:9",
)  # fmt: skip
PROMPTS = (HELLO, f"{HELLO}<think>", "<|bos|><|user|>hello<|end|><|assistant|>")
_move = st.tuples(
    st.sampled_from(PROMPTS),
    st.sampled_from(TEXTS),
    st.sampled_from(GATES),
    st.sampled_from(GATES),
    st.sampled_from([40.0, -30.0, None]),
    st.sampled_from(["all", "all", "response"]),
    st.sampled_from(["fresh", "fresh", "follow", "save", "load", "logits"]),
)


@pytest.fixture(scope="module")
def pair(model: Path) -> tuple[Watched, SteeredLlama]:
    return Watched(gated(model)), gated(model)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(_move, min_size=2, max_size=7))
def test_whatever_was_cached_every_token_is_under_what_its_gate_says(
    pair: tuple[Watched, SteeredLlama], moves: list[tuple[Any, ...]]
) -> None:
    """And the logits are those of a cache that holds nothing else."""
    watched, fresh = pair
    llm = watched.llm
    history: list[int] = []
    saved: list[Any] = []
    for asked, said, happy, calm, dial, scope, how in moves:
        text = split(llm, said)
        llm.gates = {"happy": happy, "calm": calm}
        llm.angles = {"happy": dial}
        llm.scope = scope
        if how == "save" and llm.n_tokens:
            saved.append((llm.save_state(), watched.tokens[:], watched.actions[:], watched.written[:]))
        if how == "load" and saved:
            state, *notes = saved[-1]
            llm.load_state(state)
            watched.tokens, watched.actions, watched.written = (note[: llm.n_tokens] for note in notes)
        prompt = [*(history if how == "follow" and len(history) < 100 else []), *split(llm, asked)]
        before = list(zip(watched.tokens, watched.actions, watched.written, strict=True))[: llm.n_tokens]
        watched.opened = len(prompt) - 1
        if how == "logits":
            llm.logits([*prompt, *text], len(prompt))
        else:
            answer(llm, prompt, text)
        check_answer(watched, prompt, text, before)
        count = llm.n_tokens
        assert watched.tokens[:count] == llm.input_ids[:count].tolist() == [*prompt, *text[:-1]]
        shown = llm.last_logits()
        expected = logits_by_hand(fresh, watched.tokens[:count], watched.actions[:count])
        np.testing.assert_allclose(shown, expected, atol=2e-5 * np.ptp(expected))
        history = [*prompt, *text, *split(llm, "<|end|>")]


def check_answer(watched: Watched, prompt: list[int], text: list[int], before: list[tuple[int, Actions, bool]]) -> None:
    """What acted on each token. before: what was cached; of that, answers that were written stay as they were."""
    llm = watched.llm
    gates = [gate or (Gate() if llm.scope == "response" else None) for gate in llm.gates.values()]
    opened = "<think>" if llm.detokenize(prompt).endswith(b"<think>") else ""
    pieces = [llm.detokenize([token]).decode() for token in text]
    shared = 0
    while shared < min(len(before), len(prompt) - 1) and before[shared][0] == prompt[shared]:
        shared += 1
    for at in range(len(prompt) - 1):
        for number, steering in enumerate(llm.steerings):
            acted = watched.actions[at][number]
            plain = None if gates[number] else steering.action(llm.angles[steering.name])
            # The prompt token that opened an answer is one of the answer's only where that follows.
            opening = (
                at < shared and not before[at - 1][2] and (at + 1 == len(before) or before[at + 1][0] != prompt[at + 1])
            )
            kept = bool(gates[number]) and at < shared and before[at][2] and acted == before[at][1][number]
            kept = kept and not opening
            assert acted == plain or kept, (at, steering.name)
    for step in range(len(text)):
        for number, steering in enumerate(llm.steerings):
            dial = llm.angles[steering.name]
            factor = expected_factor(gates[number], opened, pieces, step)
            wanted = steering.action(dial * factor) if dial and factor else None
            assert watched.actions[len(prompt) - 1 + step][number] == wanted, (step, steering.name, str(gates[number]))


# --- every way to an answer ---------------------------------------------------------------------------------------


def acted(watched: Watched, prompt: Sequence[int]) -> str:
    """Whether happy acted on each token from the prompt's last on."""
    return "".join("0" if each[0] is None else "1" for each in watched.actions[len(prompt) - 1 :])


@pytest.mark.parametrize("engine", ["hook", "lora"])
def test_every_way_to_an_answer_goes_through_the_gates(model: Path, engine: EngineName) -> None:
    llm = gated(model, engine=engine, gates={"happy": "@after:1@first:3"})
    asked = split(llm, HELLO)
    watched = Watched(llm)
    for _ in llm.generate(asked, temp=0.0):
        if llm.n_tokens == len(asked) + 4:
            break
    assert acted(watched, asked) == "01100"
    expected = watched.tokens[len(asked) :]

    completion = llm.create_completion(asked, max_tokens=5, temperature=0, repeat_penalty=1.0)
    assert acted(watched, asked) == "01100"
    chat = llm.create_chat_completion(
        messages=[{"role": "user", "content": "hello there"}], max_tokens=5, temperature=0, repeat_penalty=1.0
    )
    assert acted(watched, asked) == "01100"
    assert chat["choices"][0]["message"]["content"] == completion["choices"][0]["text"]  # type: ignore[index]
    for _ in stream_pieces(llm, asked, Sampling(max_tokens=5, repeat_penalty=1.0)):
        pass
    assert acted(watched, asked) == "01100"
    assert watched.tokens[len(asked) :] == expected[: len(watched.tokens) - len(asked)]


def test_a_draft_model_that_is_often_wrong_changes_no_token_by_gates_of_counts(model: Path) -> None:
    """Drafts are evaluated at once, as the first; those that are taken back are not counted."""

    class Wrong(llama_cpp.llama_speculative.LlamaDraftModel):  # type: ignore[misc]
        def __call__(self, input_ids: Any, /, **_: Any) -> Any:
            return np.array([50], np.int64)

    plain = gated(model, gates={"happy": "@first:3"})
    asked = split(plain, HELLO)
    drafted = gated(model, gates={"happy": "@first:3"}, draft_model=Wrong())
    texts = []
    for llm in (plain, drafted):
        found = llm.create_completion(asked, max_tokens=12, temperature=0, repeat_penalty=1.0)
        texts.append(found["choices"][0]["text"])  # type: ignore[index]
    assert texts[0] == texts[1]


def test_tokens_that_are_sent_are_gated_one_by_one(model: Path) -> None:
    llm = gated(model, gates={"happy": "@text"})
    asked = split(llm, HELLO)
    watched = Watched(llm)
    stream = llm.generate(asked, temp=0.0)
    next(stream)
    stream.send(split(llm, "<tool_call>a</tool_call>b"))
    stream.close()
    assert acted(watched, asked) == "1" * 12 + "0" * 13 + "11"


def test_a_dial_that_moves_in_an_answer_moves_within_its_gate(model: Path) -> None:
    llm = gated(model, gates={"happy": "@after:2"})
    asked = split(llm, HELLO)
    watched = Watched(llm)
    for count, _ in enumerate(llm.generate(asked, temp=0.0)):
        llm.angles["happy"] = float(count + 1)
        if count == 4:
            break
    happy = llm.steerings[0]
    acting = [each[0] for each in watched.actions[len(asked) - 1 :]]
    assert acting == [None, None, happy.action(2), happy.action(3), happy.action(4)]


def test_a_gate_that_changes_in_an_answer_acts_from_the_next(model: Path) -> None:
    llm = gated(model)
    asked = split(llm, HELLO)
    watched = Watched(llm)
    for count, _ in enumerate(llm.generate(asked, temp=0.0)):
        llm.gates["happy"] = "@after:1"
        if count == 3:
            break
    assert acted(watched, asked) == "1111"
    for count, _ in enumerate(llm.generate(asked, temp=0.0)):
        llm.gates["happy"] = None
        if count == 3:
            break
    assert acted(watched, asked) == "0111"


# --- @when --------------------------------------------------------------------------------------------------------


def reading(llm: SteeredLlama, prompt: Sequence[int]) -> float:
    """Of harm, of a prompt's last token, with nothing gated."""
    return float(llm.read(list(prompt), ["harm"])["harm"][-1])


def test_when_decides_by_what_the_prompt_reads_without_the_gated_steerings(model: Path) -> None:
    plain = gated(model, angles={"happy": None, "calm": 20, "harm": None})
    asked = split(plain, HELLO)
    bound = reading(plain, asked)
    llm = gated(model)
    watched = Watched(llm)
    for sign, near, acts in ((">", -1e-3, "1111"), (">", 1e-3, "0000"), ("<", 1e-3, "1111"), ("<", -1e-3, "0000")):
        llm.gates["happy"] = f"@when harm{sign}{bound + near}"
        for dial in (40.0, -40.0, 40.0):
            llm.angles["happy"] = dial
            answer(llm, asked, split(llm, "abcd"))
            assert acted(watched, asked) == acts
            assert {each[0] for each in watched.actions[: len(asked) - 1]} == {None}
            expected = logits_by_hand(plain, watched.tokens, watched.actions)
            np.testing.assert_allclose(llm.last_logits(), expected, atol=2e-5 * np.ptp(expected))


def test_a_running_when_follows_what_each_token_reads(model: Path) -> None:
    """By hand: the reading of every token under what acted on it, and the bound with its slack."""
    from edge_steer.runtime.gates import SLACK

    probe = gated(model, gates={"happy": "@response"})
    asked = split(probe, HELLO)
    text = split(probe, "the sea was calm and the sun was bright")
    answer(probe, asked, text)
    middle = float(np.median(probe.read([*asked, *text], ["harm"])["harm"][-len(text) :]))
    llm = gated(model, gates={"happy": f"@when harm>{middle}:running"})
    watched = Watched(llm)
    answer(llm, asked, text)
    by_hand = gated(model, angles={"happy": None, "calm": None, "harm": None})
    read: list[float] = []
    with by_hand.token_readings.of(["harm"]):
        for at, (token, each) in enumerate(zip(watched.tokens, watched.actions, strict=True)):
            by_hand.evaluate(each, [token])
            read.append(by_hand.token_readings.at("harm", at))
        first = len(asked) - 1
        by_hand.keep(first)
        by_hand.evaluate(watched.actions[0], asked[-1:])
        on = by_hand.token_readings.at("harm", first) > middle
    wanted = []
    for at in range(first, len(watched.tokens)):
        on = on if at == first else read[at - 1] > (middle - SLACK if on else middle)
        wanted.append("1" if on else "0")
    assert acted(watched, asked) == "".join(wanted)
    assert len(set(wanted)) == 2, "the bound is never passed: choose another text"


def test_a_prompt_that_is_cached_whole_is_still_read(model: Path) -> None:
    llm = gated(model)
    asked = split(llm, HELLO)
    answer(llm, asked, split(llm, "a"))
    llm.gates["happy"] = f"@when harm>{reading(llm, asked) - 0.01}"
    watched = Watched(llm)
    answer(llm, asked, split(llm, "ab"))
    assert watched.actions[len(asked) - 1][0] == llm.steerings[0].action(40)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_what_a_steering_or_a_model_cannot_do_is_refused(model: Path) -> None:
    ablate, turn = steering_for(model, "a", 1, "ablation"), steering_for(model, "t", 2, "standard")
    unread = steering_for(model, "u", 3).with_(class_means=())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llm = SteeredLlama(model, steering=[ablate, turn, unread], angles={"a": 1, "t": 70, "u": 3}, n_ctx=256, **EXACT)
    for name, gate, said in (
        ("a", "@decay:3", "'a' is ablation"),
        ("t", "@decay:3", "'t' is standard"),
        ("a", "@when b>1", "expected a steering among a, t, u, got 'b'"),
        ("a", "@when u>1", "holds no class means"),
        ("a", "@thinking", "expected a model that marks its thinking"),
        ("b", "@response", "expected a steering among a, t, u, got 'b'"),
        ("a", "@frst:3", r"did you mean @first\?"),
    ):
        with pytest.raises(SteerError, match=said):
            llm.gates[name] = gate
    assert set(llm.gates.values()) == {None}
    with pytest.raises(SteerError, match="expected a steering among a, t, u"):
        llm.gates = {"a": "@response", "b": "@response"}
    assert llm.gates["a"] is None, "none is set where one cannot be"
    with pytest.warns(UserWarning, match="marks no thinking, so @after-thinking acts from the answer's start"):
        llm.gates["a"] = "@after-thinking"
    with pytest.raises(SteerError, match="cannot be removed"):
        del llm.gates["a"]


def test_the_thinking_of_a_model_is_found_in_its_template(model: Path) -> None:
    llm = gated(model)
    assert llm._thinking == (b"<think>", b"</think>")
    assert gated(model, template="{{ messages[0].content }}[THINK]")._thinking == (b"[THINK]", b"[/THINK]")
    assert gated(model, template=tiny.CHAT_TEMPLATE)._thinking is None


def test_a_user_who_writes_a_marker_opens_no_thinking(model: Path) -> None:
    llm = gated(model, gates={"happy": "@thinking"})
    watched = Watched(llm)
    asked = llm.chat_tokens([{"role": "user", "content": "what is <think>"}])
    answer(llm, asked, split(llm, "it"))
    assert acted(watched, asked) == "00"


def test_a_gate_in_a_file_holds_unless_another_is_given(model: Path, tmp_path: Path) -> None:
    steering = steering_for(model, "happy").with_(gate="@first:2", angle=30)
    steering.save(tmp_path / "happy.gguf")
    how: dict[str, Any] = {"steering": tmp_path / "happy.gguf", "n_ctx": 256, **EXACT}
    assert Steering.load(tmp_path / "happy.gguf").gate == "@first:2"
    assert SteeredLlama(model, **how).gates["happy"] == Gate(first=2)
    assert SteeredLlama(model, gates={"happy": "@response"}, **how).gates["happy"] == Gate()
    assert SteeredLlama(model, gates={"happy": None}, **how).gates["happy"] is None
    again = pickle.loads(pickle.dumps(SteeredLlama(model, gates={"happy": "@all"}, **how)))
    assert again.gates["happy"] is None
    for bad in ("@frst:2", "@all", "first"):
        with pytest.raises(SteerError, match=r"steering 'happy'"):
            steering.with_(gate=bad)

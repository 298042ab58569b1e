"""A conversation: answers are those of the model called directly, commands do what they say, Ctrl-C breaks nothing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import ONE_THREAD, process, ran, steering_for

pytest.importorskip("torch")
pytest.importorskip("transformers")


from edge_steer.chat_template import ChatTemplate
from edge_steer.errors import SteerError
from edge_steer.runtime.answer import Answer, Sampling
from edge_steer.runtime.chat import Chat, stream_answer
from edge_steer.runtime.hooked_llama import Message
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.runtime.repl import Repl

QUICK = Sampling(max_tokens=12)
EOS = 257
SMALL: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1}


@pytest.fixture
def llm(model: Path) -> SteeredLlama:
    steerings = [steering_for(model, seed=i, name=name) for i, name in enumerate(("happy", "formal"))]
    return SteeredLlama(model, steering=steerings, angles={"happy": 20, "formal": None}, **SMALL)


def answer_to(llm: SteeredLlama, messages: list[Message], sampling: Sampling = QUICK) -> Answer:
    """A whole answer."""
    stream = stream_answer(llm, messages, sampling)
    while True:
        try:
            next(stream)
        except StopIteration as end:
            answer: Answer = end.value
            return answer


def fresh_answer(llm: SteeredLlama, messages: list[Message], angles: dict[str, float | None]) -> str:
    """The answer of a model that has seen nothing before."""
    fresh = SteeredLlama(llm.model_path, steering=llm.steerings, angles=angles, **SMALL)
    return answer_to(fresh, messages).text


def talk(
    llm: SteeredLlama, *lines: str, sampling: Sampling = QUICK, system: str | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> tuple[str, list[str], Chat]:  # fmt: skip
    """What a Repl says and notes on `lines`, and its chat."""
    said: list[str] = []
    notes: list[str] = []

    rest = iter([*lines, None])

    def read() -> str:
        line = next(rest)
        if line is None:
            raise EOFError
        return line

    def tell(piece: str) -> None:
        said.append(piece)
        say(piece)

    chat = Chat(llm, sampling, system, note=notes.append)
    Repl(chat, read, tell, notes.append).run()
    return "".join(said), notes, chat


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_has_the_tokens_the_model_generates_and_no_more(model: Path, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, max_tokens=12, seed=5)
    for text in ("Hello", "Who are you, and why?", "the thing in the end"):
        llm, direct = (SteeredLlama(model, steering=steering_for(model), angle=15, **SMALL) for _ in range(2))
        prompt = direct.chat_tokens([user(text)])
        direct.set_seed(5)
        tokens = direct.generate(prompt, temp=temperature, top_k=40, top_p=0.95, min_p=0.05, repeat_penalty=1.1)
        expected = list(itertools.islice(itertools.takewhile(EOS.__ne__, tokens), 12))
        answer = answer_to(llm, [user(text)], sampling)
        assert answer.text == direct.detokenize(expected).decode(errors="replace").lstrip()
        assert (answer.prompt_tokens, answer.generated_tokens) == (len(prompt), len(expected))


def test_an_answer_is_that_of_create_completion(smollm2: Path) -> None:
    llm = SteeredLlama(smollm2, **SMALL)
    answer = answer_to(llm, [user("What is the capital of France?")], Sampling(max_tokens=24))
    llm.reset()
    expected = llm.create_completion(
        llm.chat_tokens([user("What is the capital of France?")]), max_tokens=24, temperature=0.0, repeat_penalty=1.1
    )
    assert answer.text == expected["choices"][0]["text"]
    assert answer.prompt_tokens == expected["usage"]["prompt_tokens"]
    assert answer.generated_tokens == expected["usage"]["completion_tokens"]


def scripted(llm: SteeredLlama, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model say `text`, a byte a token."""
    monkeypatch.setattr(llm, "detokenize", bytes)
    monkeypatch.setattr(llm, "generate", lambda *_, **__: (byte for byte in text.encode()))


def test_a_character_of_several_tokens_comes_whole(llm: SteeredLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(llm, " \n é—🙂.", monkeypatch)
    assert [piece.text for piece in stream_answer(llm, [user("Hello")], Sampling())] == ["é", "—", "🙂", "."]


def test_a_plain_chat_ends_at_a_blank_line_and_not_at_leading_ones(
    llm: SteeredLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.__dict__["chat_template"] = ChatTemplate.from_gguf(None, "", "")
    for says, text in (("\n\n One.\nTwo.\n\nNext", "One.\nTwo."), ("One.\n", "One.\n")):
        scripted(llm, says, monkeypatch)
        assert "".join(piece.text for piece in stream_answer(llm, [user("Hello")], Sampling())) == text


# --- the conversation -----------------------------------------------------------------------------------------------


def test_a_chat_remembers_and_answers_at_the_dial_of_the_moment(llm: SteeredLlama) -> None:
    said, notes, chat = talk(llm, "Hello", "/angle happy -30", "And now?", "/off", "And now?", system="Be the one.")
    assert notes == ["happy -30, formal off", "happy off, formal off"]
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 3
    assert said == "".join(turn["content"] + "\n" for turn in chat.turns[1::2])
    system = {"role": "system", "content": "Be the one."}
    for asked, dial in ((1, 20), (3, -30), (5, None)):
        expected = fresh_answer(llm, [system, *chat.turns[:asked]], {"happy": dial, "formal": None})
        assert chat.turns[asked]["content"] == expected
    assert chat.messages()[0] == system


def test_angle_shows_and_sets_dials_and_says_what_is_wrong(llm: SteeredLlama) -> None:
    lines = [
        "/angle",
        "/angle 8",
        "/angle formal off",
        "/angle formal x",
        "/angle other 3",
        "/angle happy nan",
        "/bogus",
    ]
    said, notes, _ = talk(llm, *lines)
    assert not said
    assert notes[0] == notes[2] == "happy +20, formal off"
    assert [note.split(":")[0] for note in notes[3:]] == ["Error"] * 4
    for note, word in zip([notes[1], *notes[3:]], ("NAME", "NUMBER", "'other'", "nan", "/compare"), strict=True):
        assert word in note


def test_compare_answers_at_minus_off_and_plus_with_one_seed_and_restores_the_dials(llm: SteeredLlama) -> None:
    sampling = Sampling(temperature=1.0, max_tokens=12, seed=3)
    said, notes, chat = talk(llm, "/compare Hello", sampling=sampling)
    expected = ""
    for dial, shown in ((-20, "-20"), (None, "off"), (20, "+20")):
        fresh = SteeredLlama(
            llm.model_path, steering=llm.steerings, angles={"happy": dial, "formal": None}, **SMALL
        )  # fmt: skip
        expected += f"[happy {shown}, formal off] {answer_to(fresh, [user('Hello')], sampling).text}\n"
    assert said == expected
    assert dict(llm.angles) == {"happy": 20, "formal": None}
    assert not chat.turns
    assert not notes


def test_compare_goes_to_the_ends_of_a_measured_range(model: Path) -> None:
    steering = steering_for(model, name="happy").with_(angle_min=-9.0, angle_max=15.0)
    for dial in (4, None):
        llm = SteeredLlama(model, steering=steering, angle=dial, **SMALL)
        said, _, _ = talk(llm, "/compare Hello")
        shown = [said.index(f"[happy {dial}] ") for dial in ("-9", "off", "+15")]
        assert shown == sorted(shown)
        assert llm.angle == dial


def test_strength_is_a_share_of_the_measured_range(model: Path) -> None:
    steerings = [
        steering_for(model, name="happy").with_(angle_min=-9.0, angle_max=15.0),
        steering_for(model, name="raw", seed=1),
    ]
    llm = SteeredLlama(model, steering=steerings, angles={"happy": None, "raw": None}, **SMALL)
    _, notes, _ = talk(
        llm, *(f"/strength {rest}" for rest in ("happy -0.5", "happy 2", "raw 1", "0.5", "sad 1", "happy x"))
    )
    assert notes[0] == "happy -4.5, raw off"
    for note, word in zip(notes[1:], ("-1 to 1", "sweep --write", "NAME", "NAME", "-1 to 1"), strict=True):
        assert note.startswith("Error: ")
        assert word in note
    alone = SteeredLlama(model, steering=steerings[0], angle=None, **SMALL)
    assert talk(alone, "/strength 0.5")[1] == ["happy +7.5"]


def test_a_gate_acts_from_the_next_answer_on(llm: SteeredLlama) -> None:
    def said(*lines: str) -> str:
        text, notes, _ = talk(llm, *lines, "/off", "/gate happy @all", "/angle happy 20")
        assert notes[-1] == "happy +20, formal off"
        return text

    plain, gated = said("hello there"), said("/gate happy @first:3", "hello there")
    llm.gates["happy"] = "@first:3"
    assert gated == answer_to(llm, [{"role": "user", "content": "hello there"}]).text + "\n" != plain
    notes = talk(llm, "/gate", "/gate happy @decay:9@text", "/gate @text", "/gate sad @text", "/gate happy text")[1]
    assert notes[:2] == ["happy +20@first:3, formal off", "happy +20@decay:9@text, formal off"]
    for note, word in zip(notes[2:], ("/gate NAME", "among happy, formal", "/gate NAME"), strict=True):
        assert note.startswith("Error: ")
        assert word in note
    assert str(llm.gates["happy"]) == "@decay:9@text"


def test_an_ablation_is_compared_on_and_off_only(model: Path) -> None:
    llm = SteeredLlama(model, steering=steering_for(model, "ablation", name="no"), **SMALL)
    said, _, _ = talk(llm, "/compare Hello", "/off", "/angle on")
    assert said.count("[no on]") == said.count("[no off]") == 1


def test_compare_without_a_dial_is_an_error(model: Path) -> None:
    llm = SteeredLlama(model, **SMALL)
    said, notes, _ = talk(llm, "/compare Hello", "/angle 3", "/off")
    assert not said
    assert "no angle" in notes[0]
    assert "no steering" in notes[1]
    assert notes[2] == "no steering"


def test_save_writes_the_conversation_once(llm: SteeredLlama, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    others = (file, tmp_path / "none" / "x", "~nobody-here/x")
    _, notes, chat = talk(llm, "Hello", f"/save {file}", *(f"/save {other}" for other in others), "/save")
    assert json.loads(file.read_text("utf-8")) == {
        "model": "llama.gguf",
        "angles": {"happy": 20.0, "formal": None},
        "gates": {"happy": None, "formal": None},
        "scope": "all",
        "messages": chat.messages(),
    }
    assert notes[0] == f"saved {file}"
    assert all(note.startswith("Error: ") for note in notes[1:])
    assert len(notes) == 5
    assert list(tmp_path.iterdir()) == [file]


def test_reset_forgets_and_help_lists_every_command(llm: SteeredLlama) -> None:
    _, notes, chat = talk(llm, "Hello", "/reset", "/help", "", "/quit", "never asked")
    assert not chat.turns
    assert notes[0] == "the conversation is forgotten"
    for command in ("/angle", "/strength", "/off", "/compare", "/reset", "/save", "/help", "/quit"):
        assert command in notes[1]


def test_a_chat_that_outgrows_the_context_drops_its_oldest_turns_and_keeps_the_system_prompt(llm: SteeredLlama) -> None:
    asked = [f"{number} {'word ' * 12}end" for number in range(6)]
    _, notes, chat = talk(llm, *asked, system="Be brief.")
    assert chat.messages()[0] == {"role": "system", "content": "Be brief."}
    kept = [turn["content"] for turn in chat.turns[::2]]
    assert kept == asked[-len(kept) :]
    assert 0 < len(kept) < len(asked)
    assert notes
    assert all("context of 256 tokens is full: forgot the oldest 1 of " in note for note in notes)
    assert chat.turns[-1]["content"] == fresh_answer(llm, chat.messages()[:-1], {"happy": 20, "formal": None})


def test_a_question_that_never_fits_is_an_error_and_drops_nothing(llm: SteeredLlama) -> None:
    said, notes, chat = talk(llm, "Hello", "word " * 200)
    assert len(chat.turns) == 2
    assert said == chat.turns[1]["content"] + "\n"
    assert notes[0].startswith("Error: expected a prompt of less than 256 tokens")


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


def test_ctrl_c_while_an_answer_is_shown_keeps_what_was_said(llm: SteeredLlama) -> None:
    pressed: list[Any] = []

    def say(piece: str) -> None:
        if not pressed and piece.strip():
            pressed.append(piece)
            raise KeyboardInterrupt

    said, notes, chat = talk(llm, "Hello", "Go on", say=say)
    assert notes == ["stopped"]
    assert chat.turns[1]["content"] == pressed[0]
    assert len(chat.turns) == 4
    assert said.startswith(pressed[0] + "\n")
    assert chat.turns[3]["content"] == fresh_answer(llm, chat.turns[:3], {"happy": 20, "formal": None})


@pytest.mark.parametrize("after", [1, 2, 5])
def test_ctrl_c_while_the_model_computes_leaves_a_right_cache(
    llm: SteeredLlama, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = llm._ctx.decode, []

    def interrupted(batch: object) -> None:
        decode(batch)
        calls.append(batch)
        if len(calls) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(llm._ctx, "decode", interrupted)
    _, notes, chat = talk(llm, "Hello there", "Go on")
    assert notes == (["", "stopped"] if after == 1 else ["stopped"])
    assert len(chat.turns) == (2 if after == 1 else 4)
    assert chat.turns[-1]["content"] == fresh_answer(llm, chat.turns[:-1], {"happy": 20, "formal": None})


# --- the command ----------------------------------------------------------------------------------------------------


def test_a_piped_chat_puts_answers_on_stdout_and_all_else_on_stderr(model: Path, tmp_path: Path) -> None:
    steering, log = tmp_path / "happy.gguf", tmp_path / "log.json"
    steering_for(model, name="happy").save(steering)
    lines = [
        "Hello",
        "/angle -30",
        "Hello",
        "/compare Hi",
        "/nonsense",
        "/reset",
        "Hello",
        f"/save {log}",
        "/quit",
        "x",
    ]
    found = process(
        "chat", "-m", model, "-s", f"{steering}:20", "--max-tokens", 8, "--ctx", 256, *ONE_THREAD,
        input="\n".join(lines).encode(),
    )  # fmt: skip
    assert found.returncode == 0
    llm = SteeredLlama(model, steering=steering, angle=20, **SMALL)
    turns: list[Message] = []

    def said(text: str, angle: float | None) -> str:
        llm.angle = angle
        return answer_to(llm, [*turns, user(text)], Sampling(max_tokens=8)).text

    expected = []
    for angle in (20, -30):
        expected.append(said("Hello", angle))
        turns += [user("Hello"), {"role": "assistant", "content": expected[-1]}]
    for angle, shown in ((-30, "-30"), (None, "off"), (30, "+30")):
        expected.append(f"[happy {shown}] {said('Hi', angle)}")
    turns.clear()
    expected.append(said("Hello", -30))
    assert found.stdout.decode() == "".join(text + "\n" for text in expected)
    notes = found.stderr.decode().splitlines()
    assert notes[0] == "happy -30"
    assert notes[1].startswith("Error: expected a command among /angle")
    assert notes[2:] == ["the conversation is forgotten", f"saved {log}"]
    assert [turn["content"] for turn in json.loads(log.read_text("utf-8"))["messages"]] == ["Hello", expected[-1]]


def test_a_chat_survives_bytes_that_are_no_text(model: Path) -> None:
    found = process("chat", "-m", model, "--max-tokens", 4, *ONE_THREAD, input=b"\xff\xfe Hello\n/help\n")
    assert found.returncode == 0
    assert b"/compare TEXT" in found.stderr


def test_the_end_of_input_ends_a_chat(model: Path) -> None:
    assert ran("chat", "-m", model, *ONE_THREAD, input="").stdout == ""


def test_an_answer_without_room_is_refused(model: Path) -> None:
    with pytest.raises(SteerError, match="raise --ctx"):
        answer_to(SteeredLlama(model, **SMALL), [user("word " * 300)])


# --- reading --------------------------------------------------------------------------------------------------------


def test_read_on_tells_of_an_answer_s_readings_and_changes_no_answer(model: Path) -> None:
    steerings = [
        steering_for(model, seed=i, name=name).with_(class_means=[[-1.0, 1.0]] * 6)
        for i, name in enumerate(("happy", "formal"))
    ]
    steerings[1] = steerings[1].with_(class_means=[[-2.0, 3.0]] * 6)
    expected, _, _ = talk(
        SteeredLlama(model, steering=steerings, angles={"happy": 20, "formal": None}, **SMALL), "Hello"
    )
    llm = SteeredLlama(model, steering=steerings, angles={"happy": 20, "formal": None}, **SMALL)
    notes: list[str] = []
    said: list[str] = []
    told: list[Answer] = []
    lines = iter(["/read on", "Hello", "/read off", "/reset", "Hello", "/read", "/quit"])
    shown = lambda piece: f"{piece.text}|" if piece.readings else piece.text  # noqa: E731
    sum_up = lambda answer: told.append(answer) or "summed up"  # noqa: E731
    Repl(Chat(llm, QUICK), lambda: next(lines), said.append, notes.append, show=shown, sum_up=sum_up).run()
    read, unread = "".join(said).splitlines()
    assert (read.replace("|", ""), unread) == (expected.strip(), expected.strip())
    assert "|" in read
    assert notes == [
        "reading happy, formal",
        "summed up",
        "not reading",
        "the conversation is forgotten",
        "Error: expected /read on or /read off, got /read",
    ]
    assert len(told) == 1
    assert told[0].readings is not None
    assert list(told[0].readings) == ["happy", "formal"]


def test_a_steering_without_class_means_cannot_be_read(llm: SteeredLlama) -> None:
    _, notes, chat = talk(llm, "/read on")
    assert len(notes) == 1
    assert "holds no class means" in notes[0]
    assert not chat.sampling.read

"""Prompts, the files that they come from, and sets of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_steer.errors import FormatError, SteerError
from edge_steer.prompt_files import LONGEST_LINE, prompt_set, read_prompts
from edge_steer.prompts import Probe, Prompt, PromptSet

Write = Callable[[str, bytes | str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "Hi there.\n\n  How are you?  \n"),
        ("p.TXT", "Hi there.\nHow are you?"),
        ("p.jsonl", '{"prompt": "Hi there."}\n\n{"prompt": "How are you?", "system": null}\n'),
        ("p.csv", "prompt\nHi there.\n\nHow are you?\n"),
        ("p.csv", "system, prompt,prefix\n,Hi there.,\n,How are you?\n"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_every_format_reads_with_any_line_end_and_with_a_utf8_bom(
    write: Write, name: str, content: str, end: str, bom: bytes
) -> None:
    path = write(name, bom + content.replace("\n", end).encode())
    assert read_prompts(path) == (Prompt("Hi there."), Prompt("How are you?"))
    assert read_prompts(str(path)) == read_prompts(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", '{"prompt": "a, \\"b\\"\\nc\u2028d", "system": "Be brief.", "prefix": " Well,"}'),
        ("p.csv", 'prefix,prompt,system\n" Well,","a, ""b""\nc\u2028d",Be brief.\n'),
    ],
)
def test_system_and_prefix_commas_quotes_and_line_separators_survive(write: Write, name: str, content: str) -> None:
    assert read_prompts(write(name, content)) == (Prompt('a, "b"\nc\u2028d', "Be brief.", " Well,"),)


@pytest.mark.parametrize(
    ("name", "content", "line", "words"),
    [
        ("p.txt", b"", None, "empty file"),
        ("p.txt", b"\n \n", None, "got none"),
        ("p.txt", b"\xef\xbb\xbf", None, "got none"),
        ("p.csv", b"prompt\n", None, "got none"),
        ("p.txt", b"a\nb\0c\n", 2, "binary"),
        ("p.txt", b"a\r\nb\r\n\xe9t\xe9\r\n", 3, "expected UTF-8, got byte 0xe9"),
        ("p.txt", b"\xef\xbb\xbfa\n\xff", 2, "expected UTF-8, got byte 0xff"),
        ("p.txt", "a\n".encode("utf-16"), 1, "UTF-16"),
        ("p.txt", "a\nb\n" + "x" * (LONGEST_LINE + 1), 3, "100001"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', 2, "invalid JSON"),
        ("p.jsonl", '["a"]\n', 1, "expected a JSON object"),
        ("p.jsonl", "[" * 50_000, 1, "invalid JSON"),
        ("p.jsonl", '{"prompt": ' + "9" * 5000 + "}", 1, "p.jsonl"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": 3}\n', 3, "expected text as prompt, got 3"),
        ("p.jsonl", '{"prompt": "a", "system": ["b"]}\n', 1, "expected text as system"),
        ("p.jsonl", '{"prompt": " "}\n', 1, "expected text as prompt, got a blank"),
        ("p.jsonl", '{"prompt": "a", "system": ""}\n', 1, "expected text as system, got a blank"),
        ("p.jsonl", '{"system": "a"}\n', 1, "expected text as prompt, got None"),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', 1, "surrogate"),
        ("p.jsonl", '{"prompt": "a", "promt": "b", "x": 1}\n', 1, "'promt', 'x'"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}\n', 2, "every key once, got 'prompt' twice"),
        ("p.csv", "text,system\na,b\n", 1, "prompt column"),
        ("p.csv", "\nprompt,sistem\na,\n", 2, "'sistem'"),
        ("p.csv", "prompt,prompt\na,b\n", 1, "every column once"),
        ("p.csv", 'prompt,system\n"a\nb",c\nYes, sir, no.,d\n', 4, "at most 2 cells, got 4"),
        ("p.csv", "prompt,system\na,b\n,c\n", 3, "expected text as prompt, got a blank"),
        ("p.csv", "system,prompt\na\n", 2, "expected text as prompt, got None"),
        ("p.csv", 'prompt\na\n"b\nc\n', 3, "expected a CSV row"),
        ("p.csv", "prompt\n" + "x" * (LONGEST_LINE + 1), 2, "100001"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_with_file_and_line(
    write: Write, name: str, content: bytes | str, line: int | None, words: str
) -> None:
    path = write(name, content)
    with pytest.raises(FormatError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert words in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300


def test_a_missing_file_a_folder_and_another_suffix_are_refused(tmp_path: Path, write: Write) -> None:
    (tmp_path / "folder.txt").mkdir()
    write("p.json", "[]")
    write("p", "a")
    for name, words in (
        ("none.txt", "no such file"),
        ("folder.txt", "a folder"),
        ("p.json", "got .json"),
        ("p", "got no suffix"),
        ("-", "got no suffix"),
    ):
        with pytest.raises(SteerError, match=words) as caught:
            read_prompts(tmp_path / name)
        assert name in str(caught.value)


def test_a_file_of_a_terabyte_is_refused_unread(tmp_path: Path) -> None:
    for suffix in ("txt", "jsonl", "csv"):
        path = tmp_path / f"p.{suffix}"
        with path.open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(FormatError, match="expected at most"):
            read_prompts(path)


@pytest.mark.parametrize("open_", ["[", '{"a":', '{"prompt":['])
def test_nesting_of_any_depth_is_refused_in_one_line(tmp_path: Path, open_: str) -> None:
    """Where Python's own limit lies depends on the call: every depth around it is tried."""
    path = tmp_path / "p.jsonl"
    for depth in [*range(150, 1100), 50_000 // len(open_)]:
        close = "".join({"[": "]", "{": "}"}[each] for each in reversed(open_) if each in "[{")
        path.write_text(open_ * depth + "1" + close * depth)
        with pytest.raises(FormatError) as caught:
            read_prompts(path)
        assert len(str(caught.value)) < len(str(path)) + 300


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.csv", 'prompt\n"' + "one\n" * 40_000 + '"\n', None),
        ("p.csv", 'prompt\n"' + "one\n" * 20_000, None),
        ("p.csv", "prompt;system\na;b\n", None),
        ("p.csv", 'prompt\n=cmd()\n"a""b"\n', ("=cmd()", 'a"b')),
        ("p.csv", 'prompt\na "quoted" word\n', ('a "quoted" word',)),
        ("p.txt", "caf\xe9\n".encode("latin-1"), None),
        ("p.txt", "é\n".encode() + "é\n".encode("latin-1"), None),
        ("p.txt", "a\n".encode("utf-16-le"), None),
        ("p.txt", "a\n".encode("utf-32"), None),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}\n', None),
        ("p.jsonl", '{"prompt": ' + "1" * 90_000 + "}\n", None),
        ("p.jsonl", '{"prompt": NaN}\n', None),
    ],
)
def test_other_dialects_and_mixed_encodings_are_read_or_refused_with_the_line(
    write: Write, name: str, content: bytes | str, prompts: tuple[str, ...] | None
) -> None:
    path = write(name, content)
    if prompts is not None:
        assert tuple(each.prompt for each in read_prompts(path)) == prompts
        return
    with pytest.raises(FormatError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300


PIECES = b"""{"prompt": |"a"|}|\n|\r|\xff|\xef\xbb\xbf|,|"|\\ud800|prompt,system|null|1e999|\xe2\x80\xa8| """.split(
    b"|"
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(["txt", "jsonl", "csv"]), data=st.binary() | st.lists(st.sampled_from(PIECES)).map(b"".join)
)
def test_any_bytes_are_prompts_or_a_one_line_error(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = tmp_path / f"p.{suffix}"
    path.write_bytes(data)
    refusal = None
    try:
        prompts = read_prompts(path)
    except SteerError as error:
        refusal = str(error)
    if refusal is None:
        assert all(prompt.prompt.strip().encode() for prompt in prompts)
    else:
        assert refusal.startswith(str(path))
        assert "\n" not in refusal


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(*[st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)] * 3), min_size=1, max_size=4
    )
)
def test_what_json_writes_is_read_back(tmp_path: Path, rows: list[tuple[str, str, str]]) -> None:
    path = tmp_path / "p.jsonl"
    lines = (
        json.dumps(dict(zip(("prompt", "system", "prefix"), row, strict=True)), ensure_ascii=False) for row in rows
    )
    path.write_bytes("\n".join(lines).encode())
    assert read_prompts(path) == tuple(Prompt(*row) for row in rows)


# --- sets ---------------------------------------------------------------------------------------------------------


def test_two_files_make_a_set_named_after_them_and_may_differ_in_length(write: Write) -> None:
    happy, sad = write("happy.txt", "a\nb\n"), write("sad.txt", "c\n")
    made = prompt_set(happy, sad, "mood")
    assert (made.name, made.positive_name, made.negative_name) == ("mood", "happy", "sad")
    assert (len(made.positive), len(made.negative), made.probes) == (2, 1, ())


def test_two_equal_sides_are_refused_whatever_their_order_and_format(write: Write) -> None:
    for other in (write("q.txt", "b\na\n"), write("q.csv", "prompt\na\nb\n"), write("p.txt", "a\nb\n")):
        with pytest.raises(SteerError, match="the two sides are the same"):
            prompt_set(write("p.txt", "a\nb\n"), other, "x")
    assert prompt_set(write("p.txt", "a\nb\n"), write("q.txt", "a\na\nb\n"), "x").negative


def test_a_set_with_an_empty_side_is_refused(write: Write) -> None:
    with pytest.raises(FormatError, match=r"empty\.txt: .*empty file"):
        prompt_set(write("p.txt", "a\n"), write("empty.txt", ""), "x")
    with pytest.raises(SteerError, match="no negative one"):
        PromptSet("x", "", "p", "n", (Prompt("a"),), ())
    with pytest.raises(SteerError, match="no positive one"):
        PromptSet("x", "", "p", "n", (), (Prompt("a"),))


def test_sha256_tells_any_two_sets_of_prompts_apart_and_knows_only_the_prompts() -> None:
    a, b, c = Prompt("a"), Prompt("b"), Prompt("c")

    def sha(positive: tuple[Prompt, ...], negative: tuple[Prompt, ...], name: str = "x") -> str:
        return PromptSet(name, name, name, name, positive, negative).sha256

    sets = [
        ((a,), (b,)), ((b,), (a,)), ((a, b), (c,)), ((a,), (b, c)), ((b, a), (c,)), ((Prompt("ab"),), (c,)),
        ((Prompt("a", "b"),), (c,)), ((Prompt("a", None, "b"),), (c,)),
    ]  # fmt: skip
    assert len({sha(*sides) for sides in sets}) == len(sets)
    assert sha((a,), (b,), "x") == sha((a,), (b,), "y")
    # Kept in steering files: a change of the encoding would orphan them.
    assert sha((a,), (b,)) == "3b5595a019866d71fe9857df20064e9f81eb22cb1f79f2d2fc47567dbafb1d59"


def test_prompts_and_probes_are_frozen_and_refuse_what_is_no_text() -> None:
    with pytest.raises(FrozenInstanceError):
        Prompt("a").prompt = "b"  # type: ignore[misc]
    for bad in ("", " \n", None, 3, "\ud800"):
        with pytest.raises(FormatError, match="as prompt"):
            Prompt(bad)  # type: ignore[arg-type]
        with pytest.raises(FormatError, match="as negative"):
            Probe("a", "b", bad)  # type: ignore[arg-type]

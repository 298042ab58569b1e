"""Nothing that is read is ever written over, by whatever name it is called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import ONE_THREAD, process, run, steering_for

pytest.importorskip("torch")
import tiny

from edge_steer.prompt_files import read_prompts
from edge_steer.prompts import Prompt, PromptSet
from edge_steer.whole_file import whole_file


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model, prompts, a steering, and a symbolic and a hard link to the model."""
    model = tiny.build("llama", tmp_path).gguf_path
    for name in ("p", "n"):
        (tmp_path / f"{name}.txt").write_text(f"I {name} tea\nI {name} rain\n")
    steering_for(model).with_(angle=8.0).save(tmp_path / "s.gguf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "s.gguf").write_bytes((tmp_path / "s.gguf").read_bytes())
    (tmp_path / "out" / "sweep.csv").write_text("prompt\nI like tea\n")
    (tmp_path / "soft.gguf").symlink_to(model)
    os.link(model, tmp_path / "hard.gguf")
    return tmp_path


CALIBRATE = "calibrate -m {}/llama.gguf --positive {}/p.txt --negative {}/n.txt --force -o {}/"


@pytest.mark.parametrize(
    "line",
    [
        *(CALIBRATE + name for name in ("llama.gguf", "soft.gguf", "hard.gguf", "p.txt", "n.txt")),
        CALIBRATE.replace("--force", "--orthogonal-to {}/s.gguf --force") + "s.gguf",
        "inspect {}/s.gguf --force --plot {}/s.gguf",
        "export -m {}/llama.gguf -s {}/s.gguf --to gguf --force -o {}/soft.gguf",
        "export -m {}/llama.gguf -s {}/s.gguf --to embedded --force -o {}/s.gguf",
        "export -m {}/llama.gguf -s {}/s.gguf --to lora --angle 8 --force -o {}/llama",
        "import {}/s.gguf -m {}/llama.gguf --force -o {}/hard.gguf",
        "export -m {}/llama -s {}/out/s.gguf --to hf --force -o {}/out",
        "sweep -m {}/llama.gguf -s {}/s.gguf --positive {}/out/sweep.csv --negative {}/n.txt -o {}/out",
        "convert {}/llama --force -o {}/llama/config.json",
        "convert {}/llama -s {}/s.gguf --force -o {}/s.gguf",
    ],
)
def test_an_output_that_is_an_input_is_refused(place: Path, line: str) -> None:
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    found = run(*line.replace("{}", str(place)).split())
    assert found.exit_code == 1
    assert "which is read; give another -o" in found.stderr
    assert found.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_what_a_link_leads_to_is_written_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with whole_file(tmp_path / "link", force=True) as part:
        part.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


# --- what is read from a closed or odd standard input -----------------------------------------------------------------


def test_a_closed_standard_input_is_one_line(place: Path) -> None:
    for line in (f"chat -m {place}/llama.gguf --ctx 256", f"generate -m {place}/llama.gguf -p - --ctx 256"):
        command = f"{sys.executable} -m edge_steer {line} <&-"
        found = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
        assert found.returncode == 1
        assert "got it closed" in found.stderr
        assert "Traceback" not in found.stderr


def test_a_byte_order_mark_on_standard_input_is_no_part_of_the_prompt(place: Path) -> None:
    line = ("generate", "-m", place / "llama.gguf", "-p", "-", "--ctx", 256, "--max-tokens", 4, "--json", *ONE_THREAD)
    marked, plain = (json.loads(process(*line, input=text.encode()).stdout) for text in ("\ufeffthe sea", "the sea"))
    assert marked["prompt_tokens"] == plain["prompt_tokens"]


# --- prompts that make a doubtful steering ----------------------------------------------------------------------------


def test_doubtful_prompts_are_told(tmp_path: Path) -> None:
    def told(positive: list[str], negative: list[str]) -> str:
        sides = (tuple(map(Prompt, positive)), tuple(map(Prompt, negative)))
        return "\n".join(PromptSet("x", "", "+", "-", *sides).warnings())

    many = [f"I love {number}" for number in range(40)]
    assert told(many, [f"I hate {number}" for number in range(30)]) == ""
    assert "one negative prompt" in told(many, ["I hate tea"])
    assert "40 positive prompts against 3" in told(many, ["a", "b", "c"])
    assert "1 prompts are on both sides (such as 'I love 3')" in told(many, ["I love 3", *map(str, range(30))])
    assert "1 positive prompts look blank (such as '\\u200b')" in told(["\u200b", *many], list("abcdefghij"))


def test_a_prompt_that_is_too_long_is_told_with_file_and_line(place: Path) -> None:
    (place / "p.txt").write_text("I love tea\n" + "tea " * 900 + "\n")
    assert read_prompts(place / "p.txt")[1].origin == f"{place / 'p.txt'}:2"
    line = f"calibrate -m {place}/llama.gguf --positive {place}/p.txt --negative {place}/n.txt -o {place}/x.gguf"
    found = run(*line.split(), *ONE_THREAD)
    assert found.exit_code == 1
    assert f"{place / 'p.txt'}:2: expected a prompt of 1 to 512 tokens" in found.stderr
    assert "the model takes 512" in found.stderr


def test_a_path_that_is_not_utf_8_is_told_as_that(place: Path) -> None:
    odd = place / os.fsdecode(b"m\xff.gguf")
    os.link(place / "llama.gguf", odd)
    found = run("generate", "-m", odd, "-p", "the", "--ctx", 256)
    assert found.exit_code == 1
    assert "in UTF-8" in found.stderr
    assert "fetch it again" not in found.stderr


def test_a_pair_may_be_called_as_its_steering_is(tmp_path: Path) -> None:
    """It writes happy-cos.gguf and its like, never happy.gguf; one adapter would."""
    model = tiny.build("llama", tmp_path).gguf_path
    happy = tmp_path / "happy.gguf"
    steering_for(model, name="happy").save(happy)
    before = happy.read_bytes()
    written = process("export", "-m", model, "-s", happy, "--to", "lora", "-o", tmp_path / "happy")
    assert written.returncode == 0, written.stderr
    refused = process("export", "-m", model, "-s", f"{happy}:8", "--to", "lora", "-o", tmp_path / "happy", "--force")
    assert refused.returncode == 1
    assert b"which is read" in refused.stderr
    assert happy.read_bytes() == before

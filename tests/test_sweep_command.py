"""`edge-steer sweep` as a user runs it, on a tiny random model."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command import ONE_THREAD, PROGRAM, ran, run, steering_for

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
import tiny

from edge_steer.export.embedded import embed
from edge_steer.preset import load_preset
from edge_steer.provenance import Made
from edge_steer.steering import Steering, save_all

PNG = b"\x89PNG\r\n\x1a\n"
PICTURES = ("effect-damage.png", "by-angle.png", "layers.png")
# A random model knows nothing that it could lose.
LENIENT = ["--max-kl", 0.5, "--min-retention", 0, "--quick", "--ctx", 256, *ONE_THREAD]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with llama.gguf, mood.gguf (that knows the probes of a preset), own.gguf (that knows none)."""
    folder = tmp_path_factory.mktemp("place")
    model = tiny.build("llama", folder).gguf_path
    preset = load_preset("sentiment")
    made = Made(prompts_sha256=preset.sha256, positive_count=64, negative_count=64)
    steering_for(model, name="mood").with_(made=made).save(folder / "mood.gguf")
    steering_for(model, name="own").save(folder / "own.gguf")
    return folder


def test_a_sweep_writes_tables_and_pictures_and_the_safe_range(place: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "mood.gguf", tmp_path / "out"
    shutil.copy(place / "mood.gguf", file)
    command = ["sweep", "-m", place / "llama.gguf", "-s", file, "-o", out, *LENIENT]
    found = ran(*command, "--angles", "-3,3,90", "--write")
    assert "mood: recommended range -3° … +3°" in found.stdout
    assert "mood" in found.stderr
    assert "safe" in found.stdout
    for picture in PICTURES:
        assert (out / picture).read_bytes()[:8] == PNG
    record = json.loads((out / "sweep.json").read_text())
    assert record["model"] == "llama.gguf"
    assert [point["dial"] for point in record["curves"][0]["points"]] == [-3, 3, 90]
    written = Steering.load(file)
    assert (written.angle_min, written.angle_max, written.angle) == (-3, 3, 1.5)
    assert written.fingerprint == Steering.load(place / "mood.gguf").fingerprint

    lines = len((out / "points.jsonl").read_text().splitlines())
    again = ran(*command, "--angles", "-3,3,90", "--json")
    assert "goes on from there" in again.stderr
    assert json.loads(again.stdout)["curves"] == record["curves"]
    assert len((out / "points.jsonl").read_text().splitlines()) == lines


def test_without_probes_the_effect_is_read_in_the_answers(place: Path, tmp_path: Path) -> None:
    for side in ("glad", "sad"):
        (tmp_path / f"{side}.txt").write_text("".join(f"I am {side} about {x}\n" for x in ("tea", "rain", "you")))
    found = ran(
        "sweep", "-m", place / "llama.gguf", "-s", place / "own.gguf", "-o", tmp_path / "out", "--angles", "20",
        "--positive", tmp_path / "glad.txt", "--negative", tmp_path / "sad.txt", *LENIENT,
    )  # fmt: skip
    assert "no probes are known" in found.stderr
    point = json.loads((tmp_path / "out" / "sweep.json").read_text())["curves"][0]["points"][0]
    assert point["gap"] is None
    assert point["effect"] == point["self_read"] != 0
    assert point["shift"] != 0


def test_own_probes_are_taken(place: Path, tmp_path: Path) -> None:
    probes = tmp_path / "probes.jsonl"
    probes.write_text('{"prompt": "How?", "positive": "well", "negative": "ill"}\n')
    ran(
        "sweep", "-m", place / "llama.gguf", "-s", place / "own.gguf", "-o", tmp_path / "out", "--angles", "20",
        "--probes", probes, *LENIENT,
    )  # fmt: skip
    point = json.loads((tmp_path / "out" / "sweep.json").read_text())["curves"][0]["points"][0]
    assert point["effect"] == point["gap"] != 0


def test_methods_are_compared_on_one_recording_of_the_same_prompts(place: Path, tmp_path: Path) -> None:
    for side in ("glad", "sad"):
        (tmp_path / f"{side}.txt").write_text("".join(f"I am {side} about {n} things\n" for n in range(10)))
    command = [
        "sweep", "-m", place / "llama.gguf", "--methods", "local,ablation,addition", "-o", tmp_path / "out",
        "--positive", tmp_path / "glad.txt", "--negative", tmp_path / "sad.txt", "--angles", "1", *LENIENT,
    ]  # fmt: skip
    found = ran(*command)
    for name in ("local", "ablation", "addition"):
        assert name in found.stdout
    made = Steering.load_all(tmp_path / "out" / "methods.gguf")
    assert [each.operator for each in made] == ["selective", "ablation", "addition"]
    assert {each.made.positive_count for each in made} == {8}  # two of ten are held out
    for picture in PICTURES:
        assert (tmp_path / "out" / picture).read_bytes()[:8] == PNG
    assert ran(*command).stdout == found.stdout


def test_ctrl_c_keeps_what_was_measured_and_the_same_command_goes_on(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ["sweep", "-m", place / "llama.gguf", "-s", place / "mood.gguf", "-o", out, *LENIENT, "--angles", "3,6,9,12"]
    command = [*PROGRAM, *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        journal = out / "points.jsonl"
        while process.poll() is None and not (journal.exists() and len(journal.read_text().splitlines()) > 4):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    assert not (out / "sweep.json").exists()
    kept = journal.read_text()
    ran(*args)
    assert journal.read_text().startswith(kept[: kept.rfind("\n") + 1])
    assert len(json.loads((out / "sweep.json").read_text())["curves"][0]["points"]) == 4


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ("-o out", 2, "expected -s FILE or --methods"),
        ("-s mood.gguf --methods local -o out", 2, "expected -s FILE or --methods"),
        ("--methods local -o out", 2, "expected --preset NAME"),
        ("--methods local,best --preset sentiment -o out", 1, "expected methods among local, stream, global"),
        ("--methods local,local --preset sentiment -o out", 1, "expected each method once"),
        ("--methods local --preset nice -o out", 1, "expected a preset among"),
        ("--methods local --positive p.txt -o out", 2, "got no --negative"),
        ("--methods local --preset sentiment -o out --write", 2, "give one with -s FILE"),
        ("-s nothing.gguf -o out", 1, "nothing.gguf"),
        ("-s mood.gguf -o mood.gguf", 1, "expected a folder for -o"),
        ("-s mood.gguf -o no/where/out", 1, "missing or not writable"),
        ("-s mood.gguf -o out --angles a,b", 1, "expected --angles such as"),
        ("-s mood.gguf -o out --angles nan", 1, "expected --angles such as"),
        ("-s mood.gguf -o out --probes mood.gguf", 1, "mood.gguf"),
        ("-s idle.gguf -o out", 1, "steers no site"),
        ("-s ablation.gguf -o out --write", 2, "ablation has none"),
        ("-s standard.gguf -o out --write", 2, "standard has none"),
        ("-s embedding.gguf -o out --write", 1, "a model that embeds a steering"),
    ],
)
def test_what_cannot_be_swept_is_told_in_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: str, code: int, message: str
) -> None:
    monkeypatch.chdir(place)
    model = place / "llama.gguf"
    if not (place / "idle.gguf").exists():
        idle = steering_for(model, name="idle")
        save_all([idle.with_(mask=~idle.mask)], place / "idle.gguf")
        for operator in ("ablation", "standard"):
            steering_for(model, operator).save(place / f"{operator}.gguf")
        embed(model, place / "embedding.gguf", [(steering_for(model), 8.0)])
    words = [str(tmp_path / "out") if word == "out" else word for word in args.split()]
    found = run("sweep", "-m", model, *words, *ONE_THREAD)
    assert found.exit_code == code, found.stderr
    assert message in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "out" / "sweep.json").exists()


@pytest.mark.slow
def test_a_quick_sweep_of_a_real_model_finds_effects_both_ways_within_the_budget(smollm2: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "happy.gguf", tmp_path / "out"
    ran("calibrate", "-m", smollm2, "--preset", "sentiment", "-o", file)
    ran("sweep", "-m", smollm2, "-s", file, "-o", out, "--quick", "--write")
    curve = json.loads((out / "sweep.json").read_text())["curves"][0]
    assert curve["largest_negative"]["effect"] < -0.2
    assert curve["largest_positive"]["effect"] > 0.2
    steering = Steering.load(file)
    assert steering.angle_min < -2
    assert steering.angle_max > 2
    assert max(point["kl"] for point in curve["points"] if point["safe"]) <= 0.25

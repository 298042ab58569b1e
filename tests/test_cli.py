"""The verbs: what they print and write, and that what a user does wrong ends in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from command import ONE_THREAD, process, ran, run, steering_for

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny

from edge_steer.calibration import calibrate
from edge_steer.calibration.native_recorder import NativeRecorder
from edge_steer.choices import OPERATORS
from edge_steer.cli import main as main_module
from edge_steer.prompt_files import prompt_set
from edge_steer.runtime.dials import split_argument, split_dial
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.steering import Steering, save_all

QUICK = ["--ctx", 256, "--max-tokens", 8, *ONE_THREAD]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models llama.gguf and gemma3.gguf, prompts p.txt and n.txt, and a calibrated steering mood.gguf."""
    folder = tmp_path_factory.mktemp("place")
    for family in ("llama", "gemma3"):
        tiny.build(family, folder)
    for file, word in (("p.txt", "love"), ("n.txt", "hate")):
        lines = [f"I {word} {thing}" for thing in ("tea", "the sun", "rain", "old books")]
        (folder / file).write_text("\n".join(lines) + "\n")
    ran(
        "calibrate", "-m", folder / "llama.gguf", "--positive", folder / "p.txt", "--negative", folder / "n.txt",
        "-o", folder / "mood.gguf", "--sites", "attn_norm", *ONE_THREAD,
    )  # fmt: skip
    return folder


# --- the program ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "banned"),
    [
        ("import edge_steer", "numpy llama_cpp torch transformers matplotlib"),
        ("import edge_steer; edge_steer.Steering; edge_steer.SteeredLlama", 
         "torch transformers matplotlib edge_steer.export.lora"),
        ("from edge_steer.cli.main import main; main(['--help'], standalone_mode=False)",
         "numpy rich llama_cpp huggingface_hub torch transformers matplotlib"),
        ("from edge_steer.cli.main import main; main(['calibrate', '--help'], standalone_mode=False)",
         "numpy rich llama_cpp huggingface_hub torch transformers matplotlib"),
    ],
)  # fmt: skip
def test_importing_and_help_load_nothing_heavy(code: str, banned: str) -> None:
    check = f"import sys; {code}; print([m for m in {banned.split()!r} if m in sys.modules], file=sys.stderr)"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stderr.strip() == "[]"


@pytest.mark.parametrize("verb", main_module.VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    assert verb in ran("--help").stdout
    assert ran(verb, "--help").stdout.startswith(f"Usage: main {verb}")


def test_the_version_is_told() -> None:
    assert "edge-steer, version" in process("--version").stdout.decode()


# --- calibrate ------------------------------------------------------------------------------------------------------


def test_calibrate_writes_what_the_library_computes(place: Path) -> None:
    recorder = NativeRecorder(place / "llama.gguf", n_ctx=512, n_threads=1, n_threads_batch=1)
    expected = calibrate(recorder, prompt_set(place / "p.txt", place / "n.txt", "mood"), mask="all")
    found = Steering.load(place / "mood.gguf")
    assert found.name == "mood"
    assert found.sites == expected.sites
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.basis, expected.basis)


def test_calibrate_reads_a_hugging_face_directory(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "torch.gguf"
    ran("calibrate", "-m", place / "llama", "--positive", place / "p.txt", "--negative", place / "n.txt", "-o", out,
        "--device", "cpu", "--batch-size", 3, "--sites", "attn_norm")  # fmt: skip
    found, native = Steering.load(out), Steering.load(place / "mood.gguf")
    assert found.made.recorder == "torch"
    assert found.angle_max == pytest.approx(native.angle_max, rel=0.02)
    np.testing.assert_allclose(found.basis, native.basis, atol=2e-3)  # the GGUF was read with a half-precision cache


def test_calibrate_prints_the_path_alone_and_tells_of_sites_left_out(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    found = ran("calibrate", "-m", place / "llama.gguf", "--preset", "sentiment", "--limit", 2, "-o", out,
                "--name", "joy", "--plane", "global", "--operator", "standard", "--sites", "ffn_norm",
                *ONE_THREAD)  # fmt: skip
    assert found.stdout == f"{out}\n"
    assert "note: joy: cheerful (+) against gloomy (−), standard, global planes" in found.stderr
    made = Steering.load(out)
    assert (made.name, made.operator, made.plane, made.made.positive_count) == ("joy", "standard", "global", 2)
    assert {site.kind for site in made.sites} == {"ffn_norm"}
    found = ran("calibrate", "-m", place / "llama.gguf", "--preset", "sentiment", "--limit", 2, "-o", out, "--force",
                "--sites", "attn_norm", "--no-dial", *ONE_THREAD)  # fmt: skip
    assert np.isnan(Steering.load(out).angle)
    assert "note: blk.0.attn_norm is left out" in found.stderr


def test_an_existing_output_is_kept_without_force_and_nothing_is_computed(place: Path) -> None:
    before = (place / "mood.gguf").read_bytes()
    found = run("calibrate", "-m", "nowhere.gguf", "--preset", "sentiment", "-o", place / "mood.gguf")
    assert found.exit_code == 1
    assert "--force" in found.stderr
    assert (place / "mood.gguf").read_bytes() == before


# --- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_shows_every_layer(place: Path) -> None:
    steering = Steering.load(place / "mood.gguf")
    found = ran("inspect", place / "mood.gguf").stdout
    assert "selective, local planes, at 2 of 2 sites" in found  # before attention, but for the first block
    assert found.count("●") == 2 + 1
    for separation, norm in zip(steering.separation, steering.mean_norm, strict=True):
        assert f"{separation:.2f}" in found
        assert f"{norm:.3g}" in found
    assert "\x1b" not in found
    assert not [line for line in found.splitlines() if len(line) > 100 or line != line.rstrip()]


def test_inspect_as_json_holds_every_field_but_the_vectors(place: Path) -> None:
    steering = Steering.load(place / "mood.gguf")
    (found,) = json.loads(ran("inspect", place / "mood.gguf", "--json").stdout)
    assert [site["site"] for site in found["sites"]] == [site.name for site in steering.sites]
    assert [site["mask"] for site in found["sites"]] == steering.mask.tolist()
    np.testing.assert_allclose([site["separation"] for site in found["sites"]], steering.separation, rtol=1e-5)
    np.testing.assert_allclose([site["mean_norm"] for site in found["sites"]], steering.mean_norm, rtol=1e-5)
    assert found["angle"] == pytest.approx(steering.angle_max, rel=1e-5)
    assert found["provisional"] is True
    assert found["made"]["candidates"] == []
    assert found["base"]["tokenizer_sha256"] == steering.base.tokenizer_sha256
    assert found["made"]["positive_count"] == 4


@pytest.mark.parametrize("operator", OPERATORS)
def test_inspect_shows_several_steerings_of_any_operator_with_names_of_any_kind(
    place: Path, tmp_path: Path, operator: str
) -> None:
    one = steering_for(place / "llama.gguf", operator, name="[red]one[/] $x$")
    two = replace(one, name="two", angle=5.0, angle_min=-8.0, angle_max=9.0)
    save_all([one, two], tmp_path / "both.gguf")
    found = ran("inspect", tmp_path / "both.gguf", "--plot", tmp_path / "both.png")
    assert "[red]one[/] $x$" in found.stdout
    assert ("-8 … +9" in found.stdout) == (operator != "ablation")
    assert len(json.loads(ran("inspect", tmp_path / "both.gguf", "--json").stdout)) == 2


def test_inspect_draws_a_png_whole_or_not_at_all(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png = tmp_path / "map.png"
    found = ran("inspect", place / "mood.gguf", "--json", "--plot", png)
    assert json.loads(found.stdout)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [png]
    assert run("inspect", place / "mood.gguf", "--plot", png).exit_code == 1
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = run("inspect", place / "mood.gguf", "--plot", tmp_path / "other.png")
    assert found.exit_code == 1
    assert "pip install 'edge-steer[plot]'" in found.stderr


# --- generate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["all", "response"])
def test_generate_as_json_is_what_the_library_answers(place: Path, scope: str) -> None:
    found = ran("generate", "-m", place / "llama.gguf", "-s", f"{place / 'mood.gguf'}:25", "-p", "Hello you",
                "--system", "Be.", "--scope", scope, "--json", *QUICK)  # fmt: skip
    assert not found.stderr
    record = json.loads(found.stdout)
    llm = SteeredLlama(place / "llama.gguf", steering=place / "mood.gguf", angle=25, scope=scope,
                       n_ctx=256, n_threads=1, n_threads_batch=1)  # fmt: skip
    prompt = llm.chat_tokens([{"role": "system", "content": "Be."}, {"role": "user", "content": "Hello you"}])
    expected = llm.create_completion(prompt, max_tokens=8, temperature=0.0, repeat_penalty=1.1)
    assert record["prompt_tokens"] == len(prompt) == expected["usage"]["prompt_tokens"]
    assert 0 < record["generated_tokens"] <= 8
    # llama-cpp-python goes on past max_tokens where a character is not complete.
    text, other = (each.replace("�", "").lstrip() for each in (record["text"], expected["choices"][0]["text"]))
    assert text
    assert other.startswith(text[:3])
    assert (record["angle"], record["scope"], record["sites_hit"]) == (25.0, scope, 2)
    assert record["tokens_per_second"] > 0


def test_generate_streams_text_and_takes_the_prompt_from_standard_input(place: Path) -> None:
    common = ["generate", "-m", place / "llama.gguf", "-s", place / "mood.gguf", "--angle", 25, *QUICK]
    text = json.loads(ran(*common, "-p", "Hello", "--json").stdout)["text"]
    assert ran(*common, "-p", "Hello").stdout == text + "\n"
    assert ran(*common, "-p", "-", input=" Hello\n").stdout == text + "\n"


def test_generate_reads_every_token_where_it_is_told_to(place: Path) -> None:
    common = ["generate", "-m", place / "llama.gguf", "-s", f"{place / 'mood.gguf'}:25", "-p", "Hello you", *QUICK]
    plain = json.loads(ran(*common, "--json").stdout)
    found = json.loads(ran(*common, "--json", "--read").stdout)
    assert found["text"] == plain["text"]
    read = found["readings"]["mood"]
    assert (len(read["prompt"]), len(read["answer"])) == (found["prompt_tokens"], found["generated_tokens"])
    other = json.loads(ran(*common, "--json", "--read", "--site", "blk.1.attn_norm").stdout)
    assert other["readings"]["mood"] == read == {**read, "site": "blk.1.attn_norm"}
    told = ran(*common, "--read")
    assert told.stdout == plain["text"] + "\n", "no colours where no terminal is"
    assert told.stderr.startswith(f"colours: mood at {read['site']}, below -1 n")
    mean = np.mean(read["answer"])
    assert f"read: mood {mean:+.2f} (prompt " in told.stderr
    assert run(*common, "--site", "blk.1.attn_norm").exit_code == 2


# --- read -----------------------------------------------------------------------------------------------------------


def test_read_tells_texts_apart_line_by_line(place: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("I love the sea\n\n  I hate the sea\n")
    common = ["read", "-m", place / "llama.gguf", "-s", place / "mood.gguf", "--ctx", 256, *ONE_THREAD]
    llm = SteeredLlama(place / "llama.gguf", steering=place / "mood.gguf", angle=None, n_ctx=256)
    expected = [llm.read(text)["mood"] for text in ("I love the sea", "I hate the sea")]
    lines = ran(*common, tmp_path / "texts.txt").stdout.splitlines()
    assert lines == [
        f"{each[1:].mean():+.2f}\tI {w} the sea" for each, w in zip(expected, ("love", "hate"), strict=True)
    ]
    lines = ran(*common, "--score", "last", "--json", "--tokens", "-", input="I love the sea\n").stdout.splitlines()
    record = json.loads(lines[0])
    assert record["text"] == "I love the sea"
    assert record["readings"]["mood"] == pytest.approx(float(expected[0][-1]), abs=1e-4)
    np.testing.assert_allclose(record["tokens"]["mood"], expected[0], atol=1e-4)
    chat = json.loads(ran(*common, "--chat", "--json", "-", input="I love tea\n").stdout)
    assert chat["readings"]["mood"] == pytest.approx(
        float(llm.read([{"role": "user", "content": "I love tea"}])["mood"][-1]), abs=1e-4
    )


def test_read_refuses_in_a_line(place: Path, tmp_path: Path) -> None:
    mood = Steering.load(place / "mood.gguf")
    replace(mood, class_means=np.empty((0, 2))).save(tmp_path / "older.gguf")
    for more, why in (
        (["-s", tmp_path / "older.gguf"], "holds no class means, which a reading is in units of; calibrate it again"),
        (["-s", place / "mood.gguf", "--site", "blk.2.attn_norm"], "before the last block"),
        (["-s", place / "mood.gguf", "--site", "nowhere"], "nowhere"),
        ([], "no steering to read by"),
    ):
        found = run("read", "-m", place / "llama.gguf", *more, "--ctx", 256, *ONE_THREAD, "-", input="Hello\n")
        assert found.exit_code == 1
        assert why in found.stderr
        assert found.stderr.count("\n") == 1
    assert run("read", "-m", place / "llama.gguf", "-s", place / "mood.gguf", "-", input=" \n").exit_code == 1


def test_warnings_of_llama_cpp_do_not_come_between(place: Path) -> None:
    found = process("generate", "-m", place / "gemma3.gguf", "-p", "Hi", *QUICK)  # a sliding window earns one
    assert (found.returncode, found.stderr) == (0, b"")


def test_the_angle_option_beats_the_file_s_and_steerings_add_up(place: Path, tmp_path: Path) -> None:
    mood = Steering.load(place / "mood.gguf")
    replace(mood, name="kind", angle=7.0, angle_min=-10.0, angle_max=20.0).save(tmp_path / "kind.gguf")
    common = ["generate", "-m", place / "llama.gguf", "-p", "Hi", "--json", *QUICK, "-s"]

    def angle(*args: object) -> object:
        return json.loads(ran(*common, *args).stdout)["angle"]

    assert angle(f"{tmp_path / 'kind.gguf'}:3", "--angle", -4) == -4
    assert angle(f"{tmp_path / 'kind.gguf'}:3") == 3
    assert angle(tmp_path / "kind.gguf") == 7
    assert angle(tmp_path / "kind.gguf", "--strength", 0.5) == 10
    assert angle(tmp_path / "kind.gguf", "--strength", -0.5) == -5
    found = ran(*common, tmp_path / "kind.gguf", "-s", f"{place / 'mood.gguf'}:2")
    assert json.loads(found.stdout)["angle"] == {"kind": 7, "mood": 2}
    assert found.stderr.startswith("note: steerings 'kind' and 'mood' overlap")


# --- the rest -------------------------------------------------------------------------------------------------------


def test_a_file_whose_name_ends_like_a_dial_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "calm:2").touch()
    for argument, parts in {
        f"{tmp_path}/calm:2": (f"{tmp_path}/calm:2", None),
        f"{tmp_path}/calm:2:8": (f"{tmp_path}/calm:2", 8),
        f"{tmp_path}/other:2": (f"{tmp_path}/other", 2),
    }.items():
        assert split_dial(argument) == parts
    (tmp_path / "calm").touch()
    assert split_dial(f"{tmp_path}/calm:2") == (f"{tmp_path}/calm", 2)


def test_a_gate_stands_behind_the_dial_of_a_file(place: Path, tmp_path: Path) -> None:
    (tmp_path / "calm@home").touch()
    (tmp_path / "happy").touch()
    for argument, parts in {
        "calm:2@response": ("calm", 2, "@response"),
        "me@home/calm:2@first:3@text": ("me@home/calm", 2, "@first:3@text"),
        "calm@when a:b>1": ("calm", None, "@when a:b>1"),
        "calm@nonsense": ("calm@nonsense", None, None),
        f"{tmp_path}/calm@home": (f"{tmp_path}/calm@home", None, None),
        f"{tmp_path}/calm@home:3@all": (f"{tmp_path}/calm@home", 3, "@all"),
        f"{tmp_path}/happy:2@nonsense": (f"{tmp_path}/happy", 2, "@nonsense"),
    }.items():
        assert split_argument(argument) == parts
    common = ("generate", "-m", place / "llama.gguf", "Hello there", "--json", "-n", 24, *ONE_THREAD, "-s")
    plain, gated, off = (
        json.loads(ran(*common, f"{place / 'mood.gguf'}:{rest}").stdout)["text"]
        for rest in ("170", "170@after:3", "170@after:99")
    )
    assert len({plain, gated, off}) == 3
    refused = run(*common, f"{place / 'mood.gguf'}:60@frst:3")
    assert refused.exit_code == 1
    assert "did you mean @first?" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_what_holds_no_gate_says_that_it_does_not_act(place: Path, tmp_path: Path) -> None:
    Steering.load(place / "mood.gguf").with_(gate="@first:3", angle=5).save(tmp_path / "mood.gguf")
    assert "@first:3" in ran("inspect", tmp_path / "mood.gguf").stdout
    common = ("export", "-m", place / "llama.gguf", "-s", tmp_path / "mood.gguf")
    found = ran(*common, "--to", "gguf", "-o", tmp_path / "baked.gguf")
    assert "note: the gate @first:3 of 'mood' does not act in what is written" in found.stderr
    found = ran(*common, "--to", "embedded", "-o", tmp_path / "embedded.gguf")
    assert "does not act" not in found.stderr
    assert Steering.load(tmp_path / "embedded.gguf").gate == "@first:3"


def test_doctor_counts_the_sites_of_a_model(place: Path) -> None:
    found = json.loads(ran("doctor", "-m", place / "gemma3.gguf", "--json", *ONE_THREAD).stdout)
    assert found["native hook"].startswith("loaded")
    assert "ffn_post_norm 3 of 3" in found["model"]["sites met"]
    assert found["model"]["sites missing"] == []
    shown = ran("doctor").stdout
    assert f"llama-cpp-python: {llama_cpp.__version__} (" in shown
    assert "model:" not in shown


def test_presets_and_models_are_listed_for_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_STEER_CACHE", str(tmp_path))
    assert {row["name"] for row in json.loads(ran("presets", "--json").stdout)} >= {"sentiment", "refusal"}
    rows = {row["name"]: row for row in json.loads(ran("models", "--json").stdout)}
    assert set(rows["smollm2-135m"]) >= {"name", "source", "size", "sha256", "licence", "path"}
    assert rows["smollm2-135m"]["path"] is None


def test_the_whole_way_on_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    out = tmp_path / "happy.gguf"
    how = ("--sites", "attn_norm", "--ctx", 512, *ONE_THREAD)
    ran("calibrate", "-m", smollm2, "--preset", "sentiment", "--limit", 8, "-o", out, *how)
    assert "SmolLM2" in ran("inspect", out).stdout or "smollm2" in ran("inspect", out).stdout.lower()
    common = ["generate", "-m", smollm2, "-p", "How was your day?", "--json", "--max-tokens", 16, "--ctx", 512]
    plus, off = (json.loads(ran(*common, "-s", f"{out}:{angle}", *ONE_THREAD).stdout) for angle in (10, 0))
    assert plus["text"] != off["text"]
    assert plus["sites_hit"] == len(Steering.load(out).steered)
    assert off["sites_hit"] == 0


def test_the_program_runs_as_a_module(place: Path) -> None:
    found = process("inspect", place / "mood.gguf")
    assert found.returncode == 0
    assert not found.stderr

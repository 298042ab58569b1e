"""Control vectors, models that embed steerings, and the verb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from exports import EXACT, TOKENS, assert_same, hook_logits, plain_logits, steering_for, tinies

from edge_steer.cli.main import main
from edge_steer.errors import SteerError
from edge_steer.export.control_vector import control_vector
from edge_steer.export.embedded import embed
from edge_steer.export.gguf_bytes import map_model
from edge_steer.gguf_metadata import read_gguf
from edge_steer.model_file import read_model
from edge_steer.runtime.llama import SteeredLlama
from edge_steer.steering import Steering

__all__ = ["tinies"]


def read_vector(path: Path, layers: int) -> np.ndarray[Any, Any]:
    """As llama.cpp reads one: (layers − 1, d), the first row for block 1."""
    import gguf

    found = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    width = next(iter(found.values())).size
    return np.stack([found.get(f"direction.{layer}", np.zeros(width)) for layer in range(1, layers)])


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2_moe"])
def test_a_control_vector_is_the_addition(tinies: dict[str, Any], family: str, tmp_path: Path) -> None:
    path = tinies[family].gguf_path
    one = steering_for(path, "addition", "layer_out")
    two = steering_for(path, "addition", "layer_out", seed=1, name="b").with_(mask=np.array([False, True]))
    actions = [(one, 0.4), (two, -0.7)]
    out = control_vector(path, tmp_path / "vector.gguf", actions)
    head = read_gguf(out, lambda key: True)
    assert head.values["general.architecture"].value == "controlvector"
    assert head.values["controlvector.model_hint"].value == read_model(path).architecture
    found = plain_logits(path, vector=read_vector(out, 3))
    assert_same(found, hook_logits(path, actions), plain_logits(path))


def test_a_model_that_embeds_a_steering_runs_everywhere(tinies: dict[str, Any], tmp_path: Path) -> None:
    path = tinies["llama"].gguf_path
    one = steering_for(path, name="a").with_(angle=3.0)
    two = steering_for(path, "ablation", seed=1, name="b")
    out = embed(path, tmp_path / "embedded.gguf", [(one, 40.0), (two, None)])
    old, new = read_model(path), read_model(out)
    assert new.data_start % 32 == 0
    assert new.tensors == old.tensors
    assert out.read_bytes()[new.data_start :] == path.read_bytes()[old.data_start :]
    assert new.metadata == {**old.metadata, **{key: new.metadata[key] for key in new.metadata if "steering." in key}}
    assert bytes(map_model(new).keys[: len(map_model(old).keys)]) == bytes(map_model(old).keys)

    assert new.embeds_steerings
    found = Steering.load_all(out)
    assert [(each.name, each.default_dial()) for each in found] == [("a", 40.0), ("b", 1.0)]
    assert found[0].base == old.base
    assert found[0].fingerprint == one.fingerprint
    assert (plain_logits(out) == plain_logits(path)).all()
    llm = SteeredLlama(out, steering=found, n_ctx=128, **EXACT)
    assert_same(llm.logits([*TOKENS, 0], 1), hook_logits(path, [(one, 40.0), (two, 1.0)]), plain_logits(path))
    with pytest.raises(SteerError, match="already"):
        embed(out, tmp_path / "again.gguf", [(one, None)])


def test_a_plain_model_embeds_nothing(tinies: dict[str, Any]) -> None:
    assert not read_model(tinies["llama"].gguf_path).embeds_steerings


def test_the_verb_writes_every_target(tinies: dict[str, Any], tmp_path: Path) -> None:
    model = tinies["llama"]
    file, added = tmp_path / "s.gguf", tmp_path / "added.gguf"
    steering_for(model.gguf_path).save(file)
    steering_for(model.gguf_path, "addition", "layer_out", name="added").save(added)
    expected = {
        "lora": (model.gguf_path, str(file), ["lora-cos.gguf", "lora-sin.gguf", "lora.md"]),
        "gguf": (model.gguf_path, f"{file}:8", ["gguf"]),
        "embedded": (model.gguf_path, f"{file}:8", ["embedded"]),
        "control-vector": (model.gguf_path, f"{added}:0.3", ["control-vector"]),
        "hf": (model.hf_dir, f"{file}:8", ["hf"]),
        "peft": (model.hf_dir, f"{file}:8", ["peft"]),
    }
    for to, (source, steering, names) in expected.items():
        arguments = ["export", "-m", str(source), "-s", steering, "--to", to, "-o", str(tmp_path / to)]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        assert result.stdout.split("\n")[:-1] == [str(tmp_path / name) for name in names]
        assert len(result.stderr.splitlines()) == 1
        assert all((tmp_path / name).exists() for name in names)
        again = CliRunner().invoke(main, arguments)
        assert again.exit_code == 1
        assert "--force" in again.stderr
    one = [
        "export",
        "-m",
        str(model.gguf_path),
        "-s",
        str(file),
        "--to",
        "lora",
        "--angle",
        "8",
        "-o",
        str(tmp_path / "x"),
    ]
    assert CliRunner().invoke(main, one).stdout.split() == [str(tmp_path / "x.gguf"), str(tmp_path / "x.Modelfile")]


def test_the_verb_refuses_what_does_not_go_together(tinies: dict[str, Any], tmp_path: Path) -> None:
    model = tinies["llama"]
    file = tmp_path / "s.gguf"
    steering_for(model.gguf_path).save(file)

    def run(source: Path, *arguments: str) -> str:
        result = CliRunner().invoke(main, ["export", "-m", str(source), "-o", str(tmp_path / "out"), *arguments])
        assert result.exit_code != 0
        return result.stderr

    assert "expected a GGUF for --to gguf" in run(model.hf_dir, "-s", f"{file}:8", "--to", "gguf")
    assert "expected a Hugging Face directory for --to hf" in run(model.gguf_path, "-s", f"{file}:8", "--to", "hf")
    assert "no default angle" in run(model.gguf_path, "-s", str(file), "--to", "gguf")
    assert "--steered-type" in run(model.gguf_path, "-s", f"{file}:8", "--to", "lora", "--steered-type", "Q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["s.gguf"]

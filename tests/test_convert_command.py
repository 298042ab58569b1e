"""`edge-steer convert`: what it refuses, the quantizer behind it, and steerings on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny
from directories import (
    TOKENS,
    convert,
    divergence,
    edit,
    llama_logits,
    nothing_left,
    rewrite,
    tensors,
    values,
    variant,
)  # fmt: skip
from planted import DIAL, random_steering
from safetensors.torch import load_file, save_file

from edge_steer.architectures import architecture
from edge_steer.choices import Operator
from edge_steer.cli.main import main
from edge_steer.converters.source import read
from edge_steer.converters.write import write
from edge_steer.errors import SteerError
from edge_steer.model_file import read_model
from edge_steer.steering import Steering


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tiny.TinyModel:
    return tiny.build("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def directory(llama: tiny.TinyModel, tmp_path: Path) -> Path:
    """A directory to be broken, in a folder of its own."""
    return Path(shutil.copytree(llama.hf_dir, tmp_path / "source" / "tiny-llama"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the output would appear."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def steering_for(gguf: Path, operator: Operator = "selective", sites: str = "pre", **kwargs: Any) -> Steering:
    file = read_model(gguf)
    chosen = architecture(file.architecture).sites(file.block_count, sites)
    return random_steering(file.base, chosen, operator, **kwargs)


# --- what is refused ------------------------------------------------------------------------------------------------


INDEX = "model.safetensors.index.json"


def shards(directory: Path) -> None:
    """The checkpoint as two shards with an index."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, directory / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (directory / INDEX).write_text(json.dumps(index))


def missing_shard(directory: Path) -> None:
    shards(directory)
    (directory / "b.safetensors").unlink()


def wrong_shard(directory: Path) -> None:
    shards(directory)
    edit(directory / INDEX, lambda index: index["weight_map"].update({"more": "a.safetensors"}))


def shard_elsewhere(directory: Path) -> None:
    shards(directory)
    edit(directory / INDEX, lambda index: index["weight_map"].update({"more": "../a.safetensors"}))


def truncated(directory: Path) -> None:
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[: len(data) // 2])


def config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda directory: edit(directory / "config.json", change)


def weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda directory: rewrite(directory, change)


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda directory: edit(directory / "tokenizer.json", change)


Q = "model.layers.1.self_attn.q_proj.weight"


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda directory: [change(directory) for change in changes] and None


def narrowed(weights: dict[str, Any], head: int) -> dict[str, Any]:
    """The attention weights of heads `head` wide."""
    rows = {"q": tiny.HEADS, "k": tiny.KV_HEADS, "v": tiny.KV_HEADS}
    found = {}
    for name, weight in weights.items():
        if "self_attn" in name:
            kind = name.split(".")[-2][0]
            cut = weight[: rows[kind] * head] if kind in rows else weight[:, : tiny.HEADS * head]
            found[name] = cut.clone()
    return found


def without(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (without("config.json"), r"a Hugging Face directory with config\.json"),
    "config that is no JSON": (lambda d: (d / "config.json").write_text("{"), "expected JSON"),
    "config that is a list": (lambda d: (d / "config.json").write_text("[]"), "expected a JSON object"),
    "config without model_type": (config(lambda c: c.pop("model_type")), "model_type, got None"),
    "another family": (
        config(lambda c: c.update(model_type="mamba")),
        r"got 'mamba'.*`edge-steer export --to hf`.*convert_hf_to_gguf\.py",
    ),
    "quantized": (config(lambda c: c.update(quantization_config={"bits": 4})), r"dequantize\(\)"),
    "another activation": (config(lambda c: c.update(hidden_act="relu")), "expected activation silu, got 'relu'"),
    "unknown rope": (config(lambda c: c.update(rope_parameters={"rope_type": "dynamic"})), "'dynamic' is not known"),
    "no layers": (config(lambda c: c.update(num_hidden_layers=0)), "num_hidden_layers, got 0"),
    "heads that are a word": (config(lambda c: c.update(num_attention_heads="x")), "num_attention_heads, got 'x'"),
    "more layers than weights": (config(lambda c: c.update(num_hidden_layers=4)), r"a weight for blk\.3\.attn_norm"),
    "fewer layers than weights": (config(lambda c: c.update(num_hidden_layers=2)), r"layers\.2\..*no place"),
    "other widths": (config(lambda c: c.update(intermediate_size=64)), r"ffn_gate\.weight as \(64, 64\)"),
    "a layer for everyone": (config(lambda c: c.update(num_hidden_layers=2**31 - 1)), "layers for as many weights"),
    "heads of an odd width": (
        both(config(lambda c: c.update(head_dim=15)), weights(lambda w: w.update(narrowed(w, 15)))), "an even width"
    ),
    "an embedding of no axis": (
        weights(lambda w: w.update({"model.embed_tokens.weight": w["model.norm.weight"][0].clone()})),
        r"token_embd.* \(\)",
    ),
    "rows that are no heads": (
        weights(lambda w: w.update({Q: w[Q][:3].clone()})), r"blk\.1\.attn_q\.weight as the rows of 4 heads"
    ),
    "an expert of any number": (
        weights(lambda w: w.update({f"model.layers.0.mlp.experts.{'9' * 5000}.x": w["model.norm.weight"].clone()})),
        "no place",
    ),
    "no weights": (without("model.safetensors"), "found neither"),
    "missing shard": (missing_shard, r"names b\.safetensors, which is not there"),
    "index naming a missing tensor": (wrong_shard, "holds 'more', it does not"),
    "index leading elsewhere": (shard_elsewhere, "without folders"),
    "truncated weights": (truncated, "expected a safetensors file"),
    "no safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"x" * 100), "expected a safetensors file"),
    "missing weight": (
        weights(lambda w: w.pop("model.layers.1.mlp.up_proj.weight")), r"expected a weight for blk\.1\.ffn_up"
    ),
    "integers": (weights(lambda w: w.update({"model.norm.weight": w["model.norm.weight"].int()})), "got 'I32'"),
    "a weight too many": (
        weights(lambda w: w.update({"model.layers.1.self_attn.sink": w["model.norm.weight"].clone()})), "no place"
    ),
    "no tokenizer": (without("tokenizer.json"), r"expected tokenizer\.json"),
    "another tokenizer": (tokenizer(lambda t: t.update(model={"type": "Unigram"})), "BPE tokenizer.*'Unigram'"),
    "unknown pre-tokenizer": (tokenizer(lambda t: t.update(pre_tokenizer={"type": "Whitespace"})), "--pre NAME"),
    "one token twice": (
        tokenizer(lambda t: t["added_tokens"].append({**t["added_tokens"][0], "id": 270})), "every token once, got"
    ),
    "no merges": (tokenizer(lambda t: t["model"].update(merges=[])), "expected merges"),
    "tokenizer_config that is no JSON": (lambda d: (d / "tokenizer_config.json").write_text("{"), "expected JSON"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_directory_is_refused_in_one_line_and_nothing_is_left(
    directory: Path, folder: Path, what: str
) -> None:
    break_it, message = BROKEN[what]
    break_it(directory)
    result = run(directory, "-o", folder / "out.gguf")
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    with pytest.raises(SteerError, match=message):
        convert(directory, folder / "out.gguf")
    assert nothing_left(folder)


def test_a_tokenizer_that_splits_text_differently_is_an_error_with_the_first_difference(
    directory: Path, folder: Path
) -> None:
    edit(directory / "tokenizer.json", lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Punctuation", "behavior": "Isolated"}, {"type": "Split", "pattern": {"String": "t"},
         "behavior": "Isolated", "invert": False}, t["pre_tokenizer"]]}))  # fmt: skip
    with pytest.raises(SteerError, match=r"'gpt-2' splits text differently: expected \['t', 'h', 'e'\] at token 62 of"):
        convert(directory, folder / "out.gguf", pre="gpt-2")
    with pytest.warns(UserWarning, match="splits text differently") as told:
        convert(directory, folder / "knowingly.gguf", pre="gpt-2", allow_other_tokens=True)
    assert len(told) >= 2
    (folder / "knowingly.gguf").unlink()
    with pytest.raises(SteerError, match="unknown pre-tokenizer type: 'nonsense'"):
        convert(directory, folder / "out.gguf", pre="nonsense")
    assert nothing_left(folder)


def test_an_existing_output_is_replaced_only_when_asked(directory: Path, folder: Path) -> None:
    (folder / "out.gguf").write_text("precious")
    result = run(directory, "-o", folder / "out.gguf")
    assert result.exit_code == 1
    assert "--force" in result.stderr
    assert (folder / "out.gguf").read_text() == "precious"
    assert run(directory, "-o", folder / "out.gguf", "--force").exit_code == 0
    assert read_model(folder / "out.gguf").architecture == "llama"


# --- the quantizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "number", "kind"), [("Q8_0", 7, "Q8_0"), ("q4_0", 2, "Q4_0"), ("Q4_K", 15, "Q5_0")])
def test_llama_cpp_quantizes_to_what_it_is_asked_for(
    directory: Path, folder: Path, name: str, number: int, kind: str
) -> None:
    """A width of 64 is no multiple of 256: K-quants fall back."""
    result = run(directory, "-o", folder / "out.gguf", "--quantize", name, "--threads", 1)
    assert (result.exit_code, result.stdout) == (0, f"{folder / 'out.gguf'}\n"), result.output
    assert read_model(folder / "out.gguf").metadata["general.file_type"] == number
    assert tensors(folder / "out.gguf")["blk.0.attn_q.weight"].tensor_type.name == kind
    assert np.isfinite(llama_logits(folder / "out.gguf", TOKENS)).all()
    assert nothing_left(folder, "out.gguf")


def test_what_the_quantizer_refuses_leaves_nothing(directory: Path, folder: Path) -> None:
    with pytest.raises(SteerError, match=r"Q4_K_M.*got 'Q9'"):
        convert(directory, folder / "out.gguf", quantize="Q9")
    with pytest.raises(SteerError, match="f32, f16 or bf16 to quantize"):
        convert(directory, folder / "out.gguf", quantize="Q4_0", type="q8_0")
    assert nothing_left(folder)


# --- steerings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "qwen2_moe"])
def test_a_baked_steering_is_the_one_that_torch_applies(family: str, folder: Path) -> None:
    model = tiny.build(family, folder.parent)
    one, other = (steering_for(model.gguf_path, seed=seed, name=f"s{seed}") for seed in (1, 2))
    actions: list[tuple[Steering, float | None]] = [(one, 30.0), (other, -12.0)]
    convert(model.hf_dir, folder / "out.gguf", type="f32", steering=actions)
    found = llama_logits(folder / "out.gguf", TOKENS)
    assert divergence(tiny.torch_logits(model.hf_dir, TOKENS, actions), found) <= 1e-6
    assert divergence(tiny.torch_logits(model.hf_dir, TOKENS), found) > 1e-3


def test_baked_and_unsteered_files_have_the_same_types_and_size(
    llama: tiny.TinyModel, directory: Path, folder: Path
) -> None:
    steering_for(llama.gguf_path, name="happy").save(folder / "happy.gguf")
    for out, more in (("plain.gguf", ()), ("steered.gguf", ("-s", f"{folder / 'happy.gguf'}:8"))):
        result = run(directory, "-o", folder / out, "--quantize", "Q4_K_M", "--threads", 1, *more)
        assert result.exit_code == 0, result.output
    assert "baked in: happy at 8" in result.stderr
    plain, steered = tensors(folder / "plain.gguf"), tensors(folder / "steered.gguf")
    assert [(t.name, t.tensor_type) for t in plain.values()] == [(t.name, t.tensor_type) for t in steered.values()]
    assert (folder / "plain.gguf").stat().st_size == (folder / "steered.gguf").stat().st_size
    changed = {name for name in plain if not np.array_equal(plain[name].data, steered[name].data)}
    readers = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
    assert changed == {name for name in plain if any(f".{reader}." in name for reader in readers)}


def test_an_embedded_steering_changes_no_weight_and_is_read_back(
    llama: tiny.TinyModel, directory: Path, folder: Path
) -> None:
    happy = steering_for(llama.gguf_path, "standard", name="happy")
    happy.save(folder / "happy.gguf")
    assert run(directory, "-o", folder / "plain.gguf").exit_code == 0
    result = run(directory, "-o", folder / "out.gguf", "-s", f"{folder / 'happy.gguf'}:70", "--embed")
    assert result.exit_code == 0, result.output
    embedded = Steering.load(folder / "out.gguf")
    assert (embedded.fingerprint, embedded.angle) == (happy.fingerprint, 70.0)
    plain, found = tensors(folder / "plain.gguf"), tensors(folder / "out.gguf")
    assert all(np.array_equal(values(plain[name]), values(found[name])) for name in plain)


@pytest.mark.parametrize("operator", ["standard", "adaptive", "addition"])
def test_what_weights_cannot_hold_is_refused_before_anything_is_written(
    llama: tiny.TinyModel, folder: Path, operator: Operator
) -> None:
    steering = steering_for(llama.gguf_path, operator)
    with pytest.raises(SteerError):
        convert(llama.hf_dir, folder / "out.gguf", steering=[(steering, DIAL[operator])])
    assert nothing_left(folder)


def test_a_steering_for_another_model_is_refused_with_both_values(
    llama: tiny.TinyModel, directory: Path, folder: Path
) -> None:
    base = read_model(llama.gguf_path).base
    other = random_steering(base.__class__("llama", "Tiny", 9, tiny.WIDTH), architecture("llama").sites(9))
    for options in ({"steering": [(other, 8.0)]}, {"embed": [other]}):
        with pytest.raises(SteerError, match="layers is 9, the model's is 3"):
            convert(directory, folder / "out.gguf", **options)  # type: ignore[arg-type]
    assert run(directory, "-o", folder / "out.gguf", "--embed").exit_code == 2
    assert nothing_left(folder)


def test_a_tokenizer_hash_is_that_of_the_written_file(llama: tiny.TinyModel, folder: Path) -> None:
    source = read(llama.hf_dir)
    write(source, folder / "out.gguf")
    assert read_model(folder / "out.gguf").base == source.base


def test_a_sliding_window_that_llama_cpp_does_not_have_is_told(llama: tiny.TinyModel, tmp_path: Path) -> None:
    directory = variant(llama.hf_dir, tmp_path / "mistral", model_type="mistral", sliding_window=64)
    with pytest.warns(UserWarning, match="past 64 tokens"):
        read(directory)

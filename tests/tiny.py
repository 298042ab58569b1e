"""Tiny random models with known weights: the same model as a transformers directory and as an F32 GGUF.

The GGUF is written here from the weights in memory, independently of the converters, so that engines and converters
are tested against something neither of them made. A family is one entry of FAMILIES.
Letters: n tokens, d model width, V vocabulary. Both tokenizers are byte-level BPE with a few merges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from edge_steer.architectures import MODEL_TYPES, architecture
from edge_steer.sites import site_of_module
from edge_steer.steering import Steering

# Matrices this small are slower on several threads than on one.
torch.set_num_threads(1)

LAYERS, WIDTH, HEADS, KV_HEADS, FEED_FORWARD, CONTEXT = 3, 64, 4, 2, 128, 512
SPECIAL = ("<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
MERGES = (("t", "h"), ("th", "e"), ("i", "n"), ("e", "r"), ("a", "n"))
VOCABULARY = 288
NAME = "Tiny"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SLIDING = 8  # Narrow, so that a short text already tells a sliding layer from a full one.


@dataclass(frozen=True)
class Family:
    """One architecture: its GGUF name, its transformers configuration beyond the common one, its GGUF keys beyond the
    common ones (`{arch}.` is put before), and how its weights differ in the two forms."""

    arch: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    head_width: int = WIDTH // HEADS
    permuted: bool = False  # llama.cpp turns neighbouring pairs of q and k, transformers the two halves of a head
    norm_plus_one: bool = False  # the norm multiplies with 1 + w
    fused_by_head: bool = False  # transformers fuses q, k and v of each head, llama.cpp those of all heads


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


_PATTERN = ["sliding_attention", "full_attention", "sliding_attention"]
_SLIDES = [kind == "sliding_attention" for kind in _PATTERN]
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "llama", {"rope_parameters": _rope(5e5)}, permuted=True),
    "qwen2": Family("qwen2", "qwen2", {"rope_parameters": _rope(1e6)}),
    "qwen3": Family("qwen3", "qwen3", {"rope_parameters": _rope(1e6), "head_dim": 32}, head_width=32),
    "gemma2": Family(
        "gemma2",
        "gemma2",
        {
            "head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True, "layer_types": _PATTERN,
            "sliding_window": _SLIDING, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 6.0,
        },
        {
            "attention.sliding_window": _SLIDING, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 6.0,
        },
        head_width=32,
        norm_plus_one=True,
    ),
    "gemma3": Family(
        "gemma3",
        "gemma3_text",
        {
            "head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True, "layer_types": _PATTERN,
            "sliding_window": _SLIDING,
            "rope_parameters": {"full_attention": _rope(1e6), "sliding_attention": _rope(1e4)},
        },
        {
            "attention.sliding_window": _SLIDING, "attention.sliding_window_pattern": _SLIDES,
            "rope.freq_base_swa": 1e4,
        },
        head_width=32,
        norm_plus_one=True,
    ),
    "phi3": Family("phi3", "phi3", {"pad_token_id": 258}),
    "mixtral": Family(
        "llama", "mixtral", {**_MOE, "rope_parameters": _rope(1e6)},
        {"expert_count": 4, "expert_used_count": 2}, permuted=True,
    ),
    "qwen2_moe": Family(
        "qwen2moe", "qwen2_moe",
        {**_MOE, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96, "rope_parameters": _rope(1e6)},
        {
            "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": 96,
        },
    ),
}  # fmt: skip

# Those that no converter reads: for the hook alone.
STEERED_ONLY: dict[str, Family] = {
    "smollm3": Family("smollm3", "smollm3", {"rope_parameters": _rope(2e6)}, permuted=True),
    "qwen3_moe": Family(
        "qwen3moe", "qwen3_moe",
        {**_MOE, "moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 32, "rope_parameters": _rope(1e6)},
        {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}, head_width=32,
    ),
    "gemma": Family(
        "gemma", "gemma",
        {"head_dim": 32, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"},
        head_width=32, norm_plus_one=True,
    ),
    "phi": Family(
        "phi2", "phi", {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
        {"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 8},
    ),
    "cohere": Family(
        "command-r", "cohere", {"tie_word_embeddings": True, "logit_scale": 0.25, "layer_norm_eps": 1e-5},
        {"attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.25},
    ),
    "mistral3": Family("mistral3", "mistral", {"rope_parameters": _rope(1e6), "sliding_window": None}, permuted=True),
    "olmoe": Family(
        "olmoe", "olmoe",
        {**_MOE, "num_key_value_heads": HEADS, "norm_topk_prob": False, "rope_parameters": _rope(1e4)},
        {"attention.head_count_kv": HEADS, "expert_count": 4, "expert_used_count": 2},
    ),
    "falcon": Family(
        "falcon", "falcon",
        {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "bias": False, "alibi": False,
         "activation": "gelu_new", "layer_norm_epsilon": 1e-5, "ffn_hidden_size": FEED_FORWARD},
        {"attention.head_count_kv": 1, "attention.layer_norm_epsilon": 1e-5},
    ),
    "gpt_neox": Family(
        "gptneox", "gpt_neox",
        {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "use_parallel_residual": True,
         "rope_parameters": {**_rope(1e4), "partial_rotary_factor": 0.5}},
        {"attention.head_count_kv": HEADS, "attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 8,
         "use_parallel_residual": True},
        fused_by_head=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TinyModel:
    """One random model in both forms."""

    family: str
    hf_dir: Path
    gguf_path: Path


def build(family: str, directory: str | Path, seed: int = 0) -> TinyModel:
    """The tiny model of `family` as `directory`/`family`/ and `directory`/`family`.gguf. Same seed, same bytes."""
    made = FAMILIES.get(family) or STEERED_ONLY[family]
    hf_dir, gguf_path = Path(directory) / family, Path(directory) / f"{family}.gguf"
    config = transformers.AutoConfig.for_model(
        made.model_type,
        **{
            "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": FEED_FORWARD,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
            "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, **made.config,
        },
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill(model, made, torch.Generator().manual_seed(seed))
    model.save_pretrained(hf_dir)
    _tokenizer().save_pretrained(hf_dir)
    _write_gguf(model, made, gguf_path)
    return TinyModel(family, hf_dir, gguf_path)


def _fill(model: Any, made: Family, generator: torch.Generator) -> None:
    """Random weights at which every block matters and logits differ by several units between tokens."""
    centre = 0.0 if made.norm_plus_one else 1.0
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            drawn = torch.randn(weight.shape, generator=generator)
            if name.endswith("bias"):
                weight.copy_(0.2 * drawn)
            elif weight.ndim == 1:
                weight.copy_(centre + 0.2 * drawn)
            elif any(part in name for part in ("embed_tokens", "embed_in", "word_embeddings")):
                weight.copy_(0.3 * drawn)
            else:
                weight.copy_(
                    (2.0 if "lm_head" in name or "embed_out" in name else 1.5) * drawn / math.sqrt(weight.shape[-1])
                )


# --- the tokenizer, twice -------------------------------------------------------------------------------------------


def _tokens() -> list[str]:
    """V tokens: 256 bytes, the special tokens at 256, the results of the merges, then unused ones."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL, *("".join(pair) for pair in MERGES)]
    return tokens + [f"<|unused{number}|>" for number in range(VOCABULARY - len(tokens))]


def _tokenizer() -> Any:
    tokens = _tokens()
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokens.index("<|bos|>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False, model_max_length=CONTEXT,
    )  # fmt: skip


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens = _tokens()
    kind = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [kind.CONTROL if t in SPECIAL else kind.UNUSED if t.startswith("<|unused") else kind.NORMAL for t in tokens]
    )
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(tokens.index("<|bos|>"))
    writer.add_eos_token_id(tokens.index("<|end|>"))
    writer.add_pad_token_id(tokens.index("<|pad|>"))
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)


# --- the GGUF -------------------------------------------------------------------------------------------------------


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def _write_gguf(model: Any, made: Family, path: Path) -> None:
    config = model.config
    rope = config.rope_parameters
    writer = gguf.GGUFWriter(path, made.arch)
    # llama.cpp takes a name with "phi3" in it for a promise about the vocabulary, so the family is not in the name.
    writer.add_name(NAME)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    common = {
        "context_length": CONTEXT, "embedding_length": WIDTH, "block_count": LAYERS,
        "feed_forward_length": FEED_FORWARD, "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", 1e-6), "vocab_size": VOCABULARY,
        "attention.key_length": made.head_width, "attention.value_length": made.head_width,
        "rope.dimension_count": made.head_width,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
    }  # fmt: skip
    for key, value in {**common, **made.keys}.items():
        _add(writer, f"{made.arch}.{key}", value)
    _add_tokenizer(writer)
    for tensor, values in _gguf_tensors(model, made):
        writer.add_tensor(tensor, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_tensors(model: Any, made: Family) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Names and weights in GGUF's form, in the order of the model."""
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == made.arch)
    names = gguf.get_tensor_name_map(arch, LAYERS)
    for parameter, weight in _split_experts(model):
        stem = parameter if parameter.endswith((".weight", ".bias")) else f"{parameter}.weight"
        name = names.get_name(stem, (".weight", ".bias"))
        assert name is not None, f"{parameter} has no name in GGUF"
        if made.norm_plus_one and "norm" in name:
            weight = weight + 1
        if made.permuted and "attn_q." in name:
            weight = _paired(weight, HEADS)
        if made.permuted and "attn_k." in name:
            weight = _paired(weight, KV_HEADS)
        if made.fused_by_head and "attn_qkv" in name:
            weight = weight.reshape(HEADS, 3, made.head_width, *weight.shape[1:]).swapaxes(0, 1).reshape(weight.shape)
        if "shexp" in name and len(weight) == 1:
            weight = weight[0]
        yield name, weight


def _split_experts(model: Any) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Parameters by name; gate and up of all experts, which transformers keeps in one, as two."""
    for name, weight in model.named_parameters():
        values = weight.detach().numpy()
        if name.endswith("experts.gate_up_proj"):
            half = values.shape[1] // 2
            yield name.replace("gate_up_proj", "gate_proj"), values[:, :half]
            yield name.replace("gate_up_proj", "up_proj"), values[:, half:]
        else:
            yield name, values


def _paired(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head (the halves of its pairs one after the other) so that the two of a pair are neighbours."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.asarray(halves.swapaxes(1, 2).reshape(weight.shape))


# --- the reference engine -------------------------------------------------------------------------------------------


class _TableGelu(torch.nn.Module):  # type: ignore[misc]
    """GELU as ggml's CPU backend has it: looked up in a table of half-precision numbers. Without this, Gemma's logits
    differ by 2e-4 of their range for a reason that has nothing to do with steering."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


@lru_cache(maxsize=16)
def _loaded(hf_dir: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
    if getattr(model.config, "hidden_activation", None) == "gelu_pytorch_tanh":
        for layer in model.model.layers:
            layer.mlp.act_fn = _TableGelu()
    return model


def torch_logits(
    hf_dir: str | Path, tokens: Sequence[int], actions: Sequence[tuple[Steering, float | None]] = ()
) -> NDArray[np.float32]:
    """Logits (n, V) of the transformers model at `hf_dir`, its activations steered by each (steering, dial) in order.

    Steering is done by rotation.py in float64 on the output of the site's module, at every token.
    """
    model = _loaded(Path(hf_dir))
    with _steered(model, actions), torch.inference_mode():
        logits = model(torch.tensor([list(tokens)])).logits[0]
    return np.asarray(logits.float().numpy())


@contextmanager
def _steered(model: Any, actions: Sequence[tuple[Steering, float | None]]) -> Iterator[None]:
    known = architecture(MODEL_TYPES[model.config.model_type])
    found = {site_of_module(known, name): module for name, module in model.named_modules()}
    hooks = []
    for steering, dial in actions:
        action = steering.action(dial)
        if action is None:
            continue
        for site, mean_norm, on in zip(steering.sites, steering.mean_norm, steering.mask, strict=True):
            if on:
                basis = steering.basis_at(site).astype(np.float64)
                hooks.append(found[site].register_forward_hook(_hook(action, basis, float(mean_norm))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(action: Any, basis: NDArray[np.float64], mean_norm: float) -> Any:
    def turn(_module: Any, _inputs: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        turned = torch.from_numpy(action(h.double().numpy(), basis, mean_norm)).to(h.dtype)
        return (turned, *output[1:]) if isinstance(output, tuple) else turned

    return turn

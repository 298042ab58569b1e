"""Whether the installed llama-cpp-python still has what edge-steer relies on, checked when it is loaded.

Two parts of it are no promised interface: how `Llama` works inside, and what of llama.cpp's C interface it declares.
A part that changed is a MismatchError that names it, before a model is loaded. Where ggml's functions and tensors are
looked at is ggml.py, which loads them. docs/compatibility.md says which releases were looked at, and how another is.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from types import CodeType
from typing import Any

from edge_steer.errors import MismatchError

# The release that the test suite was run on; a range of others is declared in pyproject.toml.
TESTED = "0.3.36"
INSTALL = f"pip install llama-cpp-python=={TESTED}"

# Fields that are set or read by name: ctypes takes any other name for an attribute of Python's, and nothing happens.
_FIELDS = {
    "llama_context_params": "cb_eval cb_eval_user_data kv_unified n_seq_max n_ubatch",
    "llama_batch": "logits n_seq_id n_tokens pos seq_id token",
    "llama_model_params": "devices n_gpu_layers vocab_only",
    "llama_model_quantize_params": "ftype nthread max_buf_size",
    "llama_chat_message": "role content",
}

# What else of the C interface is used, by name.
_DECLARED = (
    "GGML_TYPE_F32 LLAMA_FTYPE_ALL_F32 llama_adapter_lora_free llama_adapter_lora_init llama_adapter_lora_p_ctypes "
    "llama_backend_init llama_chat_apply_template llama_chat_builtin_templates llama_get_memory llama_log_callback "
    "llama_log_set llama_memory_seq_pos_min llama_memory_seq_rm llama_model_n_swa "
    "llama_model_default_params llama_model_free llama_model_get_vocab llama_model_load_from_file "
    "llama_model_quantize llama_model_quantize_default_params llama_print_system_info llama_set_adapters_lora "
    "llama_supports_gpu_offload llama_supports_rpc llama_token llama_token_to_piece llama_tokenize "
    "llama_vocab_is_control llama_vocab_is_eog"
)

_PENALTIES = "repeat_penalty frequency_penalty presence_penalty"
# What is called or overridden: its first parameters, which are given by place, then behind a * those given by name;
# None: that it is there.
_CALLS: dict[str, dict[str, str | None]] = {
    "llama": {
        "Llama.__init__": (
            "self model_path * n_ctx n_batch n_ubatch n_gpu_layers n_threads n_threads_batch tensor_split vocab_only "
            "seed embedding logits_all chat_format chat_handler lora_path lora_scale draft_model last_n_tokens_size "
            "type_k type_v verbose"
        ),
        "Llama.eval": "self tokens",
        "Llama.generate": (
            f"self tokens * reset temp top_p top_k min_p {_PENALTIES} logits_processor stopping_criteria grammar"
        ),
        "Llama._init_sampler": f"self * temp {_PENALTIES} logits_processor grammar",
        "Llama.reset": "self",
        "Llama.save_state": "self",
        "Llama.load_state": "self state",
        "Llama.set_seed": "self seed",
        "Llama.tokenize": "self text * add_bos special",
        "Llama.detokenize": "self tokens",
        "Llama.close": "self",
        "Llama.__getstate__": "self",
    },
    "_internals": {
        "LlamaContext.kv_cache_seq_rm": "self seq_id p0 p1",
        "LlamaContext.decode": "self batch",
        "LlamaContext.get_logits": "self",
        "LlamaContext.get_logits_ith": "self i",
        "LlamaBatch.set_batch": "self batch n_past logits_all",
        "LlamaModel.add_bos_token": "self",
        "LlamaModel.metadata": "self",
        "LlamaModel.n_ctx_train": "self",
        "LlamaModel.token_bos": "self",
        "LlamaModel.token_get_text": "self token",
        "LlamaModel.tokenize": "self text add_bos special",
    },
    "llama_chat_format": {
        "ChatFormatterResponse.__init__": "self prompt * added_special",
        "chat_formatter_to_chat_completion_handler": "chat_formatter",
        "Jinja2ChatFormatter.__init__": "self template eos_token bos_token * stop_token_ids",
        "Jinja2ChatFormatter.IgnoreGenerationTags": None,
        "Jinja2ChatFormatter.tojson": "x",
        "Jinja2ChatFormatter.to_chat_handler": "self",
    },
    "_logger": {"llama_log_callback": None, "GGML_LOG_LEVEL_TO_LOGGING_LEVEL": None},
}  # fmt: skip

# Names that must occur in a function's code: they are where edge-steer steps in.
_USES = {
    "llama": {
        "Llama.__init__": "model_params context_params metadata tokenizer_ chat_handler",
        "Llama.eval": "_ctx kv_cache_seq_rm _batch set_batch decode input_ids n_tokens _requires_eval",
        "Llama.generate": "_init_sampler _sampler eval sample reset _ctx kv_cache_seq_rm n_tokens _requires_eval",
        "Llama.sample": "_sampler sample _ctx",
        "Llama.reset": "n_tokens _requires_eval",
        "Llama.save_state": "input_ids n_tokens",
        "Llama.load_state": "input_ids n_tokens _requires_eval",
        "Llama.tokenize": "tokenizer_ tokenize",
        "Llama.detokenize": "tokenizer_ detokenize",
        "Llama.create_chat_completion": "chat_handler",
    },
    "llama_chat_format": {"Jinja2ChatFormatter.__call__": "_environment render"},
}
# The only functions of Llama that may hold a batch: tokens enter the cache by `eval`, and `embed` is refused.
_HOLD_A_BATCH = {"__init__", "eval", "embed"}

# What a model that is made must have.
_ATTRIBUTES = (
    "input_ids n_tokens _requires_eval _batch _batch.batch _batch.n_seq_max _ctx _ctx.ctx _model _model.vocab _n_vocab "
    "_logits_all _lora_adapter _sampler _stack draft_model last_n_tokens_size lora_scale n_batch verbose"
)


def change_error(expected: str, found: str) -> MismatchError:
    """What to raise where llama-cpp-python, or the llama.cpp that it brings, is not as edge-steer knows it."""
    import llama_cpp

    return MismatchError(f"llama-cpp-python {llama_cpp.__version__}: expected {expected}, got {found}; {INSTALL}")


@cache
def check() -> None:
    """Raise MismatchError where llama-cpp-python lacks what is relied on. No model is needed."""
    for structure, fields in _FIELDS.items():
        _check_fields(structure, fields.split())
    for name in _DECLARED.split():
        _find("llama_cpp", name)
    for module, calls in _CALLS.items():
        for name, parameters in calls.items():
            function = _find(module, name)
            if parameters is not None:
                _check_parameters(name, function, parameters)
    for module, uses in _USES.items():
        for name, wanted in uses.items():
            _check_uses(name, _find(module, name), wanted.split())
    _check_batches()


def check_model(llm: Any) -> None:
    """Raise MismatchError where a Llama that was just made lacks an attribute that is relied on."""
    for path in _ATTRIBUTES.split():
        at = llm
        for name in path.split("."):
            if not hasattr(at, name):
                raise change_error(f"a Llama with {path}", "none")
            at = getattr(at, name)


def _check_fields(structure: str, fields: list[str]) -> None:
    found = [field for field, *_ in _find("llama_cpp", structure)._fields_]
    for field in fields:
        if field not in found:
            raise change_error(f"{structure} with the field {field}", f"the fields {', '.join(found)}")


def _find(module: str, name: str) -> Any:
    path = "llama_cpp" if module == "llama_cpp" else f"llama_cpp.{module}"
    try:
        at = import_module(path)
        for part in name.split("."):
            at = getattr(at, part)
    except (ImportError, AttributeError):
        raise change_error(f"{path}.{name}", "none") from None
    return at


def _check_parameters(name: str, function: Any, wanted: str) -> None:
    by_place, _, by_name = (part.split() for part in wanted.partition("*"))
    parameters = inspect.signature(function).parameters
    found = list(parameters)
    others = [
        each.name
        for each in parameters.values()
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD) and each.default is each.empty
        and each.name not in (*by_place, *by_name)
    ]  # fmt: skip
    if found[: len(by_place)] != by_place or not set(by_name) <= set(found) or others:
        raise change_error(f"{name} to take {wanted.replace(' ', ', ')}", f"{', '.join(found)}")


def _check_uses(name: str, function: Any, wanted: list[str]) -> None:
    names = set(_names(function))
    if missing := [each for each in wanted if each not in names]:
        raise change_error(f"{name} to use {', '.join(wanted)}", f"one without {', '.join(missing)}")


def _check_batches() -> None:
    holders = {name for name, each in vars(_find("llama", "Llama")).items() if "_batch" in _names(each)}
    if more := sorted(holders - _HOLD_A_BATCH):
        raise change_error("tokens to enter the cache by Llama.eval alone", f"a batch in Llama.{more[0]} too")


def _names(function: Any) -> Iterator[str]:
    """Names of attributes and globals in a function's code, and in the functions within it."""
    codes = [getattr(inspect.unwrap(function), "__code__", None)] if callable(function) else []
    while codes:
        code = codes.pop()
        if code is not None:
            yield from code.co_names
            codes += [each for each in code.co_consts if isinstance(each, CodeType)]

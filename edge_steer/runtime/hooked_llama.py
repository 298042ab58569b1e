"""HookedLlama: a llama_cpp.Llama whose graph the native hook sees, and whose texts are tokenized as transformers does.

This file, cached_llama.py and answering_llama.py are the one seam into llama-cpp-python. They rely on: `Llama.__init__`
making the model from `self.model_params` and the context from `self.context_params`; `eval`, `generate`, `save_state`,
`load_state` as the only ways tokens enter the cache; `input_ids`, `n_tokens` and `_requires_eval` describing what is
cached; `_init_sampler` making what chooses a token. compatibility.py checks that this still holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import llama_cpp
import numpy as np
from llama_cpp import Llama
from numpy.typing import NDArray

from edge_steer import compatibility
from edge_steer.chat_template import ChatTemplate
from edge_steer.errors import SteerError
from edge_steer.model_file import ModelFile
from edge_steer.runtime.arguments import adapter_path, context_length
from edge_steer.runtime.chat_handler import make_chat_handler
from edge_steer.runtime.hook import Hook, Record
from edge_steer.runtime.llama_log import llama_errors, reason
from edge_steer.runtime.rpc import connect
from edge_steer.runtime.sampling import Penalties, Sampler
from edge_steer.runtime.tokens import Tokenizer
from edge_steer.sites import Architecture, Site

Message = Mapping[str, Any]  # role and content


def _is_jinja(template: str) -> bool:
    """Whether a template is Jinja's text, not the name of one of llama.cpp's."""
    return "{" in template or "\n" in template


class Closed:
    """In place of what has been freed: llama-cpp-python hands llama.cpp a null pointer, or one to where it lay."""

    def __getattr__(self, name: str) -> NoReturn:
        raise SteerError("expected an open model, got one after close(); make another SteeredLlama")


class HookedLlama(Llama):  # type: ignore[misc]
    """A llama_cpp.Llama with the hook in its context; `_hook` turns and records nothing until it is told to.

    file, arch: the model's, as read_model and architecture give them. rpc, template, sequences: as for SteeredLlama.
    llama: for llama_cpp.Llama.
    Raises SteerError if llama.cpp does not load the model.
    """

    n_tokens: int

    def __init__(
        self,
        model_path: str | Path,
        file: ModelFile,
        arch: Architecture,
        *,
        rpc: Sequence[str] = (),
        template: str | None = None,
        sequences: int = 1,
        **llama: Any,
    ) -> None:
        self._template, self._sequences = template, sequences
        self._made = False
        self._rpc = tuple(rpc)
        devices = connect(self._rpc) if self._rpc else ()
        self._devices = (ctypes.c_void_p * (len(devices) + 1))(*devices)  # ends with a null; llama.cpp reads it once
        if self._rpc:
            llama.setdefault("n_gpu_layers", -1)
        self._hook = Hook(arch, arch.sites(file.block_count, ",".join(arch.kinds)), file.embedding_length)
        self._pieces: dict[int, bytes | None] = {}

        llama.setdefault("verbose", False)
        llama["n_ctx"] = context_length(file, llama.get("n_ctx", 512))
        own_adapter = adapter_path(llama.pop("lora_path", None))
        with llama_errors() as errors:
            try:
                super().__init__(str(model_path), **llama)
                self._load_own_adapter(own_adapter, errors)
            except ValueError as error:
                if not str(error).startswith("Failed to"):  # what llama-cpp-python says of the model and its context
                    raise
                raise SteerError(
                    f"{model_path}: expected a model that llama.cpp loads, got: "
                    f"{reason(errors) or str(error).split(':')[0]}; "
                    "fetch it again, or give less --ctx or --gpu-layers where memory is short"
                ) from None
        compatibility.check_model(self)
        self._made = True
        self.tokenizer_ = llama.get("tokenizer") or Tokenizer(self)
        self._chose_chat_format = not (llama.get("chat_format") or llama.get("chat_handler"))
        if self._chose_chat_format:
            self.chat_handler = make_chat_handler(self)

    # --- making the model and the context ---------------------------------------------------------------------

    @property
    def model_params(self) -> Any:
        """llama.cpp's model parameters. Llama fills them in; the devices of RPC servers are named as they arrive."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        if self._rpc:
            params.devices = ctypes.addressof(self._devices)
        self._model_params = params

    @property
    def context_params(self) -> Any:
        """llama.cpp's context parameters. Llama fills them in; the hook is put in place as they arrive."""
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        callback_type = type(params.cb_eval)
        params.cb_eval = callback_type(self._hook.callback)
        params.cb_eval_user_data = self._hook.user_data
        if self._sequences > 1:
            params.n_seq_max, params.kv_unified = self._sequences, True
        self._context_params = params

    def _load_own_adapter(self, path: str | None, errors: list[str]) -> None:
        """Attach the adapter that lora_path names. (Llama itself goes on with a null pointer where it is refused.)"""
        if path is None:
            return
        adapter = llama_cpp.llama_adapter_lora_init(self._model.model, path.encode())
        if not adapter:
            raise SteerError(f"{path}: expected an adapter for this model, got: {reason(errors) or 'one it refuses'}")
        self._stack.callback(llama_cpp.llama_adapter_lora_free, adapter)
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        if llama_cpp.llama_set_adapters_lora(self._ctx.ctx, pointers, 1, (ctypes.c_float * 1)(self.lora_scale)):
            raise SteerError(f"{path}: expected an adapter that llama.cpp attaches, got one that it refuses")
        self.lora_path, self._lora_adapter = path, adapter

    @property
    def metadata(self) -> dict[str, str]:
        """The model's metadata. While Llama is made, without chat templates: it would compile them unbounded."""
        return self._metadata if self._made else {k: v for k, v in self._metadata.items() if "chat_template" not in k}

    @metadata.setter
    def metadata(self, values: dict[str, str]) -> None:
        self._metadata = values

    # --- text and tokens --------------------------------------------------------------------------------------

    def token_text(self, token: int) -> str:
        """How the vocabulary writes a token; "" for one that it lacks."""
        return "" if token < 0 else str(self._model.token_get_text(token))

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """How this model's chats are written."""
        if self._template is not None and not _is_jinja(self._template):
            return ChatTemplate.builtin(self._template, self.token_text(self.token_bos()))
        return ChatTemplate.from_gguf(
            self._template or self.metadata.get("tokenizer.chat_template"),
            self.token_text(self.token_bos()),
            self.token_text(self.token_eos()),
        )

    def text_tokens(self, text: str) -> list[int]:
        """Tokens of a rendered text; a BOS that it does not bear is added where the model wants one."""
        return list(self.tokenize(text.encode(), add_bos=not self.chat_template.starts_with_bos(text), special=True))

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a chat, generation prompt included."""
        return self.text_tokens(self.chat_template.render(messages))

    def piece(self, token: int) -> bytes | None:
        """A generated token's part of the text; None where it ends the answer."""
        if token not in self._pieces:
            ends = llama_cpp.llama_vocab_is_eog(self._model.vocab, token)
            self._pieces[token] = None if ends else self.detokenize([token])
        return self._pieces[token]

    def longer(self) -> str:
        """What to do about a text that is longer than the context."""
        trained = int(self._model.n_ctx_train())
        return "raise --ctx or quote it" if trained > self.n_ctx() else f"quote it: the model takes {trained}"

    # --- sampling ---------------------------------------------------------------------------------------------

    def _init_sampler(
        self,
        *,
        repeat_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        logits_processor: Any = None,
        grammar: Any = None,
        **how: Any,
    ) -> Any:
        """Llama's sampler, quicker where nothing of Python's comes before the penalties."""
        penalties = Penalties(self.last_n_tokens_size, repeat_penalty, frequency_penalty, presence_penalty)
        if logits_processor is not None:
            charges = {f"{name}_penalty": getattr(penalties, name) for name in ("repeat", "frequency", "presence")}
            return super()._init_sampler(**how, **charges, logits_processor=logits_processor, grammar=grammar)
        greedy = grammar is None and how.get("temp") == 0
        return Sampler(self._n_vocab, penalties, None if greedy else super()._init_sampler(**how, grammar=grammar))

    def last_logits(self) -> NDArray[np.float32]:
        """The logits (vocabulary,) that the next token is chosen by, or the latest was: a copy."""
        return np.array(np.ctypeslib.as_array(self._ctx.get_logits_ith(-1), shape=(self._n_vocab,)), np.float32)

    # --- the hook ---------------------------------------------------------------------------------------------

    @contextmanager
    def recording(self, record: Record) -> Iterator[None]:
        """Within it, the last rows of every batch are added to `record`."""
        self._hook.record(record)
        try:
            yield
        finally:
            self._hook.record(None)

    @property
    def hook_width(self) -> int:
        """The model's width, of a row that is recorded."""
        return self._hook.width

    @property
    def hook_sites(self) -> tuple[Site, ...]:
        """Every site of the model that the hook knows, in the order of a Record's rows."""
        return self._hook.sites

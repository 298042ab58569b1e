"""The torch recorder: runs prompts through a Hugging Face model and reads the last token's activation at every site.

Needs the extra `edge-steer[torch]`. A site's activation is the output of its module, read by a forward hook that is
in place only while recording. Letters: n prompts in a batch, S sites, d model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.architectures import architecture_of
from edge_steer.calibration.sums import KEPT, ClassSums, Step
from edge_steer.chat_template import ChatTemplate
from edge_steer.choices import DEVICES, DTYPES, Device, DType
from edge_steer.errors import SteerError
from edge_steer.prompts import Prompt
from edge_steer.provenance import BaseModel
from edge_steer.sites import Architecture, Site, site_of_module
from edge_steer.user_path import user_path


@dataclass(frozen=True, eq=False)
class TorchRecorder:
    """Records through a transformers `model` (its `body` without the head). `load` makes one.

    modules: the module of each of the S sites. Holds nothing of what it recorded.
    """

    base: BaseModel
    sites: tuple[Site, ...]
    model: Any
    tokenizer: Any
    template: ChatTemplate
    modules: tuple[Any, ...]
    batch_size: int
    name: str = "torch"

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        sites: str = "pre",
        device: Device = "auto",
        dtype: DType = "auto",
        batch_size: int = 16,
    ) -> TorchRecorder:
        """The recorder of the Hugging Face model at `path`: a directory, or the name of a repository.

        sites: as `Architecture.sites` takes them. device: `auto` is CUDA, else MPS, else the CPU. dtype: `auto` is
        float32 on the CPU and bfloat16 elsewhere. Code that comes with a model is never run.
        Raises SteerError if torch is missing, the model cannot be read, or its sites are not known.
        """
        try:
            import torch
            import transformers
        except ImportError as error:
            raise SteerError(
                f"expected torch and transformers, got {error}; install them: pip install 'edge-steer[torch]'"
            ) from None
        if batch_size < 1:
            raise SteerError(f"expected a batch size of at least 1, got {batch_size}")
        if dtype not in DTYPES:
            raise SteerError(f"expected a dtype among {', '.join(DTYPES)}, got {dtype!r}")
        chosen = _device(torch, device)
        if dtype == "auto":
            dtype = "float32" if chosen == "cpu" else "bfloat16"
        source = _source(path)
        with _reading(source):
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        text = config.get_text_config()
        architecture_of(config.to_dict(), where=source)  # refuses an unknown model before it is loaded
        with _reading(source):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=getattr(torch, dtype), trust_remote_code=False
            )
        model = model.to(chosen).eval()
        modules = dict(model.named_modules())
        known = architecture_of(config.to_dict(), modules, where=source)
        blocks, width = int(text.num_hidden_layers), int(text.hidden_size)
        wanted = known.sites(blocks, sites)
        return cls(
            BaseModel(known.name, source.rstrip("/").rsplit("/", 1)[-1], blocks, width),
            wanted,
            model,
            tokenizer,
            ChatTemplate.from_tokenizer(tokenizer),
            _site_modules(known, wanted, modules, blocks),
            batch_size,
        )

    @property
    def uses_plain_template(self) -> bool:
        """Whether the model brought no chat template."""
        return self.template.is_plain

    def sums(self, prompts: Sequence[Prompt], step: Step) -> ClassSums:
        """The sums over `prompts`, run in batches of similar length."""
        tokens = list(map(self._tokens, prompts))
        # The kept ones first: sorted by length, the longest would be kept.
        order = sorted(range(len(tokens)), key=lambda number: (number >= KEPT, -len(tokens[number])))
        none = np.zeros((0, len(self.sites), self.base.embedding_length))
        batches = self._batches([tokens[number] for number in order], step)
        found = sum(map(ClassSums.of, batches), start=ClassSums.of(none))
        return replace(found, sink=self._forward([tokens[0][:1]])[0].astype(np.float64)) if tokens else found

    def text_tokens(self, text: str) -> list[int]:
        """Tokens of a rendered text; a BOS that it does not bear is added where the tokenizer adds one, and nothing
        else that it may add, such as an EOS."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.template.starts_with_bos(text):
            return ids
        whole, bos = self.tokenizer(text)["input_ids"], self.tokenizer.bos_token_id
        return [bos, *ids] if bos is not None and whole[:1] == [bos] and ids[:1] != [bos] else ids

    def _tokens(self, prompt: Prompt) -> list[int]:
        ids = self.text_tokens(self.template.prompt_text(prompt))
        if not ids:
            raise SteerError(f"expected a prompt of at least one token, got none in {prompt.prompt!r}")
        return ids

    def _batches(self, tokens: Sequence[Sequence[int]], step: Step) -> Iterator[NDArray[np.float32]]:
        """Activations (n, S, d) of the last token, batch by batch in the order given."""
        import torch

        for first in range(0, len(tokens), self.batch_size):
            batch = tokens[first : first + self.batch_size]
            try:
                rows = self._forward(batch)
            except torch.OutOfMemoryError:
                raise SteerError(
                    f"out of memory on {self.model.device} with {len(batch)} prompts of up to {max(map(len, batch))} "
                    f"tokens at once; use a batch size below {len(batch)}"
                ) from None
            step(len(batch))
            yield rows

    def _forward(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """One forward pass of the left-padded `batch`: activations (n, S, d) of the last token."""
        import torch

        length = max(map(len, batch))
        ids = torch.zeros((len(batch), length), dtype=torch.long)
        there = torch.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, length - len(tokens) :] = torch.tensor(tokens)
            there[row, length - len(tokens) :] = 1
        device = self.model.device
        with torch.inference_mode(), self._recording() as last:
            # The body alone: logits over a large vocabulary would cost more than all that is read.
            self.model.base_model(
                input_ids=ids.to(device),
                attention_mask=there.to(device),
                position_ids=(there.cumsum(-1) - 1).clamp(min=0).to(device),
                use_cache=False,
            )
            rows = torch.stack([last[number] for number in range(len(self.sites))], dim=1)
        return np.asarray(rows.float().cpu().numpy())

    @contextmanager
    def _recording(self) -> Iterator[dict[int, Any]]:
        """Hooks at all sites while the block runs; they fill site number → last token's activations (n, d)."""
        last: dict[int, Any] = {}

        def keep(number: int) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                h = output[0] if isinstance(output, tuple) else output
                # A copy: a view would keep all tokens of every site in memory until the pass ends.
                last[number] = h[:, -1].clone()

            return hook

        hooks = [module.register_forward_hook(keep(number)) for number, module in enumerate(self.modules)]
        try:
            yield last
        finally:
            for hook in hooks:
                hook.remove()


def _source(path: str | Path) -> str:
    """`path` as transformers takes it. Raises SteerError for a path of this machine that holds no model."""
    local = user_path(path)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise SteerError(f"expected a Hugging Face model in {local}, got a directory without config.json")
        return str(local.resolve())
    text = str(path)
    if isinstance(path, Path) or local.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise SteerError(f"expected the directory of a Hugging Face model, got {text}, which is none")
    return text


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Turns what transformers raises for a model that it cannot read into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise SteerError(
            f"expected a Hugging Face model (a directory, or a repository that can be reached), got {source}: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from None


def _device(torch: Any, device: str) -> str:
    if device not in DEVICES:
        raise SteerError(f"expected a device among {', '.join(DEVICES)}, got {device!r}")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, yes in there.items() if yes)
    if not there[device]:
        raise SteerError(f"expected a {device} device, got none on this machine; use --device cpu")
    return device


def _site_modules(
    known: Architecture, sites: Sequence[Site], modules: dict[str, Any], block_count: int
) -> tuple[Any, ...]:
    """The one module of each site, among all `modules` of a model by name."""
    found: dict[Site, list[str]] = {}
    for name in modules:
        site = site_of_module(known, name, block_count)
        if site is not None:
            found.setdefault(site, []).append(name)
    for site in sites:
        names = found.get(site, [])
        if len(names) != 1:
            raise SteerError(f"expected one module {known.module(site)} for {site}, got {', '.join(names) or 'none'}")
    return tuple(modules[found[site][0]] for site in sites)

"""Two ways to make a model act as its dials say: the native hook, and adapters of llama.cpp's own."""

from __future__ import annotations

import ctypes
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import llama_cpp
import numpy as np

from edge_steer.errors import NoEffectError, SteerError
from edge_steer.model_file import ModelFile
from edge_steer.rotation import Action
from edge_steer.runtime.hook import Hook
from edge_steer.sites import OUTER_KINDS, Site
from edge_steer.steering import Steering

if TYPE_CHECKING:
    from edge_steer.export.lora import Products

EngineName = Literal["hook", "lora", "auto"]
ENGINES: tuple[EngineName, ...] = ("hook", "lora", "auto")
Actions = tuple[Action | None, ...]

# Adapters kept loaded, for a dial that goes back and forth.
_KEPT = 8


class Engine(Protocol):
    """What SteeredLlama asks of an engine. Calls come between two decodes."""

    def apply(self, actions: Actions) -> None:
        """Let each steering do its action from the next decode on; None is off."""

    def check(self) -> None:
        """Raise SteerError where what has been decoded was not steered as it should."""

    def sites_hit(self) -> int:
        """Sites at which something was turned since the model was loaded."""

    def close(self) -> None:
        """Free what it holds. Comes before the context is freed."""


class HookEngine:
    """The native callback: any operator, any site."""

    def __init__(self, hook: Hook, steerings: Sequence[Steering]) -> None:
        self._hook = hook
        self._steerings = steerings
        self._numbers = [hook.add(each) for each in steerings]
        self._applied: Actions = (None,) * len(steerings)
        self._proven: set[str] = set()
        self._checked: Actions | None = None  # what was applied when all of it was last proven

    def apply(self, actions: Actions) -> None:
        if actions is self._applied:
            return
        for number, old, new in zip(self._numbers, self._applied, actions, strict=True):
            if old != new:
                self._hook.dial(number, new)
        self._applied = actions

    def check(self) -> None:
        """Also raises NoEffectError where a site that should act was not met in the graph."""
        self._hook.check_status()
        if self._applied is self._checked:
            return
        on = [each for each, action in zip(self._steerings, self._applied, strict=True) if action is not None]
        unproven = [each for each in on if each.name not in self._proven]
        met = {site for site, count in zip(self._hook.sites, self._hook.reached, strict=True) if count}
        for each in unproven:
            if missing := [site for site in each.steered if site not in met]:
                wanted, found = len(each.steered), len(each.steered) - len(missing)
                names = sorted({name.rsplit("-", 1)[0] for name in self._hook.node_names() if "norm" in name})
                raise NoEffectError(
                    f"steering {each.name!r} met {found} of its {wanted} sites, not {missing[0]}; "
                    f"this model's graph has: {', '.join(names) or 'no norm tensors'}"
                )
            self._proven.add(each.name)
        self._checked = self._applied

    def sites_hit(self) -> int:
        return int(np.count_nonzero(self._hook.turned))

    def close(self) -> None:
        """Nothing: the hook goes after the context that calls it."""


class LoraEngine:
    """One adapter for each position of the dials, built when it is first needed. For linear operators.

    It acts inside llama.cpp's own matrix products, so it is as fast on a GPU as anywhere. `llm` is the Llama it is
    for; an adapter that was loaded with lora_path stays attached. Raises SteerError if a steering is not exact in
    an adapter.
    """

    def __init__(self, llm: Any, model: ModelFile, steerings: Sequence[Steering]) -> None:
        # Imported where used: the hook starts without the exporters.
        from edge_steer.export.lora import products

        self._llm = llm
        self._products: Products = products(model, steerings)
        self._adapters: OrderedDict[Actions, Any] = OrderedDict()
        self._applied: Actions = (None,) * len(steerings)
        self._hit: set[Site] = set()

    def apply(self, actions: Actions) -> None:
        if actions == self._applied:
            return
        self._attach(None if not any(actions) else self._adapter(actions))
        self._applied = actions
        for steering, action in zip(self._products.steerings, actions, strict=True):
            if action is not None:
                self._hit.update(steering.steered)

    def check(self) -> None:
        """Nothing: llama.cpp checked every tensor when it loaded the adapter."""

    def sites_hit(self) -> int:
        return len(self._hit)

    def close(self) -> None:
        if self._llm._ctx.ctx is not None:
            self._attach(None)
        while self._adapters:
            llama_cpp.llama_adapter_lora_free(self._adapters.popitem()[1])

    def _adapter(self, actions: Actions) -> Any:
        from edge_steer.export.lora import live_adapter

        if actions not in self._adapters:
            with _without_warnings(verbose=self._llm.verbose):
                self._adapters[actions] = live_adapter(self._llm.model, self._products, actions)
        self._adapters.move_to_end(actions)
        return self._adapters[actions]

    def _attach(self, adapter: Any | None) -> None:
        own = self._llm._lora_adapter
        attached = [(own, self._llm.lora_scale)] if own is not None else []
        attached += [(adapter, 1.0)] if adapter is not None else []
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * len(attached))(*(pointer for pointer, _ in attached))
        scales = (ctypes.c_float * len(attached))(*(scale for _, scale in attached))
        if llama_cpp.llama_set_adapters_lora(self._llm._ctx.ctx, pointers, len(attached), scales):
            raise SteerError("llama.cpp refused to attach the steering's adapter; use the hook")
        while len(self._adapters) > _KEPT:
            llama_cpp.llama_adapter_lora_free(self._adapters.popitem(last=False)[1])


@contextmanager
def _without_warnings(*, verbose: bool) -> Iterator[None]:
    """llama.cpp warns of every adapter weight whose model weight it has repacked, harmlessly; and llama-cpp-python
    takes its warnings for errors, which it prints unasked."""
    logger = logging.getLogger("llama-cpp-python")
    before = logger.level
    if not verbose:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def choose_engine(name: EngineName, steerings: Sequence[Steering], *, offloaded: bool) -> Literal["hook", "lora"]:
    """`auto` is the hook, unless every layer is on a GPU, every operator is linear, and all turn at norms before the
    head: what turns the residual stream changes every weight of a block, and a tied head takes no adapter."""
    if name not in ENGINES:
        raise SteerError(f"expected the engine {', '.join(ENGINES)}, got {name!r}")
    if name != "auto":
        return name
    linear = bool(steerings) and all(
        each.operator in ("selective", "ablation") and not any(site.kind in OUTER_KINDS for site in each.steered)
        for each in steerings
    )
    return "lora" if offloaded and linear else "hook"

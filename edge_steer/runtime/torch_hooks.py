"""Steering on transformers: the reference engine, slow and exact, for any operator at any site.

Every steered activation goes through rotation.py in float64, on the CPU. What the hook, adapters and baked weights do
is held against this. Needs torch: pip install 'edge-steer[torch]'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_steer.architectures import architecture_of
from edge_steer.errors import NoEffectError
from edge_steer.provenance import BaseModel
from edge_steer.rotation import Action
from edge_steer.sites import Architecture, Site, site_of_module
from edge_steer.steering import Steering


@contextmanager
def steer(model: Any, steerings: Sequence[tuple[Steering, float | None]]) -> Iterator[None]:
    """While the block runs, the transformers `model` is steered at every token, by each (steering, dial) in order.

    A dial of None is off. Raises MismatchError if a steering is not for this model, NoEffectError where the model
    has no module for one of its sites.

        with steered(model, [(calm, 8)]):
            model.generate(**inputs)
    """
    known, base = _model(model)
    found = {site_of_module(known, name, base.block_count): module for name, module in model.named_modules()}
    hooks: list[tuple[Any, Any]] = []
    for steering, dial in steerings:
        steering.check_fits(base)
        if (action := steering.action(dial)) is None:
            continue
        for site, on, mean_norm in zip(steering.sites, steering.mask, steering.mean_norm, strict=True):
            if on:
                basis = steering.basis_at(site).astype(np.float64)
                hooks.append((_module(found, site, steering), _hook(action, basis, float(mean_norm))))
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _model(model: Any) -> tuple[Architecture, BaseModel]:
    config = model.config
    text = config.get_text_config()
    known = architecture_of(config.to_dict(), [name for name, _ in model.named_modules()])
    name = str(getattr(config, "name_or_path", "")) or str(config.model_type)
    return known, BaseModel(known.name, name, int(text.num_hidden_layers), int(text.hidden_size))


def _module(found: dict[Site | None, Any], site: Site, steering: Steering) -> Any:
    if site not in found:
        raise NoEffectError(f"steering {steering.name!r} acts at {site}, which this model lacks")
    return found[site]


def _hook(action: Action, basis: NDArray[np.float64], mean_norm: float) -> Any:
    import torch

    def turn(_module: Any, _inputs: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        turned = torch.from_numpy(action(h.detach().cpu().double().numpy(), basis, mean_norm)).to(h)
        return (turned, *output[1:]) if isinstance(output, tuple) else turned

    return turn

"""What Ollama's clients are told of the model."""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edge_steer.serve.service import Service
from edge_steer.serve.steering_field import aliases


def now() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


def names(service: Service) -> list[str]:
    return [service.name, *aliases(service.name, service.llm.steerings)]


def list_model(service: Service, name: str) -> dict[str, Any]:
    size = Path(service.llm.model_path).stat().st_size
    digest = hashlib.sha256(f"{name} {size}".encode()).hexdigest()  # of no file: it tells one name from another
    modified = datetime.fromtimestamp(service.created, timezone.utc).isoformat()
    return {
        "name": name, "model": name, "modified_at": modified, "size": size, "digest": digest,
        "details": _details(service),
    }  # fmt: skip


def _details(service: Service) -> dict[str, Any]:
    family = str(service.llm.metadata.get("general.architecture", ""))
    millions = service.llm._model.n_params() / 1e6
    size = f"{millions / 1000:.1f}B" if millions >= 1000 else f"{millions:.0f}M"
    return {
        "parent_model": "", "format": "gguf", "family": family, "families": [family], "parameter_size": size,
        "quantization_level": service.llm._model.desc().rpartition(" ")[2],
    }  # fmt: skip


def describe_model(service: Service) -> dict[str, Any]:
    source = service.llm.chat_template.source or ""
    family = str(service.llm.metadata.get("general.architecture", ""))
    info = {
        "general.architecture": family,
        "general.parameter_count": service.llm._model.n_params(),
        f"{family}.context_length": service.llm.n_ctx(),
        f"{family}.embedding_length": service.llm.n_embd(),
    }
    return {
        "modelfile": "", "parameters": "", "template": source, "details": _details(service), "model_info": info,
        "capabilities": ["completion", *(["tools"] if "tools" in source else [])], "modified_at": now(),
    }  # fmt: skip

"""Parts that several of OpenAI's answers share."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from edge_steer.gate import Gate
from edge_steer.runtime.answer import Answer, Piece
from edge_steer.serve.fields import Common
from edge_steer.serve.gate_field import shown_gates
from edge_steer.serve.service import Ended, Service
from edge_steer.serve.steering_field import Dial, round_dial
from edge_steer.serve.worker import Ticket


def head(ticket: Ticket, service: Service, asked: Common, kind: str) -> dict[str, Any]:
    """What every answer and chunk begins with; `steering` is what was applied."""
    return {
        "id": ticket.id,
        "object": kind,
        "created": int(time.time()),
        "model": asked.model or service.name,
        "system_fingerprint": "edge-steer",
        "steering": applied_steering(ticket.dials, ticket.gates),
    }


def applied_steering(dials: Mapping[str, Dial], gates: Mapping[str, Gate | None] | None = None) -> dict[str, Any]:
    """Dials as an answer says that they were applied, with the gates of those that have one."""
    return shown_gates({name: round_dial(dial) for name, dial in dials.items()}, gates or {})


def usage(ended: Sequence[Ended | None]) -> dict[str, Any]:
    """Tokens that a request cost. The prompt counts once, however many answers it got."""
    answers = [each.answer for each in ended if each is not None]
    prompt = max((answer.prompt_tokens for answer in answers), default=0)
    generated = sum(answer.generated_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def token_readings(piece: Piece) -> dict[str, Any]:
    """What a chunk of a request that reads has beside the text."""
    found = piece.readings or {}
    return {"readings": {name: round(value, 4) for name, value in found.items()}} if found else {}


def answer_readings(answer: Answer) -> dict[str, Any]:
    """What a choice of a request that reads has beside the text: every token's reading, and the prompt's mean, to which
    the first token does not count, as all others lean on it."""
    if answer.readings is None or answer.prompt_readings is None:
        return {}
    prompts = {name: found[1:] for name, found in answer.prompt_readings.items()}
    return {
        "readings": {
            name: {
                "prompt": round(float(prompts[name].mean()), 4) if len(prompts[name]) else None,
                "tokens": [round(float(each), 4) for each in found],
            }
            for name, found in answer.readings.items()
        }
    }


def token_bytes(service: Service, token: int) -> bytes:
    return bytes(service.llm.detokenize([token], special=True))


def choice_detail(service: Service, token: int, log_probability: float) -> dict[str, Any]:
    """A token of a chat's log-probabilities."""
    text = token_bytes(service, token)
    return {"token": text.decode(errors="replace"), "logprob": log_probability, "bytes": list(text)}

"""What is looked at before the first request reaches llama-server, and told in one line each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from edge_steer.errors import MismatchError, SteerError, quote
from edge_steer.serve.adapters import all_scales, match, parse_list
from edge_steer.serve.relay import Upstream
from edge_steer.serve.steering_field import BadRequest, Dial
from edge_steer.serve.upstream import ADAPTERS, Front, check_url, shared_sites
from edge_steer.steering import Steering

Note = Callable[[str], object]
LOADING_SECONDS = 600.0
# Long enough to be worth a cache's while, and alike in nothing.
_ONE = "One, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen"
_OTHER = "The river runs from the hills through meadows, past mills and barns and gardens, down to a grey cold sea"


def open_upstream(
    url: str,
    steerings: Sequence[Steering],
    dials: Mapping[str, Dial],
    *,
    key: str | None = None,
    order: Mapping[str, tuple[int, ...]] | None = None,
    note: Note,
) -> Front:
    """What stands in front of the llama-server at `url`, which may still be loading.

    Raises SteerError if there is none, or its model or its adapters are not what the steerings need.
    """
    address = check_url(url).rstrip("/")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=address, headers=headers, timeout=httpx.Timeout(120), trust_env=False) as client:
        _wait(client, address, note)
        name, width = _model(client, address)
        _check_width(steerings, width, f"{name} at {address}")
        if key is None and client.get(ADAPTERS).status_code == 401:
            note(
                "llama-server wants a key, so its adapters are looked at when a request brings one; see --upstream-key"
            )
            keeps = False
        else:
            keeps = _check_adapters(client, address, steerings, dials, order, note)
    for one, other in shared_sites(steerings):
        note(f"{one} and {other} act at the same places, where adapters add: both at once are a little off the hook's")
    return Front(Upstream(address, key), tuple(steerings), dict(dials), name, dict(order or {}), keeps)


def _check_adapters(
    client: httpx.Client,
    address: str,
    steerings: Sequence[Steering],
    dials: Mapping[str, Dial],
    order: Mapping[str, tuple[int, ...]] | None,
    note: Note,
) -> bool:
    """Whether llama-server's caches may be used. Raises SteerError if its adapters are not what the steerings need."""
    found = parse_list(_get(client, address, ADAPTERS))
    matched = match(steerings, found, order)
    try:
        all_scales(steerings, matched, {}, dials)
    except BadRequest as error:
        raise SteerError(f"{error.message}; start with -s FILE:DIAL") from None
    ours = [id for served in matched.values() for id in (served.cos, served.sin) if id is not None]
    if any(each.scale for each in found if each.id in ours):
        note(
            "the adapters do not stand at 0, so whoever asks llama-server itself is answered at no angle at all; "
            "start it with --lora-scaled NAME-cos.gguf:0,NAME-sin.gguf:0"
        )
    if ours and _mixes_dials(client, ours):
        note(
            "llama-server's prompt cache does not tell one dial from another, so each prompt is evaluated whole; "
            "start it with --cache-ram 0 to have the conversation's own cache used"
        )
        return False
    return True


def _check_width(steerings: Sequence[Steering], width: int | None, what: str) -> None:
    for each in steerings:
        if width not in (None, each.base.embedding_length):
            raise MismatchError(
                f"steering {each.name!r} is for {each.base.name or each.base.architecture}: its width is "
                f"{each.base.embedding_length}, that of {what} is {width}"
            )


def _wait(client: httpx.Client, address: str, note: Note) -> None:
    """Until the model is loaded."""
    end, told = time.monotonic() + LOADING_SECONDS, False
    while time.monotonic() < end:
        try:
            status = client.get("/health").status_code
        except httpx.TransportError as error:
            raise SteerError(f"expected llama-server at {address}, got: {error}; start it first") from None
        if status == 200:
            return
        if status != 503:
            raise SteerError(f"expected llama-server at {address}, got a server whose /health answers {status}")
        if not told:
            note(f"llama-server at {address} is loading its model")
            told = True
        time.sleep(0.5)
    raise SteerError(f"llama-server at {address} did not load its model within {LOADING_SECONDS:g} seconds")


def _get(client: httpx.Client, address: str, path: str) -> Any:
    try:
        answer = client.get(path)
        if answer.status_code == 401:
            raise SteerError(f"llama-server at {address} wants a key: give --upstream-key")
        if answer.status_code != 200:
            raise SteerError(
                f"expected a llama-server at {address}, with one model, got {answer.status_code} from {path}"
            )
        return answer.json()
    except (httpx.TransportError, ValueError) as error:
        raise SteerError(f"expected a llama-server at {address}, got from {path}: {error}") from None


def _model(client: httpx.Client, address: str) -> tuple[str, int | None]:
    """The model's name and width."""
    body = _get(client, address, "/v1/models")
    try:
        first = body["data"][0]
        width = (first.get("meta") or {}).get("n_embd")
        return str(first["id"]), None if width is None else int(width)
    except (TypeError, KeyError, IndexError, ValueError, AttributeError):
        raise SteerError(f"expected a list of models at {address}/v1/models, got {quote(body)}") from None


def _mixes_dials(client: httpx.Client, ids: Sequence[int]) -> bool:
    """Whether llama-server answers from what it cached at another dial.

    It drops a slot's cache where the scales change, but it also keeps prompts in memory (--cache-ram, on unless told
    otherwise), with no word of the scales. So: one prompt, another at other scales, the first again at those.
    """

    def ask(prompt: str, scale: float) -> int:
        lora = [{"id": id, "scale": scale} for id in ids]
        body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "id_slot": 0, "cache_prompt": True, "lora": lora}
        answer = client.post("/completion", json=body)
        answer.raise_for_status()
        return int(answer.json()["timings"]["cache_n"])

    try:
        ask(_ONE, 0.001)
        ask(_OTHER, 0.0)
        return ask(_ONE, 0.0) > 4
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return True  # what cannot be known is taken for the worse

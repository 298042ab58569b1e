"""What each client's script shares: a SteeredLlama that the client is given, another that is asked directly, and the
demand that both say the same at every position of the dial, and something else at each."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from edge_steer import SteeredLlama

QUESTION = "How was your day?"
BEGINNING = "The weather today was"
CHAT = [{"role": "user", "content": QUESTION}]
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}
PLAIN = {"repeat_penalty": 1.0}  # some clients have another default


@dataclass(frozen=True)
class Pair:
    """given: the SteeredLlama that the client gets. own: its like, asked directly. dials: off, one end, the other end,
    and the one again, so that a client or a cache that keeps what another angle made is caught."""

    given: SteeredLlama
    own: SteeredLlama
    dials: tuple[float | None, ...]

    def demand_same(self, what: str, client: Callable[[], Any], direct: Callable[[SteeredLlama], Any]) -> None:
        """Exit with an error unless `client()` gives what then `direct(own)` gives, at every position of the dial, and
        something else at each. The dial turns between any two answers, so that every prompt is evaluated whole: cut in
        pieces, a quantized model's logits differ by tenths, of a plain Llama too."""
        found = {}
        for dial in self.dials:
            self.given.angle = self.own.angle = dial
            found[dial] = client()
            self.own.reset()
            expected = direct(self.own)
            if found[dial] != expected:
                sys.exit(f"{what} at {dial}: expected what SteeredLlama gives, {expected!r}, got {found[dial]!r}")
        if len({repr(each) for each in found.values()}) < len(found):
            sys.exit(f"{what}: expected another answer at each of {list(found)}, got {found}")
        for dial, answer in found.items():
            print(f"{what} at {dial}: {answer!r}", file=sys.stderr)


def pair(**llama: Any) -> Pair:
    """Two SteeredLlamas on the model and steering that the command line names."""
    model, path = sys.argv[1:]
    given, own = (SteeredLlama(model, steering=path, n_ctx=1024, **llama) for _ in range(2))
    low, high = own.steerings[0].at_strength(-1), own.steerings[0].at_strength(1)
    return Pair(given, own, (None, low, high, low))


def answer(llm: SteeredLlama) -> str:
    """What SteeredLlama itself answers."""
    return str(llm.create_chat_completion(messages=CHAT, **GREEDY)["choices"][0]["message"]["content"])


def completion(llm: SteeredLlama) -> str:
    """How SteeredLlama itself goes on."""
    return str(llm.create_completion(BEGINNING, **GREEDY)["choices"][0]["text"])


def works(package: str, glue: str = "") -> None:
    """Report the result. glue: what had to be done beyond handing over the model."""
    print(json.dumps({"package": package, "version": version(package), "glue": glue}))


SERVED = "LlamaProxy.load_llama_from_model_settings = staticmethod(lambda _: llm)"


@contextmanager
def serving(llm: SteeredLlama) -> Iterator[str]:
    """llama-cpp-python's own server on the loopback address, with `llm` in place of the model that it would load;
    yields its address."""
    import uvicorn
    from llama_cpp.server import app, model, settings

    model.LlamaProxy.load_llama_from_model_settings = staticmethod(lambda _: llm)
    served = app.create_app(
        server_settings=settings.ServerSettings(), model_settings=[settings.ModelSettings(model="steered")]
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(served, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            sys.exit("expected a server, got one that ended")
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join()

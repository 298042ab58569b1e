"""One thread that has the model, and the queue before it: first come, first served.

What a request wants done is a function that runs on that thread and tells what it finds as events. The event loop
reads them; it never waits for the model.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from edge_steer.errors import SteerError
from edge_steer.gate import Gate
from edge_steer.runtime.llama import Cancelled, SteeredLlama
from edge_steer.serve.errors import ApiError
from edge_steer.serve.steering_field import Dial

PING_SECONDS = 5.0  # of silence, until whoever reads events is told that nothing has come
# An event that may wait goes with the next one where the last went this short a time ago: waking the event loop for
# every token of a fast model takes a core from it, and no eye follows more than 30 words a second.
WAKE_SECONDS = 1 / 30
Work = Callable[[SteeredLlama, "Ticket"], None]


class Ping:
    """Nothing has happened for a while."""


class Done:
    """The last event of work that ended well."""


class Ticket:
    """A place in the queue, and then the work itself. Dials and gates stand when it begins; `move` turns dials at any
    time."""

    def __init__(self, id: str, dials: dict[str, Dial], gates: dict[str, Gate | None], work: Work) -> None:
        self.id = id
        self.dials = dials
        self.gates = gates
        self.cancelled = False
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._told: deque[Any] = deque()  # on their way to the event loop
        self._woken = 0.0  # when it was told last of what may wait
        self._moved = False

    def move(self, dials: dict[str, Dial]) -> None:
        """Turn these dials, from the next token on."""
        self.dials = {**self.dials, **dials}
        self._moved = True

    def cancel(self) -> None:
        """Stop at the next token, or before the first."""
        self.cancelled = True

    def tell(self, event: Any, *, may_wait: bool = False) -> None:
        """From the model's thread: an event for who reads them. may_wait: another one is sure to come soon."""
        self._told.append(event)
        now = time.monotonic()
        if not may_wait or now - self._woken >= WAKE_SECONDS:
            self._woken = now if may_wait else 0.0
            self._loop.call_soon_threadsafe(self._hand_over)

    def _hand_over(self) -> None:
        while self._told:
            self._events.put_nowait(self._told.popleft())

    @property
    def has_more(self) -> bool:
        """Whether events wait to be read."""
        return not self._events.empty()

    def turn(self, llm: SteeredLlama) -> None:
        """From the model's thread, between two tokens: put moved dials in place. Raises Cancelled if it is."""
        if self.cancelled:
            raise Cancelled
        if self._moved:
            self._moved = False
            llm.angles.update(self.dials)

    async def events(self, patience: float | None = None) -> AsyncIterator[Any]:
        """What the work tells, a Ping in each silence, until its Done. Raises what the work raised.

        patience: seconds that the work may wait for its turn. Leaving early cancels it.
        """
        begun, waited = False, 0.0
        silence = self._ping_later()
        try:
            while True:
                event = await self._events.get()
                silence.cancel()  # a timer for each event costs a tenth of what asyncio.wait_for does
                silence = self._ping_later()
                if isinstance(event, Ping):
                    waited += PING_SECONDS
                    if not begun and patience is not None and waited >= patience:
                        raise busy(f"this request waited {waited:g} seconds for its turn")
                    yield event
                    continue
                begun = True
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Done):
                    return
                yield event
        finally:
            silence.cancel()
            self.cancel()

    def _ping_later(self) -> asyncio.TimerHandle:
        return self._loop.call_later(PING_SECONDS, self._events.put_nowait, Ping())

    def run(self, llm: SteeredLlama) -> Any:
        """Do the work, on the model's thread; returns its last event, which is still to be told."""
        end: Any = Done()
        try:
            if self.cancelled:
                raise Cancelled
            self._moved = False
            llm.angles.update(self.dials)
            llm.gates.set(self.gates)
            llm.cancelled = lambda: self.cancelled
            self._work(llm, self)
        except Cancelled:
            pass
        except SteerError as error:
            end = ApiError(400, str(error))
        except Exception as error:
            end = ApiError(500, f"{type(error).__name__}: {error}", type="server_error")
        finally:
            llm.cancelled = None
        return end


class Worker:
    """The thread and its queue of at most `most_waiting` tickets beside the one at work."""

    def __init__(self, llm: SteeredLlama, most_waiting: int) -> None:
        self._llm = llm
        self._most_waiting = most_waiting
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._tickets: dict[str, Ticket] = {}  # that are not over
        self.finished = 0
        self._thread = threading.Thread(target=self._serve, name="model", daemon=True)
        self._thread.start()

    @property
    def load(self) -> int:
        """Tickets at work or waiting."""
        return len(self._tickets)

    def find(self, id: str) -> Ticket | None:
        """The ticket `id`, while it is not over."""
        return self._tickets.get(id)

    def submit(self, kind: str, dials: dict[str, Dial], gates: dict[str, Gate | None], work: Work) -> Ticket:
        """Queue work. Raises ApiError 503 if the queue is full."""
        ticket = Ticket(f"{kind}-{secrets.token_hex(12)}", dials, gates, work)
        with self._changed:
            self._waiting = deque(each for each in self._waiting if not each.cancelled)
            if self._closing or len(self._waiting) > self._most_waiting:
                raise busy(f"{len(self._waiting)} requests are waiting already")
            self._waiting.append(ticket)
            self._tickets[ticket.id] = ticket
            self._changed.notify()
        return ticket

    def close(self) -> None:
        """Cancel everything, and wait for the thread to end."""
        with self._changed:
            self._closing = True
            for ticket in self._tickets.values():
                ticket.cancel()
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
            end = ticket.run(self._llm)
            self.finished += 1
            del self._tickets[ticket.id]
            ticket.tell(end)  # last: who hears of it finds it counted, and over


def busy(why: str) -> ApiError:
    """503: come again."""
    return ApiError(
        503, f"{why}; try again in a moment", type="server_error", code="queue_full", headers={"Retry-After": "5"}
    )

"""A model's layers on other machines, over llama.cpp's own RPC servers.

    python -m edge_steer.runtime.rpc 192.168.1.20:50052        # on the other machine: lends its GPUs, else its CPU

The protocol knows no passwords and no encryption: for networks of one's own only.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from ctypes import c_void_p
from functools import cache

import llama_cpp

from edge_steer import ggml
from edge_steer.compatibility import TESTED
from edge_steer.errors import MismatchError, SteerError
from edge_steer.runtime.native import check_library

_HELLO, _CAPS = 14, 24  # the first message of every version of the protocol, and its length
_PROTOCOL = 7  # its major version in the release that was tested; ggml does not tell that of another
_SECONDS = 10.0
# No more: llama.cpp's scheduler takes 16 backends, and the CPU is one.
_MOST_DEVICES = 15


def _rpc_library() -> ctypes.CDLL:
    check_library()
    lib = ggml.rpc()
    if lib is None:
        raise SteerError(
            "this llama-cpp-python is built without RPC; build it with: CMAKE_ARGS=-DGGML_RPC=ON pip install "
            f"--force-reinstall --no-deps --no-cache-dir llama-cpp-python=={TESTED}"
        )
    return lib


def _local_gpus() -> list[int]:
    return ggml.local_devices(ggml.GPU) or ggml.local_devices(ggml.INTEGRATED_GPU)


def parse_endpoint(server: str) -> tuple[str, int]:
    """`host:port` as its two parts. Raises SteerError."""
    host, _, port = server.rpartition(":")
    if not host or ":" in host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise SteerError(f"expected an RPC server as HOST:PORT, got {server!r}")
    return host, int(port)


def _greet(server: str) -> None:
    """Raise SteerError where no RPC server of this protocol answers: ggml itself would end the process."""
    address = parse_endpoint(server)
    try:
        with socket.create_connection(address, _SECONDS) as connection:
            connection.settimeout(_SECONDS)
            connection.sendall(struct.pack("<BQ", _HELLO, _CAPS) + bytes(_CAPS))
            with connection.makefile("rb") as reply:
                answer = reply.read(8 + 4 + _CAPS)
    except TimeoutError:
        raise SteerError(f"RPC server {server} does not answer; is it busy with another client?") from None
    except OSError as error:
        raise SteerError(f"RPC server {server} cannot be reached: {error.strerror or error}; is it running?") from None
    if len(answer) != 8 + 4 + _CAPS:
        raise SteerError(f"expected an RPC server at {server}, got another program")
    if answer[8] != _PROTOCOL and llama_cpp.__version__ == TESTED:
        raise MismatchError(
            f"expected an RPC server of protocol {_PROTOCOL} at {server}, got {answer[8]}; "
            f"run the llama.cpp of llama-cpp-python {TESTED} there"
        )


# What else is done before the process ends, each a function that returns a line for the user.
last_words: list[Callable[[], str]] = []
_told_lost = False


def _end(message: bytes) -> None:
    """What ggml calls before it aborts. A lost server is no reason for a core dump, nor for a lost conversation."""
    text = message.decode(errors="replace")
    lost = "RPC" in text
    if "handshake" in text:
        line = f"an RPC server is of another llama.cpp; run that of llama-cpp-python {llama_cpp.__version__} there"
    elif lost:
        line = "an RPC server was lost; start it again, then repeat"
    else:
        line = f"llama.cpp stopped: {text}"
    if not (lost and _told_lost):
        _tell(f"\nError: {line}\n")
        for words in last_words:
            with suppress(Exception):  # the process ends in any case
                _tell(f"{words()}\n")
    os._exit(1)


def _tell(text: str) -> None:
    os.write(2, text.encode(errors="replace"))


def check_servers(servers: Sequence[str]) -> None:
    """Raise SteerError where one of `servers` has closed its connection with this process: to ask it anything would end
    the process. A machine that vanished without a word is not noticed, nor anything on Windows, whose sockets are no
    files."""
    global _told_lost
    wanted = {_address(server): server for server in servers}
    for connection in _connections():
        with connection, suppress(OSError):
            server = wanted.get(connection.getpeername()[:2])
            if server is not None and _is_closed(connection):
                if not _told_lost:
                    atexit.register(_leave)
                _told_lost = True
                raise SteerError(
                    f"RPC server {server} was lost, and the model's layers with it; start it again, then this program"
                )


def _leave() -> None:
    """End the process before Python frees the model: ggml would ask the lost server to, and abort."""
    if not _told_lost:
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(1)


def _connections() -> Iterator[socket.socket]:
    """This process's sockets, each as a copy for the caller to close; ggml does not hand its own out."""
    for number in map(int, os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else ()):
        with suppress(OSError):  # closed meanwhile, such as that of the listing itself
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                yield socket.socket(fileno=os.dup(number))


@cache
def _address(server: str) -> tuple[str, int]:
    """The numbers of the peer that ggml has a connection with."""
    host, port = parse_endpoint(server)
    try:
        return socket.gethostbyname(host), port
    except OSError:
        return host, port


def _is_closed(connection: socket.socket) -> bool:
    """Whether the other side has ended a connection."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


_END = ggml.AbortCallback(_end)  # ggml keeps its address


@cache
def _devices_of(server: str) -> tuple[int, ...]:
    """ggml's devices on one server. Asked once a process: a server talks to one client at a time, and that is us."""
    lib, base = _rpc_library(), ggml.base()
    _greet(server)
    base.ggml_set_abort_callback(_END)
    registered = lib.ggml_backend_rpc_add_server(server.encode())
    if not registered:
        raise SteerError(f"RPC server {server} has no devices")
    count = base.ggml_backend_reg_dev_count(registered)
    return tuple(base.ggml_backend_reg_dev_get(registered, i) for i in range(count))


def connect(servers: Sequence[str]) -> tuple[int, ...]:
    """ggml's devices on `servers`, each HOST:PORT, with those of this machine's GPUs behind them.

    From then on a server that is lost in the middle of a computation ends the process with one line and exit code 1,
    after `last_words`: ggml would abort it. Raises SteerError if a server does not answer or this llama.cpp is built
    without RPC.
    """
    devices = [device for server in dict.fromkeys(servers) for device in _devices_of(server)] + _local_gpus()
    if len(devices) > _MOST_DEVICES:
        raise SteerError(f"expected at most {_MOST_DEVICES} devices, got {len(devices)}; name fewer servers")
    return tuple(devices)


def serve(endpoint: str, threads: int) -> None:
    """Lend this machine's GPUs, or its CPU where it has none, at `endpoint`, one client at a time, until killed."""
    parse_endpoint(endpoint)
    lib = _rpc_library()
    devices = _local_gpus() or ggml.local_devices(ggml.CPU)
    lib.ggml_backend_rpc_start_server(
        endpoint.encode(), None, threads, len(devices), (c_void_p * len(devices))(*devices)
    )
    raise SteerError(f"cannot serve at {endpoint}; is the port taken?")


def main() -> None:
    if not 2 <= len(sys.argv) <= 3 or not all(argument.isdecimal() for argument in sys.argv[2:]):
        sys.exit("usage: python -m edge_steer.runtime.rpc HOST:PORT [THREADS]")
    try:
        serve(sys.argv[1], int(sys.argv[2]) if len(sys.argv) == 3 else os.cpu_count() or 1)
    except SteerError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()

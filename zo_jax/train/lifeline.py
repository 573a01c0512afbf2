"""How the processes of a run learn at once that one of them has died: a socket from each to the
first, which the kernel closes.

JAX's coordination service notices too, but later, and aborts the process with the frames of all its
threads.
"""

from collections.abc import Callable
import contextlib
import secrets
import socket
import threading
from typing import Any

_BYE = b"b"
# Seconds in which a process must reach the first one; if it does not, JAX's service alone watches
# over it.
_TIMEOUT = 10


class Lifeline:
    """Sockets between the first process and the others. Who closes one without a goodbye has
    died.
    """

    def __init__(self, sockets: list[socket.socket], when_one_dies: Callable[[], Any]):
        """Watches the sockets, and calls a function, in a thread of its own, once one is closed
        without a goodbye.
        """
        self._sockets, self._when_one_dies, self._left = sockets, when_one_dies, False
        for one in sockets:
            one.settimeout(None)
            _keep_alive(one)
            threading.Thread(target=self._watch, args=(one,), daemon=True).start()

    def let_go(self) -> None:
        """Before this process ends for a reason of its own: it cares no more for the others, which
        see it die.
        """
        self._left = True

    def say_goodbye(self) -> None:
        """Before this process ends as all of them do."""
        self._left = True
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.sendall(_BYE)

    def _watch(self, one: socket.socket) -> None:
        heard = b""
        with contextlib.suppress(OSError):
            heard = one.recv(1)
        if heard != _BYE and not self._left:
            self._when_one_dies()


def _keep_alive(one: socket.socket) -> None:
    """Has the kernel close a connection whose other machine is gone without closing it, before
    JAX's service (10 s) aborts the process.
    """
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Where the system has them: seconds of silence, seconds between questions, questions.
    for name, value in (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            one.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def connect(
    index: int,
    count: int,
    host: str,
    exchange: Callable[[Any], list[Any]],
    when_one_dies: Callable[[], Any],
) -> Lifeline:
    """Connects all processes with the first one.

    Args:
      index: of this process.
      count: of all.
      host: of the first one.
      exchange: what every process gave [JSON], in their order.
      when_one_dies: called in a thread of its own.
    """
    if index == 0:
        token = secrets.token_hex(16)
        with socket.create_server(("", 0), backlog=count) as server:
            server.settimeout(_TIMEOUT)
            exchange([server.getsockname()[1], token])
            sockets = list(_accept(server, count - 1, token))
        return Lifeline(sockets, when_one_dies)
    port, token = exchange(None)[0]
    with contextlib.suppress(OSError):
        mine = socket.create_connection((host, port), _TIMEOUT)
        mine.sendall(token.encode())
        return Lifeline([mine], when_one_dies)
    return Lifeline([], when_one_dies)


def _accept(server: socket.socket, count: int, token: str):
    """The sockets of the processes that come in time and know the token."""
    with contextlib.suppress(TimeoutError):
        while count:
            one, _ = server.accept()
            one.settimeout(_TIMEOUT)
            with contextlib.suppress(OSError):
                if one.recv(len(token), socket.MSG_WAITALL) == token.encode():
                    count -= 1
                    yield one
                    continue
            one.close()

"""The Unix socket at which a process on this host gets a segment's memory for its token."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

TOKEN_BYTES = 32
#: First byte that an admitted peer gets, with the descriptor where there is one. A refused peer gets the end of stream.
WELCOME = b"\x01"
#: Seconds that a peer has to send its token.
_HANDSHAKE_SECONDS = 5.0
#: Peers that may be connected without having shown a token.
_MAX_STRANGERS = 64
_TICK_SECONDS = 1.0
#: Rest after a fault that may come again at once, such as no descriptors left.
_PAUSE_SECONDS = 0.05
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True)
class Admission:
    """A peer that showed a good token: the segment, and a descriptor of its memory, the listener's to close."""

    segment_id: str
    file_descriptor: int | None


@dataclass
class _Peer:
    connection: socket.socket
    deadline: float
    token: bytearray = field(default_factory=bytearray)
    segment_id: str | None = None


class SegmentListener:
    """Hands segments to peers and watches their connections, on a thread of its own; no peer can hold it up.

    Args:
        path: of the socket; only this user can connect, or, with `allowed_uids`, those too.
        allowed_uids: users beside this one whose processes may have segments.
        admit: the segment that a token is for, once; None for a wrong token.
        gone: called when an admitted peer's connection has ended, with the segment's id.
        tick: called about once a second.
    """

    def __init__(
        self,
        path: str,
        allowed_uids: frozenset[int],
        admit: Callable[[bytes], Admission | None],
        gone: Callable[[str], None],
        tick: Callable[[], None],
    ) -> None:
        self.path = path
        self._uids = allowed_uids | {os.getuid()}
        self._admit, self._gone, self._tick = admit, gone, tick
        self._peers: dict[socket.socket, _Peer] = {}
        self._by_segment: dict[str, _Peer] = {}
        self._to_disconnect: deque[str] = deque()
        self._closing = False
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_sender.setblocking(False)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._socket.bind(path)
        os.chmod(path, 0o666 if allowed_uids else 0o600)  # noqa: PTH101 - a socket; the folder is still private
        self._socket.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="segment-listener", daemon=True)
        self._thread.start()

    def disconnect(self, segment_id: str) -> None:
        """Ends the connection of a segment's peer, soon; `gone` is called then. From any thread."""
        self._to_disconnect.append(segment_id)
        self._wake()

    def close(self) -> None:
        """Ends all connections and the thread."""
        self._closing = True
        self._wake()
        self._thread.join()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # enough wake-ups wait already, or the thread is gone
            self._wake_sender.send(b"\0")

    def _run(self) -> None:
        try:
            while not self._closing:
                try:
                    self._turn()
                except Exception:  # one peer's trouble is not the others'
                    logger.exception("the listener at %s met a fault and goes on", self.path)
                    time.sleep(_PAUSE_SECONDS)
        finally:
            for peer in list(self._peers.values()):
                self._drop(peer)
            for item in (self._socket, self._wake_receiver, self._wake_sender, self._selector):
                item.close()

    def _turn(self) -> None:
        for key, _ in self._selector.select(_TICK_SECONDS):
            self._serve(key.fileobj)  # type: ignore[arg-type]  # only sockets are registered
        while self._to_disconnect:
            peer = self._by_segment.get(self._to_disconnect.popleft())
            if peer is not None:
                self._drop(peer)
        self._drop_late_strangers()
        self._tick()

    def _serve(self, ready: socket.socket) -> None:
        if ready is self._socket:
            self._accept()
        elif ready is self._wake_receiver:
            self._wake_receiver.recv(4096)
        elif ready in self._peers:
            self._hear(self._peers[ready])

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as error:  # the peer left again, or descriptors ran out
            logger.warning("a connection to %s was not taken: %s", self.path, error)
            time.sleep(_PAUSE_SECONDS)
            return
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        process_id, user_id, _ = _CREDENTIALS.unpack(raw)
        strangers = len(self._peers) - len(self._by_segment)
        if user_id not in self._uids or strangers >= _MAX_STRANGERS:
            logger.warning("process %d of user %d was refused at %s", process_id, user_id, self.path)
            connection.close()
            return
        connection.setblocking(False)
        self._peers[connection] = _Peer(connection, time.monotonic() + _HANDSHAKE_SECONDS)
        self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, peer: _Peer) -> None:
        try:
            received = peer.connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._drop(peer)
        elif peer.segment_id is None:
            peer.token += received
            if len(peer.token) >= TOKEN_BYTES:
                self._welcome(peer)

    def _welcome(self, peer: _Peer) -> None:
        admission = self._admit(bytes(peer.token))
        if admission is None:
            logger.warning("a peer at %s showed a token that is not good, or not any more", self.path)
            self._drop(peer)
            return
        peer.segment_id = admission.segment_id
        self._by_segment[admission.segment_id] = peer
        descriptor = admission.file_descriptor
        try:
            if descriptor is None:
                peer.connection.send(WELCOME)
            else:
                socket.send_fds(peer.connection, [WELCOME], [descriptor])
        except OSError:
            self._drop(peer)
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _drop_late_strangers(self) -> None:
        now = time.monotonic()
        for peer in [peer for peer in self._peers.values() if peer.segment_id is None and peer.deadline < now]:
            self._drop(peer)

    def _drop(self, peer: _Peer) -> None:
        del self._peers[peer.connection]
        self._selector.unregister(peer.connection)
        peer.connection.close()
        if peer.segment_id is not None:
            del self._by_segment[peer.segment_id]
            self._gone(peer.segment_id)

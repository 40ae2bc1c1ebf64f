"""A private folder for a server's sockets, that a later server cleans up should this one be killed."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

_PREFIX = "server-"
_LOCK = "lock"
#: Longest path that a Unix socket can have (`sun_path`, with its final zero byte).
_MAX_PATH_BYTES = 107


class SocketDirectoryError(Exception):
    """The folder cannot be used. Names it and the way out."""


class SocketDirectory:
    """A new folder `server-…` within `base`, this process's own for as long as it holds the lock within.

    Folders of servers that have ended without removing theirs are removed first: their locks are free.

    Args:
        base: made where it is missing; must belong to this user.
        shared: let other users pass through (their processes are told apart at the socket).

    Raises:
        SocketDirectoryError: somebody else's folder, an unusable one, or too long a path for sockets.
    """

    def __init__(self, base: Path, *, shared: bool = False) -> None:
        self._lock: int | None = None
        mode = 0o711 if shared else 0o700
        try:
            _own_folder(base, mode)
            with _locked(base / _LOCK):
                _remove_stale(base)
                self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
                self.path.chmod(mode)
                self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SocketDirectoryError(
                f"transfer_directory {base}: {error.strerror}; name another folder of your own"
            ) from error

    def socket_path(self, name: str) -> str:
        """Path of a socket in the folder.

        Raises:
            SocketDirectoryError: the path is too long for a socket.
        """
        path = str(self.path / name)
        if len(os.fsencode(path)) > _MAX_PATH_BYTES:
            raise SocketDirectoryError(
                f"transfer_directory: {path} is longer than the {_MAX_PATH_BYTES} bytes that a Unix socket's path can "
                "have; name a folder nearer to the root"
            )
        return path

    def remove(self) -> None:
        """Removes the folder with what is in it."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def default_base() -> Path:
    """The user's runtime folder, or one of this user's in the folder for temporary files."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "sale-prefill"
    return Path(tempfile.gettempdir()) / f"sale-prefill-{os.getuid()}"


def _own_folder(base: Path, mode: int) -> None:
    base.mkdir(mode=mode, parents=True, exist_ok=True)
    found = base.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise SocketDirectoryError(
            f"transfer_directory {base} is not a folder of this user (uid {os.getuid()}): name another"
        )
    if stat.S_IMODE(found.st_mode) != mode:
        base.chmod(mode)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(base: Path) -> None:
    for folder in base.glob(f"{_PREFIX}*"):
        try:
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:  # killed between making the folder and its lock, which happens under the base's lock
            shutil.rmtree(folder, ignore_errors=True)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            logger.info("removed %s, left by a server that was killed", folder)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)

"""Where a process writes files before they get their names, and how the next one cleans up after a dead one."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import time
import uuid
from pathlib import Path

_LOCK = "lock"
#: A process that did not get as far as its lock within this time is dead.
_UNLOCKED_SECONDS = 3600.0


class Staging:
    """A directory of this process's own under `parent`, with a lock that it holds while it lives.

    Those of dead processes are removed first. Process ids would not tell: containers that share a directory have the
    same ones.

    Raises:
        OSError: `parent` cannot be written.
    """

    def __init__(self, parent: Path) -> None:
        for entry in parent.iterdir():
            _remove_if_dead(entry)
        self._counter = itertools.count()
        self._directory, self._lock = _make_locked(parent)

    def new_path(self) -> Path:
        """A name that no other file has."""
        return self._directory / str(next(self._counter))

    def close(self) -> None:
        """Removes the directory."""
        with contextlib.suppress(OSError):
            _remove(self._directory)
        os.close(self._lock)


def _make_locked(parent: Path) -> tuple[Path, int]:
    while True:
        directory = parent / uuid.uuid4().hex
        directory.mkdir(mode=0o700)
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks: age alone tells the dead from the living
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (directory / _LOCK).exists():
            return directory, lock
        os.close(lock)  # one that starts beside us took us for dead


def _remove_if_dead(directory: Path) -> None:
    try:
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        with contextlib.suppress(OSError):
            if time.time() - directory.stat().st_mtime > _UNLOCKED_SECONDS:
                _remove(directory)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(directory)
    except OSError:
        pass  # its owner lives
    finally:
        os.close(lock)


def _remove(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink(missing_ok=True)
    directory.rmdir()

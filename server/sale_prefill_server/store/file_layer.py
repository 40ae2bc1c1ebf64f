"""The few system calls that the file tier makes, in one place, so that tests can lose, tear and refuse them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sale_prefill_server.store.base import Buffer

_MOST_BUFFERS = 512  # in one call; Linux takes 1024


class FileLayer:
    """Files as the operating system has them. Errors are `OSError`."""

    def create(self, path: Path) -> int:
        """A descriptor of a new file to write; there must be none of that name."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int, buffers: Sequence[Buffer]) -> None:
        """Appends all bytes of all buffers."""
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        while views:
            written = os.writev(descriptor, views[:_MOST_BUFFERS])
            while views and written >= len(views[0]):
                written -= len(views.pop(0))
            if written:
                views[0] = views[0][written:]

    def fsync(self, descriptor: int) -> None:
        """Makes a file's bytes survive a power cut."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Lets a descriptor go."""
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Moves a file, replacing one at `target`, at once."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Removes a file; none there is no error."""
        path.unlink(missing_ok=True)

    def make_directory(self, path: Path) -> None:
        """Makes a directory in one that is there; there already is no error."""
        path.mkdir(mode=0o700, exist_ok=True)

    def fsync_directory(self, path: Path) -> None:
        """Makes what was created, renamed and removed in a directory survive a power cut."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def open(self, path: Path) -> int:
        """A descriptor of a file to read."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def size(self, descriptor: int) -> int:
        """Bytes of an open file."""
        return os.fstat(descriptor).st_size

    def read(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Fills the buffers from `offset` on; returns the bytes read, fewer only at the end of the file."""
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        total = 0
        while views:
            count = os.preadv(descriptor, views[:_MOST_BUFFERS], offset + total)
            if not count:
                break
            total += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]
        return total

    def status(self, path: Path) -> os.stat_result | None:
        """Size and times of a file, or None where there is none."""
        try:
            return path.stat()
        except FileNotFoundError:
            return None

    def list_directory(self, path: Path) -> Iterator[os.DirEntry[str]]:
        """Entries of a directory; none where it is not there."""
        try:
            with os.scandir(path) as entries:
                yield from entries
        except FileNotFoundError:
            return

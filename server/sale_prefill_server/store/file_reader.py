"""Reads parts of a block's file straight into the caller's buffers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sale_prefill_server.store.base import BlockReader, Buffer, NotFoundError, UnavailableError
from sale_prefill_server.store.file_layer import FileLayer
from sale_prefill_server.store.format import BlockHeader, DamagedError

if TYPE_CHECKING:
    from sale_prefill_server.store.files import FileTier

#: Descriptors that readers keep open between reads, in all; further readers open their file for each read.
_KEPT_DESCRIPTORS = 256


class OpenFiles:
    """Counts the descriptors that readers keep, so that a session of a million tokens does not take them all."""

    def __init__(self) -> None:
        self._count = 0
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Whether one more may be kept; pair it with `give_back`."""
        with self._lock:
            if self._count >= _KEPT_DESCRIPTORS:
                return False
            self._count += 1
            return True

    def give_back(self) -> None:
        """One is closed."""
        with self._lock:
            self._count -= 1


class FileBlockReader(BlockReader):
    """Parts of one file. The header was verified; a file that is removed while the reader has it open stays readable.

    Args:
        tier: puts the file aside where a part is damaged.
        descriptor: the open file; the reader closes it, at once where too many are kept.
    """

    def __init__(
        self,
        tier: FileTier,
        header: BlockHeader,
        path: Path,
        layer: FileLayer,
        open_files: OpenFiles,
        descriptor: int,
    ) -> None:
        self.key = header.key
        self.num_parts = header.num_parts
        self.part_bytes = header.part_bytes
        self._tier = tier
        self._header = header
        self._path = path
        self._layer = layer
        self._open_files = open_files
        self._lock = threading.Lock()
        self._reads = 0
        self._closed = False
        self._descriptor: int | None = descriptor
        if not open_files.take():
            self._descriptor = None
            layer.close(descriptor)

    def read(self, first_part: int, into: Sequence[Buffer]) -> None:
        try:
            count = self._read(self._header.offset(first_part), into)
        except FileNotFoundError as error:
            raise NotFoundError(self._tier.name, self.key) from error
        except OSError as error:
            raise UnavailableError(self._tier.name, f"{error.strerror or error} ({self._path})") from error
        try:
            if count != len(into) * self.part_bytes:
                raise DamagedError(f"the file ends within parts {first_part} to {first_part + len(into) - 1}")
            self._header.verify(first_part, into)
        except DamagedError as error:
            raise self._tier.put_aside(self.key, self._path, str(error)) from error

    def _read(self, offset: int, into: Sequence[Buffer]) -> int:
        with self._lock:
            if self._closed:
                raise UnavailableError(self._tier.name, f"reader of {self.key.hash[:12]} is closed")
            self._reads += 1
            descriptor = self._descriptor
        try:
            if descriptor is not None:
                return self._layer.read(descriptor, into, offset)
            descriptor = self._layer.open(self._path)
            try:
                return self._layer.read(descriptor, into, offset)
            finally:
                self._layer.close(descriptor)
        finally:
            with self._lock:
                self._reads -= 1
                self._close_if_done()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._close_if_done()

    def _close_if_done(self) -> None:
        # A descriptor closed under a read could by then be another file's, and the read would take that for damage.
        if self._closed and not self._reads and self._descriptor is not None:
            self._layer.close(self._descriptor)
            self._descriptor = None
            self._open_files.give_back()

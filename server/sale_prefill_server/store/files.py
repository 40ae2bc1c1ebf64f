"""The file system tier: a local disk, or a directory that several servers share (NFS).

    blocks/<tenant>/<first hash digit>/<hash>[.<codec>].kv
    records/<tenant>/<session>.record
    staging/<random>/                one a process: files being written, and a lock that it holds while it lives
    quarantine/                      damaged files, for people to look at

`format` says what is in a file. One is written under `staging`, synced, renamed into place, and the directory synced:
whatever dies when, it is whole or absent. Blocks are immutable and named by what they hold, and records are replaced as
a whole, so servers that share a directory need no locks; the one under `staging` only tells the dead from the living.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from sale_prefill_server.store.base import (
    Block,
    BlockEntry,
    BlockKey,
    BlockReader,
    Buffer,
    CorruptError,
    FullError,
    Level,
    NotFoundError,
    Record,
    RecordKey,
    StoreError,
    Tier,
    UnavailableError,
    checked_block,
)
from sale_prefill_server.store.file_layer import FileLayer
from sale_prefill_server.store.file_reader import FileBlockReader, OpenFiles
from sale_prefill_server.store.format import (
    HEADER_READ_BYTES,
    DamagedError,
    block_header_bytes,
    decode_block_header,
    decode_record,
    encode_block_header,
    encode_record,
)
from sale_prefill_server.store.names import block_name, parse_block_name, parse_record_name, record_name
from sale_prefill_server.store.staging import Staging

#: Files written and synced together, and as many descriptors open at once.
_GROUP_FILES = 64
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class FileTier(Tier):
    """Files under one directory, which is made if need be.

    Args:
        root: the directory.
        level: LOCAL for a disk of this machine, SHARED for a directory that other servers have too.
        layer: system calls; tests put their own.
        on_quarantine: told of every damaged file, with where it went, before `CorruptError` is raised.

    Raises:
        UnavailableError: `root` cannot be written.
    """

    def __init__(
        self,
        root: Path,
        *,
        name: str = "disk",
        level: Level = Level.LOCAL,
        layer: FileLayer | None = None,
        on_quarantine: Callable[[CorruptError, Path], None] | None = None,
    ) -> None:
        self.name = name
        self.level = level
        self.root = root
        self._layer = layer or FileLayer()
        self._on_quarantine = on_quarantine
        self._open_files = OpenFiles()
        self._synced_directories: set[Path] = set()
        self._directories_lock = threading.Lock()
        with self._failures():
            for directory in reversed([root, *root.parents]):
                if not directory.exists():
                    self._layer.make_directory(directory)
                    self._layer.fsync_directory(directory.parent)
            for part in ("blocks", "records", "staging", "quarantine"):
                self._make_directory(root / part)
            self._staging = Staging(root / "staging")

    # -- blocks

    def put_blocks(self, blocks: Sequence[Block]) -> None:
        for first in range(0, len(blocks), _GROUP_FILES):
            group = [checked_block(block) for block in blocks[first : first + _GROUP_FILES]]
            self._put_files(
                [(self._block_path(block.key), [encode_block_header(block), *block.parts]) for block in group]
            )

    def open_block(self, key: BlockKey) -> BlockReader:
        path = self._block_path(key)
        with self._failures(key):
            descriptor = self._layer.open(path)
        try:
            with self._failures(key), self._damage(key, path):
                start = bytearray(HEADER_READ_BYTES)
                start = start[: self._layer.read(descriptor, [start], 0)]
                size = block_header_bytes(start)
                if size > len(start):
                    start = bytearray(size)
                    start = start[: self._layer.read(descriptor, [start], 0)]
                header = decode_block_header(start, key)
                if (found := self._layer.size(descriptor)) != header.total_bytes:
                    raise DamagedError(f"{found} bytes instead of {header.total_bytes}")
        except BaseException:
            self._layer.close(descriptor)
            raise
        return FileBlockReader(self, header, path, self._layer, self._open_files, descriptor)

    def find_blocks(self, keys: Iterable[BlockKey]) -> dict[BlockKey, BlockEntry]:
        found = {}
        with self._failures():
            for key in keys:
                if (status := self._layer.status(self._block_path(key))) is not None:
                    found[key] = BlockEntry(status.st_size, status.st_mtime)
        return found

    def delete_blocks(self, keys: Iterable[BlockKey]) -> None:
        with self._failures():
            for key in keys:
                self._layer.unlink(self._block_path(key))

    def list_blocks(self) -> Iterator[tuple[BlockKey, BlockEntry]]:
        with self._failures():
            for tenant in self._layer.list_directory(self.root / "blocks"):
                for shard in self._layer.list_directory(Path(tenant.path)):
                    for file in self._layer.list_directory(Path(shard.path)):
                        key = parse_block_name(tenant.name, file.name)
                        if key is not None:
                            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                                status = file.stat()
                                yield key, BlockEntry(status.st_size, status.st_mtime)

    # -- records

    def put_record(self, record: Record) -> None:
        self._put_files([(self._record_path(record.key), [encode_record(record)])])

    def get_record(self, key: RecordKey) -> Record:
        path = self._record_path(key)
        with self._failures(key):
            descriptor = self._layer.open(path)
            try:
                data = bytearray(self._layer.size(descriptor))
                data = data[: self._layer.read(descriptor, [data], 0)]
            finally:
                self._layer.close(descriptor)
        with self._damage(key, path):
            return decode_record(bytes(data), key)

    def delete_record(self, key: RecordKey) -> None:
        path = self._record_path(key)
        with self._failures():
            if self._layer.status(path) is not None:
                self._layer.unlink(path)
                self._layer.fsync_directory(path.parent)

    def list_records(self) -> list[RecordKey]:
        with self._failures():
            keys = [
                parse_record_name(tenant.name, file.name)
                for tenant in self._layer.list_directory(self.root / "records")
                for file in self._layer.list_directory(Path(tenant.path))
            ]
        return [key for key in keys if key is not None]

    def close(self) -> None:
        self._staging.close()

    # -- writing

    def _put_files(self, files: Sequence[tuple[Path, list[Buffer]]]) -> None:
        """Group commit: everything written, then synced, then renamed, then each directory synced once."""
        staged: list[Path] = []
        descriptors: list[int] = []
        with self._failures():
            try:
                for _, buffers in files:
                    staged.append(self._staging.new_path())
                    descriptors.append(self._layer.create(staged[-1]))
                    self._layer.write(descriptors[-1], buffers)
                for descriptor in descriptors:
                    self._layer.fsync(descriptor)
                for (path, _), temporary in zip(files, staged, strict=True):
                    self._make_directory(path.parent)
                    self._layer.rename(temporary, path)
                for directory in dict.fromkeys(path.parent for path, _ in files):
                    self._layer.fsync_directory(directory)
            except BaseException:
                for temporary in staged:
                    with contextlib.suppress(OSError):
                        self._layer.unlink(temporary)
                raise
            finally:
                for descriptor in descriptors:
                    self._layer.close(descriptor)

    def _make_directory(self, path: Path) -> None:
        """Makes a directory below the root, and its parents; what an earlier process made may not be synced yet."""
        if path == self.root or path in self._synced_directories:
            return
        with self._directories_lock:
            self._make_directory_once(path)

    def _make_directory_once(self, path: Path) -> None:
        if path != self.root and path not in self._synced_directories:
            self._make_directory_once(path.parent)
            self._layer.make_directory(path)
            self._layer.fsync_directory(path.parent)
            self._synced_directories.add(path)

    # -- errors

    @contextlib.contextmanager
    def _failures(self, key: BlockKey | RecordKey | None = None) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            if key is not None:
                raise NotFoundError(self.name, key) from error
            raise UnavailableError(self.name, f"{error.filename} has gone") from error
        except OSError as error:
            kind = FullError if error.errno in _NO_ROOM else UnavailableError
            raise kind(self.name, f"{error.strerror or error} ({error.filename or self.root})") from error

    @contextlib.contextmanager
    def _damage(self, key: BlockKey | RecordKey, path: Path) -> Iterator[None]:
        try:
            yield
        except DamagedError as error:
            raise self.put_aside(key, path, str(error)) from error

    def put_aside(self, key: BlockKey | RecordKey, path: Path, reason: str) -> StoreError:
        """Moves a damaged file to quarantine and tells; the error to raise."""
        error = CorruptError(self.name, key, reason)
        target = self.root / "quarantine" / f"{key.tenant[:16]}-{path.name}-{uuid.uuid4().hex[:8]}"
        try:
            self._layer.rename(path, target)
        except FileNotFoundError:
            return error  # somebody else was first, and told
        except OSError:
            with contextlib.suppress(OSError):
                self._layer.unlink(path)
        if self._on_quarantine is not None:
            self._on_quarantine(error, target)
        return error

    def _block_path(self, key: BlockKey) -> Path:
        name = block_name(key)
        return self.root / "blocks" / key.tenant / name[0] / name

    def _record_path(self, key: RecordKey) -> Path:
        name = record_name(key)
        return self.root / "records" / key.tenant / name

"""What a power cut at any moment would leave of a disk tier, and whether that is what was promised.

`RecordingLayer` does what it is told on a real directory and keeps a log. `Disk` replays the log up to a moment and
says what may be left: bytes that were not synced are lost, torn, zeroed or there; names that were created, renamed or
removed without a sync of their directory are there or not, in any combination; what is in a lost directory is lost.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sale_prefill_server.store.base import Buffer, CorruptError, Level, Record, RecordKey
from sale_prefill_server.store.events import BlocksEvicted, StoreEvent
from sale_prefill_server.store.file_layer import FileLayer
from sale_prefill_server.store.files import FileTier
from sale_prefill_server.store.tiers import TieredStore, TierSettings
from tests.unit.server.store.samples import TENANT, block, digest, read_whole, record

_PATIENCE_SECONDS = 30.0
_SECTOR_BYTES = 512
_DIRECTORY = -1


class RecordingLayer(FileLayer):
    """Files of a real directory, with a log of what was done to them."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self._inodes: dict[int, int] = {}
        self._next_inode = 0
        self._lock = threading.Lock()

    def note(self, *entry: Any) -> None:
        """Puts something else in the log."""
        with self._lock:
            self.log.append(entry)

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        with self._lock:
            self._next_inode += 1
            self._inodes[descriptor] = self._next_inode
            self.log.append(("create", path, self._next_inode))
        return descriptor

    def write(self, descriptor: int, buffers: Sequence[Buffer]) -> None:
        super().write(descriptor, buffers)
        self.note("write", self._inodes[descriptor], b"".join(bytes(buffer) for buffer in buffers))

    def fsync(self, descriptor: int) -> None:
        self.note("fsync", self._inodes[descriptor])

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.note("rename", source, target)

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.note("unlink", path)

    def make_directory(self, path: Path) -> None:
        super().make_directory(path)
        self.note("make_directory", path)

    def fsync_directory(self, path: Path) -> None:
        self.note("fsync_directory", path)


@dataclass
class _File:
    content: bytes = b""
    synced: int = 0


class Disk:
    """The state of a disk after a log of operations: what is safe, and what is only on its way."""

    def __init__(self) -> None:
        self._files: dict[int, _File] = {}
        self._names: dict[Path, int] = {}
        self._safe: dict[Path, int] = {}
        self._pending: dict[Path, list[tuple[Path, int | None]]] = {}

    def apply(self, entry: tuple[Any, ...]) -> None:
        """One operation more; ignores what is none."""
        method: Callable[..., None] | None = getattr(self, f"_{entry[0]}", None)
        if method is not None:
            method(*entry[1:])

    def cut(self, chance: random.Random) -> dict[Path, bytes]:
        """Files that a power cut might leave."""
        names = dict(self._safe)
        for changes in self._pending.values():
            for path, inode in _some(changes, chance):
                _set(names, path, inode)
        directories = {path for path, inode in names.items() if inode == _DIRECTORY}
        known = {path for path, inode in self._names.items() if inode == _DIRECTORY}
        return {
            path: _torn(self._files[inode], chance)
            for path, inode in names.items()
            if inode != _DIRECTORY and not any(parent in known - directories for parent in path.parents)
        }

    def _create(self, path: Path, inode: int) -> None:
        self._files[inode] = _File()
        self._change(path, inode)

    def _write(self, inode: int, data: bytes) -> None:
        self._files[inode].content += data

    def _fsync(self, inode: int) -> None:
        self._files[inode].synced = len(self._files[inode].content)

    def _rename(self, source: Path, target: Path) -> None:
        inode = self._names[source]
        self._change(source, None)
        self._change(target, inode)

    def _unlink(self, path: Path) -> None:
        if path in self._names:
            self._change(path, None)

    def _make_directory(self, path: Path) -> None:
        if path not in self._names:
            self._change(path, _DIRECTORY)

    def _fsync_directory(self, path: Path) -> None:
        for changed, inode in self._pending.pop(path, []):
            _set(self._safe, changed, inode)

    def _change(self, path: Path, inode: int | None) -> None:
        _set(self._names, path, inode)
        self._pending.setdefault(path.parent, []).append((path, inode))


def _set(names: dict[Path, int], path: Path, inode: int | None) -> None:
    if inode is None:
        names.pop(path, None)
    else:
        names[path] = inode


def _some(changes: list[tuple[Path, int | None]], chance: random.Random) -> list[tuple[Path, int | None]]:
    kind = chance.choice(("none", "all", "first", "any"))
    if kind == "first":
        return changes[: chance.randint(0, len(changes))]
    return [change for change in changes if kind == "all" or (kind == "any" and chance.random() < 0.5)]


def _torn(file: _File, chance: random.Random) -> bytes:
    safe, rest = file.content[: file.synced], file.content[file.synced :]
    kind = chance.choice(("none", "all", "first", "zeros", "sectors"))
    if kind in ("none", "all") or not rest:
        return safe + (rest if kind == "all" else b"")
    if kind == "sectors":
        sectors = [rest[at : at + _SECTOR_BYTES] for at in range(0, len(rest), _SECTOR_BYTES)]
        return safe + b"".join(s if chance.random() < 0.7 else bytes(len(s)) for s in sectors)
    length = chance.randint(0, len(rest))
    return safe + rest[:length] + (bytes(len(rest) - length) if kind == "zeros" else b"")


@contextlib.contextmanager
def directory_for_many_files() -> Iterator[Path]:
    """A temporary directory, in memory where the system has one there."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory)


# -- a workload, and what it was promised


def run_workload(root: Path, layer: RecordingLayer, steps: int, seed: int) -> dict[str, bytes]:
    """Sessions that are made, go on, share prefixes, and are deleted, through a store with a tight disk.

    Returns the names of all blocks by their hashes.
    """
    chance = random.Random(seed)
    names: dict[str, str] = {}
    sessions: dict[str, list[str]] = {}
    events: list[StoreEvent] = []
    tier = FileTier(root, layer=layer)
    store = TieredStore([TierSettings(tier, budget_bytes=140 * 2048)], observer=events.append)
    for step in range(steps):
        action = chance.choice(("new", "new", "go on", "go on", "fork", "delete", "cache"))
        session = chance.choice(sorted(sessions)) if sessions else f"s{step}"
        new = [f"{step}-{i}" for i in range(chance.randint(1, 6))]
        names.update((digest(name), name) for name in new)
        if action == "cache":
            store.put_blocks([block(name) for name in new])
        elif (action == "delete" or len(sessions) > 8) and sessions:
            layer.note("withdraw", record(session).key)
            del sessions[session]
            store.delete_record(record(session).key, keep_blocks=chance.random() < 0.3).result(_PATIENCE_SECONDS)
            layer.note("withdrawn", record(session).key)
        else:
            kept = sessions.get(session, []) if action != "new" else []
            if action != "go on":
                session = f"s{step}"
                kept = kept[: chance.randint(0, len(kept))]
            sessions[session] = (kept + new)[-12:]
            _save(store, layer, session, sessions[session], new)
    store.close()
    assert not any(isinstance(event, BlocksEvicted) and event.needed_blocks for event in events)
    assert any(isinstance(event, BlocksEvicted) for event in events)
    return {hash_: name.encode() for hash_, name in names.items()}


def _save(store: TieredStore, layer: RecordingLayer, session: str, blocks: list[str], new: list[str]) -> None:
    wanted = record(session, tuple(blocks), payload=f"{session} {blocks}".encode())
    layer.note("ask", wanted)
    store.put_blocks([block(name) for name in new])
    store.put_record(wanted)
    store.flush(wanted.key, Level.LOCAL, _PATIENCE_SECONDS)
    layer.note("promise", wanted)


@dataclass
class Promises:
    """What may and what must be found of each record."""

    promised: dict[RecordKey, Record] = field(default_factory=dict)
    possible: dict[RecordKey, list[Record | None]] = field(default_factory=dict)

    def apply(self, entry: tuple[Any, ...]) -> None:
        """One log entry more."""
        if entry[0] == "ask":
            key = entry[1].key
            self.possible.setdefault(key, [None]).append(entry[1])
        elif entry[0] == "promise":
            self.promised[entry[1].key] = entry[1]
            self.possible[entry[1].key] = [entry[1]]
        elif entry[0] == "withdraw":
            self.promised.pop(entry[1], None)
            self.possible[entry[1]].append(None)
        elif entry[0] == "withdrawn":
            self.possible[entry[1]] = [None]


@dataclass
class Outcome:
    """What a number of power cuts showed."""

    points: int = 0
    records_promised: int = 0
    records_whole: int = 0
    damaged_objects: int = 0
    violations: list[str] = field(default_factory=list)


def simulate(
    points: int, directory: Path, *, seed: int = 1, steps: int = 120, layer: RecordingLayer | None = None
) -> Outcome:
    """Cuts the power at `points` random moments of a workload and looks at what is left, each time."""
    layer = layer or RecordingLayer()
    root = directory / "workload"
    names = run_workload(root, layer, steps, seed)
    chance = random.Random(seed)
    moments = sorted(chance.randrange(len(layer.log) + 1) for _ in range(points))
    disk, promises, outcome, done = Disk(), Promises(), Outcome(), 0
    for moment in moments:
        for entry in layer.log[done:moment]:
            disk.apply(entry)
            promises.apply(entry)
        done = moment
        left = directory / "left"
        for path, content in disk.cut(chance).items():
            target = left / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        _examine(left, promises, names, outcome, moment)
        shutil.rmtree(left)
    return outcome


def _examine(root: Path, promises: Promises, names: dict[str, bytes], outcome: Outcome, moment: int) -> None:
    tier = FileTier(root)
    whole = set()
    for key, _ in list(tier.list_blocks()):
        try:
            if read_whole(tier, key) == list(block(names[key.hash].decode(), tenant=TENANT).parts):
                whole.add(key)
            else:
                outcome.violations.append(f"at {moment}: block {key.hash[:8]} was read wrong")
        except CorruptError:
            outcome.damaged_objects += 1
    found = {}
    for record_key in tier.list_records():
        try:
            found[record_key] = tier.get_record(record_key)
        except CorruptError:
            outcome.damaged_objects += 1
    tier.close()
    for record_key, there in found.items():
        if there not in promises.possible.get(record_key, [None]):
            outcome.violations.append(f"at {moment}: record {record_key.session[:8]} was not asked for, or was deleted")
        if not whole.issuperset(there.block_keys):
            outcome.violations.append(f"at {moment}: record {record_key.session[:8]} lacks blocks")
    for record_key in promises.promised:
        outcome.records_promised += 1
        if record_key in found and whole.issuperset(found[record_key].block_keys):
            outcome.records_whole += 1
        else:
            outcome.violations.append(f"at {moment}: promised record {record_key.session[:8]} is lost")
    outcome.points += 1

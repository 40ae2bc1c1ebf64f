"""How fast KV goes to local disk and comes back: 8K tokens of the default model, beside plain files in the same run.

    python -m benchmarks.kv_store [--directory DIR] [--rounds 5]

64 blocks of 30 layers, K and V of 49,152 bytes each: 188,743,680 bytes. Written durably (synced) and read layer by
layer with checksums verified, from the page cache and after dropping it where the system lets us. Plain files are one
of the same size, and one a block, written and synced, read into a buffer that is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sale_prefill_server.store.base import Block, BlockKey, Level, Record, RecordKey
from sale_prefill_server.store.files import FileTier
from sale_prefill_server.store.tiers import TieredStore, TierSettings

BLOCKS = 64
LAYERS = 30
PART_BYTES = 49_152
TOTAL_BYTES = BLOCKS * LAYERS * 2 * PART_BYTES
_TENANT = "00" * 16


def make_blocks(seed: int) -> list[Block]:
    """Blocks of random bytes."""
    data = np.random.default_rng(seed).bytes(TOTAL_BYTES)
    view, parts = memoryview(data), 2 * LAYERS
    return [
        Block(
            BlockKey(_TENANT, hashlib.sha256(f"{seed}/{block}".encode()).hexdigest()),
            [view[(block * parts + part) * PART_BYTES :][:PART_BYTES] for part in range(parts)],
        )
        for block in range(BLOCKS)
    ]


def drop_cache(paths: Sequence[Path]) -> None:
    """Lets the system forget what it has of clean files, as far as it does on advice."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_plain(paths: Sequence[Path], data: memoryview) -> None:
    """Files of equal size, each written and synced."""
    size = len(data) // len(paths)
    for index, path in enumerate(paths):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        part = data[index * size : (index + 1) * size]
        while part:
            part = part[os.write(descriptor, part) :]
        os.fsync(descriptor)
        os.close(descriptor)


def read_plain(paths: Sequence[Path], into: memoryview) -> None:
    """The same files into a buffer that is there."""
    size = len(into) // len(paths)
    for index, path in enumerate(paths):
        descriptor = os.open(path, os.O_RDONLY)
        part, offset = into[index * size : (index + 1) * size], 0
        while offset < size:
            offset += os.preadv(descriptor, [part[offset:]], offset)
        os.close(descriptor)


def measure(directory: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, by round."""
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], object]) -> None:
        started = time.perf_counter()
        call()
        seconds.setdefault(name, []).append(time.perf_counter() - started)

    into = memoryview(bytearray(TOTAL_BYTES))
    for number in range(rounds):
        blocks = make_blocks(number)
        data = memoryview(memoryview(blocks[0].parts[0]).obj)
        one = [directory / "plain"]
        many = [directory / f"plain-{block}" for block in range(BLOCKS)]
        for name, paths in (("one plain file", one), ("64 plain files", many)):
            timed(f"write {name}", lambda paths=paths, data=data: write_plain(paths, data))  # type: ignore[misc]
            timed(f"read {name}, cached", lambda paths=paths: read_plain(paths, into))  # type: ignore[misc]
            drop_cache(paths)
            timed(f"read {name}, uncached", lambda paths=paths: read_plain(paths, into))  # type: ignore[misc]
            for path in paths:
                path.unlink()
        root = directory / f"store-{number}"
        store = TieredStore([TierSettings(FileTier(root))])
        timed("write the store, promised", lambda store=store, blocks=blocks: _save(store, blocks))  # type: ignore[misc]
        timed("read the store, cached", lambda store=store, blocks=blocks: _restore(store, blocks))  # type: ignore[misc]
        drop_cache(list(root.glob("blocks/*/*/*.kv")))
        started = time.perf_counter()
        first, total = _restore(store, blocks)
        seconds.setdefault("read the store, uncached", []).append(total)
        seconds.setdefault("first layer of those, uncached", []).append(first)
        seconds.setdefault("locate and read, uncached", []).append(time.perf_counter() - started)
        store.delete_record(RecordKey(_TENANT, "00")).result(60)
        store.close()
    return seconds


def _save(store: TieredStore, blocks: list[Block]) -> None:
    key = RecordKey(_TENANT, "00")
    store.put_blocks(blocks)
    store.put_record(Record(key, b"{}", tuple(block.key.hash for block in blocks)))
    store.flush(key, Level.LOCAL, 120)


def _restore(store: TieredStore, blocks: list[Block]) -> tuple[float, float]:
    """Seconds until the first layer and until the last were there."""
    started = time.perf_counter()
    located = store.locate([block.key for block in blocks])
    first = 0.0
    for part in store.read(located, LAYERS, PART_BYTES):
        if part.layer == 1 and not first:
            first = time.perf_counter() - started
    assert located.num_blocks == BLOCKS
    return first, time.perf_counter() - started


def main() -> int:
    """Prints medians in GB/s and writes them as JSON where asked."""
    parser = argparse.ArgumentParser(description="How fast KV goes to local disk and comes back.")
    parser.add_argument("--directory", type=Path, help="where to write; a temporary folder if not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write seconds and rates to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        seconds = measure(Path(directory), arguments.rounds)
    rows = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in rows.items():
        rate = "" if "first layer" in name else f"{TOTAL_BYTES / value / 1e9:8.2f} GB/s"
        print(f"{name:34} {value * 1e3:9.1f} ms {rate}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"bytes": TOTAL_BYTES, "median_seconds": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Many threads that save, read and delete on tiers that fail now and then: no wrong byte, and nothing left over."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

from sale_prefill_server.store.base import BlocksLostError, Level, Pin, UnavailableError
from sale_prefill_server.store.events import BlocksEvicted
from tests.unit.server.store.faults import FaultyTier
from tests.unit.server.store.samples import TENANT, blocks, record
from tests.unit.server.store.stores import BLOCK_BYTES, PATIENCE_SECONDS, Harness, read_all, true_parts

_THREADS = 4
_SECONDS = 2.0


def flaky(tier: FaultyTier, seed: int) -> None:
    chance, lock = random.Random(seed), threading.Lock()

    def sometimes_fail(operation: str) -> None:
        with lock:
            luck = chance.random()
        if luck < 0.002:
            raise UnavailableError(tier.name, "a hiccup")
        if luck < 0.02:
            time.sleep(0.002)

    tier.before = sometimes_fail


def test_threads_that_save_read_and_delete_never_see_a_wrong_byte(tmp_path: Path) -> None:
    failures: list[str] = []
    counts = {"saved": 0, "read": 0, "lost": 0, "refused": 0}
    with Harness(tmp_path, host_bytes=30 * BLOCK_BYTES, disk_bytes=120 * (BLOCK_BYTES + 300), shared=True) as harness:
        for seed, tier in enumerate(harness.tiers.values()):
            flaky(tier, seed)
        end = time.monotonic() + _SECONDS

        def work(thread: int) -> None:
            chance = random.Random(thread)
            while time.monotonic() < end:
                prompt = chance.randrange(12)
                names = [f"{prompt}-{i}" for i in range(chance.randint(1, 8))]
                session = record(f"{thread}-{chance.randrange(6)}", tuple(names), pin=chance.choice(list(Pin)))
                action = chance.random()
                try:
                    if action < 0.3:
                        harness.store.put_blocks(blocks(*names), wait_seconds=0.5)
                        harness.store.put_record(session)
                        harness.store.flush(session.key, Level.LOCAL, 2)
                        counts["saved"] += 1
                    elif action < 0.9:
                        found = read_all(harness.store, names)
                        counts["read"] += 1
                        if found != true_parts(names[: len(found)]):
                            failures.append(f"{names} read wrong")
                    else:
                        harness.store.delete_record(session.key, keep_blocks=chance.random() < 0.5)
                except BlocksLostError:
                    counts["lost"] += 1
                except UnavailableError:
                    counts["refused"] += 1

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(_THREADS)]
        for running in threads:
            running.start()
        for running in threads:
            running.join()
        for tier in harness.tiers.values():
            tier.heal()
        time.sleep(0.2)
        harness.store._promotion.close(PATIENCE_SECONDS)
        for key in harness.store.records():
            harness.store.delete_record(key)
        harness.store.flush_all(PATIENCE_SECONDS)
        assert failures == []
        assert min(counts["saved"], counts["read"]) > 20, counts
        assert harness.store.pinned_bytes(TENANT) == 0
        status = harness.store.status()
        for name in ("host", "disk"):
            listed = dict(harness.tiers[name].tier.list_blocks())
            assert status[name].num_blocks == len(listed)
            assert status[name].pinned_bytes == 0
        assert status["disk"].queued_bytes == 0
        assert all(not slot.waiting for slot in harness.store._slots)
        assert harness.of(BlocksEvicted)

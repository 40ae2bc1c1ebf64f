"""Removes from a shared tier what no server's record needs."""

from __future__ import annotations

import time

from sale_prefill_server.store.base import BlockKey, CorruptError, NotFoundError, Tier
from sale_prefill_server.store.slot import SHARED_GRACE_SECONDS


def sweep(tier: Tier, grace_seconds: float = SHARED_GRACE_SECONDS) -> int:
    """Removes blocks that no record needs and that are older than `grace_seconds`. Returns how many.

    One server, or a job of its own, runs it from time to time. It reads every record and lists every block. A server
    whose clock is off by more than half the grace period could lose a block that it is about to rely on: it would
    compute it again.

    Raises:
        UnavailableError: nothing that is needed was removed.
    """
    oldest = time.time() - grace_seconds
    old = [key for key, entry in tier.list_blocks() if entry.modified_seconds < oldest]
    needed: set[BlockKey] = set()
    for key in tier.list_records():  # after the blocks: a record that comes meanwhile has had its old ones rewritten
        try:
            needed.update(tier.get_record(key).block_keys)
        except (NotFoundError, CorruptError):
            continue
    unneeded = [key for key in old if key.lossless not in needed]
    tier.delete_blocks(unneeded)
    return len(unneeded)

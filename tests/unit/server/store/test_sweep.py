"""A shared tier is cleaned of what no server's record needs."""

from __future__ import annotations

import os
from pathlib import Path

from sale_prefill_server.store.base import Level
from sale_prefill_server.store.files import FileTier
from sale_prefill_server.store.slot import SHARED_GRACE_SECONDS
from sale_prefill_server.store.sweep import sweep
from sale_prefill_server.store.tiers import TieredStore, TierSettings
from tests.unit.server.store.samples import TENANT, block_key, blocks, digest, record
from tests.unit.server.store.stores import PATIENCE_SECONDS


def age(root: Path, name: object, seconds: float) -> None:
    file = root / "blocks" / TENANT / digest(name)[0] / f"{digest(name)}.kv"
    modified = file.stat().st_mtime - seconds
    os.utime(file, (modified, modified))


def test_only_old_blocks_that_no_record_needs_go(tmp_path: Path) -> None:
    tier = FileTier(tmp_path, name="shared", level=Level.SHARED)
    tier.put_blocks(blocks("needed", "old", "new"))
    tier.put_record(record("s", ("needed",)))
    for name in ("needed", "old"):
        age(tmp_path, name, 2 * SHARED_GRACE_SECONDS)
    assert sweep(tier) == 1
    assert {key for key, _ in tier.list_blocks()} == {block_key("needed"), block_key("new")}


def test_a_block_that_may_soon_be_swept_is_written_again_before_a_record_relies_on_it(tmp_path: Path) -> None:
    store = TieredStore([TierSettings(FileTier(tmp_path, name="shared", level=Level.SHARED))])
    store.put_blocks(blocks("a"))
    store.flush_all(PATIENCE_SECONDS)
    age(tmp_path, "a", SHARED_GRACE_SECONDS - 60)
    store.put_blocks(blocks("a"))
    store.flush_all(PATIENCE_SECONDS)
    assert sweep(FileTier(tmp_path, level=Level.SHARED), SHARED_GRACE_SECONDS / 2) == 0
    store.close()

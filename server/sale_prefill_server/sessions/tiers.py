"""The tiers that settings name, and sessions that are found in them at start."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from pathlib import Path
from urllib.parse import urlsplit

from sale_prefill_server.config import ConfigError, ServerConfig, parse_bytes
from sale_prefill_server.engine.engine import Engine
from sale_prefill_server.sessions.archive import SessionArchive
from sale_prefill_server.sessions.manager import SessionManager
from sale_prefill_server.sessions.records import SessionRecord
from sale_prefill_server.sessions.session import Durability, Saved, Session, SessionState
from sale_prefill_server.store.base import Level, Tier, UnavailableError
from sale_prefill_server.store.events import StoreObserver
from sale_prefill_server.store.files import FileTier
from sale_prefill_server.store.memory import MemoryTier
from sale_prefill_server.store.slot import TierSettings
from sale_prefill_server.store.tiers import TieredStore

logger = logging.getLogger(__name__)


def open_store(config: ServerConfig, observer: StoreObserver) -> TieredStore | None:
    """The tiers below the device, fastest first; None where settings name none.

    Raises:
        ConfigError: one of them cannot be used.
    """
    tiers = []
    host_bytes = parse_bytes("kv_host_memory", config.kv_host_memory)
    quota_bytes = parse_bytes("pin_quota", config.pin_quota)
    try:
        if host_bytes:
            tiers.append(TierSettings(MemoryTier(host_bytes), budget_bytes=host_bytes))
        if config.kv_disk:
            disk_bytes = parse_bytes("kv_disk_memory", config.kv_disk_memory)
            tiers.append(TierSettings(FileTier(Path(config.kv_disk)), budget_bytes=disk_bytes))
        if config.kv_shared:
            tiers.append(TierSettings(_shared_tier(config.kv_shared)))
    except UnavailableError as error:
        raise ConfigError(f"kv_disk or kv_shared: {error}") from error
    return TieredStore(tiers, observer=observer, pin_quota_bytes=quota_bytes or None) if tiers else None


def _shared_tier(location: str) -> Tier:
    parts = urlsplit(location)
    if parts.scheme in ("", "file"):
        return FileTier(Path(parts.path if parts.scheme else location), name="shared", level=Level.SHARED)
    if parts.scheme == "s3" and parts.netloc:
        try:
            from sale_prefill_server.store.s3 import S3Tier
        except ImportError as error:
            raise ConfigError(f"kv_shared = {location!r} needs boto3: pip install 'sale-prefill[s3]'") from error
        return S3Tier(parts.netloc, parts.path.strip("/") or "sale-prefill", name="shared")
    raise ConfigError(f"kv_shared = {location!r}: use a folder, or s3://bucket/prefix")


def durabilities(config: ServerConfig) -> tuple[Durability, ...]:
    """What this server can promise."""
    known = [Durability.NONE]
    if config.kv_disk or config.kv_shared:
        known += [Durability.ASYNC, Durability.LOCAL]
    if config.kv_shared:
        known.append(Durability.SHARED)
    return tuple(known)


def recover_sessions(archive: SessionArchive, engine: Engine, manager: SessionManager) -> int:
    """Takes in the sessions that local tiers hold; their KV stays there until it is asked for. Returns how many."""
    count = 0
    for record in archive.recover():
        try:
            manager.adopt(_session_of(record, engine))
            count += 1
        except ValueError as error:  # settings that this server cannot serve, such as a budget without a profile
            logger.warning("session %s of an earlier run is left in the store: %s", record.session_id, error)
    return count


def _session_of(record: SessionRecord, engine: Engine) -> Session:
    sequence = engine.open(record.settings, record.tenant)
    if sequence.chain.root != record.root:
        logger.info("session %s was computed under other settings of attention", record.session_id)
        sequence.chain.root = record.root
    done: Future[Durability] = Future()
    done.set_result(Durability.NONE)
    return Session(
        record.tenant,
        record.session_id,
        sequence,
        record.retention,
        record.labels,
        state=SessionState.PARTIAL if record.is_partial else SessionState.READY,
        tokens=record.tokens,
        generation=record.generation,
        created_unix_seconds=record.created_unix_seconds,
        saved=Saved(record.generation, done),
    )

"""Sessions in the tiers below the device: written back after each request, brought back when they are asked for.

A session is a record and, for every page of its KV, a block named by the page's key. So sessions that begin the same
share blocks, and a prompt finds blocks of sessions that have ended. What cannot be brought back is computed again from
the tokens that the record holds.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import uuid
from array import array
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from sale_prefill_server.engine.sequence import Sequence
from sale_prefill_server.kv.gate import LayerGate, LoadFailedError
from sale_prefill_server.kv.pool import PAGE_TOKENS, SessionKv
from sale_prefill_server.kv.prefix import page_key, page_keys
from sale_prefill_server.sessions.records import RecordError, SessionRecord, decode_record, encode_record
from sale_prefill_server.sessions.session import Durability, KvTier, Saved, Session, SessionPin, SessionState
from sale_prefill_server.store.base import (
    Block,
    BlockKey,
    Level,
    Pin,
    Record,
    RecordKey,
    StoreError,
)
from sale_prefill_server.store.tiers import TieredStore, TierStatus

logger = logging.getLogger(__name__)

#: Pages copied off the device and handed to the store at a time.
_GROUP_PAGES = 16
_SAVING_THREADS = 4
_LEVELS = {
    Durability.NONE: Level.MEMORY,
    Durability.ASYNC: Level.SHARED,
    Durability.LOCAL: Level.LOCAL,
    Durability.SHARED: Level.SHARED,
}
_REACHED = {
    None: Durability.NONE,
    Level.MEMORY: Durability.NONE,
    Level.LOCAL: Durability.LOCAL,
    Level.SHARED: Durability.SHARED,
}
_PINS = {SessionPin.NONE: Pin.NONE, SessionPin.SOFT: Pin.SOFT, SessionPin.HARD: Pin.HARD}


@dataclass(frozen=True)
class ArchiveSettings:
    """How long promises and reads may take.

    A save that promised durability fails after `promise_timeout_seconds`; a load gives up, and computes, after
    `load_timeout_seconds`.
    """

    promise_timeout_seconds: float = 60.0
    load_timeout_seconds: float = 30.0


@dataclass(frozen=True)
class _Snapshot:
    """A session as it was when a request ended. Holds one reference of `kv`."""

    kv: SessionKv
    keys: list[bytes]
    record: SessionRecord
    logits: torch.Tensor | None
    epoch: int


class SessionArchive:
    """Saves and loads sessions. Thread-safe; `save` and `forget` return at once, `load` reads.

    Args:
        store: the tiers.
        fingerprint: names the model.
        settings: time limits.
    """

    def __init__(self, store: TieredStore, fingerprint: str, settings: ArchiveSettings = ArchiveSettings()) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._settings = settings
        self._executor = ThreadPoolExecutor(_SAVING_THREADS, "kv-save")
        self._lock = threading.Lock()
        self._turns: dict[RecordKey, threading.Lock] = {}
        self._epochs: dict[RecordKey, int] = {}
        self._has_memory = any(status.level is Level.MEMORY for status in store.status().values())

    # -- saving

    def wants(self, session: Session) -> bool:
        """Whether some tier is to have this session as it is now."""
        if session.retention.lease_seconds == 0 or not session.tokens:
            return False
        if session.saved is not None and session.saved.generation == session.generation:
            return False
        return self._has_memory or session.retention.durability is not Durability.NONE

    def save(self, session: Session) -> Saved:
        """Starts to save a session that is checked out; what it becomes afterwards does not matter.

        The future gives what has been reached; `StoreError` where less was than its retention promises.
        """
        # A name of its own: after a crash, other tokens may come to the same session and generation.
        name = f"logits {uuid.uuid4().hex}"
        keys = list(page_keys(session.sequence.chain.root, session.tokens, PAGE_TOKENS))
        if len(session.tokens) % PAGE_TOKENS:
            tail = session.tokens[len(keys) * PAGE_TOKENS :]
            keys.append(page_key(keys[-1] if keys else session.sequence.chain.root, tail))
        record = SessionRecord(
            tenant=session.tenant,
            session_id=session.session_id,
            fingerprint=self._fingerprint,
            root=session.sequence.chain.root,
            page_tokens=PAGE_TOKENS,
            settings=session.sequence.settings,
            retention=session.retention,
            labels=dict(session.labels),
            created_unix_seconds=session.created_unix_seconds,
            generation=session.generation,
            is_partial=session.state is SessionState.PARTIAL,
            logits_key=hashlib.sha256(name.encode()).hexdigest(),
            num_logits=0 if session.last_logits is None else session.last_logits.numel(),
            tokens=array("I", session.tokens),
        )
        epoch = self._epochs.get(record_key(session.tenant, session.session_id), 0)
        snapshot = _Snapshot(session.sequence.kv.acquire(), keys, record, session.last_logits, epoch)
        return Saved(session.generation, self._executor.submit(self._save, snapshot))

    def resave(self, session: Session) -> Saved:
        """Starts to save what a session's policy and labels are now, where its contents are saved already."""
        key = record_key(session.tenant, session.session_id)
        retention, labels, epoch = session.retention, dict(session.labels), self._epochs.get(key, 0)

        def run() -> Durability:
            with self._turn(key):
                held = self._store.get_record(key)
                record = replace(decode_record(held.payload), retention=retention, labels=labels)
                if epoch != self._epochs.get(key, 0):
                    return Durability.NONE
                changed = replace(held, payload=encode_record(record), pin=_PINS[retention.pin])
                self._store.put_record(changed, level=_LEVELS[retention.durability])
            return self._promised(key, retention.durability)

        return Saved(session.generation, self._executor.submit(run))

    def _save(self, snapshot: _Snapshot) -> Durability:
        record = snapshot.record
        key = record_key(record.tenant, record.session_id)
        durability = record.retention.durability
        level = _LEVELS[durability]
        with self._turn(key):
            try:
                if snapshot.epoch != self._epochs.get(key, 0):
                    return Durability.NONE  # it was deleted meanwhile
                blocks = [key.hex() for key in snapshot.keys]
                self._put_pages(snapshot, key.tenant, level)
                if snapshot.logits is not None:
                    blocks.append(record.logits_key)
                    self._store.put_blocks([_logits_block(key.tenant, record.logits_key, snapshot.logits)], level=level)
                pin = _PINS[record.retention.pin]
                self._store.put_record(Record(key, encode_record(record), tuple(blocks), pin=pin), level=level)
            finally:
                snapshot.kv.release()
        return self._promised(key, durability)

    def _promised(self, key: RecordKey, durability: Durability) -> Durability:
        if durability in (Durability.LOCAL, Durability.SHARED):
            self._store.flush(key, _LEVELS[durability], self._settings.promise_timeout_seconds)
        return _REACHED[self._store.durability(key)]

    def _put_pages(self, snapshot: _Snapshot, tenant: str, level: Level) -> None:
        keys = [BlockKey(tenant, key.hex()) for key in snapshot.keys]
        for first in range(0, len(keys), _GROUP_PAGES):
            group = keys[first : first + _GROUP_PAGES]
            # Blocks that a durable tier lacks and another has, the store brings over by itself.
            skipped = self._store.locate(group, use_shared=False).num_blocks
            blocks = [
                Block(key, _page_parts(snapshot.kv, first + index, len(snapshot.record.tokens)))
                for index, key in enumerate(group)
                if index >= skipped
            ]
            if blocks:
                self._store.put_blocks(blocks, level=level, wait_seconds=self._settings.promise_timeout_seconds)

    def _turn(self, key: RecordKey) -> threading.Lock:
        """Saves of one session come one after the other."""
        with self._lock:
            return self._turns.setdefault(key, threading.Lock())

    def durability(self, session: Session) -> Durability:
        """What the session as it is now survives."""
        saved = session.saved
        if saved is None or saved.generation != session.generation or not saved.done.done() or saved.done.exception():
            return Durability.NONE
        return _REACHED[self._store.durability(record_key(session.tenant, session.session_id))]

    def tier(self, session: Session) -> KvTier:
        """The fastest tier that has the beginning of an offloaded session."""
        keys = page_keys(session.sequence.chain.root, session.tokens[:PAGE_TOKENS], PAGE_TOKENS)
        first = next(keys, None) or page_key(session.sequence.chain.root, session.tokens)
        located = self._store.locate([BlockKey(tenant_digest(session.tenant), first.hex())], use_shared=False)
        if not located.num_blocks:
            return KvTier.SHARED
        (level,) = {source.slot.level for source in located.sources[0][:1]}
        return {Level.MEMORY: KvTier.HOST, Level.LOCAL: KvTier.DISK}.get(level, KvTier.SHARED)

    def is_saved(self, session: Session) -> bool:
        """Whether the session's KV can be given up on the device and be brought back."""
        saved = session.saved
        if saved is None or saved.generation != session.generation:
            return False
        return saved.done.done() and saved.done.exception() is None

    def forget(self, tenant: str, session_id: str, *, keep_blocks: bool) -> Future[None]:
        """Deletes a session's record, and blocks that nothing else needs unless they may serve prompts."""
        key = record_key(tenant, session_id)
        with self._lock:
            self._epochs[key] = self._epochs.get(key, 0) + 1  # what waits to be saved is not wanted any more
        return self._executor.submit(self._forget, key, keep_blocks)

    def _forget(self, key: RecordKey, keep_blocks: bool) -> None:
        with self._turn(key):
            removed = self._store.delete_record(key, keep_blocks=keep_blocks)
        removed.result(self._settings.promise_timeout_seconds)

    # -- loading

    def load(
        self,
        sequence: Sequence,
        tenant: str,
        token_ids: array[int],
        *,
        whole: bool,
        on_first_layer: Callable[[int], None],
    ) -> int:
        """Brings back KV of the leading ones of `token_ids`, all that `sequence` is to hold, behind what it holds.

        Args:
            sequence: holds whole pages; room for all tokens has been reserved.
            tenant: whose blocks.
            token_ids: from its first token on.
            whole: take the last, partial page too; else whole pages that leave one token at least.
            on_first_layer: told how many tokens are gained once a step may start: it will wait for later layers as it
                comes to them.

        Returns:
            Tokens gained; 0 where there was nothing.

        Raises:
            LoadFailedError: it could not be read. What `sequence` holds is worth nothing: truncate it.
        """
        held = sequence.num_tokens
        keys = list(page_keys(sequence.chain.root, token_ids if whole else token_ids[:-1], PAGE_TOKENS))
        if whole and len(token_ids) % PAGE_TOKENS:
            keys.append(page_key(keys[-1] if keys else sequence.chain.root, token_ids[len(keys) * PAGE_TOKENS :]))
        wanted = [BlockKey(tenant_digest(tenant), key.hex()) for key in keys[held // PAGE_TOKENS :]]
        if not wanted:
            return 0
        located = self._store.locate(wanted)
        end = min(held + located.num_blocks * PAGE_TOKENS, len(token_ids))
        if end == held:
            return 0
        kv, shape, gate = sequence.kv, sequence.kv.shape, LayerGate()
        part_bytes = PAGE_TOKENS * shape.bytes_per_token // (2 * shape.num_layers)
        kv.extend_to(end)
        kv.load(gate)
        try:
            read = self._store.read(
                located, shape.num_layers, part_bytes, deadline_seconds=self._settings.load_timeout_seconds
            )
            for part in read:
                start = held + part.first_block * PAGE_TOKENS
                count = min(part.num_blocks * PAGE_TOKENS, end - start)
                for kind, data in enumerate((part.keys, part.values)):
                    kv.write(part.layer, kind, start, _as_tokens(data, kv)[:count])
                if start + count == end:
                    gate.open(part.layer + 1)
                    if part.layer == 0:
                        on_first_layer(end - held)
        except StoreError as error:
            logger.warning("KV of %d tokens cannot be brought back: %s", end - held, error)
            gate.fail(error)
            raise LoadFailedError(str(error)) from error
        kv.load(None)
        return end - held

    def load_logits(self, session: Session) -> torch.Tensor | None:
        """Logits [vocabulary_size] float32 after the session's last token, where they were saved as it is now."""
        key = record_key(session.tenant, session.session_id)
        try:
            record = decode_record(self._store.get_record(key).payload)
            if not record.num_logits or record.tokens != session.tokens:
                return None
            located = self._store.locate([BlockKey(key.tenant, record.logits_key)])
            halves = [
                torch.frombuffer(bytearray(data), dtype=torch.float32)
                for part in self._store.read(located, 1, _half(record.num_logits) * 4, deadline_seconds=10.0)
                for data in (part.keys, part.values)
            ]
            return torch.cat(halves)[: record.num_logits] if halves else None
        except (StoreError, RecordError) as error:
            logger.warning("the last logits of session %s are computed again: %s", session.session_id, error)
            return None

    def recover(self) -> list[SessionRecord]:
        """Sessions of this model that local tiers hold, at start. Reads no KV."""
        found = []
        for record in self._store.recover():
            try:
                session = decode_record(record.payload)
            except RecordError as error:
                logger.warning("a session's record is left where it is: %s", error)
                continue
            if (session.fingerprint, session.page_tokens) == (self._fingerprint, PAGE_TOKENS):
                found.append(session)
            else:
                logger.info("session %s belongs to another model: its record is left", session.session_id)
        return found

    def tiers(self) -> dict[str, TierStatus]:
        """How each tier stands, by name."""
        return self._store.status()

    def close(self, timeout_seconds: float) -> None:
        """Ends what is being saved, then the store."""
        self._executor.shutdown(wait=True)
        self._store.close(timeout_seconds)


def tenant_digest(tenant: str) -> str:
    """How a tenant is called in the store."""
    return hashlib.sha256(b"tenant " + tenant.encode()).hexdigest()


def record_key(tenant: str, session_id: str) -> RecordKey:
    """How a session is called in the store."""
    return RecordKey(tenant_digest(tenant), hashlib.sha256(b"session " + session_id.encode()).hexdigest())


def _page_parts(kv: SessionKv, index: int, num_tokens: int) -> list[memoryview]:
    """Page `index` as a block's parts, filled up with zeros behind the sequence's last token."""
    shape = kv.shape
    start, end = index * PAGE_TOKENS, min((index + 1) * PAGE_TOKENS, num_tokens)
    size = (shape.num_layers, 2, PAGE_TOKENS, shape.num_kv_heads, shape.head_dim)
    page = torch.zeros(size, dtype=shape.dtype) if end % PAGE_TOKENS else torch.empty(size, dtype=shape.dtype)
    for layer in range(shape.num_layers):
        for kind in (0, 1):
            (segment,) = kv.segments(layer, kind, start, end)
            page[layer, kind, : end - start].copy_(segment)
    data = _bytes_of(page)
    part_bytes = len(data) // (2 * shape.num_layers)
    return [data[part : part + part_bytes] for part in range(0, len(data), part_bytes)]


def _as_tokens(data: memoryview, kv: SessionKv) -> torch.Tensor:
    """[tokens, num_kv_heads, head_dim], sharing memory."""
    shape = kv.shape
    return torch.frombuffer(data, dtype=shape.dtype).view(-1, shape.num_kv_heads, shape.head_dim)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _half(count: int) -> int:
    return -(-count // 2)


def _logits_block(tenant: str, key: str, logits: torch.Tensor) -> Block:
    """A block of two parts: the first half of the logits, and the second."""
    half = _half(logits.numel())
    padded = torch.zeros(2 * half, dtype=torch.float32)
    padded[: logits.numel()] = logits
    data = _bytes_of(padded)
    return Block(BlockKey(tenant, key), [data[: half * 4], data[half * 4 :]])

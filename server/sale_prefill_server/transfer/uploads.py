"""KV that is being pushed: sessions in the making, which appear when their last chunk is in place."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sale_prefill_server.engine.sequence import AttentionSettings
from sale_prefill_server.engine.sequence import Sequence as EngineSequence
from sale_prefill_server.errors import PrefillError, Reason
from sale_prefill_server.sessions.manager import SessionManager
from sale_prefill_server.sessions.session import Retention, Session, SessionInfo, SessionState
from sale_prefill_server.transfer.checksums import Checksum
from sale_prefill_server.transfer.chunks import Layout
from sale_prefill_server.transfer.kv_writer import KvWriter

#: Makes a sequence for a tenant's tokens and attention settings, with room for them; refuses what a prefill would be.
OpenSequence = Callable[[str, Sequence[int], AttentionSettings | None], EngineSequence]


@dataclass(frozen=True)
class ImportCommand:
    """A request to make a session out of KV.

    `request_id` is empty where the stream that brings the KV cannot be resumed, `session_id` for a fresh id;
    `attention` is None for the server's default. `fingerprint` tells requests of one id apart.
    """

    tenant: str
    request_id: str
    fingerprint: bytes
    session_id: str
    token_ids: Sequence[int]
    layout: Layout
    checksum: Checksum
    total_chunks: int
    retention: Retention
    attention: AttentionSettings | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


class Upload:
    """One import. Owned by `Uploads`; `writer` takes its chunks, from any number of streams."""

    def __init__(self, command: ImportCommand, sequence: EngineSequence, deadline_seconds: float) -> None:
        self.upload_id = uuid.uuid4().hex
        self.command = command
        self.sequence = sequence
        self.writer = KvWriter(
            sequence.kv, len(command.token_ids), command.layout, command.checksum, command.total_chunks
        )
        self.deadline_seconds = deadline_seconds
        self.session: Session | None = None


class Uploads:
    """Owns every upload and its KV until that is a session's. Called from the event loop.

    Args:
        open_sequence: makes room in the engine.
        manager: owner of the sessions that come of it.
        idle_seconds: how long an upload lives without a chunk, and is remembered when it is done.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        open_sequence: OpenSequence,
        manager: SessionManager,
        idle_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_sequence = open_sequence
        self._manager = manager
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._uploads: dict[tuple[str, str], Upload] = {}
        self._by_request: dict[tuple[str, str], Upload] = {}

    def open(self, command: ImportCommand) -> Upload:
        """A new upload, or the one that the same request_id opened before.

        Raises:
            PrefillError: REQUEST_ID_REUSED, PREFIX_MISMATCH (the session exists), or what `open_sequence` refuses.
        """
        self.sweep()
        earlier = self._by_request.get((command.tenant, command.request_id)) if command.request_id else None
        if earlier is not None:
            if earlier.command.fingerprint != command.fingerprint:
                raise PrefillError(
                    Reason.REQUEST_ID_REUSED,
                    f"request_id {command.request_id!r} came before with a different push: use a fresh id for each",
                    metadata={"request_id": command.request_id},
                    field="request_id",
                )
            if earlier.session is None or self._holds(earlier.session):
                self.touch(earlier)
                return earlier
            self.drop(earlier)
        self._require_new(command)
        sequence = self._open_sequence(command.tenant, command.token_ids, command.attention)
        upload = Upload(command, sequence, self._clock() + self._idle_seconds)
        self._uploads[command.tenant, upload.upload_id] = upload
        if command.request_id:
            self._by_request[command.tenant, command.request_id] = upload
        return upload

    def get(self, tenant: str, upload_id: str) -> Upload:
        """The caller's upload of that id, a finished one too; it lives on for a while.

        Raises:
            PrefillError: TRANSFER_UNKNOWN.
        """
        self.sweep()
        upload = self._uploads.get((tenant, upload_id))
        if upload is None:
            raise PrefillError(
                Reason.TRANSFER_UNKNOWN,
                f"upload {upload_id!r} is not open here: it is done, or no chunk came for {self._idle_seconds:g} s; "
                "open it again",
                metadata={"upload_id": upload_id},
                field="upload_id",
            )
        self.touch(upload)
        return upload

    def settle(self, upload: Upload) -> SessionInfo | None:
        """The session, made now where the last chunk has just come; None while chunks are missing.

        Raises:
            PrefillError: PREFIX_MISMATCH (another request created the session meanwhile) or INVALID_FIELD (the chunks
                leave gaps); the upload is gone then.
        """
        self.touch(upload)
        if upload.session is not None:
            return self._manager.describe(upload.session)
        try:
            if not upload.writer.complete:
                return None
            self._require_new(upload.command)
        except PrefillError:
            self.drop(upload)
            raise
        return self._commit(upload)

    def touch(self, upload: Upload) -> None:
        """Notes that chunks still come."""
        upload.deadline_seconds = self._clock() + self._idle_seconds

    def drop(self, upload: Upload) -> None:
        """Forgets an upload, and frees its KV unless that is a session's."""
        command = upload.command
        if self._uploads.pop((command.tenant, upload.upload_id), None) is None:
            return
        if self._by_request.get((command.tenant, command.request_id)) is upload:
            del self._by_request[command.tenant, command.request_id]
        upload.writer.close()
        if upload.session is None:
            upload.sequence.release()

    def sweep(self) -> None:
        """Drops uploads that have been idle for too long."""
        now = self._clock()
        for upload in list(self._uploads.values()):
            if upload.deadline_seconds <= now:
                self.drop(upload)

    def close(self) -> None:
        """Drops every upload, at shutdown."""
        for upload in list(self._uploads.values()):
            self.drop(upload)

    def _commit(self, upload: Upload) -> SessionInfo:
        command, sequence = upload.command, upload.sequence
        upload.writer.close()
        sequence.kv.extend_to(len(command.token_ids))
        session = self._manager.create(command.tenant, command.session_id, sequence, command.retention, command.labels)
        session.extend(command.token_ids, None)
        upload.session = session
        return self._manager.check_in(session, SessionState.READY)

    def _holds(self, session: Session) -> bool:
        return self._manager.find(session.tenant, session.session_id) is session

    def _require_new(self, command: ImportCommand) -> None:
        session = self._manager.find(command.tenant, command.session_id) if command.session_id else None
        if session is not None:
            raise PrefillError(
                Reason.PREFIX_MISMATCH,
                f"session {command.session_id!r} exists and holds {session.num_tokens} tokens: KV is pushed into new "
                "sessions only; delete it, or choose another id",
                metadata={"num_tokens": session.num_tokens, "expected_prefix_tokens": 0},
                field="session_id",
            )

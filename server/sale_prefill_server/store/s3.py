"""A shared store that speaks S3, through boto3.

    <prefix>/blocks/<tenant>/<hash>[.<codec>].kv
    <prefix>/records/<tenant>/<session>.record
    <prefix>/quarantine/…            damaged objects, for people to look at

`format` says what is in an object. A put is atomic and durable when it returns, by S3's own promise; blocks are small
enough for one request. Credentials and region come from where boto3 finds them.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from sale_prefill_server.store.base import (
    Block,
    BlockEntry,
    BlockKey,
    BlockReader,
    Buffer,
    CorruptError,
    Level,
    NotFoundError,
    Record,
    RecordKey,
    Tier,
    UnavailableError,
    checked_block,
)
from sale_prefill_server.store.format import (
    HEADER_READ_BYTES,
    BlockHeader,
    DamagedError,
    block_header_bytes,
    decode_block_header,
    decode_record,
    encode_block_header,
    encode_record,
)
from sale_prefill_server.store.names import block_name, parse_block_name, parse_record_name, record_name

#: A request costs as much as about this many bytes, so a reader fetches no fewer and keeps what it has too much.
_FETCH_BYTES = 2**20
_CONNECTIONS = 16
_ABSENT = {"404", "NoSuchKey", "NotFound"}


class S3Tier(Tier):
    """Objects of one bucket, under a prefix. The bucket must be there.

    Args:
        endpoint_url: of a store that is not Amazon's.
        connect_timeout_seconds, read_timeout_seconds: of one request; it is tried twice.
    """

    level = Level.SHARED

    def __init__(
        self,
        bucket: str,
        prefix: str = "sale-prefill",
        *,
        name: str = "s3",
        endpoint_url: str | None = None,
        connect_timeout_seconds: float = 2.0,
        read_timeout_seconds: float = 10.0,
    ) -> None:
        self.name = name
        self._bucket = bucket
        self._prefix = prefix.strip("/")
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint_url,
            config=Config(
                connect_timeout=connect_timeout_seconds,
                read_timeout=read_timeout_seconds,
                retries={"total_max_attempts": 2, "mode": "standard"},
                max_pool_connections=2 * _CONNECTIONS,
            ),
        )
        self._pool = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix=f"kv-{name}")

    # -- blocks

    def put_blocks(self, blocks: Sequence[Block]) -> None:
        def put(block: Block) -> None:
            self._put(self._block_object(block.key), b"".join([encode_block_header(block), *block.parts]))

        list(self._pool.map(put, [checked_block(block) for block in blocks]))

    def open_block(self, key: BlockKey) -> BlockReader:
        object_key = self._block_object(key)
        try:
            start, total_bytes = self._get(key, object_key, 0, HEADER_READ_BYTES + _FETCH_BYTES)
            if block_header_bytes(start) > len(start):
                start, total_bytes = self._get(key, object_key, 0, block_header_bytes(start) + _FETCH_BYTES)
            header = decode_block_header(start, key)
            if total_bytes != header.total_bytes:
                raise DamagedError(f"{total_bytes} bytes instead of {header.total_bytes}")
        except DamagedError as error:
            raise self.put_aside(key, object_key, str(error)) from error
        return _ObjectReader(self, header, object_key, start)

    def find_blocks(self, keys: Iterable[BlockKey]) -> dict[BlockKey, BlockEntry]:
        wanted = list(keys)
        entries = self._pool.map(self._find, wanted)
        return {key: entry for key, entry in zip(wanted, entries, strict=True) if entry is not None}

    def delete_blocks(self, keys: Iterable[BlockKey]) -> None:
        list(self._pool.map(self._delete, [self._block_object(key) for key in keys]))

    def list_blocks(self) -> Iterator[tuple[BlockKey, BlockEntry]]:
        for tenant, name, item in self._list("blocks"):
            key = parse_block_name(tenant, name)
            if key is not None:
                yield key, BlockEntry(item["Size"], item["LastModified"].timestamp())

    # -- records

    def put_record(self, record: Record) -> None:
        self._put(self._record_object(record.key), encode_record(record))

    def get_record(self, key: RecordKey) -> Record:
        object_key = self._record_object(key)
        with self._failures(key):
            data = self._client.get_object(Bucket=self._bucket, Key=object_key)["Body"].read()
        try:
            return decode_record(data, key)
        except DamagedError as error:
            raise self.put_aside(key, object_key, str(error)) from error

    def delete_record(self, key: RecordKey) -> None:
        self._delete(self._record_object(key))

    def list_records(self) -> list[RecordKey]:
        keys = (parse_record_name(tenant, name) for tenant, name, _ in self._list("records"))
        return [key for key in keys if key is not None]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    # -- requests

    def fetch(self, key: BlockKey, object_key: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a block's object, fewer where it ends before.

        Raises:
            NotFoundError, UnavailableError
        """
        return self._get(key, object_key, start, end)[0]

    def put_aside(self, key: BlockKey | RecordKey, object_key: str, reason: str) -> CorruptError:
        """Moves a damaged object to quarantine, as far as that works; the error to raise."""
        target = f"{self._prefix}/quarantine/{object_key.rsplit('/', 1)[-1]}-{uuid.uuid4().hex[:8]}"
        with contextlib.suppress(ClientError, BotoCoreError):
            source = {"Bucket": self._bucket, "Key": object_key}
            self._client.copy_object(Bucket=self._bucket, Key=target, CopySource=source)
        with contextlib.suppress(ClientError, BotoCoreError):
            self._client.delete_object(Bucket=self._bucket, Key=object_key)
        return CorruptError(self.name, key, reason)

    def _get(self, key: BlockKey, object_key: str, start: int, end: int) -> tuple[bytes, int]:
        """Bytes [start, end) or fewer, and the object's length."""
        with self._failures(key):
            got = self._client.get_object(Bucket=self._bucket, Key=object_key, Range=f"bytes={start}-{end - 1}")
            return got["Body"].read(), int(got["ContentRange"].rsplit("/", 1)[-1])

    def _put(self, object_key: str, data: bytes) -> None:
        with self._failures():
            self._client.put_object(Bucket=self._bucket, Key=object_key, Body=data)

    def _delete(self, object_key: str) -> None:
        with self._failures():
            self._client.delete_object(Bucket=self._bucket, Key=object_key)

    def _find(self, key: BlockKey) -> BlockEntry | None:
        try:
            with self._failures(key):
                head = self._client.head_object(Bucket=self._bucket, Key=self._block_object(key))
        except NotFoundError:
            return None
        return BlockEntry(head["ContentLength"], head["LastModified"].timestamp())

    def _list(self, kind: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
        start = f"{self._prefix}/{kind}/"
        with self._failures():
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=start):
                for item in page.get("Contents", ()):
                    tenant, _, name = item["Key"].removeprefix(start).partition("/")
                    yield tenant, name, item

    @contextlib.contextmanager
    def _failures(self, key: BlockKey | RecordKey | None = None) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if key is not None and code in _ABSENT:
                raise NotFoundError(self.name, key) from error
            if isinstance(key, BlockKey) and code in ("416", "InvalidRange"):
                raise self.put_aside(key, self._block_object(key), "the object has no such bytes") from error
            raise UnavailableError(self.name, f"{code or 'error'}: {error}") from error
        except BotoCoreError as error:
            raise UnavailableError(self.name, str(error)) from error

    def _block_object(self, key: BlockKey) -> str:
        return f"{self._prefix}/blocks/{key.tenant}/{block_name(key)}"

    def _record_object(self, key: RecordKey) -> str:
        return f"{self._prefix}/records/{key.tenant}/{record_name(key)}"


class _ObjectReader(BlockReader):
    """Parts of one object. It keeps a run of bytes, so that one request serves several reads."""

    def __init__(self, tier: S3Tier, header: BlockHeader, object_key: str, start: bytes) -> None:
        self.key = header.key
        self.num_parts = header.num_parts
        self.part_bytes = header.part_bytes
        self._tier = tier
        self._header = header
        self._object_key = object_key
        self._kept_from = 0
        self._kept = start
        self._lock = threading.Lock()

    def read(self, first_part: int, into: Sequence[Buffer]) -> None:
        start = self._header.offset(first_part)
        end = start + len(into) * self.part_bytes
        data = self._bytes(start, end)
        try:
            if len(data) < end - start:
                raise DamagedError(f"the object ends within parts {first_part} to {first_part + len(into) - 1}")
            for index, target in enumerate(into):
                memoryview(target)[:] = data[index * self.part_bytes : (index + 1) * self.part_bytes]
            self._header.verify(first_part, into)
        except DamagedError as error:
            raise self._tier.put_aside(self.key, self._object_key, str(error)) from error

    def _bytes(self, start: int, end: int) -> memoryview:
        with self._lock:
            if start < self._kept_from or end > self._kept_from + len(self._kept):
                stop = min(self._header.total_bytes, max(end, start + _FETCH_BYTES))
                self._kept = self._tier.fetch(self.key, self._object_key, start, stop)
                self._kept_from = start
            return memoryview(self._kept)[start - self._kept_from : end - self._kept_from]

    def close(self) -> None:
        with self._lock:
            self._kept = b""

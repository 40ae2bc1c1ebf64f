"""A store that speaks S3, on a real socket."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from sale_prefill_server.store.s3 import S3Tier

_COUNTER = itertools.count()


@dataclass
class Bucket:
    """An empty bucket, and a client to look into it."""

    name: str
    endpoint_url: str
    client: Any

    def tier(self, **arguments: Any) -> S3Tier:
        """A tier that keeps its objects there."""
        return S3Tier(self.name, "kv", endpoint_url=self.endpoint_url, **arguments)

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """What is in the bucket."""
        listed = self.client.list_objects_v2(Bucket=self.name, Prefix=prefix).get("Contents", [])
        return {o["Key"]: self.client.get_object(Bucket=self.name, Key=o["Key"])["Body"].read() for o in listed}

    def overwrite(self, key: str, data: bytes) -> None:
        """Puts other bytes under a key."""
        self.client.put_object(Bucket=self.name, Key=key, Body=data)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of the server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket of this test's own."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    name = f"bucket-{next(_COUNTER)}"
    client.create_bucket(Bucket=name)
    return Bucket(name, s3_endpoint, client)

"""The metrics page: whole from the start, right afterwards, good Prometheus."""

from __future__ import annotations

import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sale_prefill.v1 import kv_transfer_service_pb2, session_service_pb2
from tests.support import RunningServer, call_error, running_server, tokens_of

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def server(tiny_model: Path) -> Iterator[RunningServer]:
    with running_server(model=str(tiny_model), dtype="float32") as server:
        yield server


def page(server: RunningServer) -> str:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        return response.read().decode()


def samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def test_every_series_is_there_at_zero_from_the_start(server: RunningServer) -> None:
    before = samples(page(server))
    server.prefill_tokens(tokens_of(2000), session_id="m")
    server.decode_tokens("m", 2, ignore_eos=True)
    list(server.kv.PullKv(kv_transfer_service_pb2.PullKvRequest(session_id="m")))
    server.sessions.GetSession(session_service_pb2.GetSessionRequest(session_id="m"))
    call_error(lambda: server.prefill_tokens([]))
    after = samples(page(server))
    # Layers and codes other than OK are known only once they occur.
    new = {name for name, labels in after.keys() - before.keys()}
    assert new <= {"sale_prefill_layer_sparsity_ratio", "grpc_server_handled_total"}
    zero = [key for key in before if key[0].startswith("sale_prefill_") and key[0].endswith(("_total", "_count"))]
    assert len(zero) > 40
    assert all(before[key] == 0 for key in zero)


def test_requests_tokens_blocks_and_seconds_are_counted(server: RunningServer) -> None:
    result = server.prefill_tokens(tokens_of(2000), session_id="m")
    server.prefill_tokens(tokens_of(100), session_id="m")
    server.decode_tokens("m", 5, ignore_eos=True)
    call_error(lambda: server.prefill_tokens([]))
    found = samples(page(server))
    name = server.server._service.engine.model.name  # type: ignore[union-attr]
    assert value(found, "sale_prefill_requests_total", model_name=name, kind="prefill", outcome="ok") == 2
    assert value(found, "sale_prefill_requests_total", model_name=name, kind="prefill", outcome="rejected") == 1
    assert value(found, "sale_prefill_requests_total", model_name=name, kind="decode", outcome="ok") == 1
    assert value(found, "sale_prefill_admission_rejections_total", reason="NO_TOKENS") == 1
    assert value(found, "sale_prefill_tokens_total", source="computed") == 2100
    assert value(found, "sale_prefill_tokens_total", source="session") == 2000
    assert value(found, "sale_prefill_decoded_tokens_total") == 5
    assert value(found, "sale_prefill_attention_blocks_total", decision="computed") >= result.stats.computed_blocks
    assert value(found, "sale_prefill_compute_seconds_total", phase="estimation") > 0
    assert value(found, "sale_prefill_dense_fallback_rows_total", reason="short") == 1024 * 4 * 2
    assert value(found, "sale_prefill_sessions", state="ready") == 1
    assert value(found, "sale_prefill_kv_used_bytes", tier="device") > 0
    assert value(found, "sale_prefill_queue_duration_seconds_count", model_name=name) == 3
    assert value(found, "sale_prefill_ready") == 1
    method = {"grpc_service": "sale_prefill.v1.PrefillService", "grpc_method": "Prefill", "grpc_type": "server_stream"}
    assert value(found, "grpc_server_handled_total", **method, grpc_code="OK") == 2
    assert value(found, "grpc_server_handled_total", **method, grpc_code="INVALID_ARGUMENT") == 1


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)")
def test_promtool_finds_nothing_to_complain_about(server: RunningServer) -> None:
    server.prefill_tokens(tokens_of(1500))
    check = subprocess.run(["promtool", "check", "metrics"], input=page(server), capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr

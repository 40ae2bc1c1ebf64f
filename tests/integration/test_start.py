"""Start and stop of a server process: readiness, and mistakes that must end it with a clear line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.support import RunningServer, call_error, running_server, tokens_of

SERVICES = ["PrefillService", "SessionService", "KvTransferService", "ServerService"]


def serve(*arguments: str) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).parent / "sale-prefill"), "serve", "--port", "0", "--metrics-port", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def health(server: RunningServer, name: str) -> int:
    stub = health_pb2_grpc.HealthStub(server.channel)
    status: int = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status
    return status


def test_until_the_model_is_warm_health_says_not_serving_and_calls_say_try_again(tiny_model: Path) -> None:
    with running_server(model=str(tiny_model), ready=False) as server:
        for name in ("", *(f"sale_prefill.v1.{service}" for service in SERVICES)):
            assert health(server, name) == health_pb2.HealthCheckResponse.NOT_SERVING
        error = call_error(lambda: server.prefill_tokens([5]))
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
        assert error.retry_after_seconds is not None


def test_a_ready_server_says_so_by_service_and_describes_itself(tiny_server: RunningServer) -> None:
    for name in ("", *(f"sale_prefill.v1.{service}" for service in SERVICES)):
        assert health(tiny_server, name) == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(tiny_server.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = next(stub.ServerReflectionInfo(iter([request])))
    listed = {service.name for service in answer.list_services_response.service}
    assert {f"sale_prefill.v1.{service}" for service in SERVICES} <= listed


def test_a_server_serves_until_it_is_told_to_stop(tiny_model: Path) -> None:
    process = serve("--model", str(tiny_model), "--dtype", "float32")
    assert process.stdout is not None
    ready = process.stdout.readline()
    assert ready.startswith("sale-prefill ready: grpc 127.0.0.1:")
    port = ready.split()[3].rpartition(":")[2]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5).status
        assert status == health_pb2.HealthCheckResponse.SERVING
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert 'attention = "sale"' in errors  # the configuration is printed at start


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_port_in_use_is_named_with_the_way_out(tiny_model: Path, flag: str) -> None:
    with taken_port() as port:
        process = serve("--model", str(tiny_model), flag, str(port))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"127.0.0.1:{port} cannot be bound (Address already in use" in errors
    assert f"choose another with {flag}" in errors
    assert "Traceback" not in errors


def test_a_missing_model_ends_the_server_with_a_line(tmp_path: Path) -> None:
    process = serve("--model", str(tmp_path / "nothing"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"{tmp_path / 'nothing'}: no such directory or file" in errors
    assert "Traceback" not in errors


def test_weights_cut_short_end_the_server_with_a_line(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    process = serve("--model", str(tmp_path))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "model.safetensors" in errors
    assert "Traceback" not in errors


def test_a_remote_bind_without_tls_needs_saying_so(tiny_model: Path) -> None:
    process = serve("--model", str(tiny_model), "--host", "0.0.0.0")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "--allow-insecure-remote" in errors


def test_stopping_ends_running_work_and_refuses_new(tiny_model: Path) -> None:
    with running_server(model=str(tiny_model), dtype="float32") as server:
        server.prefill_tokens(tokens_of(100), session_id="held")
        pool = server.server._service.engine.pool  # type: ignore[union-attr]
        assert pool.used_bytes > 0
    assert pool.used_bytes == 0

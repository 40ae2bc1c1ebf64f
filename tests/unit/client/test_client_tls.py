"""TLS and mutual TLS on a real socket, with certificates made for the occasion."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

import grpc
import pytest

from sale_prefill.v1 import session_service_pb2 as pb
from sale_prefill_client import TlsOptions, errors
from tests.unit.client.scripted import BOTH_CLIENTS, Calls, SyncCalls, scripted_server

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate of `server.test`, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "1",
    ]
    names = ["-subj", "/CN=server.test", "-addext", "subjectAltName=DNS:server.test"]
    subprocess.run([*command, *names, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    return certificate, key


def serve(certificate: tuple[Path, Path], *, mutual: bool = False) -> AbstractContextManager[str]:
    chain, key = (path.read_bytes() for path in certificate)
    credentials = grpc.ssl_server_credentials([(key, chain)], chain if mutual else None, require_client_auth=mutual)
    return scripted_server(credentials=credentials, GetSession=lambda _, __: pb.GetSessionResponse())


@pytest.mark.parametrize("calls", BOTH_CLIENTS)
def test_a_trusted_server_is_reached(certificate: tuple[Path, Path], calls: Calls) -> None:
    tls = TlsOptions(root_certificates=certificate[0], server_name="server.test")
    with serve(certificate) as target:
        assert calls(target, tls=tls, token="secret").get_session("s").session_id == ""


def test_a_server_that_is_not_trusted_is_not(certificate: tuple[Path, Path]) -> None:
    with serve(certificate) as target, pytest.raises(errors.UnavailableError):
        SyncCalls(target, tls=TlsOptions(server_name="server.test")).get_session("s")


def test_a_server_that_wants_a_certificate_gets_it(certificate: tuple[Path, Path]) -> None:
    chain, key = certificate
    with serve(certificate, mutual=True) as target:
        mutual = TlsOptions(chain.read_bytes(), client_certificate=chain, client_key=key, server_name="server.test")
        assert SyncCalls(target, tls=mutual).get_session("s").session_id == ""
        one_sided = TlsOptions(chain, server_name="server.test")
        with pytest.raises(errors.UnavailableError):
            SyncCalls(target, tls=one_sided).get_session("s")


def test_half_a_key_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="both client_certificate and client_key"):
        TlsOptions(client_certificate=b"pem")


def test_the_private_key_is_not_shown() -> None:
    assert "hush" not in repr(TlsOptions(client_certificate=b"pem", client_key=b"hush"))

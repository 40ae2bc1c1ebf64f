"""What is tracked holds on any machine: no path of one machine, no registry's host, pins for every dependency."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = "sale-prefill"

# Written in pieces, so that this file does not hold what it looks for.
_FOLDERS = "|".join(("wo" + "rk", "fa" + "rm", "ro" + "ot", "Us" + "ers"))
_REGISTRIES = (r"py" + r"pi\.\w", "python" + "hosted", r"download\.py" + "torch", r"deb\.deb" + "ian")
MACHINE_PATH = re.compile(rf"(?<![\w.-])/(?:{_FOLDERS})/\w")
HOME_PATH = re.compile(r"(?<![\w.-])/ho" + r"me/\w")
REGISTRY_HOST = re.compile("|".join(_REGISTRIES))


def tracked_files() -> list[Path]:
    """Files that are tracked or would be: what git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    files = [REPOSITORY / name for name in names.split("\0") if name]
    return [file for file in files if file.is_file()]


def lines_with(pattern: re.Pattern[str]) -> list[str]:
    found = []
    for file in tracked_files():
        text = file.read_text(errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                found.append(f"{file.relative_to(REPOSITORY)}:{number}: {line.strip()[:120]}")
    return found


@pytest.mark.parametrize("pattern", [MACHINE_PATH, HOME_PATH, REGISTRY_HOST], ids=["machine", "home", "registry"])
def test_no_tracked_file_names_one_machine_or_a_registry(pattern: re.Pattern[str]) -> None:
    assert lines_with(pattern) == []


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (MACHINE_PATH, "cd /wo" + "rk/main"),
        (HOME_PATH, "/ho" + "me/someone"),
        (REGISTRY_HOST, "https://py" + "pi.org/simple"),
    ],
)
def test_the_patterns_find_what_they_are_for(pattern: re.Pattern[str], text: str) -> None:
    assert pattern.search(text)


def pins(file_name: str) -> dict[str, str]:
    """Package to version of a constraints file."""
    lines = (REPOSITORY / file_name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def requirements_in_use() -> set[str]:
    """Every package that `pip install -e .[dev]` brings to this machine, by what each one's metadata asks for."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(line) for line in project["dependencies"]]
    waiting += [Requirement(line) for group in project["optional-dependencies"].values() for line in group]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key not in seen and key[0] != PROJECT:
            seen.add(key)
            waiting += _requirements_of(requirement)
    return {name for name, _ in seen}


def _requirements_of(requirement: Requirement) -> Iterator[Requirement]:
    for line in metadata.requires(requirement.name) or ():
        wanted = Requirement(line)
        environments = [{"extra": extra} for extra in ("", *requirement.extras)]
        if wanted.marker is None or any(wanted.marker.evaluate(environment) for environment in environments):
            yield wanted


def constraints_in_use() -> str:
    import torch

    return "constraints.txt" if torch.version.cuda is None else "constraints-cuda.txt"


def test_every_dependency_is_pinned() -> None:
    packaging_tools = {"setuptools"}  # venv may bring it; torch takes any
    assert requirements_in_use() - set(pins(constraints_in_use())) - packaging_tools == set()


def test_what_is_installed_is_what_is_pinned() -> None:
    pinned = pins(constraints_in_use())
    installed = {name: metadata.version(name).split("+")[0] for name in requirements_in_use() & set(pinned)}
    assert installed == {name: pinned[name] for name in installed}


def test_both_constraints_files_differ_only_by_torch_and_its_parts() -> None:
    cpu, cuda = pins("constraints.txt"), pins("constraints-cuda.txt")
    assert {name for name in cpu if cuda.get(name) != cpu[name]} == {"torch"}
    only_cuda = set(cuda) - set(cpu) - {"triton", "setuptools"}
    assert {name for name in only_cuda if not name.startswith(("nvidia-", "cuda-"))} == set()

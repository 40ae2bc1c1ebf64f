"""Generate the sync client from the asyncio one: `_async/*.py` -> `_sync/*.py`, all but `_io.py`.

python tools/generate_sync_client.py            # write
python tools/generate_sync_client.py --check    # exit with 1 where a committed file differs
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import unasync  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[1]
ASYNC_FOLDER = ROOT / "client" / "sale_prefill_client" / "_async"
SYNC_FOLDER = ASYNC_FOLDER.parent / "_sync"
BY_HAND = {"_io.py"}
KEPT_NAMES = {"AsyncIterator", "AsyncIterable", "AsyncGenerator"}


def replacements(sources: list[str]) -> dict[str, str]:
    """Names to replace beside those that unasync knows: the project's `AsyncThing` becomes `Thing`."""
    found = {name for source in sources for name in re.findall(r"\bAsync[A-Z]\w*", source)} - KEPT_NAMES
    return {name: name.removeprefix("Async") for name in sorted(found)} | {"aclosing": "closing", "anext": "next"}


def ruff(*arguments: str, source: str, name: str) -> str:
    """Run ruff on source text as the file `name`, with the project's settings."""
    command = [str(Path(sysconfig.get_path("scripts")) / "ruff"), *arguments, "--stdin-filename", name, "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def finished(source: str, name: str) -> str:
    """Generated text with its header, prose fixed, imports sorted, formatted."""
    header = f"# Generated from _async/{name} by tools/generate_sync_client.py. Do not edit.\n"
    prose = re.sub(r"`Async([A-Z]\w*)`", r"`\1`", source).replace(
        "from contextlib import closing, closing\n", "from contextlib import closing\n"
    )
    target = str(SYNC_FOLDER / name)
    fixed = ruff("check", "--fix", "--quiet", "--select", "I,F811,UP", source=header + prose, name=target)
    return ruff("format", "--quiet", source=fixed, name=target)


def generate() -> dict[str, str]:
    """The sync files by name."""
    paths = [path for path in sorted(ASYNC_FOLDER.glob("*.py")) if path.name not in BY_HAND]
    table = replacements([path.read_text(encoding="utf-8") for path in paths])
    with tempfile.TemporaryDirectory() as scratch:
        rule = unasync.Rule(str(ASYNC_FOLDER) + "/", scratch + "/", additional_replacements=table)
        unasync.unasync_files([str(path) for path in paths], [rule])
        return {
            path.name: finished((Path(scratch) / path.name).read_text(encoding="utf-8"), path.name) for path in paths
        }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file differs")
    check = parser.parse_args().check
    wanted = generate()
    present = {
        path.name: path.read_text(encoding="utf-8") for path in SYNC_FOLDER.glob("*.py") if path.name not in BY_HAND
    }
    differing = sorted(name for name in wanted.keys() | present.keys() if wanted.get(name) != present.get(name))
    for name in differing:
        if check:
            sys.stderr.write(f"{SYNC_FOLDER / name} is out of date; run python tools/generate_sync_client.py\n")
        elif name in wanted:
            (SYNC_FOLDER / name).write_text(wanted[name], encoding="utf-8")
        else:
            (SYNC_FOLDER / name).unlink()
    return 1 if check and differing else 0


if __name__ == "__main__":
    sys.exit(main())

"""The folder of fetched and converted models: whole entries or none, made once however many processes ask.

An entry is built in a temporary folder beside its place and renamed there; its marker file records what it was made
from and the size of each file, so that an entry of other bytes, or one that lost a file, is made again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sale_prefill_server.models.errors import ModelCacheError

CACHE_VARIABLE = "SALE_PREFILL_CACHE"
_MARKER = "sale_prefill_source.json"
_MARKER_FORMAT = 1

Progress = Callable[[str], None]


@dataclass(frozen=True)
class CachedModel:
    """A converted model in the cache.

    Attributes:
        name: what `resolve_model` takes for it.
        path: its directory.
        size_bytes: of all its files.
        source: what it was made from, with its hash or its size and time.
    """

    name: str
    path: Path
    size_bytes: int
    source: str


def default_cache_dir() -> Path:
    """`$SALE_PREFILL_CACHE`, else `$XDG_CACHE_HOME/sale-prefill`, else `~/.cache/sale-prefill`."""
    if override := os.environ.get(CACHE_VARIABLE):
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sale-prefill"


class ModelCache:
    """Entries under `<root>/models/<key>/`.

    Args:
        root: the cache folder; made when the first entry is.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._models = root / "models"

    def entry(self, key: str) -> CachedModel | None:
        """The whole entry `key`, or None where there is none or it lost a file."""
        path = self._models / key
        try:
            marker = json.loads((path / _MARKER).read_text())
            sizes: dict[str, int] = marker["files"]
            whole = marker["format"] == _MARKER_FORMAT and all(
                (path / file).stat().st_size == size for file, size in sizes.items()
            )
            return CachedModel(marker["name"], path, sum(sizes.values()), marker["source"]) if whole else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def entries(self) -> list[CachedModel]:
        """All whole entries, by name."""
        keys = sorted(path.name for path in self._models.glob("*/"))
        return sorted((found for key in keys if (found := self.entry(key))), key=lambda model: model.name)

    def get_or_make(
        self, key: str, *, name: str, source: str, make: Callable[[Path], None], on_progress: Progress
    ) -> CachedModel:
        """Entry `key` made from `source`, made now by `make(directory)` where it is not there.

        Where another process is making it, this waits and takes the other's.

        Args:
            key: folder name.
            name: what `resolve_model` takes for it.
            source: what it is made from; an entry of another source is replaced.
            make: fills the directory that it is given.
            on_progress: told when this waits.

        Raises:
            ModelCacheError: the cache folder cannot be written.
        """
        if (found := self.entry(key)) and found.source == source:
            return found
        try:
            with self._lock(key, on_progress):
                if (found := self.entry(key)) and found.source == source:
                    return found
                self._publish(key, name, source, make)
        except OSError as error:
            raise ModelCacheError(
                f"model cache {self.root}: {error.strerror or error}",
                f"Make that folder writable and roomy, or name another in {CACHE_VARIABLE}",
            ) from error
        made = self.entry(key)
        if made is None:
            raise ModelCacheError(f"model cache {self._models / key} was removed while in use", "Start again")
        return made

    def remove(self, model: CachedModel) -> None:
        """Delete an entry; a process that has it loaded keeps its memory map.

        Raises:
            ModelCacheError: it cannot be deleted.
        """
        try:
            shutil.rmtree(model.path)
        except OSError as error:
            raise ModelCacheError(f"{model.path}: {error.strerror or error}", "Check its permissions") from error

    def _publish(self, key: str, name: str, source: str, make: Callable[[Path], None]) -> None:
        for leftover in self._models.glob(f".making-{key}-*"):  # of a process that was killed; the lock is ours
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix=f".making-{key}-", dir=self._models) as scratch:
            building = Path(scratch) / "model"
            building.mkdir()
            make(building)
            sizes = {file.name: file.stat().st_size for file in sorted(building.iterdir())}
            marker = {"format": _MARKER_FORMAT, "name": name, "source": source, "files": sizes}
            (building / _MARKER).write_text(json.dumps(marker, indent=2) + "\n")
            if (self._models / key).exists():
                shutil.rmtree(self._models / key)
            building.rename(self._models / key)

    @contextmanager
    def _lock(self, key: str, on_progress: Progress) -> Iterator[None]:
        self._models.mkdir(parents=True, exist_ok=True)
        with (self._models / f".{key}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_progress(f"{key}: another process is preparing it; waiting")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

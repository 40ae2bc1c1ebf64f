"""The model cache holds whole entries or none, and makes each once."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from sale_prefill_server.models import ModelCacheError, default_cache_dir
from sale_prefill_server.models.cache import CachedModel, ModelCache


def write_weights(directory: Path) -> None:
    (directory / "weights").write_bytes(b"12345678")


def get(cache: ModelCache, source: str = "v1", *, log: list[str] | None = None) -> CachedModel:
    made = log if log is not None else []

    def make(directory: Path) -> None:
        made.append(source)
        write_weights(directory)

    return cache.get_or_make("tiny", name="tiny", source=source, make=make, on_progress=lambda line: None)


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    log: list[str] = []
    assert get(ModelCache(tmp_path), log=log) == get(ModelCache(tmp_path), log=log)
    assert log == ["v1"]


def test_another_source_replaces_it(tmp_path: Path) -> None:
    get(ModelCache(tmp_path))
    assert get(ModelCache(tmp_path), "v2").source == "v2"
    assert len(ModelCache(tmp_path).entries()) == 1


@pytest.mark.parametrize("damage", ["remove", "truncate", "marker"])
def test_a_damaged_entry_is_not_listed_and_made_again(damage: str, tmp_path: Path) -> None:
    entry = get(ModelCache(tmp_path))
    if damage == "remove":
        (entry.path / "weights").unlink()
    elif damage == "truncate":
        (entry.path / "weights").write_bytes(b"1234")
    else:
        (entry.path / "sale_prefill_source.json").write_text("[]")
    assert ModelCache(tmp_path).entries() == []
    log: list[str] = []
    assert get(ModelCache(tmp_path), log=log) == entry
    assert log == ["v1"]


def test_a_failure_leaves_no_entry(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        write_weights(directory)
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        ModelCache(tmp_path).get_or_make("tiny", name="tiny", source="v1", make=fail, on_progress=print)
    assert [path for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    leftover = tmp_path / "models" / ".making-tiny-abc" / "model"
    leftover.mkdir(parents=True)
    write_weights(leftover)
    get(ModelCache(tmp_path))
    assert not leftover.exists()
    assert [entry.name for entry in ModelCache(tmp_path).entries()] == ["tiny"]


def _make_slowly(root: Path, log: Path) -> None:
    def make(directory: Path) -> None:
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(0.3)
        write_weights(directory)

    ModelCache(root).get_or_make("tiny", name="tiny", source="v1", make=make, on_progress=lambda line: None)


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_make_slowly, args=(tmp_path, tmp_path / "log")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_cache_that_cannot_be_written_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelCacheError, match=r"file: Not a directory\. .*SALE_PREFILL_CACHE") as caught:
        get(ModelCache(tmp_path / "file"))
    assert caught.value.reason == "MODEL_CACHE_FAILED"


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALE_PREFILL_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("SALE_PREFILL_CACHE")
    assert default_cache_dir() == tmp_path / "xdg" / "sale-prefill"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "sale-prefill"

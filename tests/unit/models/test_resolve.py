"""A model's name becomes a directory that transformers loads; a wrong name says what is wrong and what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sale_prefill_server.models import (
    ModelDownloadError,
    ModelInvalidError,
    ModelNotFoundError,
    ModelSource,
    ModelUnreadableError,
    inspect_config,
    list_models,
    remove_model,
    resolve_model,
)


def test_a_directory_is_taken_as_it_is(model_directory: Path, tmp_path: Path) -> None:
    source = resolve_model(str(model_directory), tmp_path / "cache")
    assert source == ModelSource(model_directory, "tiny-llama")
    assert list_models(tmp_path / "cache") == []


def test_a_gguf_file_is_converted_once(gguf_file: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    first = resolve_model(str(gguf_file), tmp_path / "cache", lines.append)
    assert any("converting" in line for line in lines)
    lines.clear()
    assert resolve_model(str(gguf_file), tmp_path / "cache", lines.append) == first
    assert lines == []
    assert first.name == "tiny"


def test_a_converted_gguf_file_loads_with_its_tokenizer(gguf_file: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve_model(str(gguf_file), tmp_path / "cache").path
    assert inspect_config(path).num_key_value_heads == 1
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer("hello").input_ids
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.model_max_length == 256
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()


def test_a_gguf_file_that_changed_is_converted_again(gguf_file: Path, tmp_path: Path) -> None:
    resolve_model(str(gguf_file), tmp_path / "cache")
    os.utime(gguf_file, ns=(0, 0))
    lines: list[str] = []
    resolve_model(str(gguf_file), tmp_path / "cache", lines.append)
    assert any("converting" in line for line in lines)
    assert len(list_models(tmp_path / "cache")) == 1


def test_the_cache_is_listed_and_cleared_by_name(gguf_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    source = resolve_model(str(gguf_file), cache)
    (held,) = list_models(cache)
    assert (held.name, held.path) == (str(gguf_file), source.path)
    assert held.size_bytes > 10_000
    assert remove_model(str(gguf_file), cache) == held
    assert list_models(cache) == []
    assert not source.path.exists()
    assert gguf_file.exists()
    with pytest.raises(ModelNotFoundError, match="It holds nothing"):
        remove_model(str(gguf_file), cache)


def test_listing_does_not_load_torch() -> None:
    code = "import sys, sale_prefill_server.models as m; m.list_models(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_in_the_hubs_cache_is_found_without_a_network(
    model_directory: Path, tmp_path: Path, hub_offline: Path
) -> None:
    commit = "0123456789012345678901234567890123456789"
    repository = hub_offline / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    model_directory.rename(repository / "snapshots" / commit)

    source = resolve_model("someone/tiny", tmp_path / "cache")
    assert source.name == "someone/tiny"
    assert inspect_config(source.path).model_type == "llama"


def test_a_hub_id_that_cannot_be_fetched_says_so(tmp_path: Path, hub_offline: Path) -> None:
    with pytest.raises(ModelDownloadError, match=r"someone/absent: no directory of that name here.*Name a model dir"):
        resolve_model("someone/absent", tmp_path / "cache")


@pytest.mark.parametrize("name", ["/no/such/folder", "./absent", "absent.gguf", "some/deep/path", ""])
def test_a_path_to_nothing_is_not_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="smollm2-135m-instruct") as caught:
        resolve_model(name, tmp_path / "cache")
    assert caught.value.reason == "MODEL_NOT_FOUND"


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(b"PK")
    with pytest.raises(ModelInvalidError, match=r"model.zip is neither a directory nor a .gguf file"):
        resolve_model(str(tmp_path / "model.zip"), tmp_path / "cache")


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read everything, so root's tests step down to the user nobody meanwhile."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_directory_without_permission_is_unreadable(model_directory: Path, tmp_path: Path) -> None:
    model_directory.parent.joinpath("locked").mkdir()
    locked = model_directory.rename(model_directory.parent / "locked" / "tiny")
    locked.parent.chmod(0)
    try:
        with without_privileges(), pytest.raises(ModelUnreadableError, match="Permission denied"):
            resolve_model(str(locked), tmp_path / "cache")
    finally:
        locked.parent.chmod(0o755)


def _not_gguf(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 something else")


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20_000])


@pytest.mark.parametrize("damage", [_not_gguf, _cut_short])
def test_a_damaged_gguf_file_is_refused_and_leaves_nothing(
    damage: Callable[[Path], None], gguf_file: Path, tmp_path: Path
) -> None:
    damage(gguf_file)
    with pytest.raises(ModelInvalidError, match=r"tiny\.gguf") as caught:
        resolve_model(str(gguf_file), tmp_path / "cache")
    assert caught.value.reason == "MODEL_INVALID"
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()] == []

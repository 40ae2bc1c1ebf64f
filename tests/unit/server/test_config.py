"""Configuration: one schema, four origins, clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from sale_prefill_server.config import ConfigError, load_config, parse_bytes


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('port = 1\nmetrics_port = 2\nthreshold = 0.01\nattention = "dense"\n')
    config = load_config(
        {"port": "3"}, file=file, environment={"SALE_PREFILL_PORT": "4", "SALE_PREFILL_METRICS_PORT": "5"}
    )
    assert (config.port, config.metrics_port, config.threshold, config.attention) == (3, 5, 0.01, "dense")


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("query_stride = 2")
    assert load_config({}, environment={"SALE_PREFILL_CONFIG": str(file)}).query_stride == 2


def test_what_is_printed_at_start_is_a_file_that_can_be_read_back(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    config = load_config({"port": 7, "trust_remote_code": True}, environment={})
    file.write_text(config.describe())
    assert load_config({}, file=file, environment={}) == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"chunk_tokens": "600"}, "chunk_tokens = 600: must be a multiple of 128"),
        ({"query_stride": "3"}, "query_stride = 3: must be 1, 2 or 4"),
        ({"threshold": "0"}, "threshold = 0.0: must be above 0"),
        ({"host": "0.0.0.0"}, "--allow-insecure-remote"),
        ({"port": "many"}, "port = 'many' (--port): not a int"),
        ({"port": "-1"}, "port = -1 (--port): must be at least 0"),
        ({"dtype": "int4"}, "must be one of auto, bfloat16, float16, float32"),
        ({"no_such": "1"}, "no such setting; there are allow_insecure_remote"),
        ({"trust_remote_code": "maybe"}, "trust_remote_code = 'maybe'"),
    ],
)
def test_an_unusable_setting_is_named(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(flags, environment={})
    assert message in str(caught.value)


def test_an_unreadable_or_malformed_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml: No such file"):
        load_config({}, file=tmp_path / "missing.toml", environment={})
    broken = tmp_path / "broken.toml"
    broken.write_text("port = ")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config({}, file=broken, environment={})


def test_a_remote_bind_is_possible_when_said() -> None:
    assert load_config({"host": "0.0.0.0", "allow_insecure_remote": True}, environment={}).host == "0.0.0.0"


@pytest.mark.parametrize(
    ("text", "expected"), [("8G", 8 * 2**30), ("512MiB", 2**29), ("1.5k", 1536), ("4096", 4096), ("2 GB", 2**31)]
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes("kv_memory", text.replace(" ", "")) == expected


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_memory = 'lots'"):
        parse_bytes("kv_memory", "lots")

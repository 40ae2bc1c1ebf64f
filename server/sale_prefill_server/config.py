"""The configuration schema: one table for flags, environment (`SALE_PREFILL_*`), TOML file and documentation."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENVIRONMENT_PREFIX = "SALE_PREFILL_"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class ConfigError(Exception):
    """A setting that cannot be used. Names it, its value, where it came from and what would do."""


def _setting(default: Any, help_text: str, *, minimum: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help_text, "minimum": minimum, "choices": choices})


@dataclass(frozen=True)
class ServerConfig:
    """Settings of one server process. Precedence: flag, environment, TOML file, default."""

    model: str = _setting("smollm2-135m-instruct", "model: a directory, a .gguf file, a hub id, or the default's name")
    host: str = _setting("127.0.0.1", "address to bind gRPC to")
    port: int = _setting(50051, "gRPC port; 0 takes a free one", minimum=0)
    metrics_host: str = _setting("127.0.0.1", "address to bind the metrics page to")
    metrics_port: int = _setting(9464, "port of the metrics page; 0 takes a free one", minimum=0)
    allow_insecure_remote: bool = _setting(False, "bind to other hosts than loopback without TLS")
    auth_tokens_file: str = _setting("", "file of 'tenant:token' lines; empty lets every caller in as one tenant")
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = _setting(
        "auto", "weights and KV; auto is bfloat16", choices=("auto", "bfloat16", "float16", "float32")
    )
    threads: int = _setting(0, "CPU threads for the model; 0 leaves torch's choice", minimum=0)
    attention: str = _setting("sale", "attention of a session that asks for none", choices=("sale", "dense"))
    attention_backend: str = _setting("auto", "attention backend by name; auto takes the fastest that works here")
    profile: str = _setting(
        "auto",
        "calibrated profile: a file, none, or auto for one that comes with this package and belongs to the model",
    )
    threshold: float = _setting(
        0.004, "SALE threshold tau of a session that asks for none, without a profile", minimum=0
    )
    query_stride: int = _setting(1, "estimate from every n-th query row: 1, 2 or 4; without a profile", minimum=1)
    guard_share: float = _setting(0.01, "share of prefills of which the guard recomputes some attention", minimum=0)
    guard_policy: str = _setting(
        "fallback", "a head that loses more than calibrated: dense, or only told", choices=("fallback", "alert")
    )
    dense_rows: int = _setting(
        0, "query rows before this position take dense attention; 0: up to where sparse is expected to pay", minimum=0
    )
    chunk_tokens: int = _setting(
        0, "prefill chunk, a multiple of 128: the unit of fairness; 0: 2048 on the CPU, 8192 on a GPU", minimum=0
    )
    prefix_reuse: bool = _setting(
        True, "a new session takes KV that its tenant's other sessions hold for the tokens it begins with"
    )
    kv_memory: str = _setting("auto", "bytes for KV, such as 8G; auto takes half of what is free")
    kv_host_memory: str = _setting("0", "bytes of host memory for KV that leaves the device, such as 8G")
    kv_disk: str = _setting("", "folder on a local disk for KV; sessions that ask for it survive a restart")
    kv_disk_memory: str = _setting("32G", "bytes that KV may take in kv_disk")
    kv_shared: str = _setting(
        "", "store for KV that other servers see too: a folder, or s3://bucket/prefix (AWS_ENDPOINT_URL for others)"
    )
    durability: str = _setting(
        "none", "durability of a session that asks for none", choices=("none", "async", "local", "shared")
    )
    pin_quota: str = _setting("0", "bytes that one tenant's hard-pinned sessions may take on the device, such as 2G")
    transfer_memory: str = _setting(
        "auto", "bytes of host memory that callers on this host may share; auto is a quarter of what is free, 0 is none"
    )
    transfer_device_memory: str = _setting(
        "auto", "bytes of GPU memory that callers on this host may share; auto is an eighth of the GPU's, 0 is none"
    )
    transfer_directory: str = _setting(
        "", "folder for the socket of shared memory; empty is in the user's runtime folder"
    )
    transfer_uids: str = _setting("", "numbers of other users whose processes may share memory, with commas between")
    max_sequence_tokens: int = _setting(0, "longest session; 0 takes the model's context", minimum=0)
    max_message_bytes: int = _setting(8 * 2**20, "largest gRPC message, either way", minimum=2**16)
    max_queued_requests: int = _setting(256, "requests that may wait or run", minimum=1)
    default_lease_seconds: float = _setting(600.0, "lease of a session that asks for none", minimum=0)
    max_lease_seconds: float = _setting(86400.0, "longest lease that a caller may ask for", minimum=0)
    request_retention_seconds: float = _setting(600.0, "how long a request_id answers with its result", minimum=0)
    upload_idle_seconds: float = _setting(60.0, "how long a push that broke off keeps what came", minimum=1)
    cache_dir: str = _setting("", "folder of fetched and converted models; empty is the user's cache folder")
    trust_remote_code: bool = _setting(False, "run Python code that a model folder brings")
    log_level: str = _setting("info", "least level logged", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        if self.chunk_tokens % 128:
            raise ConfigError(
                f"chunk_tokens = {self.chunk_tokens}: must be a multiple of 128, so that blocks never depend on chunks"
            )
        if self.dense_rows and (self.dense_rows < 1024 or self.dense_rows % 128):
            raise ConfigError(f"dense_rows = {self.dense_rows}: use a multiple of 128 from 1024 on, or 0")
        if self.query_stride not in (1, 2, 4):
            raise ConfigError(f"query_stride = {self.query_stride}: must be 1, 2 or 4")
        if not 0 < self.threshold <= 1:
            raise ConfigError(
                f"threshold = {self.threshold}: must be above 0 and at most 1; dense is attention = 'dense'"
            )
        if self.profile not in ("auto", "none") and (self.threshold, self.query_stride) != _UNIFORM:
            raise ConfigError(
                f"profile = {self.profile!r} and a threshold or query_stride: say one; a profile has its own by head"
            )
        if self.durability != "none" and not (self.kv_disk or self.kv_shared):
            raise ConfigError(f"durability = {self.durability!r} needs kv_disk or kv_shared: name a folder")
        if self.durability == "shared" and not self.kv_shared:
            raise ConfigError(
                "durability = 'shared' needs kv_shared: name a folder that other servers see, or s3://..."
            )
        if self.guard_share > 1:
            raise ConfigError(f"guard_share = {self.guard_share}: must be 0 to 1")
        if not self.allow_insecure_remote and self.host not in ("127.0.0.1", "localhost", "::1"):
            raise ConfigError(
                f"host = {self.host!r} is reachable from other machines, and this server has no TLS: bind to 127.0.0.1 "
                "behind a proxy that has, or say --allow-insecure-remote"
            )

    @property
    def wants_shipped_profile(self) -> bool:
        """Whether a profile that comes with the package may be used: nobody said what heads should do."""
        return self.profile == "auto" and (self.threshold, self.query_stride) == _UNIFORM

    @property
    def kv_memory_bytes(self) -> int | None:
        """Bytes for KV, or None for automatic."""
        return None if self.kv_memory == "auto" else parse_bytes("kv_memory", self.kv_memory)

    @property
    def transfer_uid_numbers(self) -> frozenset[int]:
        """Users named by `transfer_uids`."""
        parts = [part.strip() for part in self.transfer_uids.split(",") if part.strip()]
        if not all(part.isdecimal() for part in parts):
            raise ConfigError(f"transfer_uids = {self.transfer_uids!r}: write user numbers, such as 1000,1001")
        return frozenset(int(part) for part in parts)

    def describe(self) -> str:
        """One `name = value` line a setting, as TOML; printed at start."""
        return "\n".join(f"{item.name} = {_toml(getattr(self, item.name))}" for item in dataclasses.fields(self))


#: Threshold and query stride where nobody says otherwise.
_UNIFORM = (ServerConfig.threshold, ServerConfig.query_stride)


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def parse_bytes(name: str, text: str) -> int:
    """Bytes of '8G', '512M', '1073741824'.

    Raises:
        ConfigError: anything else.
    """
    body = text.strip().upper().removesuffix("IB").removesuffix("B")
    unit = body[-1:] if body[-1:].isalpha() else ""
    try:
        if unit in _UNITS and float(body[: len(body) - len(unit)]) >= 0:
            return int(float(body[: len(body) - len(unit)]) * _UNITS[unit])
    except ValueError:
        pass
    raise ConfigError(f"{name} = {text!r}: not a size; write bytes, or a number with K, M, G or T, such as 8G")


def parse_setting(name: str, value: object, origin: str) -> Any:
    """`value` (a string, or what TOML gave) as the type of setting `name`.

    Raises:
        ConfigError: unknown name, wrong type, out of range.
    """
    item = {field.name: field for field in dataclasses.fields(ServerConfig)}.get(name)
    if item is None:
        known = ", ".join(sorted(field.name for field in dataclasses.fields(ServerConfig)))
        raise ConfigError(f"{name} ({origin}): no such setting; there are {known}")
    parsed = _convert(name, value, type(item.default), origin)
    minimum, choices = item.metadata["minimum"], item.metadata["choices"]
    if minimum is not None and not parsed >= minimum:
        raise ConfigError(f"{name} = {parsed} ({origin}): must be at least {minimum}")
    if choices and parsed not in choices:
        raise ConfigError(f"{name} = {parsed!r} ({origin}): must be one of {', '.join(choices)}")
    return parsed


def _convert(name: str, value: object, kind: type, origin: str) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("1", "true", "yes", "on", "0", "false", "no", "off"):
            return str(value).lower() in ("1", "true", "yes", "on")
    elif kind is str and isinstance(value, str):
        return value
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            return kind(value)
        except ValueError:
            pass
    raise ConfigError(f"{name} = {value!r} ({origin}): not a {kind.__name__}")


def load_config(
    flags: Mapping[str, object], *, file: Path | None = None, environment: Mapping[str, str] | None = None
) -> ServerConfig:
    """Settings from flags over environment over TOML file over defaults.

    Args:
        flags: settings given on the command line.
        file: TOML file of settings, by their names; `SALE_PREFILL_CONFIG` names one too.
        environment: instead of `os.environ`.

    Raises:
        ConfigError: an unknown or unusable setting, or an unreadable file.
    """
    variables = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    if file is None and variables.get(ENVIRONMENT_PREFIX + "CONFIG"):
        file = Path(variables[ENVIRONMENT_PREFIX + "CONFIG"])
    if file is not None:
        values |= {name: parse_setting(name, value, str(file)) for name, value in _read_toml(file).items()}
    for item in dataclasses.fields(ServerConfig):
        variable = ENVIRONMENT_PREFIX + item.name.upper()
        if variable in variables:
            values[item.name] = parse_setting(item.name, variables[variable], variable)
    for name, value in flags.items():
        values[name] = parse_setting(name, value, "--" + name.replace("_", "-"))
    return ServerConfig(**values)


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"configuration file {file}: {error.strerror}; check the path and its permissions") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"configuration file {file} is not TOML: {error}") from error

"""A calibrated profile: what every head of one model does, and what that was measured to cost and to lose.

One JSON file. `load_profile` believes nothing: a file that is cut short, was edited by hand, belongs to another version
or holds a value that cannot be, is refused with the field named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from .config import QUERY_STRIDES, LayerPolicy, SaleConfig
from .fingerprint import ModelFingerprint

FORMAT = "sale-prefill-profile"
VERSION = 2
STRATEGIES = ("sparse", "streaming", "dense")
METHODS = ("budget", "rows", "paper")

Strategy = Literal["sparse", "streaming", "dense"]
_T = TypeVar("_T")
# What float32 holds, in which thresholds and centres are computed with.
_LEAST_TAU, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_MOST_TOKENS = 1 << 20


class ProfileError(ValueError):
    """A profile that cannot be used. Names the field, its value and the way out."""


@dataclass(frozen=True)
class HeadSetting:
    """What one query head does: `tau` (above 0) and `query_stride` (1, 2 or 4) matter to a sparse head only."""

    strategy: Strategy
    tau: float | None = None
    query_stride: int = 1


@dataclass(frozen=True)
class HeadMeasure:
    """What calibration measured of a head at its setting: kept share, relative row errors |o - o_dense| / |o_dense|."""

    density: float
    mean_error: float
    p99_error: float


@dataclass(frozen=True)
class Level:
    """Settings `[layers][query heads]` that keep within an error budget, and what was measured of them.

    `error_budget` is the expected divergence of next-token predictions from dense attention, in nats a token; density,
    errors and cost (relative to dense attention) are those of all heads together.
    """

    error_budget: float
    settings: tuple[tuple[HeadSetting, ...], ...]
    measures: tuple[tuple[HeadMeasure, ...], ...]
    density: float
    mean_error: float
    p99_error: float
    estimated_cost: float


@dataclass(frozen=True)
class Geometry:
    """What the thresholds of a profile speak of: its blocks, and what a row's sum takes in; see `SaleConfig`."""

    query_block: int
    key_block: int
    sink_tokens: int
    local_tokens: int
    code_bits: int
    sample_stride: int

    @classmethod
    def of(cls, config: SaleConfig) -> Geometry:
        """That of `config`."""
        return cls(**{item.name: getattr(config, item.name) for item in dataclasses.fields(cls)})

    def applied_to(self, config: SaleConfig) -> SaleConfig:
        """`config` with this; its own query block stays, since that is the one that its backend is made for."""
        return dataclasses.replace(config, **{**dataclasses.asdict(self), "query_block": config.query_block})


@dataclass(frozen=True)
class Profile:
    """See the module. `levels` ascend by error budget; `key_centres` is float32 `[layers, kv heads, head_dim]`.

    Attributes:
        name: to show, such as the model's name.
        fingerprint: the model it belongs to.
        geometry: what it was calibrated with. Another query block serves, too: a larger one keeps more at the same tau.
        method: how heads were settled: "budget" (on predictions), "rows" (a budget on the p99 of row errors), "paper".
        text: what it was calibrated on: names, tokens, seeds.
        key_centres: subtracted from keys before they are quantised.
        levels: one or more.
        default_level: index into `levels` of what requests get that ask for nothing.
        created_with: versions of what made it.
    """

    name: str
    fingerprint: ModelFingerprint
    geometry: Geometry
    method: str
    text: Mapping[str, Any]
    key_centres: Tensor = field(compare=False)
    levels: tuple[Level, ...] = ()
    default_level: int = 0
    created_with: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the content, as in the file."""
        return _digest(_content(self))

    def level_for(self, error_budget: float) -> int | None:
        """The level of the largest budget that is at most `error_budget`; None where even the least is above it."""
        fitting = [index for index, level in enumerate(self.levels) if level.error_budget <= error_budget]
        return fitting[-1] if fitting else None

    def policies(self, level: int | None = None) -> list[LayerPolicy]:
        """One a layer, of `levels[level]`, by default the default level."""
        settings = self.levels[self.default_level if level is None else level].settings
        return [
            LayerPolicy(
                tau=torch.tensor([_tau(setting) for setting in heads]),
                query_stride=torch.tensor([setting.query_stride for setting in heads]),
                key_centre=self.key_centres[layer],
            )
            for layer, heads in enumerate(settings)
        ]

    def check_fits(self, fingerprint: ModelFingerprint) -> None:
        """Raises `ProfileError`, saying what differs, where the profile belongs to another model."""
        if differences := self.fingerprint.differences(fingerprint):
            raise ProfileError(
                f"fingerprint: the profile {self.name!r} belongs to another model: {'; '.join(differences)}. "
                "Calibrate this model: sale-prefill calibrate MODEL"
            )


def _tau(setting: HeadSetting) -> float:
    if setting.strategy == "sparse":
        assert setting.tau is not None
        return setting.tau
    return 0.0 if setting.strategy == "dense" else math.inf


# ------------------------------------------------------------------------------------------------------------- writing


def dumps_profile(profile: Profile) -> str:
    """The file's text."""
    content = _content(profile)
    checksums = {"checksum": _digest(content), "checksums": _digests_by_part(content)}
    return json.dumps({**content, **checksums}, indent=1, allow_nan=False) + "\n"


def save_profile(profile: Profile, path: Path) -> None:
    """Writes `path`, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(dumps_profile(profile))
    partial.replace(path)


def _content(profile: Profile) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": profile.name,
        "fingerprint": dataclasses.asdict(profile.fingerprint),
        "geometry": dataclasses.asdict(profile.geometry),
        "method": profile.method,
        "text": dict(profile.text),
        # Nine digits name a float32 exactly.
        "key_centres": [
            [[float(f"{value:.9g}") for value in head] for head in layer] for layer in profile.key_centres.tolist()
        ],
        "levels": [_level_content(level) for level in profile.levels],
        "default_level": profile.default_level,
        "created_with": dict(profile.created_with),
    }


def _level_content(level: Level) -> dict[str, Any]:
    content = dataclasses.asdict(level)
    # A head is one short list: a profile of a large model has tens of thousands.
    content["settings"] = [[[s.strategy, s.tau, s.query_stride] for s in heads] for heads in level.settings]
    content["measures"] = [[[m.density, m.mean_error, m.p99_error] for m in heads] for heads in level.measures]
    return content


def _digests_by_part(content: Mapping[str, Any]) -> dict[str, str]:
    """Short digests by which a reader can say what was edited; one of the whole decides whether anything was."""
    parts = {name: part for name, part in content.items() if name != "levels"}
    for index, level in enumerate(content["levels"]):
        parts |= {f"levels[{index}].{name}": part for name, part in level.items()}
    return {name: _digest(part)[:12] for name, part in parts.items()}


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- reading


def load_profile(path: Path) -> Profile:
    """The profile in `path`.

    Raises:
        ProfileError: unreadable, cut short, edited, of another version, or a value that cannot be.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ProfileError(f"profile {path}: {reason}; check the path, or make one: sale-prefill calibrate") from error
    try:
        return loads_profile(text)
    except ProfileError as error:
        raise ProfileError(f"profile {path}: {error}") from error


def loads_profile(text: str) -> Profile:
    """The profile in a file's text. Raises `ProfileError` as `load_profile` does."""
    try:
        data = json.loads(text)
    except RecursionError:
        raise ProfileError("the file: nested too deeply for a profile: calibrate again") from None
    except json.JSONDecodeError as error:
        raise ProfileError(
            f"not whole JSON, line {error.lineno}: {error.msg}; the file was cut short or edited: calibrate again"
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise ProfileError(f"the file: {error}: calibrate again") from error
    top = _Reader("", data)
    if top.take("format", str) != FORMAT:
        raise top.bad("format", f"this is no {FORMAT} file")
    if top.take("version", int) != VERSION:
        raise top.bad("version", f"this release reads version {VERSION}: calibrate again with it")
    profile = _read(top)
    try:
        _check_finite(top)
    except RecursionError:
        raise top.bad("", "is nested too deep") from None
    _check_unedited(top)
    return profile


def _check_finite(reader: _Reader) -> None:
    """Wherever it stands: JSON has no NaN and no infinity, though Python reads them."""
    if isinstance(reader.data, float) and not math.isfinite(reader.data):
        raise reader.bad("", "must be finite")
    if isinstance(reader.data, dict):
        for key in reader.data:
            _check_finite(_Reader(reader._at(key), reader.data[key]))
    elif isinstance(reader.data, list):
        for index, value in enumerate(reader.data):
            _check_finite(_Reader(f"{reader.path}[{index}]", value))


def _check_unedited(top: _Reader) -> None:
    """A file without digests by part is good, too; those that it has must be right."""
    content = {name: value for name, value in top.data.items() if name not in ("checksum", "checksums")}
    now = _digests_by_part(content)
    written = top.take("checksums", dict) if "checksums" in top.data else now
    if top.take("checksum", str) != _digest(content) or written != now:
        changed = ", ".join(name for name in now if written.get(name) != now[name]) or "checksum"
        raise ProfileError(
            f"{changed}: changed after calibration, by the file's checksum; calibrate again instead of editing"
        )


def _read(top: _Reader) -> Profile:
    fingerprint = _read_dataclass(top.inside("fingerprint"), ModelFingerprint)
    geometry = _read_dataclass(top.inside("geometry"), Geometry)
    try:
        SaleConfig(**dataclasses.asdict(geometry))
    except ValueError as error:
        raise ProfileError(f"geometry.{error}") from error
    levels = tuple(_read_level(reader, fingerprint) for reader in top.items("levels"))
    if not levels:
        raise top.bad("levels", "there must be at least one")
    budgets = [level.error_budget for level in levels]
    if budgets != sorted(set(budgets)):
        raise ProfileError(f"levels: error budgets {budgets} must ascend")
    default_level = top.take("default_level", int)
    if not 0 <= default_level < len(levels):
        raise top.bad("default_level", f"there are {len(levels)} levels")
    method = top.take("method", str)
    if method not in METHODS:
        raise top.bad("method", f"must be one of {', '.join(METHODS)}")
    return Profile(
        name=top.take("name", str),
        fingerprint=fingerprint,
        geometry=geometry,
        method=method,
        text=top.take("text", dict),
        key_centres=_read_centres(top, fingerprint),
        levels=levels,
        default_level=default_level,
        created_with=top.take("created_with", dict),
    )


def _read_level(reader: _Reader, fingerprint: ModelFingerprint) -> Level:
    def table(name: str, read: Callable[[_Reader], _T]) -> tuple[tuple[_T, ...], ...]:
        layers = reader.items(name, fingerprint.layers, "layers")
        return tuple(
            tuple(read(head) for head in layer.items("", fingerprint.query_heads, "heads")) for layer in layers
        )

    return Level(
        error_budget=reader.number("error_budget", least=_LEAST_TAU),
        settings=table("settings", _read_setting),
        measures=table("measures", _read_measure),
        density=reader.number("density", most=1.0),
        mean_error=reader.number("mean_error"),
        p99_error=reader.number("p99_error"),
        estimated_cost=reader.number("estimated_cost"),
    )


def _read_setting(reader: _Reader) -> HeadSetting:
    strategy, tau, stride = reader.items("", 3, "fields: strategy, tau, query_stride")
    if strategy.data not in STRATEGIES:
        raise strategy.bad("", f"must be one of {', '.join(STRATEGIES)}")
    if strategy.data == "sparse" and tau.number("", most=_MOST, name="tau") < _LEAST_TAU:
        raise tau.bad("", f"tau must be at least {_LEAST_TAU:g}; a head that keeps everything is dense", name="tau")
    if strategy.data != "sparse" and tau.data is not None:
        raise tau.bad("", f"a {strategy.data} head has no tau", name="tau")
    if stride.data not in QUERY_STRIDES or isinstance(stride.data, bool):
        raise stride.bad("", f"must be one of {QUERY_STRIDES}", name="query_stride")
    return HeadSetting(strategy.data, tau.data, stride.data)


def _read_measure(reader: _Reader) -> HeadMeasure:
    density, mean, p99 = reader.items("", 3, "fields: density, mean_error, p99_error")
    return HeadMeasure(
        density.number("", most=1.0, name="density"),
        mean.number("", name="mean_error"),
        p99.number("", name="p99_error"),
    )


def _read_centres(top: _Reader, fingerprint: ModelFingerprint) -> Tensor:
    rows = [
        [
            [value.number("", least=-_MOST, most=_MOST) for value in head.items("", fingerprint.head_dim, "values")]
            for head in layer.items("", fingerprint.kv_heads, "kv heads")
        ]
        for layer in top.items("key_centres", fingerprint.layers, "layers")
    ]
    return torch.tensor(rows, dtype=torch.float32)


def _read_dataclass(reader: _Reader, kind: type[_T]) -> _T:
    types: dict[str, type] = {"str": str, "int": int}
    values: dict[str, Any] = {
        item.name: reader.take(item.name, types[str(item.type)])
        for item in dataclasses.fields(kind)  # type: ignore[arg-type]
    }
    for name, value in values.items():
        if isinstance(value, int) and not 0 <= value <= _MOST_TOKENS:
            raise reader.bad(name, f"must be between 0 and {_MOST_TOKENS}")
    return kind(**values)


@dataclass(frozen=True)
class _Reader:
    """JSON below `path`, such as `levels[0].settings[3][2]`."""

    path: str
    data: Any

    def bad(self, key: str, problem: str, *, name: str = "") -> ProfileError:
        value = self.data[key] if key else self.data
        shown = json.dumps(value) if isinstance(value, str | int | float | None) else type(value).__name__
        where = self._at(key) + (f" ({name})" if name else "")
        return ProfileError(f"{where} = {shown[:80]}: {problem}")

    def _at(self, key: str) -> str:
        return f"{self.path}.{key}".strip(".") if key else self.path

    def take(self, key: str, kind: type[_T]) -> _T:
        if not isinstance(self.data, dict):
            raise ProfileError(f"{self.path or 'the file'}: must be an object")
        if key not in self.data:
            raise ProfileError(f"{self._at(key)}: missing; the file was cut short or edited: calibrate again")
        value = self.data[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.bad(key, f"must be of type {kind.__name__}")
        return value

    def inside(self, key: str) -> _Reader:
        return _Reader(self._at(key), self.take(key, dict))

    def items(self, key: str, count: int | None = None, unit: str = "entries") -> list[_Reader]:
        values = self.take(key, list) if key else self.data
        where = self._at(key)
        if not isinstance(values, list):
            raise ProfileError(f"{where}: must be a list")
        if count is not None and len(values) != count:
            raise ProfileError(f"{where}: {len(values)} {unit}, must be {count}")
        return [_Reader(f"{where}[{index}]", value) for index, value in enumerate(values)]

    def number(self, key: str, *, least: float = 0.0, most: float = math.inf, name: str = "") -> float:
        value = self.take(key, object) if key else self.data
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.bad(key, "must be a number", name=name)
        if not -sys.float_info.max <= value <= sys.float_info.max or not least <= value <= most:
            limits = f"between {least:g} and {most:g}" if math.isfinite(most) else f"finite and at least {least:g}"
            raise self.bad(key, f"must be {limits}", name=name)
        return float(value)


# ------------------------------------------------------------------------------------------------------------- shipped


def shipped_profile(fingerprint: ModelFingerprint) -> Profile | None:
    """The profile in this package that belongs to the model, if there is one."""
    folder = resources.files(__package__).joinpath("profiles")
    if not folder.is_dir():
        return None
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".json") and fingerprint.weights in (text := file.read_text()):
            return loads_profile(text)
    return None

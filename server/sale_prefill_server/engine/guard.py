"""The live guard: looks at a few tiles of some requests, and takes heads off SALE that lose more than they should.

In a sampled request one tile of every layer is computed densely once more (`sale_attention.audit`), of a random sparse
head at a random sparse row. What a tile lost is compared with what calibration measured of that head: the score of a
tile is ln(error / expected), capped, less an allowance. Scores add up by layer and never below zero (a CUSUM, Page
1954): text that is twice as hard as the calibration's does not add up, a threshold that does not fit the layer does
within a few tiles. A layer over the limit raises an alert; from then on sampled requests look at all its sparse heads,
and every head over the limit by itself is dense in the sessions opened after that.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sale_attention import Audit, LayerPolicy, Profile, Tile, TileResult

logger = logging.getLogger(__name__)

#: Where no profile says what to expect: the mean relative row error of tau 0.004 on real text is 0.04 to 0.06.
DEFAULT_EXPECTED_ERROR = 0.05
#: Errors below this say nothing: bfloat16 rounds outputs to 2 to 4 thousandths.
_LEAST_ERROR = 0.01
#: ln of how much worse than expected tiles may be on average for ever.
_ALLOWANCE = math.log(2.5)
#: Most that one tile counts: an outlier needs company.
_MOST = math.log(8.0)
#: Sum at which a layer, or a head by itself, is over the limit.
_LAYER_LIMIT = 3.0
_HEAD_LIMIT = 2.0


@dataclass(frozen=True)
class GuardAlert:
    """A layer (`head` None) or head went over the limit; `dense` says whether it is dense from now on."""

    layer: int
    head: int | None
    dense: bool
    mean_error: float
    expected_error: float


@dataclass(frozen=True)
class GuardReport:
    """What the guard saw in one request."""

    tiles: tuple[TileResult, ...]
    alerts: tuple[GuardAlert, ...] = ()

    @property
    def kept_mass(self) -> float:
        """Mean share of the attention mass that kept keys hold."""
        return sum(found.kept_mass for found in self.tiles) / len(self.tiles)

    @property
    def mean_error(self) -> float:
        """Mean relative row error."""
        return sum(found.mean_error for found in self.tiles) / len(self.tiles)

    @property
    def max_error(self) -> float:
        """Largest relative row error."""
        return max(found.max_error for found in self.tiles)


@dataclass(frozen=True)
class GuardSettings:
    """`share` of requests sampled, 0 to 1; `fall_back`: guilty heads go dense, else alerts only."""

    share: float
    fall_back: bool
    seed: int | None = None


class Guard:
    """One engine's guard; used from the scheduler's thread.

    Args:
        settings: how much to look, and what to do.
        profile: where expectations come from; None for the default.
        emit: told of every request that was looked at.
    """

    def __init__(self, settings: GuardSettings, profile: Profile | None, emit: Callable[[GuardReport], None]) -> None:
        self._settings = settings
        self._profile = profile
        self._emit = emit
        self._random = random.Random(settings.seed)
        self._scores: dict[tuple[int, int | None], float] = {}
        self.suspect_layers: set[int] = set()
        self.dense_heads: set[tuple[int, int]] = set()

    def scores(self) -> dict[tuple[int, int | None], float]:
        """Sums by layer (head None) and by head."""
        return dict(self._scores)

    def adjusted(self, policies: Sequence[LayerPolicy]) -> list[LayerPolicy]:
        """`policies` with guilty heads dense."""
        if not self.dense_heads:
            return list(policies)
        adjusted = []
        for layer, policy in enumerate(policies):
            tau = policy.tau.clone()
            tau[[head for at, head in self.dense_heads if at == layer]] = 0.0
            adjusted.append(replace(policy, tau=tau))
        return adjusted

    def begin(self, policies: Sequence[LayerPolicy], query_block: int, start: int, end: int) -> Audit | None:
        """Tiles of a request whose rows `[start, end)` are sparse; None where it is not sampled or has none."""
        if start >= end or self._random.random() >= self._settings.share:
            return None
        tiles = []
        for layer, policy in enumerate(policies):
            sparse = [head for head, stride in enumerate(policy.estimated_strides) if stride]
            if not sparse:
                continue
            heads = sparse if layer in self.suspect_layers else [self._random.choice(sparse)]
            tiles += [Tile(layer, head, self._random.randrange(start, end)) for head in heads]
        return Audit(tiles, query_block) if tiles else None

    def finish(self, audit: Audit, level: int | None) -> GuardReport | None:
        """Judges what was found; None where nothing was."""
        tiles = audit.results()
        if not tiles:
            return None
        alerts = [alert for found in tiles for alert in self._judge(found, level)]
        report = GuardReport(tuple(tiles), tuple(alerts))
        for alert in alerts:
            logger.warning(
                "guard: layer %d%s loses %.3f of its output where %.3f was calibrated%s",
                alert.layer,
                "" if alert.head is None else f" head {alert.head}",
                alert.mean_error,
                alert.expected_error,
                "; dense in new sessions until a restart: calibrate again" if alert.dense else "",
            )
        self._emit(report)
        return report

    def expected_error(self, tile: Tile, level: int | None) -> float:
        """Mean relative row error that the tile's head should have."""
        if self._profile is None or level is None:
            return DEFAULT_EXPECTED_ERROR
        return self._profile.levels[level].measures[tile.layer][tile.head].mean_error

    def _judge(self, found: TileResult, level: int | None) -> list[GuardAlert]:
        layer, head = found.tile.layer, found.tile.head
        expected = self.expected_error(found.tile, level)
        excess = _MOST  # of a tile that is not even a number
        if math.isfinite(found.mean_error):
            excess = min(math.log(max(found.mean_error, _LEAST_ERROR) / max(expected, _LEAST_ERROR)), _MOST)
        score = excess - _ALLOWANCE
        alerts = []
        if self._add((layer, None), score) > _LAYER_LIMIT and layer not in self.suspect_layers:
            self.suspect_layers.add(layer)
            alerts.append(GuardAlert(layer, None, False, found.mean_error, expected))
        guilty = self._add((layer, head), score) > _HEAD_LIMIT and layer in self.suspect_layers
        if guilty and (layer, head) not in self.dense_heads:
            self.dense_heads |= {(layer, head)} if self._settings.fall_back else set()
            alerts.append(GuardAlert(layer, head, self._settings.fall_back, found.mean_error, expected))
        return alerts

    def _add(self, key: tuple[int, int | None], score: float) -> float:
        self._scores[key] = max(0.0, self._scores.get(key, 0.0) + score)
        return self._scores[key]

"""The live guard: looks at a few tiles of some requests, and takes heads off SALE that lose more than they should.

In a sampled request some heads of every layer are computed densely once more (`sale_attention.audit`) at one random
sparse query block. A tile's excess is ln(error / expected), what it lost beside what calibration measured of that head.
The score of a layer is the mean excess of its tiles less an allowance; scores add up from request to request and never
below zero (a CUSUM: Page, "Continuous inspection schemes", Biometrika 41, 1954). Text that is twice as hard as the
calibration's does not add up; thresholds that do not fit the layer do within a few requests. A layer over its limit
raises an alert; from then on sampled requests look at all its heads, and every head over the limit by itself is dense
in the sessions opened after that. A single head that loses four times too much is found without its layer.

The limits, from data (2026-11-25): SmolLM2-135M, a profile of seven documents of 3K (176 sparse heads), eight other
texts of 6K, four places in each layer of each, healthy and with thresholds 50 times too high.
- A healthy layer's mean excess m was at most 0.29, its standard deviation s from place to place 0.28; 0.43 and 0.57 in
  a layer with one sparse head, so the limit is higher where few heads make the mean.
- With the fault the mean was 0.94 to 2.08; 0.46 in a layer with one sparse head, of which there was little to lose.
- A sum of steps with mean m - allowance < 0 passes a limit h with a chance of about exp(-2 h (allowance - m) / s^2) a
  start: 2e-4 for the worst layer, below 1e-8 for the others. Drawn from those places, no run of 100 raised an alert in
  200 healthy requests; faults were found within 20 requests in 27 of 30 layers always, in two more in four runs of
  five, after 3 to 4 requests in the median. The allowance is text twice as hard as the calibration's, and a little.
- A sampled request of 8K costs half a percent more operations, 4 % more time on a CPU.
"""

from __future__ import annotations

import logging
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sale_attention import Audit, LayerPolicy, Profile, Tile, TileResult

logger = logging.getLogger(__name__)

#: Where no profile says what to expect: mean relative row errors of tau 0.004 on real text are 0.01 to 0.06.
DEFAULT_EXPECTED_ERROR = 0.05
#: Errors below this say nothing: bfloat16 rounds outputs to 2 to 4 thousandths.
_LEAST_ERROR = 0.005
#: Heads looked at in a layer of a sampled request; more tell little more, as they share their text.
_HEADS_A_LAYER = 8
#: ln of how much worse than expected a layer may be on average for ever.
_ALLOWANCE = math.log(2.2)
#: Most that one tile counts: an outlier needs company.
_MOST = math.log(8.0)
#: Sum at which a layer is over the limit, and what comes to it divided by the sparse heads that were looked at.
_LAYER_LIMIT = 2.0
_LAYER_LIMIT_OF_ONE = 2.0
#: Sum at which a head of a layer that was over its limit is over its own.
_HEAD_LIMIT = 2.0
#: The same for a head whose layer is in order: heads scatter more than layers, and there are many of them.
_ALONE_ALLOWANCE = math.log(4.0)
_ALONE_MOST = math.log(16.0)
_ALONE_LIMIT = 6.0


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
    """One engine's guard. Samples and judges on the scheduler's thread; `adjusted` is read from the one that opens.

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
        self._layer_sums: dict[int, float] = defaultdict(float)
        self._head_sums: dict[tuple[int, int], float] = defaultdict(float)
        self._alone_sums: dict[tuple[int, int], float] = defaultdict(float)
        self.suspect_layers: frozenset[int] = frozenset()
        self.guilty_heads: frozenset[tuple[int, int]] = frozenset()

    @property
    def dense_heads(self) -> frozenset[tuple[int, int]]:
        """(layer, head) that new sessions run dense."""
        return self.guilty_heads if self._settings.fall_back else frozenset()

    def layer_sums(self) -> dict[int, float]:
        """How far every layer that was looked at is on its way to the limit."""
        return dict(self._layer_sums)

    def adjusted(self, policies: Sequence[LayerPolicy]) -> list[LayerPolicy]:
        """`policies` with guilty heads dense."""
        heads: dict[int, list[int]] = defaultdict(list)
        for layer, head in self.dense_heads:
            heads[layer].append(head)
        return [
            _with_dense(policy, heads[layer]) if layer in heads else policy for layer, policy in enumerate(policies)
        ]

    def begin(self, policies: Sequence[LayerPolicy], query_block: int, start: int, end: int) -> Audit | None:
        """Tiles of a request whose rows `[start, end)` are sparse; None where it is not sampled or has none."""
        if start >= end or self._random.random() >= self._settings.share:
            return None
        tiles = []
        for layer, policy in enumerate(policies):
            heads = [head for head, dense in enumerate(policy.dense_heads) if not dense]
            if layer not in self.suspect_layers:
                heads = self._random.sample(heads, min(len(heads), _HEADS_A_LAYER))
            position = self._random.randrange(start, end)
            tiles += [Tile(layer, head, position) for head in heads]
        return Audit(tiles, query_block) if tiles else None

    def finish(self, audit: Audit, level: int | None) -> GuardReport | None:
        """Judges what was found, in a session of the profile's level `level`; None where nothing was."""
        tiles = audit.results()
        if not tiles:
            return None
        report = GuardReport(tuple(tiles), tuple(self._judge(tiles, level)))
        for alert in report.alerts:
            logger.warning(
                "guard: layer %d%s loses %.3f of its output where %.3f was expected%s",
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

    def _judge(self, tiles: Sequence[TileResult], level: int | None) -> list[GuardAlert]:
        layers: dict[int, list[TileResult]] = defaultdict(list)
        for found in tiles:
            layers[found.tile.layer].append(found)
        alerts = []
        for layer, members in layers.items():
            alerts += self._judge_layer(layer, members, level)
            alerts += [alert for found in members if (alert := self._judge_head(found, level)) is not None]
        return alerts

    def _judge_layer(self, layer: int, members: Sequence[TileResult], level: int | None) -> list[GuardAlert]:
        # A streaming head has no threshold that could be wrong; it answers for itself alone.
        sparse = [found for found in members if not self._is_streaming(found.tile, level)]
        if not sparse:
            return []
        excess = sum(min(self._excess(found, level), _MOST) for found in sparse) / len(sparse)
        self._layer_sums[layer] = max(0.0, self._layer_sums[layer] + excess - _ALLOWANCE)
        limit = _LAYER_LIMIT + _LAYER_LIMIT_OF_ONE / len(sparse)
        if self._layer_sums[layer] <= limit or layer in self.suspect_layers:
            return []
        self.suspect_layers |= {layer}
        error = sum(found.mean_error for found in sparse) / len(sparse)
        expected = sum(self.expected_error(found.tile, level) for found in sparse) / len(sparse)
        return [GuardAlert(layer, None, False, error, expected)]

    def _judge_head(self, found: TileResult, level: int | None) -> GuardAlert | None:
        layer, key = found.tile.layer, (found.tile.layer, found.tile.head)
        excess = self._excess(found, level)
        self._head_sums[key] = max(0.0, self._head_sums[key] + min(excess, _MOST) - _ALLOWANCE)
        self._alone_sums[key] = max(0.0, self._alone_sums[key] + min(excess, _ALONE_MOST) - _ALONE_ALLOWANCE)
        with_its_layer = layer in self.suspect_layers and self._head_sums[key] > _HEAD_LIMIT
        if key in self.guilty_heads or not (with_its_layer or self._alone_sums[key] > _ALONE_LIMIT):
            return None
        self.guilty_heads |= {key}
        expected = self.expected_error(found.tile, level)
        return GuardAlert(*key, self._settings.fall_back, found.mean_error, expected)

    def _excess(self, found: TileResult, level: int | None) -> float:
        expected = max(self.expected_error(found.tile, level), _LEAST_ERROR)
        return math.log(max(found.mean_error, _LEAST_ERROR) / expected)

    def _is_streaming(self, tile: Tile, level: int | None) -> bool:
        if self._profile is None or level is None:
            return False
        return self._profile.levels[level].settings[tile.layer][tile.head].strategy == "streaming"


def _with_dense(policy: LayerPolicy, heads: Sequence[int]) -> LayerPolicy:
    tau = policy.tau.clone()
    tau[list(heads)] = 0.0
    return replace(policy, tau=tau)

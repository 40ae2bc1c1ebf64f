"""What is compared with dense attention: a calibrated profile, or one threshold and stride for every head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sale_attention import AttentionStatistics, LayerPolicy, ModelFingerprint, SaleConfig
from sale_attention.profile import Level, Profile, ProfileError, load_profile, shipped_profile
from sale_attention.transformers_integration import AttentionContext

from ..agreement import quickest_backend
from ..models import FidelityModel

#: Thresholds and strides of all heads whose errors are shown beside those of a profile.
UNIFORM_BESIDE = ((0.002, 1), (0.004, 1), (0.008, 1), (0.004, 2), (0.004, 4))


@dataclass(frozen=True, eq=False)
class EvaluationSetting:
    """One way to run SALE.

    Attributes:
        name: to show, with all that tells it from others.
        policies: one a layer.
        config: block geometry. Rows are sparse from position 1024 on, which is sooner than a server's crossover and
            so shows at least what is lost there.
        backend: attention backend.
        level: what calibration promised; None for a uniform setting.
    """

    name: str
    policies: Sequence[LayerPolicy]
    config: SaleConfig
    backend: str
    level: Level | None = None

    def context(self, prompt_end: int, statistics: AttentionStatistics | None = None) -> AttentionContext:
        """For the forward pass of one prompt of `prompt_end` tokens."""
        return AttentionContext(
            config=self.config,
            policies=self.policies,
            prompt_end=prompt_end,
            statistics=statistics,
            backend=self.backend,
        )


def uniform_setting(model: FidelityModel, tau: float, query_stride: int, config: SaleConfig) -> EvaluationSetting:
    """The same for every head."""
    policy = LayerPolicy.uniform(model.num_query_heads, tau, query_stride)
    name = f"uniform tau {tau:g}, stride {query_stride}"
    return EvaluationSetting(name, [policy] * model.num_layers, config, quickest_backend(model))


def profile_setting(
    model: FidelityModel, profile: Profile, *, error_budget: float | None = None, query_block: int | None = None
) -> EvaluationSetting:
    """A level of a profile.

    Args:
        model: the one that it was calibrated for.
        profile: where from.
        error_budget: the level of the largest budget that is not above; None for the default level.
        query_block: rows of a block, in place of the profile's, as a server on a GPU does it.

    Raises:
        ProfileError: it belongs to another model, or has no level within the budget.
    """
    profile.check_fits(ModelFingerprint.of(model.module))
    level = profile.default_level if error_budget is None else profile.level_for(error_budget)
    if level is None:
        least = profile.levels[0].error_budget
        raise ProfileError(
            f"error budget {error_budget:g} is below the profile's least, {least:g}; ask for that, or calibrate again "
            "with a lower one"
        )
    geometry = dataclasses.asdict(profile.geometry)
    config = SaleConfig(**{**geometry, "query_block": query_block or profile.geometry.query_block})
    chosen = profile.levels[level]
    name = f"profile {profile.name}, error budget {chosen.error_budget:g}"
    return EvaluationSetting(name, profile.policies(level), config, quickest_backend(model), chosen)


def find_profile(model: FidelityModel, source: str) -> Profile:
    """The profile in the file `source`, or for "auto" the one that comes with the package for this model.

    Raises:
        ProfileError: there is none, or it cannot be used; with the way out.
    """
    if source != "auto":
        return load_profile(Path(source))
    found = shipped_profile(ModelFingerprint.of(model.module))
    if found is None:
        raise ProfileError(
            f"no profile comes with the package for the model {model.name!r}; calibrate it (sale-prefill calibrate), "
            "name a file (--profile FILE), or evaluate one threshold for all heads (--profile none --tau 0.004)"
        )
    return found

"""Any method's mask in a model's attention, in place of SALE's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sale_attention import LayerPolicy, SaleConfig, attend
from sale_fidelity.peers import Method, Sale, methods
from sale_fidelity.peers.backend import NAME, EachHead, Survey, using
from tests.unit.attention.naive import Shape, random_problem

CONFIG = SaleConfig(dense_rows=256, centre_tokens=256)
SHAPE = Shape(1088, heads=4, kv_heads=2)


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.name)
def test_at_density_one_outputs_are_dense(method: Method) -> None:
    query, kv = random_problem(SHAPE)
    with using(EachHead(method, 1.0)):
        found = attend(query, kv, config=CONFIG, backend=NAME, return_lse=False).output
    expected = attend(query, kv, dense=True, return_lse=False).output
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=1e-2)


def test_sales_own_rule_gives_the_librarys_outputs_at_the_same_threshold() -> None:
    query, kv = random_problem(SHAPE)
    method = methods()[0]
    survey = Survey(method, 0.5)
    with using(survey):
        attend(query, kv, config=CONFIG, backend=NAME, return_lse=False)
    chooser = survey.one_knob()
    with using(chooser):
        found = attend(query, kv, config=CONFIG, backend=NAME, return_lse=False).output
    assert sum(chooser.densities) / 4 == pytest.approx(0.5, abs=0.02)

    rule = method.rules[0]
    assert isinstance(rule, Sale)
    tau = rule.tau(chooser._knob)
    # The rule centres by the first 1,024 keys, as a server does: the library is told the same centre.
    centre = kv.keys[0, :, : SaleConfig().centre_tokens].double().mean(dim=1).float()
    policy = replace(LayerPolicy.uniform(4, tau=tau), key_centre=centre)
    config = replace(CONFIG, sample_stride=rule.config.sample_stride)
    expected = attend(query, kv, policy=policy, config=config, backend="reference", return_lse=False).output
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=1e-2)
    assert not torch.allclose(expected, attend(query, kv, dense=True, return_lse=False).output, atol=2e-2)


def test_a_survey_leaves_attention_dense() -> None:
    query, kv = random_problem(SHAPE)
    with using(Survey(methods()[3], 0.3)):
        found = attend(query, kv, config=CONFIG, backend=NAME, return_lse=False).output
    torch.testing.assert_close(found, attend(query, kv, dense=True, return_lse=False).output, atol=2e-2, rtol=1e-2)


def test_every_head_reaches_the_density_asked_for() -> None:
    query, kv = random_problem(SHAPE)
    chooser = EachHead(methods()[0], 0.4)
    with using(chooser):
        attend(query, kv, config=CONFIG, backend=NAME, return_lse=False)
    assert chooser.densities == [pytest.approx(0.4, abs=0.01)] * 4


def test_rows_behind_a_cache_are_refused() -> None:
    query, kv = random_problem(Shape(256, offset=512, heads=4, kv_heads=2))
    with using(EachHead(methods()[0], 0.4)), pytest.raises(ValueError, match="measures whole prompts"):
        attend(query, kv, config=CONFIG, backend=NAME)

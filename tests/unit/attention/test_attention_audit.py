"""An audit sees exactly what sparse rows lost, and changes nothing."""

from __future__ import annotations

import pytest
import torch

from sale_attention import Audit, KvView, LayerPolicy, SaleConfig, Tile, attend
from sale_attention.audit import LARGEST_ERROR, exact_attention

CONFIG = SaleConfig(dense_rows=256, centre_tokens=256)
TOKENS, HEADS = 768, 4


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, KvView]:
    generator = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(1, HEADS, TOKENS, 64, generator=generator)
    keys, values = (torch.randn(1, 2, TOKENS, 64, generator=generator) for _ in range(2))
    return query, KvView(keys, values)


def audited(layer: tuple[torch.Tensor, KvView], tau: float, tiles: list[Tile], chunk: int = TOKENS) -> Audit:
    query, kv = layer
    audit = Audit(tiles, CONFIG.query_block)
    policy = LayerPolicy.uniform(HEADS, tau)
    for start in range(0, TOKENS, chunk):
        end = start + chunk
        arguments = {"policy": policy, "config": CONFIG, "prompt_end": TOKENS, "return_lse": False}
        with_audit = attend(query[:, :, start:end], kv.prefix(end), audit=audit, layer=3, **arguments)
        without = attend(query[:, :, start:end], kv.prefix(end), **arguments)
        assert torch.equal(with_audit.output, without.output)
    return audit


def test_streaming_rows_keep_the_mass_of_sink_and_window(layer: tuple[torch.Tensor, KvView]) -> None:
    query, kv = layer
    tile = Tile(layer=3, head=2, position=700)
    (found,) = audited(layer, float("inf"), [tile]).results()
    assert (found.tile, found.rows) == (tile, 64)
    start = 640
    scores = query[0, 2, start : start + 64] @ kv.keys[0, 1].T / 8
    position = torch.arange(start, start + 64).unsqueeze(1)
    key = torch.arange(TOKENS)
    causal = key <= position
    kept = causal & ((key < 32) | (key >= start - 128))
    weights = scores.masked_fill(~causal, float("-inf")).softmax(dim=-1)
    mass = (weights * kept).sum(dim=-1)
    assert found.kept_mass == pytest.approx(float(mass.mean()), abs=1e-4)
    assert found.least_kept_mass == pytest.approx(float(mass.min()), abs=1e-4)
    exact = weights @ kv.values[0, 1]
    sparse = (weights * kept / mass.unsqueeze(1)) @ kv.values[0, 1]
    error = (sparse - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert found.mean_error == pytest.approx(float(error.mean()), rel=1e-3)
    assert found.max_error == pytest.approx(float(error.max()), rel=1e-3)


def test_where_everything_is_kept_nothing_is_lost(layer: tuple[torch.Tensor, KvView]) -> None:
    (found,) = audited(layer, 1e-9, [Tile(3, 0, 300)]).results()
    assert found.least_kept_mass == pytest.approx(1.0, abs=1e-5)
    assert found.max_error < 1e-4


def test_chunks_find_the_same(layer: tuple[torch.Tensor, KvView]) -> None:
    tiles = [Tile(3, head, position) for head, position in ((0, 300), (1, 511), (3, 767))]
    whole, chunked = audited(layer, 0.05, tiles).results(), audited(layer, 0.05, tiles, chunk=128).results()
    assert [found.tile for found in chunked] == sorted(tiles, key=lambda tile: tile.position)
    for one, other in zip(whole, chunked, strict=True):
        assert one.mean_error == pytest.approx(other.mean_error, abs=1e-5)
        assert one.kept_mass == pytest.approx(other.kept_mass, abs=1e-5)


def test_other_layers_and_rows_that_never_come_stay_unseen(layer: tuple[torch.Tensor, KvView]) -> None:
    assert audited(layer, 0.05, [Tile(2, 0, 300), Tile(3, 0, 5000)]).results() == []


def test_exact_attention_of_pages_is_that_of_one_piece(layer: tuple[torch.Tensor, KvView]) -> None:
    query, kv = layer
    pages = [tensor[0].view(2, 6, 128, 64).transpose(0, 1).contiguous() for tensor in (kv.keys, kv.values)]
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    shuffled = [torch.empty_like(page).index_copy_(0, order, page) for page in pages]
    paged = KvView(*shuffled, page_table=order.unsqueeze(0), length=TOKENS)
    rows = query[0, 2:, -50:]
    expected = exact_attention(rows, kv, [1, 1], 0.125)
    for ours, theirs in zip(exact_attention(rows, paged, [1, 1], 0.125), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_exact_attention_in_pieces_of_the_keys_is_that_of_one_piece(
    layer: tuple[torch.Tensor, KvView], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, kv = layer
    rows = query[0, :, -80:].double()
    exact_kv = KvView(kv.keys.double(), kv.values.double())
    expected = exact_attention(rows, exact_kv, [0, 0, 1, 1], 0.125)
    monkeypatch.setattr("sale_attention.audit._KEY_PIECE", 100)
    for ours, theirs in zip(exact_attention(rows, exact_kv, [0, 0, 1, 1], 0.125), expected, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


def test_heads_at_one_position_are_found_as_they_are_alone(layer: tuple[torch.Tensor, KvView]) -> None:
    tiles = [Tile(3, head, 500) for head in (2, 0, 3)]
    for found, tile in zip(audited(layer, 0.05, tiles).results(), tiles, strict=True):
        (alone,) = audited(layer, 0.05, [tile]).results()
        assert found.tile == tile
        assert found.mean_error == pytest.approx(alone.mean_error, rel=1e-5)
        assert found.kept_mass == pytest.approx(alone.kept_mass, rel=1e-5)


def test_what_is_not_finite_gives_figures_that_are(layer: tuple[torch.Tensor, KvView]) -> None:
    query, kv = layer
    audit = Audit([Tile(0, 0, 600), Tile(0, 2, 600)], CONFIG.query_block)
    lse = torch.zeros(1, HEADS, TOKENS)
    broken = torch.full((1, HEADS, TOKENS, 64), float("nan"))
    audit.observe(0, query, kv, broken, lse, 0.125)
    assert [found.mean_error for found in audit.results()] == [LARGEST_ERROR] * 2
    values = kv.values.clone()
    values[:, 1, 5] = float("inf")  # dense attention shows it as well
    audit = Audit([Tile(0, 2, 600)], CONFIG.query_block)
    audit.observe(0, query, KvView(kv.keys, values), broken, lse, 0.125)
    (found,) = audit.results()
    assert (found.kept_mass, found.mean_error) == (1.0, 0.0)


def test_a_device_without_memory_ends_the_audit_and_nothing_else(
    layer: tuple[torch.Tensor, KvView], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("no memory for scores")

    monkeypatch.setattr("sale_attention.audit.exact_attention", full)
    assert audited(layer, 0.05, [Tile(3, 0, 300), Tile(3, 1, 500)]).results() == []
    assert "layer 3 is not audited" in caplog.text

"""What counts as the same, and words for what does not."""

from __future__ import annotations

import torch
from torch import Tensor

from sale_attention import AttentionBackend
from tests.conformance.cases import Case
from tests.conformance.inputs import Attention, Problem
from tests.conformance.layout import KEY_BLOCK, bits_of

QUERY_AXES = ("batch", "head", "row", "channel")

#: Against float64; a tenth of what a decision may lie from its threshold and still differ.
LSE_NATS = 1e-4
#: How much larger an error may be than that of torch in the same precision.
ERROR_RATIO = 2.0
#: float32 and float64 only, besides: so many times `Attention.rounding`. There the error is the order of sums, and on
#: a few rows torch's own may be next to nothing by luck.
ROUNDINGS = 4


def where(backend: AttentionBackend, case: Case) -> str:
    """The head of every message."""
    return f"{backend.description}, {case}"


def require_equal(place: str, what: str, actual: Tensor, expected: Tensor, axes: tuple[str, ...]) -> None:
    """Every bit equal; only a NaN may be any NaN. `axes` names the dimensions in the message."""
    actual = actual.cpu()
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{place}: {what} is {actual.dtype} {tuple(actual.shape)}, not {expected.dtype} {tuple(expected.shape)}"
        )
    differs = actual != expected
    if actual.is_floating_point():
        differs = (bits_of(actual) != bits_of(expected)) & ~(actual.isnan() & expected.isnan())
    if bool(differs.any()):
        first = tuple(differs.nonzero()[0].tolist())
        position = ", ".join(f"{axis} {index}" for axis, index in zip(axes, first, strict=True))
        raise AssertionError(
            f"{place}: {int(differs.sum())} of {differs.numel()} {what} differ, first at {position}: "
            f"{actual[first].item()} instead of {expected[first].item()}"
        )


def require_selection(problem: Problem, place: str, actual: Tensor, expected: Tensor) -> None:
    """Mask words `[B, H, query blocks, words]` equal, bits past the last key block included."""
    actual = actual.cpu()
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{place}: mask words are {actual.dtype} {tuple(actual.shape)}, "
            f"not {expected.dtype} {tuple(expected.shape)}"
        )
    bits = torch.arange(32, dtype=torch.int32)
    mine, theirs = (((words.unsqueeze(-1) >> bits) & 1).flatten(-2) for words in (actual, expected))
    differs = mine != theirs
    if bool(differs.any()):
        batch, head, index, block = differs.nonzero()[0].tolist()
        start, end = problem.grid.rows(index)
        verdict = "kept, not by the reference" if mine[batch, head, index, block] else "not kept, but by the reference"
        raise AssertionError(
            f"{place}: {int(differs.sum())} of {differs.numel()} block decisions differ, first at batch {batch}, "
            f"head {head}, query block {index} (rows {start} to {end - 1}), key block {block} (keys "
            f"{block * KEY_BLOCK} to {block * KEY_BLOCK + KEY_BLOCK - 1}): {verdict}"
        )


def require_lse(place: str, what: str, actual: Tensor, exact: Tensor) -> None:
    """Log-sum-exp within `LSE_NATS` of float64, besides what float32 cannot tell apart: `[B, H, Nq]`."""
    if actual.dtype != torch.float32 or actual.shape != exact.shape:
        raise AssertionError(f"{place}: {what} is {actual.dtype} {tuple(actual.shape)}, not float32 {exact.shape}")
    difference = (actual.cpu().double() - exact).abs()
    wrong = ~(difference <= LSE_NATS + 4 * torch.finfo(torch.float32).eps * exact.abs())
    if bool(wrong.any()):
        first = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{place}: {what} of {int(wrong.sum())} of {wrong.numel()} rows is further than {LSE_NATS} nats from "
            f"float64, first at batch {first[0]}, head {first[1]}, row {first[2]}: {actual[first].item()} instead of "
            f"{exact[first].item()}"
        )


def require_accuracy(place: str, output: Tensor, expected: Attention, heads: list[int]) -> None:
    """Error against float64 at most `ERROR_RATIO` times torch's, of each head as a whole and in its worst row."""
    output = output.cpu()[:, heads]
    if not bool(output.isfinite().all()):
        batch, head, row = (~output.isfinite()).any(-1).nonzero()[0].tolist()
        raise AssertionError(
            f"{place}: {int((~output.isfinite()).any(-1).sum())} output rows were left unwritten or are not finite, "
            f"first at batch {batch}, head {heads[head]}, row {row}"
        )
    exact = expected.exact[:, heads]
    error = (output.double() - exact).norm(dim=-1)
    by_torch = (expected.by_torch[:, heads] - exact).norm(dim=-1)
    rounding = ROUNDINGS * expected.rounding[:, heads]
    for what, mine, theirs, least in (
        ("the head", error.norm(dim=-1), by_torch.norm(dim=-1), rounding.norm(dim=-1)),
        ("its worst row", error.amax(dim=-1), by_torch.amax(dim=-1), rounding.amax(dim=-1)),
    ):
        wrong = mine > ERROR_RATIO * theirs + least
        if bool(wrong.any()):
            batch, head = wrong.nonzero()[0].tolist()
            raise AssertionError(
                f"{place}: the output of {int(wrong.sum())} heads is off, first batch {batch}, head {heads[head]}: "
                f"error of {what} {mine[batch, head]:.3e} (row {int(error[batch, head].argmax())}), allowed "
                f"{ERROR_RATIO * theirs[batch, head] + least[batch, head]:.3e}, torch's own {theirs[batch, head]:.3e}"
            )

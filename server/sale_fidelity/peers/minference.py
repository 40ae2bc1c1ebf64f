"""MInference: vertical and slash lines, found from the last rows of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cost import EstimationCost, sort_operations
from .rule import ALWAYS, NEVER, QUERY_BLOCK, Head, Levels

#: Lines of each kind at the paper's budget, the search space of its offline search (Algorithm 1 and appendix).
SPLITS = ((30, 2048), (100, 1800), (500, 1500), (3000, 200))


@dataclass(frozen=True)
class VerticalSlash:
    """Vertical-slash heads ("MInference 1.0", arXiv 2407.02490, section 3.2 and Algorithm 2).

    The attention of the last 64 rows is summed along columns and along diagonals; the largest columns ("vertical") and
    diagonals ("slash") are kept for the whole prompt. As in the paper's kernel, a vertical line costs a query block of
    64 one key, and a slash line the 64 keys that the diagonal crosses in it, which neighbouring lines share.

    Knob: one factor on the numbers of vertical and slash lines of `split`. The paper searches the split of each head
    offline, by output error on one example: so does the bench, on the very prompt that it then judges by.

    Where the paper is silent: the first 32 keys and the 128 nearest diagonals are always kept, as sinks and local
    window (its published code keeps about as many). A-shape heads are `StreamingLlm`; of block-sparse heads it has
    hardly any.
    """

    split: tuple[int, int]
    last_rows: int = 64
    sink_tokens: int = 32
    local_tokens: int = 128
    name: str = "MInference"

    @property
    def setting(self) -> str:
        """The split."""
        return f"{self.split[0]} vertical : {self.split[1]} slash"

    def levels(self, head: Head) -> Levels:
        """The factor at which a key's column, or one of the diagonals it lies on in the query block, comes in."""
        attention = head.last_rows_attention(min(self.last_rows, head.tokens))
        vertical = _ranks(attention.sum(dim=0)) / self.split[0]
        vertical[: self.sink_tokens] = ALWAYS
        slash = _ranks(diagonal_sums(attention)) / self.split[1]
        slash[: self.local_tokens] = ALWAYS
        return Levels(torch.minimum(_by_query_block(slash, head), vertical), 1, head)

    def cost(self, tokens: int, head_dim: int) -> EstimationCost:
        """Scores of the last rows, sums along columns and diagonals, two sorts."""
        pairs = float(self.last_rows * tokens)
        return EstimationCost(
            multiply_adds=pairs * head_dim, element_operations=2 * pairs + 2 * sort_operations(tokens)
        )


def _ranks(mass: Tensor) -> Tensor:
    """Place of each element in descending order, from 1: float32."""
    order = mass.sort(descending=True, stable=True).indices
    places = torch.arange(1, len(mass) + 1, dtype=torch.float32, device=mass.device)
    return torch.empty_like(places).scatter_(0, order, places)


def diagonal_sums(attention: Tensor) -> Tensor:
    """Sums by distance of row and key: `[rows, N]`, rows at the end, -> `[N]`."""
    rows, tokens = attention.shape
    # Row i stands at N - rows + i: backwards, its key at distance x is in column x + rows - 1 - i.
    backwards = torch.nn.functional.pad(attention.flip(1), (0, rows - 1))
    by_distance = backwards.as_strided((rows, tokens), (backwards.shape[1] - 1, 1), rows - 1)
    return by_distance.sum(dim=0)


def _by_query_block(slash: Tensor, head: Head) -> Tensor:
    """By query block and key, the least of `slash [N]` over the distances between the key and the block's rows."""
    tokens = head.tokens
    width = QUERY_BLOCK
    # least[x] is of the distances x - 63 .. x that are not negative: those of a key x - 63 before the block's start.
    padded = torch.cat([slash.new_full((width - 1,), NEVER), slash, slash.new_full((width - 1,), NEVER)])
    least = -torch.nn.functional.max_pool1d(-padded.view(1, 1, -1), width, stride=1).view(-1)
    starts = torch.arange(head.first_row, tokens, width, device=slash.device).unsqueeze(1)
    distance = starts + width - 1 - torch.arange(tokens, device=slash.device)
    return least[distance.clamp(0, len(least) - 1)].masked_fill(distance < 0, NEVER)

"""StreamingLLM: attention sinks and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cost import EstimationCost
from .rule import ALWAYS, QUERY_BLOCK, Head, Levels


@dataclass(frozen=True)
class StreamingLlm:
    """Sinks and window ("Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, section 3.2).

    The paper keeps 4 initial tokens; we keep the first key block of 32, as SALE does. Knob: tokens of the window before
    a query block, in steps of a key block; the block's own keys are always kept. Nothing is estimated.
    """

    sink_tokens: int = 32
    key_block: int = 32
    name: str = "StreamingLLM"
    setting: str = ""

    def levels(self, head: Head) -> Levels:
        """The distance of each key block from the start of the query block."""
        device = head.query.device
        rows = torch.arange(head.first_row, head.tokens, QUERY_BLOCK, device=device).unsqueeze(1)
        keys = torch.arange(0, head.tokens, self.key_block, device=device)
        distance = (rows - keys).to(torch.float32)
        return Levels(distance.masked_fill((distance <= 0) | (keys < self.sink_tokens), ALWAYS), self.key_block, head)

    def cost(self, tokens: int, head_dim: int) -> EstimationCost:
        """None."""
        return EstimationCost()

"""The fixed grid: one `Case` a shape class, and what each group of them is there to catch."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields, replace

import torch

from sale_attention import LayerPolicy, SaleConfig
from tests.unit.attention.naive import SMALL, Shape

#: Threshold at which the kit's inputs keep between a twentieth and half of the blocks.
TAU = 0.03
FOUR_BIT = replace(SMALL, code_bits=4)


@dataclass(frozen=True)
class Case(Shape):
    """One attention problem, with everything that shapes its inputs and where they lie in memory.

    Attributes:
        tau: thresholds by head, repeated over the heads where there are fewer.
        stride: query strides by head, likewise.
        config: geometry and code width.
        dtype: of query, keys, values and output.
        value_dim: size of a value; None for head_dim.
        inputs: a name in `inputs.INPUTS`.
        prompt_end: absolute end of the prompt; None for the end of the keys.
        page_tokens: page size of keys and values; None for contiguous ones.
        code_page_tokens: page size of the codes; None for contiguous ones.
        transposed_table: whether page tables are column-major views.
        spare_tokens: room after the last key in contiguous buffers, poisoned; 0 for buffers that end with it.
        token_major: whether memory runs token by token, as models make it, and not head by head.
        seed: of the random generator.
    """

    tau: tuple[float, ...] = (TAU,)
    stride: tuple[int, ...] = (1,)
    config: SaleConfig = SMALL
    dtype: torch.dtype = torch.bfloat16
    value_dim: int | None = None
    inputs: str = "attention"
    prompt_end: int | None = None
    page_tokens: int | None = None
    code_page_tokens: int | None = None
    transposed_table: bool = False
    spare_tokens: int = 45
    token_major: bool = False
    seed: int = 0

    def __str__(self) -> str:
        """Whatever differs from the defaults; also the test's id."""
        parts = [f"{self.rows} rows behind {self.offset}", f"heads {self.heads}/{self.kv_heads}"]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("rows", "offset", "heads", "kv_heads") or value == field.default:
                continue
            if field.name == "config":
                parts += [f"{name} {mine}" for name, mine in _changes(self.config)]
            else:
                parts.append(f"{field.name} {_plain(value)}")
        return ", ".join(parts)

    @property
    def optional(self) -> bool:
        """Whether a backend may decline it: what the method has besides its main line."""
        return self.config.code_bits == 4 or self.dtype == torch.float64

    @property
    def policy(self) -> LayerPolicy:
        """Thresholds and strides of every head."""
        taus, strides = (tuple(itertools.islice(itertools.cycle(v), self.heads)) for v in (self.tau, self.stride))
        return LayerPolicy(tau=torch.tensor(taus), query_stride=torch.tensor(strides))


def _changes(config: SaleConfig) -> list[tuple[str, int]]:
    names = [field.name for field in fields(SaleConfig)]
    return [(name, getattr(config, name)) for name in names if getattr(config, name) != getattr(SMALL, name)]


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return "/".join(str(item) for item in value)
    return str(value).removeprefix("torch.")


ROWS = (1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 300)
OFFSETS = (0, 1, 37, 64, 255, 300, 511)

#: Row counts around the edges of both block sizes, at offsets that are multiples of no block.
EDGES = [Case(rows, OFFSETS[(3 * index + 5) % 7], seed=index) for index, rows in enumerate(ROWS)]
ALL_EDGES = [
    case
    for index, (rows, offset) in enumerate(itertools.product(ROWS, OFFSETS))
    if (case := Case(rows, offset, seed=100 + index)) not in EDGES
]

_GROUPS = (1, 3, 6, 8)
_DIMS = (64, 96, 128, 256)
_DTYPES = (torch.bfloat16, torch.float32, torch.float16)
#: Query heads per KV head by head_dim, in batches of two.
HEADS = [
    Case(97, 301, 2 * group, 2, dim, batch=2, dtype=_DTYPES[index % 3], seed=index)
    for index, (group, dim) in enumerate(zip(_GROUPS, _DIMS, strict=True))
]
ALL_HEADS = [
    Case(130, 101 + 64 * index, 2 * group, 2, dim, batch=2, dtype=_DTYPES[index % 3], token_major=bool(index % 2))
    for index, (group, dim) in enumerate(itertools.product(_GROUPS, _DIMS))
    if group != _GROUPS[index % 4]
]

#: Where tensors lie: pages of several sizes, codes in pages of their own or in none, token-major, no spare room.
LAYOUTS = [
    Case(200, 150, 3, 1, page_tokens=32, code_page_tokens=32, spare_tokens=0),
    Case(97, 300, 4, 2, 128, batch=2, page_tokens=96, code_page_tokens=96, token_major=True),
    Case(130, 211, 4, 2, batch=2, dtype=torch.float32, page_tokens=64),
    Case(70, 290, batch=2, page_tokens=64, code_page_tokens=32, transposed_table=True),
    Case(65, 256, 2, 2, code_page_tokens=128, token_major=True),
    Case(129, 255, 2, 1, 96, dtype=torch.float16, page_tokens=128, code_page_tokens=32),
    Case(180, 231, 6, 2, token_major=True, spare_tokens=0),
]

#: What the heads of one layer may do differently, and the rules of strides.
POLICIES = [
    Case(300, 100, 6, 2, tau=(0.0, TAU, math.inf, TAU, 0.0, 0.0), stride=(1, 2, 4)),
    Case(300, 200, 6, 2, tau=(TAU, TAU, 0.1), stride=(4, 2, 1)),
    Case(260, 101, 4, 1, tau=(TAU, 0.2), stride=(4, 2), prompt_end=2000, page_tokens=32, code_page_tokens=32),
    # Shorter than the stride, between two of its multiples: every row is inspected.
    Case(2, 401, 2, 1, stride=(4, 2), prompt_end=4096),
]

#: Everything at either end: all sink, all local, all dense, nothing selected, everything selected.
EXTREMES = [
    Case(150, 150, config=replace(SMALL, sink_tokens=512)),
    Case(150, 150, config=replace(SMALL, local_tokens=512)),
    Case(200, 300, config=replace(SMALL, sink_tokens=0, local_tokens=0)),
    Case(130, 200, 4, 2, tau=(0.0,), page_tokens=64, code_page_tokens=64),
    Case(130, 300, tau=(math.inf,)),
    Case(130, 300, tau=(1e6,)),
    Case(130, 300, tau=(1e-30,), dtype=torch.float32),
    Case(129, 500, config=replace(SMALL, query_block=128, dense_rows=128), stride=(1, 4)),
]

#: Values that a random generator does not make.
VALUES = [
    # Quotients that lie exactly between two codes.
    Case(100, 300, inputs="ties"),
    Case(100, 300, inputs="ties", dtype=torch.float32, page_tokens=32, code_page_tokens=32),
    # Rows of zeros, keys that equal the centre, and subnormal numbers.
    Case(100, 300, inputs="blank", dtype=torch.float32),
    # A softmax that is nearly one-hot.
    Case(150, 300, inputs="peaked"),
    # Weights too small for a running float32 sum, thousands of them.
    Case(4, 16380, 1, tau=(1e-30,), inputs="faint"),
]

SAMPLED_SMALL = replace(SMALL, sample_stride=32)
#: Thresholds relative to a sample of the whole row: strides, pages, blocks of 128, more than 32 sampled keys, one.
SAMPLED = [
    Case(300, 1900, 6, 2, tau=(TAU, 0.1, math.inf, TAU, 0.0), stride=(1, 2, 4), config=SAMPLED_SMALL),
    Case(200, 4100, 4, 2, 128, batch=2, config=SAMPLED_SMALL, stride=(2, 1), page_tokens=96, code_page_tokens=96),
    Case(70, 290, batch=2, config=SAMPLED_SMALL, code_page_tokens=32, transposed_table=True, token_major=True),
    Case(260, 1001, 4, 1, tau=(TAU,), stride=(4, 2), prompt_end=4000, config=SAMPLED_SMALL, dtype=torch.float16),
    Case(257, 1500, 3, 1, 128, config=replace(SMALL, query_block=128, dense_rows=128, sample_stride=64)),
    Case(130, 900, config=replace(SMALL, sink_tokens=96, sample_stride=160), dtype=torch.float32),
    Case(33, 7000, 2, 1, 64, config=replace(SMALL, sample_stride=32), inputs="peaked", page_tokens=64),
    Case(
        150,
        150,
        config=replace(SMALL, sink_tokens=0, local_tokens=0, sample_stride=32),
        inputs="blank",
        dtype=torch.float32,
    ),
    Case(150, 450, config=SAMPLED_SMALL, inputs="blank", dtype=torch.float16),
    Case(2, 1001, 2, 1, stride=(4, 2), prompt_end=4096, config=SAMPLED_SMALL),
]

#: What a backend may decline.
OPTIONAL = [
    Case(130, 301, 3, 1, 64, config=FOUR_BIT, stride=(1, 2, 4)),
    Case(129, 201, 4, 2, 96, batch=2, config=FOUR_BIT, page_tokens=64, code_page_tokens=64),
    Case(97, 333, dtype=torch.float64),
]

#: Head sizes beyond the four that models have today, and values of another size.
SIZES = [
    Case(97, 300, head_dim=80),
    Case(97, 300, head_dim=40, dtype=torch.float32),
    Case(97, 300, head_dim=128, value_dim=64),
    Case(97, 300, head_dim=64, value_dim=96, dtype=torch.float32, page_tokens=32, code_page_tokens=32),
]

QUICK = [*EDGES, *HEADS, *LAYOUTS, *POLICIES, *EXTREMES, *VALUES, *OPTIONAL, *SAMPLED[:3]]
SLOW = [
    *ALL_EDGES,
    *ALL_HEADS,
    *SIZES,
    Case(33, 32000, 1, tau=(1e-30,), inputs="faint", dtype=torch.float16),
    Case(2048, 2048, 2, 1, 128, tau=(TAU, 0.1), config=SaleConfig(), page_tokens=64, code_page_tokens=64),
    Case(1500, 1000, 3, 1, 64, stride=(1, 2, 4), config=SaleConfig(query_block=128), dtype=torch.float16),
    Case(1100, 0, 6, 2, 96, batch=2, dtype=torch.float32, token_major=True),
]

#: Decisions enough to speak of one in ten thousand.
END_TO_END = [
    Case(2200, 300, 6, 2, 64, tau=(TAU, TAU, 0.1), stride=(1, 2)),
    Case(700, 1300, 2, 1, 128, dtype=torch.float16, page_tokens=64, code_page_tokens=64),
    Case(600, 900, 3, 1, 96, dtype=torch.float32, token_major=True),
    Case(700, 1300, 2, 1, 128, config=SAMPLED_SMALL, stride=(1, 2)),
]
END_TO_END_SLOW = [
    *END_TO_END,
    Case(4096, 0, 6, 2, 64, tau=(TAU, TAU, 0.1)),
    Case(3000, 2000, 4, 1, 128, config=SaleConfig(), dtype=torch.float16),
    Case(2000, 3001, 4, 2, 256, config=SaleConfig(query_block=128), dtype=torch.float32),
]
END_TO_END_OPTIONAL = [Case(1500, 300, 4, 2, 64, config=FOUR_BIT), Case(1500, 500, 2, 1, 64, dtype=torch.float64)]

#: Whole prompts in pieces; heads of every kind, strides, an offset that is no multiple of the query block.
CHUNKS = [
    Case(700, 0, 4, 2, tau=(TAU, 0.1, 0.0, math.inf), stride=(1, 2, 4, 1)),
    Case(530, 229, 3, 1, 128, dtype=torch.float32, page_tokens=96),
    # No head is dense, so short rows may be computed along with the others.
    Case(430, 100, 2, 1, 128, config=replace(SMALL, query_block=128, dense_rows=256), page_tokens=96, stride=(1, 2)),
    Case(1400, 0, 3, 1, 64, config=SAMPLED_SMALL, tau=(TAU, 0.1, 0.0), stride=(1, 2, 4)),
]
CHUNKS_SLOW = [
    Case(2500, 0, 6, 2, 96, stride=(4, 2, 1), dtype=torch.float16, config=SaleConfig(query_block=128)),
    Case(900, 0, 2, 1, 64, batch=2, token_major=True),
    Case(800, 0, 2, 2, 64, config=FOUR_BIT, stride=(2, 1)),
]

#: Profiles: heads of every kind in calls of several sizes.
PROFILES = CHUNKS
PROFILES_SLOW = [Case(1500, 300, 8, 2, 128, batch=2, tau=(TAU, 0.1, 0.0, math.inf, 0.005), stride=(1, 2, 4))]

THREADS = [
    Case(130, 1400, 6, 2, 64, config=SAMPLED_SMALL, stride=(1, 2)),
    Case(130, 200, 6, 2, 64, tau=(0.0, TAU, math.inf, TAU), batch=2),
    Case(97, 205, 2, 2, 128, dtype=torch.float32, page_tokens=64, code_page_tokens=64),
]

RAGGED = [
    Case(200, 150, 4, 2, page_tokens=32, code_page_tokens=32, seed=1),
    Case(1, 333, 4, 2, page_tokens=32, code_page_tokens=32, seed=2),
    Case(65, 0, 4, 2, page_tokens=32, code_page_tokens=32, seed=3),
    Case(130, 259, 4, 2, page_tokens=32, code_page_tokens=32, seed=4),
]
RAGGED_LARGE_PAGES = [
    Case(100 + 30 * seed, 180, 3, 1, 96, dtype=torch.float32, page_tokens=160, code_page_tokens=160, seed=seed)
    for seed in range(3)
]

NON_FINITE = [
    Case(500, 0, 2, 1),
    Case(200, 250, 3, 1, 128, dtype=torch.float32, page_tokens=64, config=SAMPLED_SMALL),
    Case(200, 250, 2, 2, 96, dtype=torch.float16),
    Case(300, 500, 2, 2, 64, config=SAMPLED_SMALL, stride=(2, 1)),
]

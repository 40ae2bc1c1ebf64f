"""Settings of the method: one `SaleConfig` a model, one `LayerPolicy` a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_TAU = 0.004
QUERY_STRIDES = (1, 2, 4)
#: Kernels count positions of a sample in 32 bits.
MOST_SAMPLE_STRIDE = 1 << 20


@dataclass(frozen=True, slots=True)
class SaleConfig:
    """Block geometry and code width, the same for every layer (SALE, arXiv 2505.24179, sections 3 and 4).

    All lengths are tokens; every boundary is an absolute position, so results do not depend on how a prompt is chunked
    as long as chunk boundaries are multiples of 128.

    Attributes:
        query_block: rows that share one list of key blocks; 64 or 128.
        key_block: keys that are kept or skipped together; 32.
        sink_tokens: the first keys of the sequence, always attended; a multiple of `key_block`.
        local_tokens: keys before a query block that are always attended (besides its own); a multiple of `key_block`.
        dense_rows: rows at absolute positions below this attend to everything; a multiple of `query_block`.
        centre_tokens: without a calibrated centre, keys are centred by the mean of positions 0 .. centre_tokens - 1.
        code_bits: 8 (only K centred) or 4 (K and Q centred, both rotated by a Hadamard transform).
        unstrided_tail_tokens: the last rows of a prompt, which are all inspected whatever the query stride.
        dense_prompt_tokens: a prompt that ends at this position or before is dense altogether: its few sparse rows
            could not save what the sparse passes cost at the least.
        sample_stride: thresholds are relative to an estimate of a row's whole sum: besides sink and local keys, every
            `sample_stride`-th key between them counts, so many times over (`sampled.py`). A multiple of `key_block`;
            needs 8-bit codes. 0, as the paper has it: relative to the sum over sink and local keys alone.

    Raises:
        ValueError: for a value outside the above, naming it and what is accepted.
    """

    query_block: int = 64
    key_block: int = 32
    sink_tokens: int = 32
    local_tokens: int = 128
    dense_rows: int = 1024
    centre_tokens: int = 1024
    code_bits: int = 8
    unstrided_tail_tokens: int = 128
    dense_prompt_tokens: int = 0
    sample_stride: int = 0

    def __post_init__(self) -> None:
        _require_one_of("query_block", self.query_block, (64, 128))
        _require_one_of("key_block", self.key_block, (32,))
        _require_one_of("code_bits", self.code_bits, (8, 4))
        _require_multiple("sink_tokens", self.sink_tokens, "key_block", self.key_block)
        _require_multiple("local_tokens", self.local_tokens, "key_block", self.key_block)
        _require_multiple("sample_stride", self.sample_stride, "key_block", self.key_block)
        _require_multiple("dense_rows", self.dense_rows, "query_block", self.query_block)
        if not 0 <= self.sample_stride <= MOST_SAMPLE_STRIDE:
            raise ValueError(f"sample_stride={self.sample_stride} must be 0 to {MOST_SAMPLE_STRIDE} tokens")
        if self.sample_stride and self.code_bits != 8:
            raise ValueError(f"sample_stride={self.sample_stride} needs code_bits=8, not {self.code_bits}; use 0")
        if self.centre_tokens < 1:
            raise ValueError(f"centre_tokens={self.centre_tokens} must be at least 1")
        for name in ("unstrided_tail_tokens", "dense_prompt_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.dense_rows < self.centre_tokens:
            raise ValueError(
                f"dense_rows={self.dense_rows} is below centre_tokens={self.centre_tokens}: the key centre would not "
                f"be known when the first sparse row needs it; lower centre_tokens as well or raise dense_rows"
            )

    @property
    def code_limit(self) -> int:
        """Largest code magnitude: 127 for 8-bit codes, 7 for 4-bit codes (-8 and -128 are not used)."""
        return 127 if self.code_bits == 8 else 7


@dataclass(frozen=True, eq=False)
class LayerPolicy:
    """What each query head of one layer does; data, so that a calibrated profile can hold it. Kept on the CPU.

    Attributes:
        tau: float32 `[H]`, threshold on the Relative Attention Score exp(s_ij - L_i) (paper, section 3.3).
            0 makes the head dense, inf makes it streaming (sink and local blocks only).
        query_stride: int64 `[H]`, each 1, 2 or 4: only rows at multiples of it are inspected.
        key_centre: float32 `[Hkv, d]` or None; the constant subtracted from K before quantising. None means the mean
            of the first `SaleConfig.centre_tokens` keys.

    Raises:
        ValueError: for shapes that do not fit together, a negative or NaN tau, or an unknown stride.
    """

    tau: Tensor
    query_stride: Tensor
    key_centre: Tensor | None = None
    _log_tau: dict[torch.device | str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _key_centre: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        tau = torch.as_tensor(self.tau, dtype=torch.float32, device="cpu")
        stride = torch.as_tensor(self.query_stride, dtype=torch.int64, device="cpu")
        if tau.ndim != 1 or tau.shape != stride.shape:
            raise ValueError(
                f"tau has shape {tuple(tau.shape)} and query_stride {tuple(stride.shape)}; both must be [query heads]"
            )
        if not bool((tau >= 0).all()):
            raise ValueError(
                f"tau={tau.tolist()} must be 0 (dense), a positive threshold, or inf (sink and local only)"
            )
        bad = sorted(set(stride.tolist()) - set(QUERY_STRIDES))
        if bad:
            raise ValueError(f"query_stride={bad[0]} is not one of {QUERY_STRIDES}")
        if self.key_centre is not None and self.key_centre.ndim != 2:
            raise ValueError(f"key_centre has shape {tuple(self.key_centre.shape)}; it must be [kv heads, head_dim]")
        object.__setattr__(self, "tau", tau)
        object.__setattr__(self, "query_stride", stride)

    @classmethod
    def uniform(cls, num_heads: int, tau: float = DEFAULT_TAU, query_stride: int = 1) -> LayerPolicy:
        """The same threshold and stride for `num_heads` query heads."""
        return cls(tau=torch.full((num_heads,), tau), query_stride=torch.full((num_heads,), query_stride))

    @property
    def num_heads(self) -> int:
        """Query heads the policy speaks of."""
        return self.tau.shape[0]

    @cached_property
    def estimated_strides(self) -> tuple[int, ...]:
        """One a query head: its stride, 0 for a head that estimates nothing (dense or streaming)."""
        taus, strides = self.tau.tolist(), self.query_stride.tolist()
        return tuple(stride if 0 < tau < math.inf else 0 for tau, stride in zip(taus, strides, strict=True))

    @cached_property
    def dense_heads(self) -> tuple[bool, ...]:
        """One a query head: whether its tau is 0."""
        return tuple(tau == 0 for tau in self.tau.tolist())

    def log_tau(self, device: torch.device | str = "cpu") -> Tensor:
        """ln(tau) as float32 `[H]`, computed in float64 and rounded once: part of the pinned threshold arithmetic.

        Kept by device: a copy from the host in every layer would make it wait.
        """
        if device not in self._log_tau:
            self._log_tau[device] = self.tau.to(torch.float64).log().to(torch.float32).to(device)
        return self._log_tau[device]

    def key_centre_on(self, device: torch.device) -> Tensor | None:
        """`key_centre` as float32 on `device`, kept like `log_tau`."""
        if self.key_centre is not None and device not in self._key_centre:
            self._key_centre[device] = self.key_centre.to(device, torch.float32)
        return self._key_centre.get(device)


class HeadPlan(NamedTuple):
    """A policy resolved for one call, in plain Python values, so that no backend needs the host to wait for a device.

    Attributes:
        strides: one a query head: 1, 2 or 4 for a head whose blocks are estimated, 0 for a dense or streaming head.
        dense: one a query head: True where the head attends to everything, outside the sparse phases.
        unstrided_from: absolute row from which every row is inspected; a multiple of the query block.
    """

    strides: tuple[int, ...]
    dense: tuple[bool, ...]
    unstrided_from: int

    @classmethod
    def resolve(cls, policy: LayerPolicy, config: SaleConfig, prompt_end: int) -> HeadPlan:
        """The plan of `policy` for a prompt that ends (exclusively) at absolute position `prompt_end`."""
        tail_start = max(0, prompt_end - config.unstrided_tail_tokens)
        return cls(
            strides=policy.estimated_strides,
            dense=policy.dense_heads,
            unstrided_from=tail_start // config.query_block * config.query_block,
        )


def _require_one_of(name: str, value: int, accepted: tuple[int, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}={value} is not supported; use {' or '.join(str(choice) for choice in accepted)}")


def _require_multiple(name: str, value: int, unit_name: str, unit: int) -> None:
    if value < 0 or value % unit:
        raise ValueError(f"{name}={value} must be a multiple of {unit_name}={unit}, and not negative")

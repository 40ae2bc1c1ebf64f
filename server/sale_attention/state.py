"""What a session keeps per layer besides its KV: key codes. Derived from the KV, so it never travels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .config import LayerPolicy, SaleConfig
from .kv_view import KvView
from .quantise import KeyCodes, KeyExtension

if TYPE_CHECKING:
    from .backends import AttentionBackend


class PagedCodes(Protocol):
    """Room for the key codes of one layer of one session, page for page beside its KV.

    Attributes:
        codes: int8 `[pages, Hkv, page_tokens, d]`.
        scales: float32 `[pages, Hkv, page_tokens / 32]`.
        page_table: int64 `[1, pages per sequence]`, with pages for all tokens of the KV.
    """

    @property
    def codes(self) -> Tensor: ...

    @property
    def scales(self) -> Tensor: ...

    @property
    def page_table(self) -> Tensor: ...


class LayerState:
    """Key centre, codes and scales of one layer of one session, extended as the KV grows.

    Only whole key blocks stay; the partial block at the end is quantised again by the next call. Starts blank and
    takes its shape from the first keys it sees. Cutting a session's KV back must be followed by `truncate`, since
    the state cannot see that positions were overwritten.

    Args:
        pages: where codes go; memory of its own where left out.
    """

    _centre: Tensor | None
    _centre_from_keys: int
    _codes: Tensor | None
    _scales: Tensor | None
    _code_bits: int
    _tokens: int

    def __init__(self, pages: PagedCodes | None = None) -> None:
        self._pages = pages
        self.clear()

    @property
    def tokens(self) -> int:
        """Leading key tokens whose codes are final: a multiple of the key block."""
        return self._tokens

    @property
    def nbytes(self) -> int:
        """Bytes held, capacity included."""
        held = (self._centre, self._codes, self._scales)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def clear(self) -> None:
        """Forget everything; the next call starts from the KV."""
        self._centre, self._centre_from_keys = None, 0
        self._codes, self._scales, self._code_bits = None, None, 0
        self._tokens = 0

    def truncate(self, tokens: int) -> None:
        """Follow the KV being cut to its first `tokens` tokens; a longer state is cut, a shorter one is left."""
        if tokens < self._centre_from_keys:
            # The keys that gave the centre may be replaced by others.
            self.clear()
        self._tokens = min(self._tokens, max(0, tokens))

    def clone(self) -> LayerState:
        """An independent copy, for a fork of a session whose codes are not in pages."""
        copy = LayerState()
        copy.__dict__.update(
            {name: value.clone() if isinstance(value, Tensor) else value for name, value in self.__dict__.items()}
        )
        return copy

    def fork(self, pages: PagedCodes, tokens: int) -> LayerState:
        """The state of a session that has this one's first `tokens` tokens, its codes among them, in `pages`."""
        child = LayerState(pages)
        if tokens >= self._centre_from_keys:
            child._centre, child._centre_from_keys = self._centre, self._centre_from_keys
            child._code_bits = self._code_bits
            child._tokens = min(self._tokens, tokens)
        return child

    def adopt(self, tokens: int, config: SaleConfig) -> None:
        """The pages hold final codes for their first `tokens` tokens, made with the centre that these keys give."""
        self._tokens = tokens // config.key_block * config.key_block
        self._code_bits = config.code_bits

    def update(self, kv: KvView, policy: LayerPolicy, config: SaleConfig, backend: AttentionBackend) -> KeyCodes:
        """Quantise what is new in `kv` and return the codes of all of it (views, valid until the next call).

        Raises:
            ValueError: where `kv` or `config` cannot belong to the session this state was made for.
        """
        extension = self.extension(kv, policy, config)
        codes = extension.codes
        if extension.centre_tokens:
            codes.centre.copy_(backend.key_centre(kv, config))
        backend.quantise_key_range(kv, config, extension.start, codes)
        self.accept(extension, kv, config)
        return codes.gathered(kv.tokens, config.key_block)

    def extension(self, kv: KvView, policy: LayerPolicy, config: SaleConfig) -> KeyExtension:
        """Buffers for the codes of all of `kv`, and what is to be written there; `accept` it once that is done.

        The centre, any constant (softmax does not change), is the policy's where it has one, else the mean of the first
        keys. Held for the session's life: codes of old keys stay valid through chunks and appends.

        Raises:
            ValueError: as `update`.
        """
        centre, centre_tokens = self._centre, 0
        if centre is None:
            given = policy.key_centre_on(kv.device)
            centre_tokens = 0 if given is not None else min(config.centre_tokens, kv.tokens)
            centre = _empty_centre(kv) if given is None else _spread(given, kv)
        else:
            self._check_same_session(centre, kv, config)
        start = min(self._tokens, kv.tokens) // config.key_block * config.key_block
        if self._pages is not None:
            codes = KeyCodes(self._pages.codes, self._pages.scales, centre, self._pages.page_table)
        else:
            codes = KeyCodes(*self._reserve(kv, config), centre)
        return KeyExtension(codes, start, centre_tokens)

    def accept(self, extension: KeyExtension, kv: KvView, config: SaleConfig) -> None:
        """The codes of `extension` were written for all of `kv`."""
        if self._centre is None:
            self._centre, self._centre_from_keys = extension.codes.centre, extension.centre_tokens
            self._code_bits = config.code_bits
        self._tokens = kv.tokens // config.key_block * config.key_block

    def _check_same_session(self, centre: Tensor, kv: KvView, config: SaleConfig) -> None:
        expected = (kv.batch, kv.kv_heads, kv.head_dim)
        if centre.shape != expected or centre.device != kv.device:
            raise ValueError(
                f"this LayerState was made for keys {tuple(centre.shape)} (batch, kv heads, head_dim) on "
                f"{centre.device}, not {expected} on {kv.device}; use one state per session and layer"
            )
        if self._code_bits != config.code_bits:
            raise ValueError(
                f"this LayerState holds {self._code_bits}-bit codes, the config asks for {config.code_bits}-bit ones; "
                f"clear() it first"
            )

    def _reserve(self, kv: KvView, config: SaleConfig) -> tuple[Tensor, Tensor]:
        """Buffers for all of `kv`, doubled when full so that appending stays linear overall."""
        block = config.key_block
        blocks = -(-kv.tokens // block)
        if self._codes is None or self._scales is None or self._scales.shape[2] < blocks:
            capacity = blocks if self._scales is None else max(blocks, 2 * self._scales.shape[2])
            heads = (kv.batch, kv.kv_heads)
            codes = torch.empty(*heads, capacity * block, kv.head_dim, dtype=torch.int8, device=kv.device)
            scales = torch.empty(*heads, capacity, dtype=torch.float32, device=kv.device)
            if self._codes is not None and self._scales is not None:
                codes[:, :, : self._tokens] = self._codes[:, :, : self._tokens]
                scales[:, :, : self._tokens // block] = self._scales[:, :, : self._tokens // block]
            self._codes, self._scales = codes, scales
        return self._codes, self._scales


def _empty_centre(kv: KvView) -> Tensor:
    return torch.empty(kv.batch, kv.kv_heads, kv.head_dim, dtype=torch.float32, device=kv.device)


def _spread(centre: Tensor, kv: KvView) -> Tensor:
    """A policy's centre for every sequence."""
    if tuple(centre.shape) != (kv.kv_heads, kv.head_dim):
        raise ValueError(
            f"key_centre has shape {tuple(centre.shape)}; these keys need [{kv.kv_heads}, {kv.head_dim}] "
            f"(kv heads, head_dim)"
        )
    return centre.unsqueeze(0).expand(kv.batch, -1, -1).contiguous()

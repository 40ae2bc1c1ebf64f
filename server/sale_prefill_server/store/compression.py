"""Lossy forms of blocks, a quarter to a half of their size; off unless a tier is given one.

Each row of `row_elements` values (one head of one token) has its own scale, float32: the largest magnitude becomes the
largest value of the narrow type. A part is its rows' scales, then its values. A lossy block has its codec's name in its
key and in its header, so nothing takes it for the bytes as they were.

Largest error of a value, relative to the largest of its row: 1/16 for fp8 (e4m3fn: three bits of fraction; relative to
the value itself, but for those below 2^-15 of the largest), 1/254 for int8.
"""

from __future__ import annotations

from typing import Protocol

from sale_prefill_server.store.base import Block, Buffer

_LARGEST = {"fp8": 448.0, "int8": 127.0}
_DTYPES = ("float32", "bfloat16", "float16")


class Codec(Protocol):
    """Makes parts smaller, with a loss."""

    @property
    def name(self) -> str:
        """Says all that decoding needs; lower-case letters, digits and dashes."""
        ...

    def encode(self, part: Buffer) -> bytes:
        """The small form of a part."""
        ...

    def decode(self, encoded: Buffer, into: Buffer) -> None:
        """Fills `into`, as long as the part was."""
        ...


class RowScaledCodec:
    """fp8 (e4m3fn) or int8 with one scale a row.

    Args:
        kind: "fp8" or "int8".
        dtype: what the values are: "float32", "bfloat16" or "float16".
        row_elements: values that share a scale: the model's head_dim.
    """

    def __init__(self, kind: str, dtype: str, row_elements: int) -> None:
        if kind not in _LARGEST or dtype not in _DTYPES or row_elements < 1:
            raise ValueError(
                f"codec {kind} of {dtype}, rows of {row_elements}: kinds are {', '.join(_LARGEST)}, "
                f"element types {', '.join(_DTYPES)}, rows have 1 element or more"
            )
        import torch  # the tiers do without it where nothing is compressed

        self._torch = torch
        self._kind = kind
        self._dtype_name = dtype
        self._dtype = getattr(torch, dtype)
        self._narrow = torch.float8_e4m3fn if kind == "fp8" else torch.int8
        self._row_elements = row_elements

    @property
    def name(self) -> str:
        return f"{self._kind}-{self._dtype_name}-{self._row_elements}"

    def encode(self, part: Buffer) -> bytes:
        torch = self._torch
        values = torch.frombuffer(bytearray(part), dtype=self._dtype).view(-1, self._row_elements).float()
        largest = values.abs().amax(dim=1, keepdim=True)
        scales = torch.where(largest > 0, largest / _LARGEST[self._kind], torch.ones_like(largest))
        scaled = values / scales
        narrow = (scaled.round() if self._kind == "int8" else scaled).to(self._narrow)
        encoded: bytes = scales.numpy().tobytes() + narrow.view(torch.uint8).numpy().tobytes()
        return encoded

    def decode(self, encoded: Buffer, into: Buffer) -> None:
        torch = self._torch
        target = torch.frombuffer(into, dtype=self._dtype).view(-1, self._row_elements)
        rows = target.shape[0]
        if len(encoded) != rows * (4 + self._row_elements):
            raise ValueError(f"{len(encoded)} bytes do not hold {rows} rows of {self.name}")
        data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        scales = data[: 4 * rows].view(torch.float32).view(-1, 1)
        narrow = data[4 * rows :].view(self._narrow).view(rows, self._row_elements)
        target.copy_(narrow.float() * scales)


def codec_named(name: str) -> RowScaledCodec:
    """The codec that a block's key names.

    Raises:
        ValueError: no such codec.
    """
    kind, _, rest = name.partition("-")
    dtype, _, row_elements = rest.partition("-")
    if not row_elements.isdigit():
        raise ValueError(f"codec {name!r}: not one of this program's, such as fp8-bfloat16-64")
    return RowScaledCodec(kind, dtype, int(row_elements))


def compressed(block: Block, codec: Codec) -> Block:
    """The lossy form of a block, under its own key."""
    return Block(block.key._replace(codec=codec.name), [codec.encode(part) for part in block.parts])

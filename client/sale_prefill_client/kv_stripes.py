"""One pull over several connections: which layers each brings, and where they go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .errors import ProtocolError
from .kv import KvCache
from .options import Range
from .results import Session


def flat_memory(into: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The memory that a caller gives for KV, as flat bytes.

    Raises:
        ValueError: it cannot be written in order.
    """
    if not (into.flags.c_contiguous and into.flags.writeable):
        raise ValueError("the memory given for the KV must be C-contiguous and writable")
    return into.reshape(-1).view(np.uint8)


@dataclass(frozen=True, eq=False)
class Stripe:
    """Layers that one connection brings, and their part of the memory."""

    number: int
    token_range: Range
    layer_range: Range
    memory: npt.NDArray[np.uint8]
    generation: int


class StripePlan:
    """Disjoint runs of layers, as even as they go, in one block of memory.

    Args:
        session: as the server describes it.
        token_range, layer_range: part of it, half-open; an end of None is the session's, None is everything.
        count: connections; fewer where there are fewer layers.
        memory: flat, for all bytes; fresh memory where left out.
        generation: that the session must have; 0 for the one it has.

    Raises:
        ProtocolError: the server did not say what format the KV has.
        ValueError: the memory is too small.
    """

    def __init__(
        self,
        session: Session,
        token_range: Range | None,
        layer_range: Range | None,
        count: int,
        memory: npt.NDArray[np.uint8] | None,
        generation: int,
    ) -> None:
        spec = session.kv_spec
        if spec is None:
            raise ProtocolError("the server does not say what format the session's KV has; pull without stripes")
        tokens, layers = _resolved(token_range, session.num_tokens), _resolved(layer_range, spec.num_layers)
        layer_bytes = 2 * max(0, tokens[1] - tokens[0]) * spec.layer_token_bytes
        total_bytes = layer_bytes * max(0, layers[1] - layers[0])
        if memory is not None and memory.nbytes < total_bytes:
            raise ValueError(f"the KV has {total_bytes} bytes; the memory given for it has {memory.nbytes}")
        self._session = session
        self.memory = np.empty(total_bytes, np.uint8) if memory is None else memory[:total_bytes]
        self.stripes = [
            Stripe(
                number,
                tokens,
                run,
                self.memory[(run[0] - layers[0]) * layer_bytes : (run[1] - layers[0]) * layer_bytes],
                generation or session.generation,
            )
            for number, run in enumerate(_split(layers, count))
        ]

    def joined(self, parts: list[KvCache]) -> KvCache:
        """The stripes as one cache, in the memory that they share.

        Raises:
            ProtocolError: they are not of the same contents.
        """
        first, last = parts[0], parts[-1]
        for part in parts:
            if (part.spec, part.generation, part.token_digest) != (first.spec, first.generation, first.token_digest):
                raise ProtocolError("stripes of one pull have different manifests; pull again")
        shape = (last.layer_end - first.layer_start, *first.buffer.shape[1:])
        return replace(
            first, layer_end=last.layer_end, buffer=self.memory.reshape(shape), attention=self._session.attention
        )


def _resolved(part: Range | None, end: int) -> tuple[int, int]:
    first, last = part or (0, None)
    return first, end if last is None else last


def _split(layers: tuple[int, int], count: int) -> list[tuple[int, int]]:
    start, end = layers
    count = max(1, min(count, end - start))
    return list(pairwise(start + (end - start) * part // count for part in range(count + 1)))

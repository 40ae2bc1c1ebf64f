"""What a rule's estimation costs, in pairs of dense attention, so that methods compare at equal total cost.

Operations are counted, not timed: a figure from somebody's kernel would say more about the kernel. A pair of one row
and one key costs dense attention 2 d multiply-adds in 16 bit. What runs in the shadow of a product (the exponential of
a score, a maximum, a comparison) is not counted, here as in dense attention.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Multiply-adds in 16 bit that one other operation on one number is worth: 2,048 a cycle of a streaming multiprocessor
#: against 128 float32 operations (NVIDIA H100 white paper).
ELEMENT_OPERATION = 16.0
#: Of an 8-bit multiply-add, likewise. SALE's kernels need less: 0.40, measured on an H100 and on AVX-512 (the pair
#: costs of `sale_attention.crossover`, where an estimated pair takes 0.20 of a dense pair).
INT8_MULTIPLY_ADD = 0.5


@dataclass(frozen=True, slots=True)
class EstimationCost:
    """Operations for one head of a whole prompt.

    Attributes:
        multiply_adds: in 16 bit.
        int8_multiply_adds: in 8 bit.
        element_operations: on single numbers outside of any product: pooling, sorting, the softmax of a map.
    """

    multiply_adds: float = 0.0
    int8_multiply_adds: float = 0.0
    element_operations: float = 0.0

    def dense_pairs(self, head_dim: int) -> float:
        """How many pairs of dense attention cost as much."""
        products = self.multiply_adds + INT8_MULTIPLY_ADD * self.int8_multiply_adds
        return (products + ELEMENT_OPERATION * self.element_operations) / (2 * head_dim)

    def share(self, tokens: int, head_dim: int) -> float:
        """As a share of what dense causal attention of the whole prompt costs."""
        return self.dense_pairs(head_dim) / causal_pairs(tokens)


def causal_pairs(tokens: int) -> float:
    """Pairs of a row and a key that it sees, in a prompt of `tokens`."""
    return tokens * (tokens + 1) / 2


def sort_operations(count: float) -> float:
    """Element operations of sorting `count` numbers: a pass of four operations for each of four 8-bit digits."""
    return 16.0 * count

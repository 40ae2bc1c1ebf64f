"""Every kernel once on small shapes, for compute-sanitizer to watch."""

from __future__ import annotations

import torch
from torch import Tensor

from sale_attention import KvView, LayerPolicy, SaleConfig, attend, decode_attention

#: head_dim, query block, rows, tokens before them, query heads, KV heads, page size (0: contiguous), code bits.
SHAPES = (
    (128, 128, 300, 212, 4, 2, 0, 8),
    (64, 64, 200, 100, 2, 1, 0, 8),
    (128, 64, 257, 255, 8, 2, 64, 8),
    (64, 128, 129, 301, 3, 1, 96, 4),
)


def paged(tensor: Tensor, page_tokens: int) -> Tensor:
    """`[1, H, N, d]` in pages `[pages, H, page_tokens, d]`."""
    padded = torch.nn.functional.pad(tensor[0], (0, 0, 0, -tensor.shape[2] % page_tokens))
    return padded.unflatten(1, (-1, page_tokens)).transpose(0, 1).contiguous()


def main() -> None:
    """Prefill and decode of every shape."""
    generator = torch.Generator().manual_seed(1)
    for head_dim, query_block, rows, before, heads, kv_heads, page_tokens, code_bits in SHAPES:
        tokens = rows + before
        query, keys, values = (
            torch.randn(1, count, size, head_dim, generator=generator).bfloat16().cuda()
            for count, size in ((heads, rows), (kv_heads, tokens), (kv_heads, tokens))
        )
        kv = KvView(keys, values)
        if page_tokens:
            table = torch.arange(-(-tokens // page_tokens), device="cuda")[None]
            kv = KvView(paged(keys, page_tokens), paged(values, page_tokens), table, tokens)
        config = SaleConfig(
            query_block=query_block, local_tokens=64, dense_rows=128, centre_tokens=64, code_bits=code_bits
        )
        policy = LayerPolicy(torch.full((heads,), 0.05), torch.tensor([1, 2, 4, 1, 2, 4, 1, 2][:heads]))
        output = attend(query, kv, policy=policy, config=config, backend="cuda", prompt_end=tokens + 500).output
        lengths = torch.tensor([tokens], device="cuda")
        decoded = decode_attention(query[:, :, -1:], kv, lengths).output
        torch.cuda.synchronize()
        print(head_dim, query_block, page_tokens, code_bits, float(output.abs().mean()), float(decoded.abs().mean()))


if __name__ == "__main__":
    main()

// What the attention kernels share: the order of work, and where an item's mask words lie.
#pragma once

#include "layout.cuh"

namespace sale::cuda {

// One query block of one head.
struct Item {
  int batch, head, kv_head, index;

  // KV head by KV head, so that what is read at a time fits the L2 cache; in each, the longest rows first.
  __device__ __forceinline__ Item(const SaleCudaGrid& grid, int query_blocks, int number) {
    const int group = grid.heads / grid.kv_heads;
    const int member = number % group;
    number /= group;
    index = query_blocks - 1 - number % query_blocks;
    number /= query_blocks;
    kv_head = number % grid.kv_heads;
    batch = number / grid.kv_heads;
    head = kv_head * group + member;
  }
};

// The item's mask words; null: it attends to every block.
__device__ __forceinline__ const uint32_t* words_of(const SaleCudaAttend& call, const Blocks& blocks, const Item& item) {
  if (call.words == nullptr || blocks.start(item.index) < call.dense_until) return nullptr;
  const int dense_blocks = max(static_cast<int>(call.dense_until / blocks.query_block) - blocks.first_query_block, 0);
  const int64_t plane = static_cast<int64_t>(item.batch) * call.grid.heads + item.head;
  return call.words + (plane * (blocks.query_blocks() - dense_blocks) + item.index - dense_blocks) * call.mask_words;
}

}  // namespace sale::cuda

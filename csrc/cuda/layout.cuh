// Where blocks and tokens lie (`geometry.py`, `kv_view.py`).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "sale_prefill/cuda_api.h"

namespace sale::cuda {

constexpr int kKeyBlock = 32;

struct Blocks {
  __host__ __device__ explicit Blocks(const SaleCudaGrid& grid)
      : offset(grid.offset),
        tokens(grid.offset + grid.rows),
        query_block(grid.query_block),
        sink_blocks(grid.sink_blocks),
        local_tokens(grid.local_tokens),
        first_query_block(static_cast<int>(grid.offset / grid.query_block)) {}

  __host__ __device__ int query_blocks() const {
    return static_cast<int>((tokens + query_block - 1) / query_block) - first_query_block;
  }
  // Absolute position where the index-th touched query block starts.
  __host__ __device__ int64_t start(int index) const {
    return static_cast<int64_t>(first_query_block + index) * query_block;
  }
  __host__ __device__ int64_t end(int index) const {
    const int64_t whole = start(index) + query_block;
    return whole < tokens ? whole : tokens;
  }
  __host__ __device__ int local_start(int index) const {
    const int64_t position = start(index) - local_tokens;
    return position > 0 ? static_cast<int>(position / kKeyBlock) : 0;
  }
  // Key blocks [sink_blocks, selectable_end) are for the selection.
  __host__ __device__ int selectable_end(int index) const {
    const int local = local_start(index);
    return local > sink_blocks ? local : sink_blocks;
  }
  __host__ __device__ int causal_end(int index) const {
    return static_cast<int>((end(index) + kKeyBlock - 1) / kKeyBlock);
  }

  int64_t offset, tokens;
  int query_block, sink_blocks, local_tokens, first_query_block;
};

struct Place {
  int64_t unit, token;
};

// The unit of a token, and the token's index within it; 32 tokens from a multiple of 32 on share a unit.
__device__ __forceinline__ Place place_of(const SaleCudaTokens& tokens, int batch, int64_t token) {
  if (tokens.page_table == nullptr) return {batch, token};
  // 32 bits: a division of 64 is a hundred instructions.
  const uint32_t page = static_cast<uint32_t>(token) / static_cast<uint32_t>(tokens.unit_tokens);
  return {tokens.page_table[batch * tokens.page_table_stride + page * tokens.page_table_step],
          token - static_cast<int64_t>(page) * tokens.unit_tokens};
}

struct BlockPlace {
  int64_t unit;
  int token;  // within the unit
};

// The place of a key block's first token; divides in 32 bits, where `place_of` takes ten times as long.
__device__ __forceinline__ BlockPlace place_of_block(const SaleCudaTokens& tokens, int batch, int block) {
  if (tokens.page_table == nullptr) return {batch, block * kKeyBlock};
  const unsigned page_blocks = static_cast<unsigned>(tokens.unit_tokens) / kKeyBlock;
  const unsigned page = static_cast<unsigned>(block) / page_blocks;
  return {tokens.page_table[batch * tokens.page_table_stride + page * tokens.page_table_step],
          static_cast<int>(block - page * page_blocks) * kKeyBlock};
}

// The same of a key block's scale, which is one "token".
__device__ __forceinline__ BlockPlace place_of_scale(const SaleCudaTokens& scales, int batch, int block) {
  if (scales.page_table == nullptr) return {batch, block};
  const unsigned page_scales = static_cast<unsigned>(scales.unit_tokens);
  const unsigned page = static_cast<unsigned>(block) / page_scales;
  return {scales.page_table[batch * scales.page_table_stride + page * scales.page_table_step],
          static_cast<int>(block - page * page_scales)};
}

template <class T>
__device__ __forceinline__ T* token_at(const SaleCudaTokens& tokens, int batch, int head, int64_t token) {
  const Place place = place_of(tokens, batch, token);
  return static_cast<T*>(tokens.data) + place.unit * tokens.unit_stride + head * tokens.head_stride +
         place.token * tokens.token_stride;
}

template <class T>
__device__ __forceinline__ T* row_at(const SaleCudaRows& rows, int batch, int head, int64_t row) {
  return static_cast<T*>(rows.data) + batch * rows.batch_stride + head * rows.head_stride + row * rows.row_stride;
}

}  // namespace sale::cuda

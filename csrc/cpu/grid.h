// Where blocks lie and where tokens are: `geometry.py` and `kv_view.py` in C++. Free of vector code.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sale_prefill/cpu_api.h"

namespace sale::cpu {

constexpr int64_t kKeyBlock = 32;
// Rows that the kernels take through together: a query block of 64, or half of one of 128.
constexpr int64_t kTileRows = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Blocks {
  explicit Blocks(const SaleGrid& grid)
      : rows(grid.rows),
        offset(grid.offset),
        query_block(grid.query_block),
        sink_blocks(grid.sink_blocks),
        local_tokens(grid.local_tokens),
        first_query_block(grid.offset / grid.query_block),
        query_blocks(ceil_div(grid.offset + grid.rows, grid.query_block) - first_query_block),
        first_tile(grid.offset / kTileRows),
        tiles(ceil_div(grid.offset + grid.rows, kTileRows) - first_tile) {}

  int64_t tokens() const { return offset + rows; }
  int64_t block_start(int64_t index) const { return (first_query_block + index) * query_block; }
  // Rows [begin, end) of this call that lie in a query block, or in a tile of 64 rows.
  int64_t row_begin(int64_t index) const { return std::max<int64_t>(0, block_start(index) - offset); }
  int64_t row_end(int64_t index) const { return std::min(rows, block_start(index) + query_block - offset); }
  int64_t tile_begin(int64_t tile) const { return std::max<int64_t>(0, (first_tile + tile) * kTileRows - offset); }
  int64_t tile_end(int64_t tile) const { return std::min(rows, (first_tile + tile + 1) * kTileRows - offset); }
  int64_t query_block_of_tile(int64_t tile) const { return (first_tile + tile) * kTileRows / query_block - first_query_block; }
  // Key blocks.
  int64_t local_start(int64_t index) const { return std::max<int64_t>(0, block_start(index) - local_tokens) / kKeyBlock; }
  int64_t selectable_end(int64_t index) const { return std::max(sink_blocks, local_start(index)); }

  int64_t rows, offset, query_block, sink_blocks, local_tokens;
  int64_t first_query_block, query_blocks, first_tile, tiles;
};

template <class T>
inline T* token_at(const SaleTokens& tokens, int64_t batch, int64_t head, int64_t token) {
  int64_t unit = batch;
  if (tokens.page_table != nullptr) {
    unit = tokens.page_table[batch * tokens.page_table_stride + token / tokens.page_tokens * tokens.page_table_step];
    token %= tokens.page_tokens;
  }
  return static_cast<T*>(tokens.data) + unit * tokens.batch_stride + head * tokens.head_stride +
         token * tokens.token_stride;
}

template <class T>
inline T* row_at(const SaleRows& rows, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(rows.data) + batch * rows.batch_stride + head * rows.head_stride + row * rows.row_stride;
}

// Row-major index of (batch, head, row) in a contiguous [batch, heads, rows] array.
inline int64_t flat_row(const SaleGrid& grid, int64_t batch, int64_t head, int64_t row) {
  return (batch * grid.heads + head) * grid.rows + row;
}

}  // namespace sale::cpu

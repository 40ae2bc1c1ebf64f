// Which rows vote for a query block (`select.py`), and exact products of their codes with packed keys.
//
// 32 keys are packed as [head_dim / codes per lane][32 keys] in 32-bit lanes. VNNI multiplies unsigned by signed, so there
// packed keys carry +128 and each sum starts at -128 * sum(query codes), which is exact.
#pragma once

#include "common.h"

namespace sale::cpu {
namespace SALE_ISA {

// Rows first, first + step, ... of the call: those at multiples of the stride; all of them from `unstrided_from` on, and
// where none would vote.
struct Votes {
  Votes(const Blocks& blocks, int64_t stride, int64_t unstrided_from, int64_t index)
      : first(blocks.row_begin(index)), step(stride) {
    const int64_t begin = first, end = blocks.row_end(index);
    if (blocks.block_start(index) >= unstrided_from) step = 1;
    first += (step - (blocks.offset + begin) % step) % step;
    if (first >= end) first = begin, step = 1;
    count = ceil_div(end - first, step);
  }
  // The last one stands in for those past it.
  int64_t row(int64_t i) const { return first + std::min(i, count - 1) * step; }

  int64_t first, step, count;
};

inline uint32_t widened_codes(const int8_t* two) {
  const int16_t both[2] = {two[0], two[1]};
  return static_cast<uint32_t>(load32(both));
}

// A head's voting rows, filled up to whole tiles of kSelectRows.
template <class S>
struct Voters {
  uint32_t* codes;  // [rows][lanes]
  int32_t* starts;  // [rows]
  int rows;

  static Voters gather(const SaleGrid& grid, const int8_t* query_codes, const Votes& votes, int64_t batch, int64_t head,
                       Carver& carver) {
    const int64_t dim = grid.head_dim, lanes = dim / S::kCodesPerLane;
    const int64_t rows = ceil_div(votes.count, S::kSelectRows) * S::kSelectRows;
    Voters result{carver.take<uint32_t>(rows * lanes), carver.take<int32_t>(rows), static_cast<int>(rows)};
    for (int64_t i = 0; i < rows; ++i) {
      const int8_t* source = query_codes + flat_row(grid, batch, head, votes.row(i)) * dim;
      uint32_t* out = result.codes + i * lanes;
      result.starts[i] = 0;
      if constexpr (S::kCodesPerLane == 4) {
        std::memcpy(out, source, static_cast<size_t>(dim));
        int32_t sum = 0;
        for (int64_t c = 0; c < dim; ++c) sum += source[c];
        result.starts[i] = -128 * sum;
      } else {
        for (int64_t c = 0; c < lanes; ++c) out[c] = widened_codes(source + 2 * c);
      }
    }
    return result;
  }
};

// One key's codes into its column of 32 packed keys; null: zeros.
template <class S>
void pack_key(const int8_t* codes, int64_t dim, uint32_t* column) {
  for (int64_t c = 0; c < dim / S::kCodesPerLane; ++c) {
    uint32_t value = 0;
    if (codes != nullptr) {
      if constexpr (S::kCodesPerLane == 4)
        value = static_cast<uint32_t>(load32(codes + 4 * c));
      else
        value = widened_codes(codes + 2 * c);
    }
    column[c * kKeyBlock] = S::kKeysBiased ? value ^ 0x80808080u : value;
  }
}

// sum[r] = codes of row r (from its start) times 32 packed keys.
template <class S>
inline void multiply_codes(const uint32_t* codes, const int32_t* starts, const uint32_t* keys, int lanes,
                           typename S::I (&sum)[S::kSelectRows][kKeyBlock / S::kLanes]) {
  constexpr int kRows = S::kSelectRows, kVectors = kKeyBlock / S::kLanes;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = S::set1_i(starts[r]);
  for (int c = 0; c < lanes; ++c, keys += kKeyBlock) {
    typename S::I key[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) key[v] = S::load_i(keys + v * S::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename S::I query = S::set1_i(load32(codes + r * lanes + c));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = S::dot_codes(sum[r][v], key[v], query);
    }
  }
}

}  // namespace SALE_ISA
}  // namespace sale::cpu

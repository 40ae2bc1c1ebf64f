// Selection, bit-identical to `select.py` for 8-bit codes: integer products, one max per (row, 32 keys), one compare.
//
// Keys are packed once per call: block by block, [head_dim / codes per lane][32 keys] in 32-bit lanes. VNNI multiplies
// unsigned by signed, so packed keys carry +128 and each sum starts at -128 * sum(query codes), which is exact.
// One task: one KV head, one query block, 128 key blocks (four mask words). A packed block (4 KiB at head_dim 128) stays
// in L1 while all voting rows of the group's heads pass; the query codes (8 KiB a head) stay in L1 or L2.
#pragma once

#include "common.h"

namespace sale::cpu {
namespace SALE_ISA {

constexpr int64_t kSegmentBlocks = 128;

template <class S>
struct Select {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int kVectors = kKeyBlock / S::kLanes;
  static constexpr int kPerLane = S::kCodesPerLane;

  static int32_t run(const SaleSelect& call) {
    const SaleGrid& grid = call.grid;
    const Blocks blocks(grid);
    int64_t end = 0;  // selectable_end grows with the query block
    if (blocks.query_blocks > 0) end = blocks.selectable_end(blocks.query_blocks - 1);
    const int64_t key_blocks = std::max<int64_t>(0, end - grid.sink_blocks);
    if (key_blocks == 0) return SALE_OK;
    const int64_t lanes = grid.head_dim / kPerLane, group = grid.heads / grid.kv_heads;

    Scratch packed(1, static_cast<size_t>(grid.batch * grid.kv_heads * key_blocks * lanes * kKeyBlock) * 4);
    const int64_t most_rows = group * (grid.query_block + S::kSelectRows);
    Scratch scratch(grid.threads, static_cast<size_t>(most_rows * (lanes + 2)) * 4 + static_cast<size_t>(group) * 64 + 1024);
    if (!packed.ok() || !scratch.ok()) return SALE_NO_MEMORY;
    uint32_t* keys = reinterpret_cast<uint32_t*>(packed.of(0));
    auto pack = [&](int64_t task, int) {
      const int64_t block = task % key_blocks, unit = task / key_blocks;
      pack_keys(call, unit / grid.kv_heads, unit % grid.kv_heads, grid.sink_blocks + block,
                keys + task * lanes * kKeyBlock);
    };
    for_each_task(grid.threads, grid.batch * grid.kv_heads * key_blocks, pack);

    const int64_t segments = ceil_div(end, kSegmentBlocks), units = grid.batch * grid.kv_heads;
    auto segment = [&](int64_t task, int worker) {
      const int64_t unit = task % units, rest = task / units;
      const int64_t index = blocks.query_blocks - 1 - rest / segments;
      run_segment(call, blocks, unit, index, rest % segments, keys + unit * key_blocks * lanes * kKeyBlock,
                  scratch.of(worker));
    };
    for_each_task(grid.threads, units * blocks.query_blocks * segments, segment);
    return SALE_OK;
  }

 private:
  struct HeadRows {
    uint32_t* codes;  // [rows][lanes]
    int32_t* starts;  // [rows]
    float* thresholds;
    int rows;
    uint32_t* words;
  };

  static void pack_keys(const SaleSelect& call, int64_t batch, int64_t kv_head, int64_t block, uint32_t* out) {
    const int64_t dim = call.grid.head_dim;
    const int8_t* source = token_at<int8_t>(call.key_codes, batch, kv_head, block * kKeyBlock);
    const int64_t stride = call.key_codes.token_stride;
    if constexpr (kPerLane == 4) {
      for (int64_t key = 0; key < kKeyBlock; ++key)
        for (int64_t c = 0; c < dim / 4; ++c)
          out[c * kKeyBlock + key] = static_cast<uint32_t>(load32(source + key * stride + 4 * c)) ^ 0x80808080u;
    } else {
      for (int64_t key = 0; key < kKeyBlock; ++key)
        for (int64_t c = 0; c < dim / 2; ++c) out[c * kKeyBlock + key] = widened(source + key * stride + 2 * c);
    }
  }

  static uint32_t widened(const int8_t* two) {
    const int16_t both[2] = {two[0], two[1]};
    return static_cast<uint32_t>(load32(both));
  }

  // Codes, starting sums and thresholds of a head's voting rows in one query block; the last row fills up the tile.
  static HeadRows gather(const SaleSelect& call, const Blocks& blocks, int64_t batch, int64_t head, int64_t index,
                         Carver& carver) {
    const int64_t dim = call.grid.head_dim, lanes = dim / kPerLane;
    const int64_t begin = blocks.row_begin(index), end = blocks.row_end(index);
    int64_t step = call.strides[head], first = begin;
    if (blocks.block_start(index) >= call.unstrided_from) {
      step = 1;
    } else {
      first = begin + (step - (blocks.offset + begin) % step) % step;
      if (first >= end) first = begin, step = 1;
    }
    const int64_t votes = ceil_div(end - first, step), rows = ceil_div(votes, S::kSelectRows) * S::kSelectRows;
    HeadRows result{carver.take<uint32_t>(rows * lanes), carver.take<int32_t>(rows), carver.take<float>(rows),
                    static_cast<int>(rows),
                    call.words + ((batch * call.grid.heads + head) * blocks.query_blocks + index) * call.mask_words};
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = flat_row(call.grid, batch, head, first + std::min(i, votes - 1) * step);
      const int8_t* codes = call.query_codes + at * dim;
      uint32_t* out = result.codes + i * lanes;
      result.thresholds[i] = call.thresholds[at];
      result.starts[i] = 0;
      if constexpr (kPerLane == 4) {
        std::memcpy(out, codes, static_cast<size_t>(dim));
        int32_t sum = 0;
        for (int64_t c = 0; c < dim; ++c) sum += codes[c];
        result.starts[i] = -128 * sum;
      } else {
        for (int64_t c = 0; c < lanes; ++c) out[c] = widened(codes + 2 * c);
      }
    }
    return result;
  }

  static void run_segment(const SaleSelect& call, const Blocks& blocks, int64_t unit, int64_t index, int64_t segment,
                          const uint32_t* keys, char* memory) {
    const SaleGrid& grid = call.grid;
    const int64_t first = std::max(grid.sink_blocks, segment * kSegmentBlocks);
    const int64_t end = std::min(blocks.selectable_end(index), (segment + 1) * kSegmentBlocks);
    if (first >= end) return;
    const int64_t batch = unit / grid.kv_heads, kv_head = unit % grid.kv_heads, group = grid.heads / grid.kv_heads;
    const int64_t lanes = grid.head_dim / kPerLane;
    Carver carver(memory);
    HeadRows* heads = carver.take<HeadRows>(group);
    int64_t count = 0;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      if (call.strides[head] > 0) heads[count++] = gather(call, blocks, batch, head, index, carver);
    for (int64_t block = first; block < end; ++block) {
      const float scale = *token_at<float>(call.key_scales, batch, kv_head, block);
      const uint32_t* packed = keys + (block - grid.sink_blocks) * lanes * kKeyBlock;
      for (int64_t h = 0; h < count; ++h)
        if (keeps(heads[h], packed, static_cast<int>(lanes), scale))
          heads[h].words[block / 32] |= 1u << (block % 32);
    }
  }

  static bool keeps(const HeadRows& head, const uint32_t* keys, int lanes, float scale) {
    for (int row = 0; row < head.rows; row += S::kSelectRows)
      if (rows_keep(head.codes + static_cast<int64_t>(row) * lanes, head.starts + row, head.thresholds + row, keys, lanes,
                    S::set1(scale)))
        return true;
    return false;
  }

  static bool rows_keep(const uint32_t* codes, const int32_t* starts, const float* thresholds, const uint32_t* keys,
                        int lanes, F scale) {
    constexpr int kRows = S::kSelectRows;
    I sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = S::set1_i(starts[r]);
    for (int c = 0; c < lanes; ++c, keys += kKeyBlock) {
      I key[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) key[v] = S::load_i(keys + v * S::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const I query = S::set1_i(load32(codes + r * lanes + c));
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] = S::dot_codes(sum[r][v], key[v], query);
      }
    }
    typename S::M kept = S::nowhere();
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      I top = sum[r][0];
#pragma GCC unroll 8
      for (int v = 1; v < kVectors; ++v) top = S::max_i(top, sum[r][v]);
      kept = S::either(kept, S::not_less_equal(S::mul(S::to_float(top), scale), S::set1(thresholds[r])));
    }
    return S::any(kept);
  }
};

}  // namespace SALE_ISA
}  // namespace sale::cpu

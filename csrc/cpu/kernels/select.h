// Selection, bit-identical to `select.py` for 8-bit codes: integer products, one max per (row, 32 keys), one compare.
//
// Keys are packed once per call, block by block (`voting.h`).
// One task: one KV head, one query block, 128 key blocks (four mask words). A packed block (4 KiB at head_dim 128) stays
// in L1 while all voting rows of the group's heads pass; the query codes (8 KiB a head) stay in L1 or L2.
#pragma once

#include "voting.h"

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
      const int8_t* codes = token_at<int8_t>(call.key_codes, unit / grid.kv_heads, unit % grid.kv_heads,
                                             (grid.sink_blocks + block) * kKeyBlock);
      for (int64_t key = 0; key < kKeyBlock; ++key)
        pack_key<S>(codes + key * call.key_codes.token_stride, grid.head_dim, keys + task * lanes * kKeyBlock + key);
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
    Voters<S> voters;
    float* thresholds;
    uint32_t* words;
  };

  static HeadRows gather(const SaleSelect& call, const Blocks& blocks, int64_t batch, int64_t head, int64_t index,
                         Carver& carver) {
    const Votes votes(blocks, call.strides[head], call.unstrided_from, index);
    const auto voters = Voters<S>::gather(call.grid, call.query_codes, votes, batch, head, carver);
    HeadRows result{voters, carver.take<float>(voters.rows),
                    call.words + ((batch * call.grid.heads + head) * blocks.query_blocks + index) * call.mask_words};
    for (int64_t i = 0; i < voters.rows; ++i)
      result.thresholds[i] = call.thresholds[flat_row(call.grid, batch, head, votes.row(i))];
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
    for (int row = 0; row < head.voters.rows; row += S::kSelectRows)
      if (rows_keep(head.voters.codes + static_cast<int64_t>(row) * lanes, head.voters.starts + row,
                    head.thresholds + row, keys, lanes, S::set1(scale)))
        return true;
    return false;
  }

  static bool rows_keep(const uint32_t* codes, const int32_t* starts, const float* thresholds, const uint32_t* keys,
                        int lanes, F scale) {
    constexpr int kRows = S::kSelectRows;
    I sum[kRows][kVectors];
    multiply_codes<S>(codes, starts, keys, lanes, sum);
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

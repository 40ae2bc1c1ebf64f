// Adds to each voting row's sum what a sample of the keys between sink and local ones says of all of them (`sampled.py`).
//
// Sampled keys are packed once per call, 32 to a block (`voting.h`), counted from the first one after the sink: so blocks
// depend on absolute positions alone, and a row's sum, taken up block by block, not on the call that it comes in.
// One task: one KV head, one query block, all voting rows of the group's heads.
#pragma once

#include "voting.h"

namespace sale::cpu {
namespace SALE_ISA {

template <class S>
struct Sampled {
  using F = typename S::F;
  static constexpr int kVectors = kKeyBlock / S::kLanes;
  static constexpr float kLog2E = 1.44269504f;

  static int32_t run(const SaleSampled& call) {
    const SaleGrid& grid = call.grid;
    const Blocks blocks(grid);
    const Sample sample(call, blocks);
    const int64_t most = blocks.query_blocks > 0 ? sample.count(blocks.query_blocks - 1) : 0;
    if (most == 0) return SALE_OK;
    const int64_t lanes = grid.head_dim / S::kCodesPerLane, group = grid.heads / grid.kv_heads;
    const int64_t key_blocks = ceil_div(most, kKeyBlock), units = grid.batch * grid.kv_heads;

    Scratch packed(1, static_cast<size_t>(units * key_blocks * (lanes + 1) * kKeyBlock) * 4);
    const int64_t most_rows = group * (grid.query_block + S::kSelectRows);
    Scratch scratch(grid.threads, static_cast<size_t>(most_rows * (lanes + 2 + 2 * S::kLanes)) * 4 +
                                      static_cast<size_t>(group) * (sizeof(HeadRows) + 256) + 1024);
    if (!packed.ok() || !scratch.ok()) return SALE_NO_MEMORY;
    uint32_t* keys = reinterpret_cast<uint32_t*>(packed.of(0));
    float* scales = reinterpret_cast<float*>(keys + units * key_blocks * lanes * kKeyBlock);
    auto pack = [&](int64_t task, int) {
      const int64_t unit = task / key_blocks, first = task % key_blocks * kKeyBlock;
      for (int64_t i = 0; i < kKeyBlock; ++i) {
        const bool present = first + i < most;
        const int64_t position = sample.position(first + i), batch = unit / grid.kv_heads, head = unit % grid.kv_heads;
        pack_key<S>(present ? token_at<int8_t>(call.key_codes, batch, head, position) : nullptr, grid.head_dim,
                    keys + task * lanes * kKeyBlock + i);
        scales[task * kKeyBlock + i] =
            present ? *token_at<float>(call.key_scales, batch, head, position / kKeyBlock) : 0.0f;
      }
    };
    for_each_task(grid.threads, units * key_blocks, pack);

    auto rows = [&](int64_t task, int worker) {
      const int64_t unit = task % units, index = blocks.query_blocks - 1 - task / units;
      run_block(call, blocks, unit, index, sample.count(index), keys + unit * key_blocks * lanes * kKeyBlock,
                scales + unit * key_blocks * kKeyBlock, scratch.of(worker));
    };
    for_each_task(grid.threads, units * blocks.query_blocks, rows);
    return SALE_OK;
  }

 private:
  // Keys at stride / 2 + i * stride, of which the first that is no sink key counts as number 0.
  struct Sample {
    Sample(const SaleSampled& call, const Blocks& its_blocks)
        : blocks(its_blocks),
          stride(call.sample_stride),
          skipped(ceil_div(std::max<int64_t>(0, call.grid.sink_blocks * kKeyBlock - stride / 2), stride)) {}
    int64_t position(int64_t i) const { return (skipped + i) * stride + stride / 2; }
    // Keys before the local ones of a query block.
    int64_t count(int64_t index) const {
      const int64_t end = blocks.selectable_end(index) * kKeyBlock;
      return std::max<int64_t>(0, ceil_div(end - stride / 2, stride) - skipped);
    }

    const Blocks& blocks;
    int64_t stride, skipped;
  };

  struct HeadRows {
    int64_t head;
    Votes votes;
    Voters<S> voters;
    float* tops;    // [rows][lanes of a vector], in units of the products
    float* totals;  // the same, of exponentials less the top's
  };

  static void run_block(const SaleSampled& call, const Blocks& blocks, int64_t unit, int64_t index, int64_t count,
                        const uint32_t* keys, const float* scales, char* memory) {
    if (count == 0) return;
    const SaleGrid& grid = call.grid;
    const int64_t batch = unit / grid.kv_heads, kv_head = unit % grid.kv_heads, group = grid.heads / grid.kv_heads;
    const int64_t lanes = grid.head_dim / S::kCodesPerLane;
    Carver carver(memory);
    HeadRows* heads = carver.take<HeadRows>(group);
    int64_t members = 0;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      if (call.strides[head] > 0) heads[members++] = gather(call, blocks, batch, head, index, carver);
    for (int64_t first = 0; first < count; first += kKeyBlock) {
      float scale[kKeyBlock], hidden[kKeyBlock];
      for (int64_t i = 0; i < kKeyBlock; ++i) {
        const bool seen = first + i < count;
        scale[i] = seen ? scales[first + i] : 0.0f;  // whatever cannot be judged must not show before its time
        hidden[i] = seen ? 0.0f : -__builtin_inff();
      }
      for (int64_t h = 0; h < members; ++h)
        take(call, batch, heads[h], keys + first * lanes, scale, hidden, static_cast<int>(lanes));
    }
    for (int64_t h = 0; h < members; ++h) write(call, batch, heads[h]);
  }

  static HeadRows gather(const SaleSampled& call, const Blocks& blocks, int64_t batch, int64_t head, int64_t index,
                         Carver& carver) {
    const Votes votes(blocks, call.strides[head], call.unstrided_from, index);
    const auto voters = Voters<S>::gather(call.grid, call.query_codes, votes, batch, head, carver);
    const int64_t floats = static_cast<int64_t>(voters.rows) * S::kLanes;
    HeadRows result{head, votes, voters, carver.take<float>(floats), carver.take<float>(floats)};
    std::fill(result.tops, result.tops + floats, -3.0e38f);
    std::fill(result.totals, result.totals + floats, 0.0f);
    return result;
  }

  // From units of a row's products to those of exp2.
  static float row_scale(const SaleSampled& call, int64_t row) { return call.query_scales[row] * call.scale; }

  static void take(const SaleSampled& call, int64_t batch, const HeadRows& head, const uint32_t* keys,
                   const float* scales, const float* hidden, int lanes) {
    for (int row = 0; row < head.voters.rows; row += S::kSelectRows) {
      typename S::I sum[S::kSelectRows][kVectors];
      multiply_codes<S>(head.voters.codes + static_cast<int64_t>(row) * lanes, head.voters.starts + row, keys, lanes, sum);
      for (int r = 0; r < S::kSelectRows; ++r) {
        const int64_t at = flat_row(call.grid, batch, head.head, head.votes.row(row + r));
        const F factor = S::set1(row_scale(call, at) * kLog2E);
        float* top = head.tops + (row + r) * S::kLanes;
        float* total = head.totals + (row + r) * S::kLanes;
        const F before = S::load(top);
        F most = before, x[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          x[v] = S::fma(S::to_float(sum[r][v]), S::load(scales + v * S::kLanes), S::load(hidden + v * S::kLanes));
          most = S::max(x[v], most);
        }
        F all = S::mul(S::load(total), exp2<S, false>(S::mul(S::sub(before, most), factor)));
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) all = S::add(all, exp2<S, false>(S::mul(S::sub(x[v], most), factor)));
        S::store(top, most);
        S::store(total, all);
      }
    }
  }

  static void write(const SaleSampled& call, int64_t batch, const HeadRows& head) {
    for (int64_t i = 0; i < head.votes.count; ++i) {
      const int64_t at = flat_row(call.grid, batch, head.head, head.votes.row(i));
      const float scale = row_scale(call, at);
      const float *tops = head.tops + i * S::kLanes, *totals = head.totals + i * S::kLanes;
      const float top = *std::max_element(tops, tops + S::kLanes);
      float total = 0.0f;
      for (int lane = 0; lane < S::kLanes; ++lane) total += totals[lane] * std::exp((tops[lane] - top) * scale);
      const float far = top * scale + std::log(total * static_cast<float>(call.sample_stride)), near = call.lse[at];
      // Whichever is NaN shows.
      call.lse[at] = near >= far ? near + std::log1p(std::exp(far - near)) : far + std::log1p(std::exp(near - far));
    }
  }
};

}  // namespace SALE_ISA
}  // namespace sale::cpu

// Per row, the log-sum-exp of scale * q . (k - centre) over sink and local keys, in float32 as `sink_local.py` has it.
//
// One task: 64 rows of every query head of one KV head. Sink and local keys are centred once per task.
// Scratch of a worker at head_dim 128, local 128, blocks of 64: keys 112 KiB, query panel 32 KiB, scores 56 KiB.
#pragma once

#include "common.h"

namespace sale::cpu {
namespace SALE_ISA {

template <class S>
struct SinkLocal {
  using F = typename S::F;
  static constexpr float kLog2E = 1.44269504f;

  static int32_t run(const SaleSinkLocal& call) {
    const SaleGrid& grid = call.grid;
    const Blocks blocks(grid);
    const int64_t keys_most =
        (grid.sink_blocks + ceil_div(grid.local_tokens, kKeyBlock) + grid.query_block / kKeyBlock + 1) * kKeyBlock;
    const int64_t floats = keys_most * grid.head_dim + 2 * kTileRows * grid.head_dim + keys_most * kTileRows;
    Scratch scratch(grid.threads, static_cast<size_t>(floats) * 4 + 1024);
    if (!scratch.ok()) return SALE_NO_MEMORY;
    auto tile = [&](int64_t task, int worker) {
      const int64_t index = task % blocks.tiles, kv_head = task / blocks.tiles % grid.kv_heads;
      run_tile(call, blocks, task / blocks.tiles / grid.kv_heads, kv_head, index, keys_most, scratch.of(worker));
    };
    for_each_task(grid.threads, grid.batch * grid.kv_heads * blocks.tiles, tile);
    return SALE_OK;
  }

 private:
  static void run_tile(const SaleSinkLocal& call, const Blocks& blocks, int64_t batch, int64_t kv_head, int64_t tile,
                       int64_t keys_most, char* memory) {
    const SaleGrid& grid = call.grid;
    const int64_t dim = grid.head_dim, begin = blocks.tile_begin(tile), end = blocks.tile_end(tile);
    const int rows = static_cast<int>(end - begin);
    const int64_t index = blocks.query_block_of_tile(tile), tokens = blocks.offset + end;
    Carver carver(memory);
    float* keys = carver.take<float>(keys_most * dim);
    float* rowwise = carver.take<float>(kTileRows * dim);
    uint32_t* panel = carver.take<uint32_t>(kTileRows * dim);
    float* scores = carver.take<float>(keys_most * kTileRows);

    const int64_t sink_end = std::min(grid.sink_blocks * kKeyBlock, tokens);
    const int64_t local = std::max(sink_end, blocks.local_start(index) * kKeyBlock);
    const int64_t count = sink_end + tokens - local;
    const float* centre = call.centre + (batch * grid.kv_heads + kv_head) * dim;
    for (int64_t i = 0; i < count; ++i) {
      const void* source = token_address(call.keys, batch, kv_head, i < sink_end ? i : local + i - sink_end);
      for (int64_t c = 0; c < dim; c += S::kLanes)
        S::store(keys + i * dim + c, S::sub(load_as_float<S>(source, c, call.keys.dtype), S::load(centre + c)));
    }
    const int64_t group = grid.heads / grid.kv_heads;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int64_t row = 0; row < rows; ++row) {
        const void* source = row_address(call.query, batch, head, begin + row);
        for (int64_t c = 0; c < dim; c += S::kLanes)
          S::store(rowwise + row * dim + c,
                   S::mul(load_as_float<S>(source, c, call.query.dtype), S::set1(call.scale)));
      }
      const int lanes = lanes_for(rows);
      fill_panel<S>(reinterpret_cast<const uint32_t*>(rowwise), dim, rows, static_cast<int>(dim), lanes, panel);
      score(panel, reinterpret_cast<const uint32_t*>(keys), static_cast<int>(count), static_cast<int>(dim), lanes, scores);
      float result[kTileRows];
      log_sum_exp(scores, static_cast<int>(count), static_cast<int>(tokens - rows - local + sink_end), lanes, result);
      std::copy(result, result + rows, call.lse + flat_row(grid, batch, head, begin));
    }
  }

  static int lanes_for(int rows) {
    constexpr int kUnit = S::kRowVectors * S::kLanes;
    return (rows + kUnit - 1) / kUnit * kUnit;
  }

  static void score(const uint32_t* panel, const uint32_t* keys, int count, int dim, int lanes, float* scores) {
    for (int key = 0; key < count; key += S::kKeys) {
      const uint32_t* b[S::kKeys];
      for (int c = 0; c < S::kKeys; ++c) b[c] = keys + static_cast<int64_t>(std::min(key + c, count - 1)) * dim;
      for (int lane = 0; lane < lanes; lane += S::kRowVectors * S::kLanes)
        multiply<S, false, S::kRowVectors>(panel + lane, b, 1, dim, scores + key * kTileRows + lane, false);
    }
  }

  // Row r sees the first `first_row_keys + r + 1` of `count` keys.
  static void log_sum_exp(const float* scores, int count, int first_row_keys, int lanes, float* result) {
    for (int lane = 0; lane < lanes; lane += S::kLanes) {
      const auto visible = [&](int key) {
        const F x = S::load(scores + key * kTileRows + lane);
        const int hidden = key - first_row_keys - lane;
        return hidden <= 0 ? x : S::hide_before(x, std::min(hidden, S::kLanes));
      };
      F largest = S::set1(-3.0e38f);
      for (int key = 0; key < count; ++key) largest = S::max(visible(key), largest);
      const F shift = S::mul(largest, S::set1(-kLog2E));
      F sum = S::zero();
      for (int key = 0; key < count; ++key)
        sum = S::add(sum, exp2<S, false>(S::fma(visible(key), S::set1(kLog2E), shift)));
      float sums[S::kLanes], tops[S::kLanes];
      S::store(sums, sum);
      S::store(tops, largest);
      for (int i = 0; i < S::kLanes; ++i) result[lane + i] = tops[i] + std::log(sums[i]);
    }
  }
};

}  // namespace SALE_ISA
}  // namespace sale::cpu

// Softmax attention over lists of 32-key blocks, bf16 products (or float32 where a machine or dtype has none).
//
// One task: one query head, 64 rows; longest lists first. Rows lie in vector lanes throughout (see common.h): scores come
// out as [key][row], so maximum, exp2 and sum are lane by lane, keys are read where they lie, and only values are
// interleaved in pairs. Scores are taken a block at a time; products with values wait until kPendingKeys are there, so
// that the accumulator, [value_dim][row] in memory, is loaded and stored once per batch.
//
// The running maximum moves only when a row exceeds it by kSlack (in powers of two), so that rescaling the accumulator
// is rare. Rows are divided by the sum of the probabilities as bfloat16 rounded them: a weight that stands alone is then
// exactly 1, as it is with an exact maximum. The log-sum-exp has a sum of its own, unrounded. Both are taken block by
// block, which keeps float32 sums of many thousand equal terms right.
//
// Scratch of a worker at head_dim 128, bf16: query panel 16 KiB, scores 8, probabilities 16, values 34, accumulator 32.
#pragma once

#include "common.h"

namespace sale::cpu {
namespace SALE_ISA {

constexpr int kPendingKeys = 128;
constexpr float kSlack = 8.0f;
constexpr float kNoMaximum = -1.0e30f;

template <class S, bool kBf16>
struct Attend {
  using F = typename S::F;
  static constexpr int kLanes = S::kLanes;
  static constexpr int kKeysPerValue = kBf16 ? 2 : 1;  // keys in one 32-bit value of a probability panel

  static int32_t run(const SaleAttend& call) {
    const SaleGrid& grid = call.grid;
    const Blocks blocks(grid);
    const int64_t tasks = grid.batch * grid.heads * blocks.tiles;
    Scratch scratch(grid.threads, Workspace::bytes(grid, ceil_div(blocks.tokens(), kKeyBlock)));
    Scratch order_memory(1, static_cast<size_t>(tasks) * sizeof(Task));
    if (!scratch.ok() || !order_memory.ok()) return SALE_NO_MEMORY;
    Task* order = reinterpret_cast<Task*>(order_memory.of(0));
    const int64_t count = plan(call, blocks, order);
    auto tile = [&](int64_t task, int worker) {
      Workspace space(grid, scratch.of(worker));
      run_tile(call, blocks, order[task], space);
    };
    for_each_task(grid.threads, count, tile);
    return SALE_OK;
  }

 private:
  struct Task {
    int32_t blocks;
    int32_t tile;
    int64_t unit;  // batch * heads + head
  };

  struct Workspace {
    Workspace(const SaleGrid& grid, char* memory) : value_stride(grid.value_dim + 16) {
      Carver carver(memory);
      query = carver.take<uint32_t>(kTileRows * grid.head_dim);
      scores = carver.take<float>(kKeyBlock * kTileRows);
      probabilities = carver.take<uint32_t>(kPendingKeys * kTileRows);
      values = carver.take<uint32_t>(kPendingKeys * value_stride);
      sums = carver.take<float>(grid.value_dim * kTileRows);
      rowwise = carver.take<float>(kTileRows * std::max(grid.head_dim, grid.value_dim + 16));
      list = carver.take<int32_t>(0);
    }
    static size_t bytes(const SaleGrid& grid, int64_t key_blocks) {
      const int64_t words = 2 * kTileRows * (grid.head_dim + grid.value_dim + 16) + kTileRows * grid.value_dim +
                            (kKeyBlock + kPendingKeys) * kTileRows + kPendingKeys * (grid.value_dim + 16) + key_blocks;
      return static_cast<size_t>(words) * 4 + 1024;
    }

    int64_t value_stride;
    uint32_t* query;
    float* scores;
    uint32_t* probabilities;
    uint32_t* values;
    float* sums;
    float* rowwise;
    int32_t* list;
    float maximum[kTileRows];  // in powers of two
    float total[kTileRows];
    float divisor[kTileRows];
    int pending = 0;  // keys whose products with values wait
    bool fresh = true;
  };

  static const uint32_t* words_of(const SaleAttend& call, const Blocks& blocks, int64_t unit, int64_t index) {
    return call.words == nullptr ? nullptr : call.words + (unit * blocks.query_blocks + index) * call.mask_words;
  }

  // Key blocks of one tile, ascending; returns how many. `list` null only counts.
  static int64_t list_blocks(const SaleAttend& call, const Blocks& blocks, int64_t unit, int64_t tile, int32_t* list) {
    const int64_t index = blocks.query_block_of_tile(tile);
    const int64_t end = ceil_div(blocks.offset + blocks.tile_end(tile), kKeyBlock);
    const uint32_t* words = words_of(call, blocks, unit, index);
    int64_t count = 0;
    auto take = [&](int64_t block) {
      if (list != nullptr) list[count] = static_cast<int32_t>(block);
      ++count;
    };
    if (words == nullptr) {
      for (int64_t block = 0; block < end; ++block) take(block);
      return count;
    }
    const int64_t sink = std::min(blocks.sink_blocks, end), local = std::max(sink, blocks.local_start(index));
    for (int64_t block = 0; block < sink; ++block) take(block);
    for (int64_t word = 0; word * 32 < local; ++word)
      for (uint32_t bits = words[word]; bits != 0; bits &= bits - 1) {
        const int64_t block = word * 32 + __builtin_ctz(bits);
        if (block >= sink && block < local) take(block);
      }
    for (int64_t block = local; block < end; ++block) take(block);
    return count;
  }

  static int64_t plan(const SaleAttend& call, const Blocks& blocks, Task* order) {
    int64_t count = 0;
    for (int64_t unit = 0; unit < call.grid.batch * call.grid.heads; ++unit) {
      if (call.skip_heads != nullptr && call.skip_heads[unit % call.grid.heads] != 0) continue;
      for (int64_t tile = 0; tile < blocks.tiles; ++tile)
        order[count++] = {static_cast<int32_t>(list_blocks(call, blocks, unit, tile, nullptr)),
                          static_cast<int32_t>(tile), unit};
    }
    std::sort(order, order + count, [](const Task& a, const Task& b) {
      return a.blocks != b.blocks ? a.blocks > b.blocks : a.unit != b.unit ? a.unit < b.unit : a.tile < b.tile;
    });
    return count;
  }

  static void run_tile(const SaleAttend& call, const Blocks& blocks, const Task& task, Workspace& space) {
    const int64_t rows = blocks.tile_end(task.tile) - blocks.tile_begin(task.tile);
    // Few rows need few lanes; the narrow kernel keeps a single row from paying for 64.
    if (rows <= kLanes)
      run_rows<1>(call, blocks, task, static_cast<int>(rows), space);
    else
      run_rows<S::kRowVectors>(call, blocks, task, static_cast<int>(rows), space);
  }

  template <int RV>
  static void run_rows(const SaleAttend& call, const Blocks& blocks, const Task& task, int rows, Workspace& space) {
    const SaleGrid& grid = call.grid;
    const int64_t batch = task.unit / grid.heads, head = task.unit % grid.heads;
    const int64_t kv_head = head / (grid.heads / grid.kv_heads), begin = blocks.tile_begin(task.tile);
    const int lanes = (rows + RV * kLanes - 1) / (RV * kLanes) * (RV * kLanes);
    load_query(call, batch, head, begin, rows, lanes, space);
    std::fill(space.maximum, space.maximum + kTileRows, kNoMaximum);
    std::fill(space.total, space.total + kTileRows, 0.0f);
    std::fill(space.divisor, space.divisor + kTileRows, 0.0f);
    const int64_t count = list_blocks(call, blocks, task.unit, task.tile, space.list);
    const int64_t first_position = blocks.offset + begin;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t key = space.list[i] * kKeyBlock;
      const int keys = static_cast<int>(std::min(kKeyBlock, first_position + rows - key));
      if (i + 1 < count) prefetch(call, batch, kv_head, space.list[i + 1] * kKeyBlock, first_position + rows);
      score_block<RV>(call, batch, kv_head, key, keys, lanes, space);
      if (key + kKeyBlock - 1 > first_position) hide_future(static_cast<int>(key - first_position), lanes, space.scores);
      raise_maximum<RV>(call, lanes, space);
      exponentiate(call, lanes, space);
      take_values(call, batch, kv_head, key, keys, space);
      space.pending += kKeyBlock;
      if (space.pending == kPendingKeys) multiply_values<RV>(call, lanes, space);
    }
    multiply_values<RV>(call, lanes, space);
    write_rows(call, batch, head, begin, rows, lanes, space);
  }

  static void load_query(const SaleAttend& call, int64_t batch, int64_t head, int64_t begin, int rows, int lanes,
                         Workspace& space) {
    const int64_t dim = call.grid.head_dim;
    if constexpr (kBf16) {
      const uint16_t* source = row_at<uint16_t>(call.query, batch, head, begin);
      fill_panel<S>(reinterpret_cast<const uint32_t*>(source), call.query.row_stride / 2, rows, static_cast<int>(dim / 2),
                    lanes, space.query);
      return;
    }
    for (int64_t row = 0; row < rows; ++row) {
      const void* source = row_address(call.query, batch, head, begin + row);
      for (int64_t c = 0; c < dim; c += kLanes)
        S::store(space.rowwise + row * dim + c, load_as_float<S>(source, c, call.query.dtype));
    }
    fill_panel<S>(reinterpret_cast<const uint32_t*>(space.rowwise), dim, rows, static_cast<int>(dim), lanes, space.query);
  }

  // The next block's keys and values, while this one is multiplied: blocks lie anywhere, so hardware cannot guess.
  static void prefetch(const SaleAttend& call, int64_t batch, int64_t kv_head, int64_t key, int64_t tokens) {
    const int keys = static_cast<int>(std::min(kKeyBlock, tokens - key));
    for (const SaleTokens* source : {&call.keys, &call.values}) {
      const char* first = static_cast<const char*>(token_address(*source, batch, kv_head, key));
      const int64_t bytes = element_bytes(source->dtype), stride = source->token_stride * bytes;
      const int64_t width = (source == &call.keys ? call.grid.head_dim : call.grid.value_dim) * bytes;
      for (int i = 0; i < keys; ++i)
        for (int64_t byte = 0; byte < width; byte += 64) __builtin_prefetch(first + i * stride + byte, 0, 2);
    }
  }

  // scores[key][row] of one block; keys past `keys` repeat the last one and are hidden by causality.
  template <int RV>
  static void score_block(const SaleAttend& call, int64_t batch, int64_t kv_head, int64_t key, int keys, int lanes,
                          Workspace& space) {
    const int64_t dim = call.grid.head_dim;
    const uint32_t* source;
    int64_t stride;  // in 32-bit values
    if (kBf16 || call.keys.dtype == SALE_F32) {
      source = static_cast<const uint32_t*>(token_address(call.keys, batch, kv_head, key));
      stride = call.keys.token_stride / kKeysPerValue;
    } else {
      for (int i = 0; i < keys; ++i) {
        const void* token = token_address(call.keys, batch, kv_head, key + i);
        for (int64_t c = 0; c < dim; c += kLanes)
          S::store(space.rowwise + i * dim + c, load_as_float<S>(token, c, call.keys.dtype));
      }
      source = reinterpret_cast<const uint32_t*>(space.rowwise);
      stride = dim;
    }
    const int steps = static_cast<int>(dim) / kKeysPerValue;
    for (int i = 0; i < kKeyBlock; i += S::kKeys) {
      const uint32_t* b[S::kKeys];
      for (int c = 0; c < S::kKeys; ++c) b[c] = source + std::min(i + c, keys - 1) * stride;
      for (int lane = 0; lane < lanes; lane += RV * kLanes)
        multiply<S, kBf16, RV>(space.query + lane, b, 1, steps, space.scores + i * kTileRows + lane, false);
    }
  }

  // Row r stands at key `r` counted from the tile's first position; the block starts at `first_key` by that count.
  static void hide_future(int first_key, int lanes, float* scores) {
    for (int key = 0; key < kKeyBlock; ++key)
      for (int lane = 0; lane < lanes; lane += kLanes) {
        const int hidden = first_key + key - lane;
        if (hidden <= 0) continue;
        float* at = scores + key * kTileRows + lane;
        S::store(at, S::hide_before(S::load(at), std::min(hidden, kLanes)));
      }
  }

  static F log2_scale(const SaleAttend& call) { return S::set1(call.scale * 1.44269504f); }

  template <int RV>
  static void raise_maximum(const SaleAttend& call, int lanes, Workspace& space) {
    const F scale = log2_scale(call);
    float block_maximum[kTileRows];
    typename S::M exceeded = S::nowhere();
    for (int lane = 0; lane < lanes; lane += kLanes) {
      F top = S::set1(kNoMaximum);
      for (int key = 0; key < kKeyBlock; ++key) top = S::max(S::load(space.scores + key * kTileRows + lane), top);
      top = S::mul(top, scale);
      S::store(block_maximum + lane, top);
      exceeded = S::either(exceeded, S::greater(top, S::add(S::load(space.maximum + lane), S::set1(kSlack))));
    }
    if (!S::any(exceeded)) return;
    multiply_values<RV>(call, lanes, space);
    for (int lane = 0; lane < lanes; lane += kLanes) {
      const F old = S::load(space.maximum + lane), top = S::load(block_maximum + lane);
      const F now = S::where_greater(top, S::add(old, S::set1(kSlack)), top, old);
      // Exactly 1 for rows that stay: the polynomial's 2^0 is one unit off, and no row may feel its neighbours.
      const F factor =
          S::where_greater(top, S::add(old, S::set1(kSlack)), exp2<S, false>(S::sub(old, now)), S::set1(1.0f));
      S::store(space.maximum + lane, now);
      S::store(space.total + lane, S::mul(S::load(space.total + lane), factor));
      S::store(space.divisor + lane, S::mul(S::load(space.divisor + lane), factor));
      if (space.fresh) continue;
      for (int64_t c = 0; c < call.grid.value_dim; ++c) {
        float* at = space.sums + c * kTileRows + lane;
        S::store(at, S::mul(S::load(at), factor));
      }
    }
  }

  static void exponentiate(const SaleAttend& call, int lanes, Workspace& space) {
    const F scale = log2_scale(call);
    uint32_t* out = space.probabilities + space.pending / kKeysPerValue * kTileRows;
    for (int lane = 0; lane < lanes; lane += kLanes) {
      const F shift = S::sub(S::zero(), S::load(space.maximum + lane));
      F total = S::zero(), divisor = S::zero();
      for (int key = 0; key < kKeyBlock; key += kKeysPerValue) {
        const F first = exp2<S, kBf16>(S::fma(S::load(space.scores + key * kTileRows + lane), scale, shift));
        total = S::add(total, first);
        if constexpr (kBf16) {
          const F second = exp2<S, kBf16>(S::fma(S::load(space.scores + (key + 1) * kTileRows + lane), scale, shift));
          total = S::add(total, second);
          const typename S::I pair = S::pair_bf16(first, second);
          divisor = S::dot_bf16(divisor, pair, S::set1_i(0x3f803f80));  // ones
          S::store_i(out + key / 2 * kTileRows + lane, pair);
        } else {
          S::store(reinterpret_cast<float*>(out) + key * kTileRows + lane, first);
        }
      }
      S::store(space.total + lane, S::add(S::load(space.total + lane), total));
      S::store(space.divisor + lane, S::add(S::load(space.divisor + lane), kBf16 ? divisor : total));
    }
  }

  // The block's values behind those pending, [key or pair of keys][column]; absent keys count as zero.
  static void take_values(const SaleAttend& call, int64_t batch, int64_t kv_head, int64_t key, int keys,
                          Workspace& space) {
    const int64_t dim = call.grid.value_dim;
    uint32_t* out = space.values + space.pending / kKeysPerValue * space.value_stride;
    for (int i = 0; i < kKeyBlock; i += kKeysPerValue, out += space.value_stride) {
      if (i >= keys) {
        std::fill(out, out + dim, 0u);
        continue;
      }
      const void* first = token_address(call.values, batch, kv_head, key + i);
      if constexpr (kBf16) {
        const uint16_t* low = static_cast<const uint16_t*>(first);
        const uint16_t* high = low + call.values.token_stride;
        interleave(low, i + 1 < keys ? high : nullptr, dim, out);
      } else {
        for (int64_t c = 0; c < dim; c += kLanes)
          S::store(reinterpret_cast<float*>(out) + c, load_as_float<S>(first, c, call.values.dtype));
      }
    }
  }

  static void interleave(const uint16_t* low, const uint16_t* high, int64_t dim, uint32_t* out) {
    if constexpr (kBf16) {
      int64_t c = 0;
      if (high != nullptr)
        for (; c + S::kInterleaveColumns <= dim; c += S::kInterleaveColumns) S::interleave16(low + c, high + c, out + c);
      for (; c < dim; ++c) out[c] = low[c] | (high == nullptr ? 0u : static_cast<uint32_t>(high[c]) << 16);
    }
  }

  template <int RV>
  static void multiply_values(const SaleAttend& call, int lanes, Workspace& space) {
    if (space.pending == 0) return;
    const int steps = space.pending / kKeysPerValue;
    for (int64_t column = 0; column < call.grid.value_dim; column += S::kKeys) {
      const uint32_t* b[S::kKeys];
      for (int c = 0; c < S::kKeys; ++c) b[c] = space.values + column + c;
      for (int lane = 0; lane < lanes; lane += RV * kLanes)
        multiply<S, kBf16, RV>(space.probabilities + lane, b, space.value_stride, steps,
                               space.sums + column * kTileRows + lane, !space.fresh);
    }
    space.pending = 0;
    space.fresh = false;
  }

  static void write_rows(const SaleAttend& call, int64_t batch, int64_t head, int64_t begin, int rows, int lanes,
                         Workspace& space) {
    const int64_t dim = call.grid.value_dim, stride = dim + 16;
    for (int lane = 0; lane < lanes; lane += kLanes) {
      const F inverse = S::div(S::set1(1.0f), S::load(space.divisor + lane));
      for (int64_t c = 0; c < dim; ++c) {
        float* at = space.sums + c * kTileRows + lane;
        S::store(at, S::mul(S::load(at), inverse));
      }
      for (int64_t c = 0; c < dim; c += kLanes)
        S::transpose(reinterpret_cast<const uint32_t*>(space.sums + c * kTileRows + lane), kTileRows,
                     reinterpret_cast<uint32_t*>(space.rowwise + lane * stride + c), stride);
    }
    for (int row = 0; row < rows; ++row)
      for (int64_t c = 0; c < dim; c += kLanes) store_output(call, batch, head, begin + row, c, space.rowwise + row * stride + c);
    if (call.lse == nullptr) return;
    float* lse = call.lse + batch * call.lse_batch_stride + head * call.lse_head_stride + begin;
    for (int row = 0; row < rows; ++row) lse[row] = space.maximum[row] * 0.693147181f + std::log(space.total[row]);
  }

  static void store_output(const SaleAttend& call, int64_t batch, int64_t head, int64_t row, int64_t column,
                           const float* values) {
    const F x = S::load(values);
    if (call.output.dtype == SALE_F32)
      S::store(row_at<float>(call.output, batch, head, row) + column, x);
    else if (call.output.dtype == SALE_BF16)
      S::store_bf16(row_at<uint16_t>(call.output, batch, head, row) + column, x);
    else
      S::store_f16(row_at<uint16_t>(call.output, batch, head, row) + column, x);
  }
};

}  // namespace SALE_ISA
}  // namespace sale::cpu

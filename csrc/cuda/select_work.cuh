// What selection and sampling share: which rows vote in which CTA, for which query block, and which launches there are.
//
// Voting rows are counted through the query blocks of a launch; 64 of them of one head are a unit, 16 of them a part.
// A part lies in one query block whatever the stride (64 rows / stride 4), so whoever has a part takes whole decisions.
#pragma once

#include "layout.cuh"

namespace sale::cuda {

constexpr int kUnits = 4;  // of a CTA, where a kernel does not say otherwise
constexpr int kUnitRows = 64;
constexpr int kPartRows = 16;
constexpr int kTileKeys = 128;
constexpr int kTileBlocks = kTileKeys / kKeyBlock;
constexpr int kWordTiles = 32 / kTileBlocks;
constexpr int kMaxHeads = 512;

template <class Call>
struct SelectLaunch {
  Call call;
  int first_block;  // query blocks [first_block, first_block + blocks) of the call...
  int blocks;
  int stride;  // ...inspected at this stride, of heads whose own stride is head_stride
  int head_stride;
  int segments;  // pieces of the key range, a CTA each: the last rows of a long prompt would else keep few CTAs for long
  uint8_t strides[kMaxHeads];
};

// What a CTA shares: units, row tile by row tile from the last one (which sees most keys), head by head. CTAs of a cluster
// have neighbouring units and the same keys: those of the first CTA, which sees the most.
struct Work {
  int batch, kv_head, group, members, tiles, first_unit;
  int first_tile, end_tile;  // of keys
  int end_block;             // one past the last key block that any of the units may select

  template <class Launch>
  __device__ explicit Work(const Launch& launch, int cluster = 1, int units = kUnits) {
    const SaleCudaGrid& grid = launch.call.grid;
    kv_head = blockIdx.y;
    batch = blockIdx.z;
    group = grid.heads / grid.kv_heads;
    members = 0;
    for (int i = 0; i < group; ++i) members += launch.strides[kv_head * group + i] == launch.head_stride;
    tiles = (launch.blocks * (grid.query_block / launch.stride) + kUnitRows - 1) / kUnitRows;
    const int number = blockIdx.x / cluster, longest = number / launch.segments * cluster * units;
    first_unit = longest + blockIdx.x % cluster * units;
    first_tile = end_tile = end_block = 0;
    if (longest >= tiles * members) return;
    const Blocks blocks(grid);
    const int last_row = (tiles - longest / members) * kUnitRows * launch.stride - 1;
    const int index = launch.first_block + min(last_row / grid.query_block, launch.blocks - 1);
    end_block = blocks.selectable_end(index);
    if (end_block <= blocks.sink_blocks) return;
    // Segments are whole mask words.
    const int key_tiles = (end_block + kTileBlocks - 1) / kTileBlocks, words = (key_tiles + kWordTiles - 1) / kWordTiles;
    const int each = (words + launch.segments - 1) / launch.segments * kWordTiles;
    first_tile = number % launch.segments * each;
    end_tile = min(first_tile + each, key_tiles);
  }
  template <class Launch>
  __device__ int head(const Launch& launch, int unit) const {
    int left = unit % members;
    for (int i = 0; i < group; ++i)
      if (launch.strides[kv_head * group + i] == launch.head_stride && left-- == 0) return kv_head * group + i;
    return -1;
  }
};

// The sixteen voting rows of a part. Those that do not exist repeat one that does, which changes no decision.
struct Part {
  int head = 0, index = 0;  // of the query block that they decide for
  int low = 0, high = 0;    // voters that exist
  int stride = 1;
  int64_t first = 0;        // voter 0 in [batch, head, row]; may lie before the call's rows
  int64_t block = 0;        // the query block in [batch, head, query block]

  template <class Launch>
  __device__ Part(const Launch& launch, const Work& work, int unit, int part) {
    if (unit >= work.tiles * work.members) return;
    const SaleCudaGrid& grid = launch.call.grid;
    const Blocks blocks(grid);
    const int per_block = grid.query_block / launch.stride;
    const int voter = (work.tiles - 1 - unit / work.members) * kUnitRows + part * kPartRows;  // of the launch
    if (voter >= launch.blocks * per_block) return;
    index = launch.first_block + voter / per_block;
    stride = launch.stride;
    const int64_t position = blocks.start(launch.first_block) + static_cast<int64_t>(voter) * stride;
    const int64_t missing = blocks.offset - position;
    low = missing > 0 ? static_cast<int>((missing + stride - 1) / stride) : 0;
    const int64_t present = (blocks.tokens - position + stride - 1) / stride;
    high = present < kPartRows ? static_cast<int>(present) : kPartRows;
    if (low >= high) return;
    head = work.head(launch, unit);
    const int64_t plane = static_cast<int64_t>(work.batch) * grid.heads + head;
    first = plane * grid.rows + position - blocks.offset;
    block = plane * blocks.query_blocks() + index;
  }
  __device__ __forceinline__ bool votes() const { return low < high; }
  __device__ __forceinline__ int64_t row(int voter) const {
    return first + static_cast<int64_t>(min(max(voter, low), high - 1)) * stride;
  }
};

// A part's codes as the A operand of 8-bit products: a warp's rows g and g + 8 in lane 4 g + q.
template <int kDim>
__device__ __forceinline__ void load_part_codes(const int8_t* query_codes, const Part& part,
                                                uint32_t (&codes)[kDim / 32][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int8_t* source = query_codes + part.row(lane / 4 + 8 * half) * kDim + lane % 4 * 4;
#pragma unroll
    for (int step = 0; step < kDim / 32; ++step) {
      codes[step][half] = *reinterpret_cast<const uint32_t*>(source + step * 32);
      codes[step][half + 2] = *reinterpret_cast<const uint32_t*>(source + step * 32 + 16);
    }
  }
}

// The same and the rows' thresholds.
template <int kDim>
__device__ __forceinline__ void load_part(const SaleCudaSelect& call, const Part& part, uint32_t (&codes)[kDim / 32][4],
                                          float (&thresholds)[2]) {
  load_part_codes<kDim>(call.query_codes, part, codes);
#pragma unroll
  for (int half = 0; half < 2; ++half) thresholds[half] = call.thresholds[part.row(threadIdx.x % 32 / 4 + 8 * half)];
}

__device__ __forceinline__ uint32_t bits_below(int count) {
  return count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1u;
}

// The CTAs of a launch; sets its segments, 1 where there are CTAs in plenty.
template <class Launch>
dim3 select_ctas(Launch& launch, int most_members, int cluster = 1, int cta_units = kUnits) {
  const SaleCudaGrid& grid = launch.call.grid;
  const int tiles = (launch.blocks * (grid.query_block / launch.stride) + kUnitRows - 1) / kUnitRows;
  const int units = cta_units * cluster, along_rows = (tiles * most_members + units - 1) / units * cluster;
  const int64_t ctas = static_cast<int64_t>(along_rows) * grid.kv_heads * grid.batch;
  launch.segments = static_cast<int>((2 * grid.multiprocessors + ctas - 1) / ctas);
  return dim3(along_rows * launch.segments, grid.kv_heads, grid.batch);
}

// Whether some row of a query block stands at a multiple of the stride; else all its rows vote.
inline bool has_voter(const Blocks& blocks, int index, int stride) {
  const int64_t first = blocks.start(index) > blocks.offset ? blocks.start(index) : blocks.offset;
  return (first + stride - 1) / stride * stride < blocks.end(index);
}

// Calls run(launch, most heads of a KV head) for every stride that heads have, and for each run of query blocks with
// the same effective stride: an odd first or last one, the middle, the prompt's tail. `launch.call` is set before.
template <class Launch, class Run>
int run_votes(Launch& launch, Run run) {
  const auto& call = launch.call;
  const SaleCudaGrid& grid = call.grid;
  const Blocks blocks(grid);
  const int count = blocks.query_blocks();
  for (int head = 0; head < grid.heads; ++head) launch.strides[head] = static_cast<uint8_t>(call.strides[head]);
  const int group = grid.heads / grid.kv_heads;
  const int64_t tail_start = call.unstrided_from / grid.query_block - blocks.first_query_block;
  const int tail = static_cast<int>(tail_start < 0 ? 0 : tail_start > count ? count : tail_start);
  for (const int stride : {1, 2, 4}) {
    int most = 0;
    for (int kv_head = 0; kv_head < grid.kv_heads; ++kv_head) {
      int members = 0;
      for (int i = 0; i < group; ++i) members += call.strides[kv_head * group + i] == stride;
      most = members > most ? members : most;
    }
    if (most == 0) continue;
    launch.head_stride = stride;
    for (int index = 0; index < count;) {
      const auto effective = [&](int i) { return i >= tail || !has_voter(blocks, i, stride) ? 1 : stride; };
      int end = index + 1;
      while (end < count && effective(end) == effective(index)) ++end;
      launch.first_block = index;
      launch.blocks = end - index;
      launch.stride = effective(index);
      if (const int status = run(launch, most); status != 0) return status;
      index = end;
    }
  }
  return 0;
}

// The same after clearing the words.
template <class Launch, class Run>
int run_select(Launch& launch, cudaStream_t stream, Run run) {
  const auto& call = launch.call;
  const size_t words =
      static_cast<size_t>(call.grid.batch) * call.grid.heads * Blocks(call.grid).query_blocks() * call.mask_words;
  if (const cudaError_t cleared = cudaMemsetAsync(call.words, 0, words * sizeof(uint32_t), stream); cleared != cudaSuccess)
    return cleared;
  return run_votes(launch, run);
}

}  // namespace sale::cuda

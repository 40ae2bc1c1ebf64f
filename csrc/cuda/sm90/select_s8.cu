// Selection on sm_90a, bit-identical to `select.py` for 8-bit codes: wgmma s8, one max per (row, 32 keys), one compare.
//
// One CTA: four consumer warpgroups of 64 voting rows each (the heads of a KV head first, then other rows), and one
// producer warp that feeds tiles of 128 keys by the copy engine. Query codes live in registers as wgmma's A operand.
// A warp's 16 voting rows lie in one query block, so a warp takes whole decisions, gathers them into mask words
// (8 tiles each) and merges these with the block's other warps by atomicOr.
//
// Barriers: full[s], one arrival and the tile's bytes; empty[s], one arrival a consumer warp.
// Shared memory: kStages tiles of 128 keys x head_dim bytes (64 KiB at head_dim 128), 128- or 64-byte swizzle.
#include "../layout.cuh"
#include "ptx.cuh"
#include "tensor_map.cuh"
#include "wgmma.cuh"

namespace sale::cuda {
namespace {

constexpr int kWarpgroups = 4;
constexpr int kTileKeys = 128;
constexpr int kTileBlocks = kTileKeys / kKeyBlock;
constexpr int kWordTiles = 32 / kTileBlocks;
constexpr int kTileRows = 64;
constexpr int kWarpRows = 16;
#ifndef SELECT_STAGES
#define SELECT_STAGES 4
#endif
#ifndef SELECT_CLUSTER
#define SELECT_CLUSTER 2
#endif
#ifndef SELECT_SHARED
#define SELECT_SHARED 1
#endif
#ifndef SELECT_TURN
#define SELECT_TURN 2
#endif
#ifndef SELECT_ORDER
#define SELECT_ORDER 1
#endif
constexpr int kStages = SELECT_STAGES;
constexpr int kCluster = SELECT_CLUSTER;  // CTAs that share tiles of keys, each fetching its part for all
constexpr int kThreads = 128 * (kWarpgroups + 1);
constexpr int kMaxHeads = 512;

struct Launch {
  SaleCudaSelect call;
  CUtensorMap codes;
  int first_block;  // query blocks [first_block, first_block + blocks) of the call...
  int blocks;
  int stride;  // ...inspected at this stride, of heads whose own stride is head_stride
  int head_stride;
  int box_tokens;
  int segments;  // pieces of the key range, a CTA each: the last rows of a long prompt would else keep few CTAs for long
  uint8_t strides[kMaxHeads];
};

template <int kDim>
struct Shared {
  alignas(1024) int8_t keys[kStages][kTileKeys * kDim];
#if SELECT_SHARED
  alignas(1024) int8_t queries[kWarpgroups][kTileRows * kDim];
#endif
  alignas(16) float scales[kStages][kTileBlocks];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  int first_tile, end_tile;  // of keys; here rather than in registers, which the setting-up of a role needs
};

// What a CTA shares: units, row tile by row tile from the last one (which sees most keys), head by head.
struct Work {
  int batch, kv_head, group, members, tiles, first_unit;
  int first_tile, end_tile;  // of keys

  __device__ explicit Work(const Launch& launch) {
    const SaleCudaGrid& grid = launch.call.grid;
    kv_head = blockIdx.y;
    batch = blockIdx.z;
    group = grid.heads / grid.kv_heads;
    members = 0;
    for (int i = 0; i < group; ++i) members += launch.strides[kv_head * group + i] == launch.head_stride;
    tiles = (launch.blocks * (grid.query_block / launch.stride) + kTileRows - 1) / kTileRows;
    const int pair = blockIdx.x / kCluster, rank = blockIdx.x % kCluster;
    const int leader_unit = pair / launch.segments * kCluster * kWarpgroups;  // sees the most keys of the cluster
    first_unit = leader_unit + rank * kWarpgroups;
    first_tile = end_tile = 0;
    if (leader_unit >= tiles * members) return;
    const Blocks blocks(grid);
    const int last_row = (tiles - leader_unit / members) * kTileRows * launch.stride - 1;
    const int index = launch.first_block + min(last_row / grid.query_block, launch.blocks - 1);
    const int end = blocks.selectable_end(index);
    if (end <= blocks.sink_blocks) return;
    // Segments are whole mask words.
    const int key_tiles = (end + kTileBlocks - 1) / kTileBlocks, words = (key_tiles + kWordTiles - 1) / kWordTiles;
    const int each = (words + launch.segments - 1) / launch.segments * kWordTiles;
    first_tile = pair % launch.segments * each;
    end_tile = min(first_tile + each, key_tiles);
  }
  __device__ int head(const Launch& launch, int unit) const {
    int left = unit % members;
    for (int i = 0; i < group; ++i)
      if (launch.strides[kv_head * group + i] == launch.head_stride && left-- == 0) return kv_head * group + i;
    return -1;
  }
};

// One warp: lane 0 moves keys, the first four lanes the blocks' scales.
template <int kDim>
__device__ __forceinline__ void produce(const Launch& launch, const Work& work, Shared<kDim>& shared) {
  const SaleCudaTokens& codes = launch.call.key_codes;
  const int lane = threadIdx.x % 32, first_tile = shared.first_tile, end_tile = shared.end_tile;
  const int last = static_cast<int>((launch.call.grid.offset + launch.call.grid.rows - 1) / kKeyBlock);
  // Scales of a mask word's blocks, a lane each, a word ahead: a load a tile would be the slowest thing in the loop.
  const auto scale_of = [&](int word) {
    // Blocks past the last one: nobody looks at them; their page exists.
    return *token_at<const float>(launch.call.key_scales, work.batch, work.kv_head, min(word * 32 + lane, last));
  };
  float scale = 0.0f, next_scale = scale_of(first_tile / kWordTiles);
  for (int tile = first_tile; tile < end_tile; ++tile) {
    const int turn = tile - first_tile, stage = turn % kStages;
    if (tile % kWordTiles == 0) {
      scale = next_scale;
      next_scale = scale_of(tile / kWordTiles + 1);
    }
    const float mine = __shfl_sync(0xffffffffu, scale, tile % kWordTiles * kTileBlocks + lane % kTileBlocks);
    barrier_wait(&shared.empty[stage], (turn / kStages & 1) ^ 1);
    if (lane < kTileBlocks) shared.scales[stage][lane] = mine;
    __syncwarp();
    if (lane == 0) {
      barrier_expect(&shared.full[stage], kTileKeys * kDim);
      constexpr int kShare = kTileKeys / kCluster;
      const int first_key = static_cast<int>(blockIdx.x) % kCluster * kShare;
#pragma unroll 1
      for (int key = first_key; key < first_key + kShare; key += launch.box_tokens) {
        int8_t* target = shared.keys[stage] + key * kDim;
        int unit = work.batch, token = tile * kTileKeys + key;
        if (codes.page_table != nullptr) {
          const Place place = place_of(codes, work.batch, min(token, last * kKeyBlock));
          unit = static_cast<int>(place.unit);
          token = static_cast<int>(place.token);
        }
        if (kCluster == 1)
          tensor_load(target, &launch.codes, &shared.full[stage], 0, token, work.kv_head, unit);
        else
          tensor_load_multicast(target, &launch.codes, &shared.full[stage], 0, token, work.kv_head, unit, (1 << kCluster) - 1);
      }
    }
  }
}

// One warp's voting rows: which query block they decide for, and this thread's two rows (g and g + 8 of wgmma's layout).
template <int kDim>
struct Voters {
#if !SELECT_SHARED
  uint32_t codes[kDim / 32][4];
#endif
  float thresholds[2];
  uint32_t* words = nullptr;  // null: nobody votes
  int selectable_end = 0;

  __device__ Voters(const Launch& launch, const Work& work, int unit, int warp, int lane, int8_t* queries) {
    if (unit >= work.tiles * work.members) return;
    const SaleCudaSelect& call = launch.call;
    const SaleCudaGrid& grid = call.grid;
    const Blocks blocks(grid);
    const int per_block = grid.query_block / launch.stride;
    const int first = (work.tiles - 1 - unit / work.members) * kTileRows + warp * kWarpRows;  // voter of the range
    if (first >= launch.blocks * per_block) return;
    const int index = launch.first_block + first / per_block;
    const int64_t position = blocks.start(launch.first_block) + static_cast<int64_t>(first) * launch.stride;
    // Voters [low, high) exist; the others repeat one of them, which changes no decision.
    const int64_t missing = blocks.offset - position;
    const int low = missing > 0 ? static_cast<int>((missing + launch.stride - 1) / launch.stride) : 0;
    const int64_t present = (blocks.tokens - position + launch.stride - 1) / launch.stride;
    const int high = present < kWarpRows ? static_cast<int>(present) : kWarpRows;
    if (low >= high) return;
    const int head = work.head(launch, unit);
    const int64_t plane = (static_cast<int64_t>(work.batch) * grid.heads + head) * grid.rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int voter = min(max(lane / 4 + 8 * half, low), high - 1);
      const int64_t row = plane + position - blocks.offset + static_cast<int64_t>(voter) * launch.stride;
      thresholds[half] = call.thresholds[row];
#if !SELECT_SHARED
      const int8_t* source = call.query_codes + row * kDim + lane % 4 * 4;
#pragma unroll
      for (int step = 0; step < kDim / 32; ++step) {
        codes[step][half] = *reinterpret_cast<const uint32_t*>(source + step * 32);
        codes[step][half + 2] = *reinterpret_cast<const uint32_t*>(source + step * 32 + 16);
      }
#endif
    }
#if SELECT_SHARED
    constexpr int kPieces = kDim / 16;
#pragma unroll
    for (int i = lane; i < kWarpRows * kPieces; i += 32) {
      const int r = i / kPieces, piece = i % kPieces, voter = min(max(r, low), high - 1);
      const int64_t row = plane + position - blocks.offset + static_cast<int64_t>(voter) * launch.stride;
      const int swizzled = kDim == 128 ? piece ^ (r & 7) : piece ^ (r / 2 & 3);
      *reinterpret_cast<uint4*>(queries + (warp * kWarpRows + r) * kDim + swizzled * 16) =
          *reinterpret_cast<const uint4*>(call.query_codes + row * kDim + piece * 16);
    }
#endif
    selectable_end = blocks.selectable_end(index);
    words = call.words +
            ((static_cast<int64_t>(work.batch) * grid.heads + head) * blocks.query_blocks() + index) * call.mask_words;
  }
};

__device__ __forceinline__ uint32_t bits_below(int count) {
  return count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1u;
}

// Four bits: whether any of the warp's scores passes in each of the tile's key blocks.
__device__ __forceinline__ uint32_t passing(const int32_t (&sums)[64], const float (&thresholds)[2], const float4& scales) {
  const float scale[kTileBlocks] = {scales.x, scales.y, scales.z, scales.w};
  uint32_t bits = 0;
#pragma unroll
  for (int block = 0; block < kTileBlocks; ++block) {
    bool passes = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t* s = sums + block * 16 + half * 2;
      const int top = max(__vimax3_s32(__vimax3_s32(__vimax3_s32(s[0], s[1], s[4]), s[5], s[8]), s[9], s[12]), s[13]);
      passes |= !(__fmul_rn(static_cast<float>(top), scale[block]) <= thresholds[half]);
    }
    if (__any_sync(0xffffffffu, passes)) bits |= 1u << block;
  }
  return bits;
}

template <int kDim>
__device__ __forceinline__ void consume(const Launch& launch, const Work& work, Shared<kDim>& shared, int warpgroup) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#if SELECT_SHARED
  const Voters<kDim> voters(launch, work, work.first_unit + warpgroup, warp, lane, shared.queries[warpgroup]);
  proxy_fence();
  named_sync(1 + warpgroup, 128);
#else
  const Voters<kDim> voters(launch, work, work.first_unit + warpgroup, warp, lane, nullptr);
#endif
#if SELECT_ORDER
  if (warpgroup == kWarpgroups - 1) named_arrive(5, 256);
#endif
  const int first_tile = shared.first_tile, end_tile = shared.end_tile;
  const int sink = launch.call.grid.sink_blocks;
  constexpr int kSwizzle = kDim == 128 ? 1 : 2;
  warpgroup = uniform(warpgroup);
  const uint64_t first_keys = matrix_descriptor(shared.keys[0], 16, 8 * kDim, kSwizzle);
#if SELECT_SHARED
  const uint64_t queries = moved(matrix_descriptor(shared.queries[0], 16, 8 * kDim, kSwizzle), warpgroup * (kTileRows * kDim));
#endif
  uint32_t word = 0;
  for (int tile = first_tile; tile < end_tile; ++tile) {
    const int turn = tile - first_tile, stage = turn % kStages;
    int32_t sums[64];
#ifndef ELIM_NOBAR
    barrier_wait(&shared.full[stage], turn / kStages & 1);
#endif
    const uint64_t keys = moved(first_keys, uniform(stage) * (kTileKeys * kDim));
#if SELECT_ORDER
    named_sync(5 + warpgroup, 256);
#endif
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDim / 32; ++step) {
#if SELECT_SHARED
      wgmma_s8_shared(sums, moved(queries, step * 32), moved(keys, step * 32), step > 0);
#else
      wgmma_s8_n128(sums, voters.codes[step], moved(keys, step * 32), step > 0);
#endif
#if SELECT_TURN
      wgmma_commit();
#endif
    }
#if SELECT_TURN
    wgmma_wait<SELECT_TURN>();
#else
    wgmma_commit();
#endif
#if SELECT_ORDER
    named_arrive(5 + (warpgroup + 1) % kWarpgroups, 256);
#endif
    const float4 scales = *reinterpret_cast<const float4*>(shared.scales[stage]);
    wgmma_wait<0>();
    __syncwarp();  // every lane has read the scales
#ifndef ELIM_NOBAR
    if (lane < kCluster) barrier_arrive_at(&shared.empty[stage], lane);
#endif
#ifdef ELIM_NOEPI
    word |= uint32_t(sums[0] == 0x7fffffff) <<
#else
    word |= passing(sums, voters.thresholds, scales) <<
#endif
 (tile % kWordTiles * kTileBlocks);
    if (tile % kWordTiles == kWordTiles - 1 || tile == end_tile - 1) {
      const int first = tile / kWordTiles * 32;
      word &= bits_below(voters.selectable_end - first) & ~bits_below(sink - first);
      if (lane == 0 && word != 0 && voters.words != nullptr) atomicOr(voters.words + tile / kWordTiles, word);
      word = 0;
    }
  }
}

template <int kDim>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1) select_s8(const __grid_constant__ Launch launch) {
  extern __shared__ uint8_t memory[];
  Shared<kDim>& shared = *reinterpret_cast<Shared<kDim>*>(aligned(memory));
  const Work work(launch);
  if (work.first_tile >= work.end_tile) return;
  if (threadIdx.x == 0) {
    prefetch_map(&launch.codes);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], 4 * kWarpgroups * kCluster);
    }
    barrier_init_fence();
    shared.first_tile = work.first_tile;
    shared.end_tile = work.end_tile;
  }
  cluster_sync();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == kWarpgroups) {
    registers_down<32>();  // 4 x 112 + 32 = 5 x 96: more than the launch had would wait forever
#ifndef ELIM_NOBAR
    if (threadIdx.x < 128 * kWarpgroups + 32) produce<kDim>(launch, work, shared);
#endif
    cluster_sync();  // until then another CTA may write here
  } else {
    registers_up<112>();
    consume<kDim>(launch, work, shared, warpgroup);
    cluster_sync();
  }
}

template <int kDim>
int run(const Launch& launch, int most_members, cudaStream_t stream) {
  const SaleCudaGrid& grid = launch.call.grid;
  const size_t bytes = sizeof(Shared<kDim>) + 1024;
  static const cudaError_t raised =
      cudaFuncSetAttribute(select_s8<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (raised != cudaSuccess) return raised;
  const int tiles = (launch.blocks * (grid.query_block / launch.stride) + kTileRows - 1) / kTileRows;
  constexpr int kUnits = kWarpgroups * kCluster;
  const int along_rows = (tiles * most_members + kUnits - 1) / kUnits * kCluster;
  const int64_t ctas = static_cast<int64_t>(along_rows) * grid.kv_heads * grid.batch;
  Launch split = launch;
  split.segments = static_cast<int>((2 * grid.multiprocessors + ctas - 1) / ctas);  // 1 where there are plenty
  const dim3 blocks(along_rows * split.segments, grid.kv_heads, grid.batch);
  select_s8<kDim><<<blocks, kThreads, bytes, stream>>>(split);
  return cudaGetLastError();
}

// Whether some row of a query block stands at a multiple of the stride; else all its rows vote.
bool has_voter(const Blocks& blocks, int index, int stride) {
  const int64_t first = blocks.start(index) > blocks.offset ? blocks.start(index) : blocks.offset;
  return (first + stride - 1) / stride * stride < blocks.end(index);
}

}  // namespace
}  // namespace sale::cuda

using namespace sale::cuda;

extern "C" int32_t sale_cuda_select(const SaleCudaSelect* call, void* stream) {
  const SaleCudaGrid& grid = call->grid;
  const Blocks blocks(grid);
  const int count = blocks.query_blocks();
  Launch launch{};
  launch.call = *call;
  const bool paged = call->key_codes.page_table != nullptr;
  launch.box_tokens = paged ? kKeyBlock : kTileKeys / kCluster;
  const int made = make_tensor_map(&launch.codes, call->key_codes, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, grid.head_dim,
                                   grid.kv_heads, grid.head_dim, launch.box_tokens,
                                   grid.head_dim == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
  if (made != 0) return made;
  for (int head = 0; head < grid.heads; ++head) launch.strides[head] = static_cast<uint8_t>(call->strides[head]);
  const int group = grid.heads / grid.kv_heads;
  const int64_t tail_start = call->unstrided_from / grid.query_block - blocks.first_query_block;
  const int tail = static_cast<int>(tail_start < 0 ? 0 : tail_start > count ? count : tail_start);
  for (const int stride : {1, 2, 4}) {
    int most = 0;
    for (int kv_head = 0; kv_head < grid.kv_heads; ++kv_head) {
      int members = 0;
      for (int i = 0; i < group; ++i) members += call->strides[kv_head * group + i] == stride;
      most = members > most ? members : most;
    }
    if (most == 0) continue;
    launch.head_stride = stride;
    // Runs of query blocks with the same effective stride: an odd first or last one, the middle, the prompt's tail.
    for (int index = 0; index < count;) {
      const auto effective = [&](int i) { return i >= tail || !has_voter(blocks, i, stride) ? 1 : stride; };
      int end = index + 1;
      while (end < count && effective(end) == effective(index)) ++end;
      launch.first_block = index;
      launch.blocks = end - index;
      launch.stride = effective(index);
      const int status = grid.head_dim == 128 ? run<128>(launch, most, static_cast<cudaStream_t>(stream))
                                              : run<64>(launch, most, static_cast<cudaStream_t>(stream));
      if (status != cudaSuccess) return status;
      index = end;
    }
  }
  return cudaSuccess;
}

// Selection on sm_90a, bit-identical to `select.py` for 8-bit codes: wgmma s8, one max per (row, 32 keys), one compare.
//
// One CTA: three consumer warpgroups of two units (64 voting rows) each, the heads of a KV head first, then other rows, and
// one producer warp that feeds tiles of 128 keys by the copy engine. A warpgroup multiplies its units with a tile one after
// the other, and decides for one while the tensor cores are at the other. Query codes live in registers as wgmma's A operand.
// A warp's 16 voting rows lie in one query block, so a warp takes whole decisions, gathers them into mask words
// (8 tiles each) and merges these with the block's other warps by atomicOr.
//
// Two CTAs are a cluster and share the tiles: each fetches half of a tile for both.
//
// Barriers: full[s], one arrival and the tile's bytes; empty[s], one arrival a consumer warp of the cluster.
// Shared memory: kStages tiles of 128 keys x head_dim bytes (64 KiB at head_dim 128), 128- or 64-byte swizzle.
#include "../launch.cuh"
#include "../layout.cuh"
#include "../select_work.cuh"
#include "ptx.cuh"
#include "tensor_map.cuh"
#include "wgmma.cuh"

namespace sale::cuda {
namespace {

constexpr int kWarpgroups = 3;
constexpr int kWarpgroupUnits = 2;
constexpr int kCtaUnits = kWarpgroups * kWarpgroupUnits;
constexpr int kStages = 4;
constexpr int kCluster = 2;  // CTAs that share tiles of keys, each fetching its part for all
constexpr int kThreads = 128 * (kWarpgroups + 1);

struct Launch : SelectLaunch<SaleCudaSelect> {
  CUtensorMap codes;
  int box_tokens;
};

template <int kDim>
struct Shared {
  alignas(1024) int8_t keys[kStages][kTileKeys * kDim];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  int first_tile, end_tile;  // of keys; here rather than in registers, which the setting-up of a role needs
};

// Where a box of keys lies. Blocks past the last one: nobody looks at them; their page exists.
__device__ __forceinline__ Place place_in(const Launch& launch, const Work& work, int token, int last) {
  const SaleCudaTokens& codes = launch.call.key_codes;
  if (codes.page_table == nullptr) return {work.batch, token};
  return place_of(codes, work.batch, min(token, last * kKeyBlock / launch.box_tokens * launch.box_tokens));
}

// One warp, of which a lane moves keys; the others stay with it, for a warp in two places runs slowly in both.
template <int kDim>
__device__ __forceinline__ void produce(const Launch& launch, const Work& work, Shared<kDim>& shared) {
  const int first_tile = shared.first_tile, end_tile = shared.end_tile;
  const int last = static_cast<int>((launch.call.grid.offset + launch.call.grid.rows - 1) / kKeyBlock);
  constexpr int kShare = kTileKeys / kCluster;
  const int first_key = static_cast<int>(blockIdx.x) % kCluster * kShare;
  for (int tile = first_tile; tile < end_tile; ++tile) {
    const int turn = tile - first_tile, stage = turn % kStages;
    Place place = place_in(launch, work, tile * kTileKeys + first_key, last);  // while the stage is still in use
    barrier_wait(&shared.empty[stage], (turn / kStages & 1) ^ 1);
    if (threadIdx.x % 32 != 0) continue;
    barrier_expect(&shared.full[stage], kTileKeys * kDim);
#pragma unroll 1
    for (int key = first_key; key < first_key + kShare; key += launch.box_tokens) {
      if (key != first_key) place = place_in(launch, work, tile * kTileKeys + key, last);
      tensor_load_multicast(shared.keys[stage] + key * kDim, &launch.codes, &shared.full[stage], 0,
                            static_cast<int>(place.token), work.kv_head, static_cast<int>(place.unit),
                            (1 << kCluster) - 1);
    }
  }
  __syncwarp();
}

// One warp's voting rows: which query block they decide for, and this thread's two rows (g and g + 8 of wgmma's layout).
template <int kDim>
struct Voters {
  uint32_t codes[kDim / 32][4];
  float thresholds[2];
  uint32_t* words = nullptr;  // null: nobody votes
  int selectable_end = 0;

  __device__ Voters(const Launch& launch, const Work& work, int unit, int warp, int lane) {
    const Part part(launch, work, unit, warp);
    if (!part.votes()) return;
    const SaleCudaSelect& call = launch.call;
    load_part<kDim>(call, part, codes, thresholds);
    selectable_end = Blocks(call.grid).selectable_end(part.index);
    words = call.words + part.block * call.mask_words;
  }
};

// Largest sums by (block, row) of a thread's share of a tile.
struct Maxima {
  int top[kTileBlocks][2];

  __device__ __forceinline__ void take(const int32_t (&sums)[64]) {
#pragma unroll
    for (int block = 0; block < kTileBlocks; ++block)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t* s = sums + block * 16 + half * 2;
        top[block][half] =
            max(__vimax3_s32(__vimax3_s32(__vimax3_s32(s[0], s[1], s[4]), s[5], s[8]), s[9], s[12]), s[13]);
      }
  }
  // Keeps what follows from the maxima behind this place in the program.
  __device__ __forceinline__ void pin() {
#pragma unroll
    for (int block = 0; block < kTileBlocks; ++block)
      asm volatile("" : "+r"(top[block][0]), "+r"(top[block][1])::"memory");
  }
};

// Decisions of a warp's rows, a mask word at a time; lanes keep their own bits until a word is whole.
template <int kDim>
struct Decisions {
  const Launch& launch;
  const Work& work;
  const int end_tile;
  const int lane = threadIdx.x % 32;
  uint32_t words[kWarpgroupUnits] = {};
  float scale, next_scale;  // of block `lane` of this mask word, and of the next

  __device__ __forceinline__ Decisions(const Launch& l, const Work& w, int first_tile, int end)
      : launch(l), work(w), end_tile(end) {
    scale = load(first_tile / kWordTiles);
    next_scale = load(first_tile / kWordTiles + 1);
  }
  __device__ __forceinline__ float load(int index) const {
    const int last = static_cast<int>((launch.call.grid.offset + launch.call.grid.rows - 1) / kKeyBlock);
    return *token_at<const float>(launch.call.key_scales, work.batch, work.kv_head, min(index * 32 + lane, last));
  }
  // Units take tiles in turns, the last unit last.
  template <int kUnit>
  __device__ __forceinline__ void take(const Maxima& maxima, const Voters<kDim>& voters, int tile) {
    uint32_t bits = 0;
#pragma unroll
    for (int block = 0; block < kTileBlocks; ++block) {
      const float c = __shfl_sync(0xffffffffu, scale, tile % kWordTiles * kTileBlocks + block);
      bool passes = false;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        passes |= !(__fmul_rn(static_cast<float>(maxima.top[block][half]), c) <= voters.thresholds[half]);
      bits |= passes ? 1u << block : 0u;
    }
    words[kUnit] |= bits << (tile % kWordTiles * kTileBlocks);
    if (tile % kWordTiles != kWordTiles - 1 && tile != end_tile - 1) return;
    write<kUnit>(voters, tile / kWordTiles);
    if (kUnit < kWarpgroupUnits - 1) return;
    scale = next_scale;
    next_scale = load(tile / kWordTiles + 2);
  }
  template <int kUnit>
  __device__ __forceinline__ void write(const Voters<kDim>& voters, int index) {
    const int first = index * 32;
    uint32_t word = __reduce_or_sync(0xffffffffu, words[kUnit]);
    word &= bits_below(voters.selectable_end - first) & ~bits_below(launch.call.grid.sink_blocks - first);
    if (lane == 0 && word != 0 && voters.words != nullptr) atomicOr(voters.words + index, word);
    words[kUnit] = 0;
  }
};

template <int kDim>
__device__ __forceinline__ void multiply(int32_t (&sums)[64], const Voters<kDim>& voters, uint64_t keys) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDim / 32; ++step) wgmma_s8_n128(sums, voters.codes[step], moved(keys, step * 32), step > 0);
  wgmma_commit();
}

template <int kDim>
__device__ __forceinline__ void consume(const Launch& launch, const Work& work, Shared<kDim>& shared, int warpgroup) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const int first_tile = shared.first_tile, end_tile = shared.end_tile;
  const int unit = work.first_unit + warpgroup * kWarpgroupUnits;
  const Voters<kDim> first(launch, work, unit, warp, lane), second(launch, work, unit + 1, warp, lane);
  Decisions<kDim> decisions(launch, work, first_tile, end_tile);
  constexpr int kSwizzle = kDim == 128 ? 1 : 2;
  const uint64_t first_keys = matrix_descriptor(shared.keys[0], 16, 8 * kDim, kSwizzle);
  Maxima first_maxima, second_maxima;
  for (int tile = first_tile; tile < end_tile; ++tile) {
    const int turn = tile - first_tile, stage = turn % kStages;
    int32_t sums[64];
    barrier_wait(&shared.full[stage], turn / kStages & 1);
    const uint64_t keys = moved(first_keys, uniform(stage) * (kTileKeys * kDim));
    multiply<kDim>(sums, first, keys);
    if (tile > first_tile) {
      second_maxima.pin();
      decisions.template take<1>(second_maxima, second, tile - 1);
    }
    wgmma_wait<0>();
    first_maxima.take(sums);
    multiply<kDim>(sums, second, keys);
    first_maxima.pin();
    decisions.template take<0>(first_maxima, first, tile);
    wgmma_wait<0>();
    if (lane < kCluster) barrier_arrive_at(&shared.empty[stage], lane);
    second_maxima.take(sums);
  }
  decisions.template take<1>(second_maxima, second, end_tile - 1);
}

template <int kDim>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)
    select_s8(const __grid_constant__ Launch launch) {
  extern __shared__ uint8_t memory[];
  Shared<kDim>& shared = *reinterpret_cast<Shared<kDim>*>(aligned(memory));
  const Work work(launch, kCluster, kCtaUnits);
  if (work.first_tile >= work.end_tile) return;  // the whole cluster
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
    registers_down<32>();  // 3 x 160 + 32 = 4 x 128: more than the launch had would wait forever
    if (threadIdx.x < 128 * kWarpgroups + 32) produce<kDim>(launch, work, shared);
    cluster_sync();  // until then the other CTA may write here
  } else {
    registers_up<160>();
    consume<kDim>(launch, work, shared, warpgroup);
    cluster_sync();
  }
}

template <int kDim>
int run(const Launch& launch, int most_members, cudaStream_t stream) {
  const size_t bytes = sizeof(Shared<kDim>) + 1024;
  if (const cudaError_t allowed = allow_shared_memory<select_s8<kDim>>(bytes); allowed != cudaSuccess) return allowed;
  Launch split = launch;
  const dim3 blocks = select_ctas(split, most_members, kCluster, kCtaUnits);
  select_s8<kDim><<<blocks, kThreads, bytes, stream>>>(split);
  return cudaGetLastError();
}

}  // namespace
}  // namespace sale::cuda

using namespace sale::cuda;

extern "C" int32_t sale_cuda_select(const SaleCudaSelect* call, void* stream) {
  const SaleCudaGrid& grid = call->grid;
  Launch launch{};
  launch.call = *call;
  const bool paged = call->key_codes.page_table != nullptr;
  constexpr int kShare = kTileKeys / kCluster;
  launch.box_tokens = paged && call->key_codes.unit_tokens % kShare != 0 ? kKeyBlock : kShare;
  const int made = make_tensor_map(&launch.codes, call->key_codes, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, grid.head_dim,
                                   grid.kv_heads, grid.head_dim, launch.box_tokens,
                                   grid.head_dim == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
  if (made != 0) return made;
  const auto at = static_cast<cudaStream_t>(stream);
  return run_select(launch, at, [&](const Launch& part, int most_members) {
    return grid.head_dim == 128 ? run<128>(part, most_members, at) : run<64>(part, most_members, at);
  });
}

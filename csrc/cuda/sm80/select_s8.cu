// Selection from sm_80 on, bit-identical to `select.py` for 8-bit codes: mma.sync s8, one max per (row, 32 keys), one compare.
//
// One CTA: eight warps of 32 voting rows (four units, see select_work.cuh), which share tiles of 128 keys. Query codes
// live in registers as two A operands a warp: every B operand from shared memory serves twice, else shared memory is the
// limit. A lane gathers its own decisions into mask words; a word's lanes are joined once in 32 blocks.
//
// Barriers: __syncthreads once a tile, after which the tile before may be overwritten.
// Shared memory: kStages tiles of 128 keys x head_dim bytes and 4 scales, 48 KiB at head_dim 128; two CTAs a multiprocessor.
#include "../code_tiles.cuh"
#include "../launch.cuh"
#include "../mma.cuh"
#include "../select_work.cuh"

namespace sale::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kParts = kUnits * kUnitRows / kPartRows / kWarps;  // of a warp
constexpr int kUnitWarps = kWarps / kUnits;
constexpr int kStages = 3;

using Launch = SelectLaunch<SaleCudaSelect>;

template <int kDim>
struct Shared {
  CodeTile<kDim, kTileBlocks> tiles[kStages];
};

// One part's voting rows: this thread's two (g and g + 8), and what they have decided of the current mask word.
template <int kDim>
struct Voters {
  uint32_t codes[kDim / 32][4] = {};
  float thresholds[2] = {INFINITY, INFINITY};
  uint32_t* words = nullptr;  // null: nobody votes
  int selectable_end = 0;
  uint32_t word = 0;

  __device__ __forceinline__ void load(const Launch& launch, const Work& work, int unit, int number) {
    const Part part(launch, work, unit, number);
    if (!part.votes()) return;
    const SaleCudaSelect& call = launch.call;
    load_part<kDim>(call, part, codes, thresholds);
    selectable_end = Blocks(call.grid).selectable_end(part.index);
    words = call.words + part.block * call.mask_words;
  }

  // Products with the 32 keys of a block, by n-tiles of 8 keys; this lane's bit of the word if any of its scores passes.
  __device__ __forceinline__ void judge(const int32_t (&sums)[4][4], float scale, uint32_t bit) {
    bool passes = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int32_t top = max(sums[0][2 * half], sums[0][2 * half + 1]);
#pragma unroll
      for (int n = 1; n < 4; ++n) top = max(top, max(sums[n][2 * half], sums[n][2 * half + 1]));
      passes |= !(__fmul_rn(static_cast<float>(top), scale) <= thresholds[half]);
    }
    if (passes) word |= bit;
  }

  __device__ __forceinline__ void publish(int at, int sink) {
    const uint32_t all = __reduce_or_sync(0xffffffffu, word) & bits_below(selectable_end - 32 * at) & ~bits_below(sink - 32 * at);
    if (threadIdx.x % 32 == 0 && all != 0 && words != nullptr) atomicOr(words + at, all);
    word = 0;
  }
};

template <int kDim>
__device__ __forceinline__ void judge_tile(Voters<kDim> (&voters)[kParts], const CodeTile<kDim, kTileBlocks>& tile,
                                           int first_bit) {
#pragma unroll 1
  for (int block = 0; block < kTileBlocks; ++block) {
    int32_t sums[kParts][4][4] = {};
#pragma unroll
    for (int step = 0; step < kDim / 32; step += 2)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b[4];
        load_codes(b, tile, block * kKeyBlock + n * 8, step * 32);
#pragma unroll
        for (int part = 0; part < kParts; ++part) multiply_s8(sums[part][n], voters[part].codes[step], b[0], b[1]);
#pragma unroll
        for (int part = 0; part < kParts; ++part) multiply_s8(sums[part][n], voters[part].codes[step + 1], b[2], b[3]);
      }
    const float scale = tile.scales[block];
#pragma unroll
    for (int part = 0; part < kParts; ++part) voters[part].judge(sums[part], scale, 1u << (first_bit + block));
  }
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, 2) select_s8(const __grid_constant__ Launch launch) {
  extern __shared__ uint4 memory[];
  Shared<kDim>& shared = *reinterpret_cast<Shared<kDim>*>(memory);
  const Work work(launch);
  if (work.first_tile >= work.end_tile) return;
  const int warp = threadIdx.x / 32, sink = launch.call.grid.sink_blocks;

  CodeLoader<kDim, kTileBlocks, kThreads> loader(launch.call.key_codes, launch.call.key_scales, work.batch, work.kv_head,
                                                 work.end_block);
  loader.look_up(work.first_tile);
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) {
    if (work.first_tile + i < work.end_tile) loader.load(shared.tiles[i], work.first_tile + i + 1);
    copy_commit();
  }
  Voters<kDim> voters[kParts];
  int end = 0;  // no block from here on is for this warp
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    voters[part].load(launch, work, work.first_unit + warp / kUnitWarps, warp % kUnitWarps * kParts + part);
    end = max(end, voters[part].selectable_end);
  }

  int stage = 0;
  for (int tile = work.first_tile; tile < work.end_tile; ++tile) {
    copy_wait<kStages - 2>();
    __syncthreads();
    const int next = tile + kStages - 1;
    if (next < work.end_tile) loader.load(shared.tiles[stage == 0 ? kStages - 1 : stage - 1], next + 1);
    copy_commit();
    if (tile * kTileBlocks < end) judge_tile<kDim>(voters, shared.tiles[stage], tile % kWordTiles * kTileBlocks);
    if (tile % kWordTiles == kWordTiles - 1 || tile == work.end_tile - 1)
#pragma unroll
      for (int part = 0; part < kParts; ++part) voters[part].publish(tile / kWordTiles, sink);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  copy_wait<0>();
}

template <int kDim>
int run(const Launch& launch, int most_members, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kDim>);
  if (const cudaError_t allowed = allow_shared_memory<select_s8<kDim>>(kBytes); allowed != cudaSuccess) return allowed;
  Launch split = launch;
  const dim3 blocks = select_ctas(split, most_members);
  select_s8<kDim><<<blocks, kThreads, kBytes, stream>>>(split);
  return cudaGetLastError();
}

}  // namespace
}  // namespace sale::cuda

extern "C" int32_t sale_cuda_select(const SaleCudaSelect* call, void* stream) {
  using namespace sale::cuda;
  Launch launch{};
  launch.call = *call;
  const auto at = static_cast<cudaStream_t>(stream);
  return run_select(launch, at, [&](const Launch& part, int most_members) {
    return call->grid.head_dim == 128 ? run<128>(part, most_members, at) : run<64>(part, most_members, at);
  });
}

// Selection for 4-bit codes on any GPU (`select.py`): m16n8k64 s4 before sm_90, which only emulates it; there m16n8k32 s8.
//
// One CTA: eight warps of 32 voting rows (four units, see select_work.cuh), which share tiles of 64 keys: their codes,
// one a byte, and the exact keys. First all threads make the corrections g = (query block mean) . (key - centre), plain
// float32, a key a thread, for each query block that the CTA decides for; then each warp multiplies codes, and each score
// is scaled and corrected with one rounding a step. Two codes share a byte in registers only: along k, both operands
// have the order that this gives.
// Sums start at the integer that is the float 1.5 * 2^23, so that they come out as floats, exact, without a conversion.
//
// Barriers: __syncthreads twice a tile: the tile is there and the corrections before are used up; corrections are there.
// Shared memory at head_dim 128: kStages tiles of codes (8 KiB) and keys (17 KiB), means (8 KiB), corrections (4 KiB), 62 KiB.
#include "code_tiles.cuh"
#include "mma.cuh"
#include "select_work.cuh"

namespace sale::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kParts = kUnits * kUnitRows / kPartRows / kWarps;  // of a warp
constexpr int kUnitWarps = kWarps / kUnits;
constexpr int kUnitParts = kUnitRows / kPartRows;
constexpr int kStages = 2;
constexpr int kPairBlocks = 2;  // key blocks of a tile
constexpr int kPairKeys = kPairBlocks * kKeyBlock;
constexpr int kPad = 8;  // spreads keys over the banks
constexpr int32_t kMagic = 0x4b400000;

static_assert(kThreads / kPairKeys == kUnits, "a thread corrects one key for one unit");

using Launch = SelectLaunch<SaleCudaSelect4>;

template <class Element, int kDim>
struct Shared {
  CodeTile<kDim, kPairBlocks> codes[kStages];
  alignas(16) Element keys[kStages][kPairKeys][kDim + kPad];
  alignas(16) float means[kUnits][kUnitParts][kDim];
  alignas(16) float centre[kDim];
  alignas(16) float corrections[kUnits][kUnitParts][kPairKeys];  // of the unit's query blocks
};

// Query blocks that a unit's rows lie in: 1, 2 or 4; part p lies in the (p * count / 4)-th of them.
__device__ __forceinline__ int unit_blocks(const Launch& launch) {
  const int per_block = launch.call.grid.query_block / launch.stride;
  return per_block < kUnitRows ? kUnitRows / per_block : 1;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kPacked = true;
#else
constexpr bool kPacked = false;
#endif

// One part's voting rows: this thread's two (g and g + 8), and what they have decided of the current mask word.
template <int kDim>
struct Voters {
  uint32_t codes[kDim / (kPacked ? 64 : 32)][4] = {};
  float thresholds[2] = {INFINITY, INFINITY};
  float scales[2] = {};
  uint32_t* words = nullptr;  // null: nobody votes
  int selectable_end = 0;
  uint32_t word = 0;

  // Codes of one piece of 16 bytes in the lower nibbles, of the next in the upper ones.
  __device__ __forceinline__ static uint32_t packed(uint32_t first, uint32_t second) {
    return (first & 0x0f0f0f0fu) | (second << 4 & 0xf0f0f0f0u);
  }

  // Also brings the mean of the part's query block, as do the block's other parts.
  __device__ __forceinline__ void load(const Launch& launch, const Work& work, int unit, int number, float* mean) {
    const Part part(launch, work, unit, number);
    if (!part.votes()) return;
    const SaleCudaSelect4& call = launch.call;
    const int lane = threadIdx.x % 32;
    for (int i = lane; i < kDim; i += 32) mean[i] = call.block_means[part.block * kDim + i];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = part.row(lane / 4 + 8 * half);
      thresholds[half] = call.thresholds[row];
      scales[half] = call.query_scales[row];
      const uint32_t* source = reinterpret_cast<const uint32_t*>(call.query_codes + row * kDim) + lane % 4;
#pragma unroll
      for (int piece = 0; piece < kDim / 16; piece += kPacked ? 2 : 1) {
        uint32_t(&a)[4] = codes[piece / (kPacked ? 4 : 2)];
        if constexpr (kPacked)
          a[half + piece % 4] = packed(source[4 * piece], source[4 * piece + 4]);
        else
          a[half + piece % 2 * 2] = source[4 * piece];
      }
    }
    selectable_end = Blocks(call.grid).selectable_end(part.index);
    words = call.words + part.block * call.mask_words;
  }

  // C += the 64 codes from `column` on, as `load_codes` brings them.
  __device__ __forceinline__ void multiply(int32_t (&sums)[4], int column, const uint32_t (&b)[4]) const {
    if constexpr (kPacked) {
      multiply_s4(sums, codes[column / 64], packed(b[0], b[1]), packed(b[2], b[3]));
    } else {
      multiply_s8(sums, codes[column / 32], b[0], b[1]);
      multiply_s8(sums, codes[column / 32 + 1], b[2], b[3]);
    }
  }

  // Products with the 32 keys of a block, by n-tiles of 8 keys, and the keys' corrections.
  __device__ __forceinline__ void judge(const int32_t (&sums)[4][4], float key_scale, const float* corrections, uint32_t bit) {
    const float pair_scales[2] = {__fmul_rn(scales[0], key_scale), __fmul_rn(scales[1], key_scale)};
    bool passes = false;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float2 both = *reinterpret_cast<const float2*>(corrections + n * 8 + threadIdx.x % 4 * 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float product = __fsub_rn(__int_as_float(sums[n][i]), __int_as_float(kMagic));
        const float estimate = __fadd_rn(__fmul_rn(product, pair_scales[i / 2]), i % 2 == 0 ? both.x : both.y);
        passes |= !(estimate <= thresholds[i / 2]);
      }
    }
    if (passes) word |= bit;
  }

  __device__ __forceinline__ void publish(int at, int sink) {
    const uint32_t all = __reduce_or_sync(0xffffffffu, word) & bits_below(selectable_end - 32 * at) & ~bits_below(sink - 32 * at);
    if (threadIdx.x % 32 == 0 && all != 0 && words != nullptr) atomicOr(words + at, all);
    word = 0;
  }
};

// Brings the exact keys of a tile; blocks from `end` on come as zeros.
template <class Element, int kDim>
__device__ __forceinline__ void load_keys(Element (&target)[kPairKeys][kDim + kPad], const SaleCudaTokens& keys, int batch,
                                          int kv_head, int tile, int end) {
  constexpr int kPieces = kDim / 8, kBlockThreads = kThreads / kPairBlocks, kRowsAtOnce = kBlockThreads / kPieces;
  const int slot = threadIdx.x / kBlockThreads, column = threadIdx.x % kPieces * 8;
  const int block = tile * kPairBlocks + slot;
  const BlockPlace place = place_of_block(keys, batch, min(block, end - 1));
  const int row = threadIdx.x % kBlockThreads / kPieces;
  const Element* source = static_cast<const Element*>(keys.data) + place.unit * keys.unit_stride + kv_head * keys.head_stride +
                          (place.token + row) * keys.token_stride + column;
#pragma unroll
  for (int i = 0; i < kKeyBlock; i += kRowsAtOnce) {
    copy_async(&target[slot * kKeyBlock + row + i][column], source, block < end);
    source += kRowsAtOnce * keys.token_stride;
  }
}

// A thread's key with the means of its unit's query blocks.
template <int kBlocks, class Element, int kDim>
__device__ __forceinline__ void correct(Shared<Element, kDim>& shared, int stage) {
  const int key = threadIdx.x % kPairKeys, unit = threadIdx.x / kPairKeys;
  float sums[kBlocks] = {};
#pragma unroll 2
  for (int column = 0; column < kDim; column += 8) {
    float x[8];
    unpack_eight<Element>(x, *reinterpret_cast<const uint4*>(&shared.keys[stage][key][column]));
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __fsub_rn(x[i], shared.centre[column + i]);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[block] = fmaf(shared.means[unit][block][column + i], x[i], sums[block]);
  }
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) shared.corrections[unit][block][key] = sums[block];
}

template <class Element, int kDim>
__device__ __forceinline__ void judge_tile(Voters<kDim> (&voters)[kParts], const Shared<Element, kDim>& shared, int stage,
                                           const float* const (&corrections)[kParts], int first_bit) {
#pragma unroll 1
  for (int block = 0; block < kPairBlocks; ++block) {
    int32_t sums[kParts][4][4];
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[part][n][i] = kMagic;
#pragma unroll
    for (int column = 0; column < kDim; column += 64)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b[4];
        load_codes(b, shared.codes[stage], block * kKeyBlock + n * 8, column);
#pragma unroll
        for (int part = 0; part < kParts; ++part) voters[part].multiply(sums[part][n], column, b);
      }
    const float scale = shared.codes[stage].scales[block];
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      voters[part].judge(sums[part], scale, corrections[part] + block * kKeyBlock, 1u << (first_bit + block));
  }
}

template <class Element, int kDim>
__global__ void __launch_bounds__(kThreads, 2) select_4bit(const __grid_constant__ Launch launch) {
  extern __shared__ uint4 memory[];
  auto& shared = *reinterpret_cast<Shared<Element, kDim>*>(memory);
  const Work work(launch);
  if (work.first_tile >= work.end_tile) return;
  const SaleCudaSelect4& call = launch.call;
  const int warp = threadIdx.x / 32, unit = warp / kUnitWarps, blocks_a_unit = unit_blocks(launch);
  constexpr int kHalves = kTileBlocks / kPairBlocks;  // tiles here of a tile of Work
  const int first_tile = work.first_tile * kHalves;
  const int end_tile = min(work.end_tile * kHalves, (work.end_block + kPairBlocks - 1) / kPairBlocks);

  CodeLoader<kDim, kPairBlocks, kThreads> loader(call.key_codes, call.key_scales, work.batch, work.kv_head, work.end_block);
  loader.look_up(first_tile);
  const auto load = [&](int tile) {
    if (tile < end_tile) {
      loader.load(shared.codes[tile % kStages], tile + 1);
      load_keys<Element, kDim>(shared.keys[tile % kStages], call.keys, work.batch, work.kv_head, tile, work.end_block);
    }
    copy_commit();
  };
  load(first_tile);
  const int64_t plane = static_cast<int64_t>(work.batch) * call.grid.kv_heads + work.kv_head;
  if (threadIdx.x < kDim) shared.centre[threadIdx.x] = call.centre[plane * kDim + threadIdx.x];
  Voters<kDim> voters[kParts];
  const float* corrections[kParts];
  int end = 0;  // no block from here on is for this warp
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int number = warp % kUnitWarps * kParts + part, its_block = number * blocks_a_unit / kUnitParts;
    voters[part].load(launch, work, work.first_unit + unit, number, shared.means[unit][its_block]);
    corrections[part] = shared.corrections[unit][its_block];
    end = max(end, voters[part].selectable_end);
  }

  constexpr int kWordPairs = 32 / kPairBlocks;
  for (int tile = first_tile; tile < end_tile; ++tile) {
    copy_wait<0>();
    __syncthreads();
    load(tile + 1);
    if (blocks_a_unit == 1)
      correct<1>(shared, tile % kStages);
    else if (blocks_a_unit == 2)
      correct<2>(shared, tile % kStages);
    else
      correct<4>(shared, tile % kStages);
    __syncthreads();
    if (tile * kPairBlocks < end)
      judge_tile<Element, kDim>(voters, shared, tile % kStages, corrections, tile % kWordPairs * kPairBlocks);
    if (tile % kWordPairs == kWordPairs - 1 || tile == end_tile - 1)
#pragma unroll
      for (int part = 0; part < kParts; ++part) voters[part].publish(tile / kWordPairs, call.grid.sink_blocks);
  }
}

template <class Element, int kDim>
int run(const Launch& launch, int most_members, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<Element, kDim>);
  const cudaError_t raised =
      cudaFuncSetAttribute(select_4bit<Element, kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (raised != cudaSuccess) return raised;
  Launch split = launch;
  const dim3 blocks = select_ctas(split, most_members);
  select_4bit<Element, kDim><<<blocks, kThreads, kBytes, stream>>>(split);
  return cudaGetLastError();
}

template <class Element>
int run(const SaleCudaSelect4& call, cudaStream_t stream) {
  Launch launch{};
  launch.call = call;
  return run_select(launch, stream, [&](const Launch& part, int most_members) {
    return call.grid.head_dim == 128 ? run<Element, 128>(part, most_members, stream)
                                     : run<Element, 64>(part, most_members, stream);
  });
}

}  // namespace
}  // namespace sale::cuda

extern "C" int32_t sale_cuda_select_4bit(const SaleCudaSelect4* call, void* stream) {
  const auto at = static_cast<cudaStream_t>(stream);
  return call->grid.dtype == SALE_CUDA_F16 ? sale::cuda::run<__half>(*call, at) : sale::cuda::run<__nv_bfloat16>(*call, at);
}

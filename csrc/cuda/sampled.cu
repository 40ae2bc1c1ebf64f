// Adds to the sums of voting rows what a sample of the keys between sink and local ones says of all of them (`sampled.py`),
// and makes their thresholds: mma.sync s8 on the codes that selection compares, an exponential a product.
//
// One CTA: eight warps of 32 voting rows (four units, see select_work.cuh), which share tiles of 128 sampled keys. Query
// codes live in registers as two A operands a warp, as in sm80/select_s8.cu.
//
// Barriers: __syncthreads once a tile, after which the tile before may be overwritten.
// Shared memory: kStages tiles of 128 keys x head_dim bytes and a scale a key, 49.5 KiB at head_dim 128.
#include "code_tiles.cuh"
#include "launch.cuh"
#include "log_sum_exp.cuh"
#include "mma.cuh"
#include "select_work.cuh"

namespace sale::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kParts = kUnits * kUnitRows / kPartRows / kWarps;  // of a warp
constexpr int kUnitWarps = kWarps / kUnits;
constexpr int kStages = 3;
constexpr int kStepKeys = 32;  // of a tile, whose products a warp holds at a time

using Launch = SelectLaunch<SaleCudaSampled>;

// Sampled keys stand at stride / 2 + i * stride; number 0 is the first of them that is no sink key.
struct Sample {
  int stride, skipped;

  __device__ __forceinline__ explicit Sample(const SaleCudaSampled& call) : stride(static_cast<int>(call.sample_stride)) {
    const int sink = call.grid.sink_blocks * kKeyBlock - stride / 2;
    skipped = sink > 0 ? (sink + stride - 1) / stride : 0;
  }
  __device__ __forceinline__ int position(int number) const { return (skipped + number) * stride + stride / 2; }
  // Those before the end of the selectable key blocks.
  __device__ __forceinline__ int count(int end_block) const {
    return max(0, (end_block * kKeyBlock - stride / 2 + stride - 1) / stride - skipped);
  }
};

template <int kDim>
struct Tile {
  alignas(128) int8_t keys[kTileKeys * kDim];
  alignas(16) float scales[kTileKeys];
};

// One thread's share of a tile: pieces of 16 bytes of every kAtOnce-th key; absent keys come as zeros.
template <int kDim>
__device__ __forceinline__ void load_tile(Tile<kDim>& tile, const SaleCudaSampled& call, const Work& work,
                                          const Sample& sample, int first, int count) {
  constexpr int kPieces = kDim / 16, kAtOnce = kThreads / kPieces;
  const int piece = threadIdx.x % kPieces;
#pragma unroll 1
  for (int key = threadIdx.x / kPieces; key < kTileKeys; key += kAtOnce) {
    const bool present = first + key < count;
    const int position = sample.position(present ? first + key : 0);
    const BlockPlace place = place_of_block(call.key_codes, work.batch, position / kKeyBlock);
    const int8_t* source = static_cast<const int8_t*>(call.key_codes.data) + place.unit * call.key_codes.unit_stride +
                           work.kv_head * call.key_codes.head_stride +
                           (place.token + position % kKeyBlock) * call.key_codes.token_stride + piece * 16;
    copy_async(tile.keys + swizzled<kDim>(key, piece), source, present);
    if (piece != 0) continue;
    const BlockPlace at = place_of_scale(call.key_scales, work.batch, position / kKeyBlock);
    const float* scale = static_cast<const float*>(call.key_scales.data) + at.unit * call.key_scales.unit_stride +
                         work.kv_head * call.key_scales.head_stride + at.token * call.key_scales.token_stride;
    copy_async_word(&tile.scales[key], scale, present);
  }
}

// Sixteen voting rows: this thread's two (g and g + 8).
template <int kDim>
struct Rows {
  uint32_t codes[kDim / 32][4] = {};
  int row[2] = {-1, -1};  // in [batch, head, row], of which the codes alone would fill a GPU at 2^31; -1: not there
  int head = 0, count = 0;  // sampled keys that these rows see
  float scales[2] = {};     // from products, scaled by their key, to powers of two
  LogSumExp sums[2];

  __device__ __forceinline__ void load(const Launch& launch, const Work& work, const Sample& sample, int unit, int number) {
    const Part part(launch, work, unit, number);
    if (!part.votes()) return;
    load_part_codes<kDim>(launch.call.query_codes, part, codes);
    head = part.head;
    count = sample.count(Blocks(launch.call.grid).selectable_end(part.index));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int voter = static_cast<int>(threadIdx.x) % 32 / 4 + 8 * half;
      scales[half] = launch.call.query_scales[part.row(voter)] * launch.call.scale * kLog2E;
      if (voter >= part.low && voter < part.high) row[half] = static_cast<int>(part.row(voter));
    }
  }

  // Products with kStepKeys keys from `first` on, whose scales are `key_scales`.
  __device__ __forceinline__ void take(const int32_t (&products)[4][4], const float* key_scales, int first) {
    const int column = first + threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[8];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float2 scale = *reinterpret_cast<const float2*>(key_scales + n * 8 + threadIdx.x % 4 * 2);
        x[2 * n] = static_cast<float>(products[n][2 * half]) * scale.x;
        x[2 * n + 1] = static_cast<float>(products[n][2 * half + 1]) * scale.y;
        // Not by a factor: what cannot be judged must not show before its time.
        if (column + 8 * n >= count) x[2 * n] = -INFINITY;
        if (column + 8 * n + 1 >= count) x[2 * n + 1] = -INFINITY;
      }
      sums[half].take(x, scales[half]);
    }
  }

  __device__ __forceinline__ void write(const SaleCudaSampled& call) {
    const float more = __logf(static_cast<float>(call.sample_stride));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float far = sums[half].of_quad(scales[half], 0.0f) + more;
      if (threadIdx.x % 4 != 0 || row[half] < 0) continue;
      const float near = call.lse[row[half]];
      // Whichever is NaN shows.
      float lse = near >= far ? near + log1pf(expf(far - near)) : far + log1pf(expf(near - far));
      if (count == 0) lse = near;
      call.lse[row[half]] = lse;
      if (call.thresholds != nullptr)
        call.thresholds[row[half]] =
            __fdiv_rn(__fdiv_rn(__fadd_rn(call.log_tau[head], lse), call.scale), call.query_scales[row[half]]);
    }
  }
};

template <int kDim>
__device__ __forceinline__ void take_tile(Rows<kDim> (&rows)[kParts], const Tile<kDim>& tile, int first) {
#pragma unroll 1
  for (int key = 0; key < kTileKeys; key += kStepKeys) {
    int32_t products[kParts][4][4] = {};
#pragma unroll
    for (int step = 0; step < kDim / 32; step += 2)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b[4];
        const int lane = threadIdx.x % 32;
        load_matrices(b, tile.keys + swizzled<kDim>(key + n * 8 + lane % 8, step * 2 + lane / 8));
#pragma unroll
        for (int part = 0; part < kParts; ++part) multiply_s8(products[part][n], rows[part].codes[step], b[0], b[1]);
#pragma unroll
        for (int part = 0; part < kParts; ++part) multiply_s8(products[part][n], rows[part].codes[step + 1], b[2], b[3]);
      }
#pragma unroll
    for (int part = 0; part < kParts; ++part) rows[part].take(products[part], tile.scales + key, first + key);
  }
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, 2) sampled_sums(const __grid_constant__ Launch launch) {
  extern __shared__ uint4 memory[];
  Tile<kDim>* tiles = reinterpret_cast<Tile<kDim>*>(memory);
  const Work work(launch);
  if (work.first_unit >= work.tiles * work.members) return;
  const SaleCudaSampled& call = launch.call;
  const Sample sample(call);
  const int count = work.end_block > 0 ? sample.count(work.end_block) : 0;
  const int key_tiles = (count + kTileKeys - 1) / kTileKeys, warp = threadIdx.x / 32;
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < key_tiles) load_tile<kDim>(tiles[i], call, work, sample, i * kTileKeys, count);
    copy_commit();
  }
  Rows<kDim> rows[kParts];
  int most = 0;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    rows[part].load(launch, work, sample, work.first_unit + warp / kUnitWarps, warp % kUnitWarps * kParts + part);
    most = max(most, rows[part].count);
  }
  int stage = 0;
  for (int tile = 0; tile < key_tiles; ++tile) {
    copy_wait<kStages - 2>();
    __syncthreads();
    const int next = tile + kStages - 1;
    if (next < key_tiles)
      load_tile<kDim>(tiles[stage == 0 ? kStages - 1 : stage - 1], call, work, sample, next * kTileKeys, count);
    copy_commit();
    if (tile * kTileKeys < most) take_tile<kDim>(rows, tiles[stage], tile * kTileKeys);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  copy_wait<0>();
#pragma unroll
  for (int part = 0; part < kParts; ++part) rows[part].write(call);
}

template <int kDim>
int run(const Launch& launch, int most_members, cudaStream_t stream) {
  constexpr int kBytes = kStages * sizeof(Tile<kDim>);
  if (const cudaError_t allowed = allow_shared_memory<sampled_sums<kDim>>(kBytes); allowed != cudaSuccess) return allowed;
  Launch whole = launch;
  dim3 blocks = select_ctas(whole, most_members);
  blocks.x /= whole.segments;  // a row's sum is one CTA's
  whole.segments = 1;
  sampled_sums<kDim><<<blocks, kThreads, kBytes, stream>>>(whole);
  return cudaGetLastError();
}

}  // namespace
}  // namespace sale::cuda

extern "C" int32_t sale_cuda_sampled(const SaleCudaSampled* call, void* stream) {
  using namespace sale::cuda;
  Launch launch{};
  launch.call = *call;
  const auto at = static_cast<cudaStream_t>(stream);
  return run_votes(launch, [&](const Launch& part, int most_members) {
    return call->grid.head_dim == 128 ? run<128>(part, most_members, at) : run<64>(part, most_members, at);
  });
}

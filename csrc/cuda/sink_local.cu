// Per row, the log-sum-exp of scale * q . (k - centre) over sink and local keys (`sink_local.py`), by mma.sync bf16.
//
// One CTA: 64 rows of kHeads query heads of one KV head, a warp for 16 rows of one. All the tile's keys come into shared
// memory at once (up to kChunkBlocks blocks; longer windows take turns), so that warps wait for memory once. Products of
// bf16 inputs are exact in float32 sums, so the centre is taken off afterwards as q . centre, once a row.
// Shared memory: 9 blocks x 32 keys x (head_dim + 8) bf16, 77 KiB at head_dim 128; two CTAs a multiprocessor.
#include <cuda_bf16.h>

#include "layout.cuh"
#include "ptx.cuh"

namespace sale::cuda {
namespace {

constexpr int kHeadWarps = 4;
constexpr int kTileRows = 16 * kHeadWarps;
constexpr int kChunkBlocks = 9;  // sink 32, local 128, and the second half of a query block of 128
constexpr int kPad = 8;  // spreads the rows of a block over the banks

__device__ __forceinline__ float2 pair_of(uint32_t bits) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&bits));
}

// The key blocks of a tile: sink blocks, then local ones up to the diagonal.
struct Window {
  int sink, local, count;

  __device__ Window(const Blocks& blocks, int64_t first) {
    const int64_t whole = first + kTileRows, tile_end = whole < blocks.tokens ? whole : blocks.tokens;
    const int end = static_cast<int>((tile_end + kKeyBlock - 1) / kKeyBlock);
    const int index = static_cast<int>(first / blocks.query_block) - blocks.first_query_block;
    sink = min(blocks.sink_blocks, end);
    local = max(sink, blocks.local_start(index));
    count = sink + end - local;
  }
  __device__ __forceinline__ int block(int i) const { return i < sink ? i : local + i - sink; }
};

template <int kDim>
__device__ __forceinline__ void load_chunk(const SaleCudaSinkLocal& call, __nv_bfloat16 (*keys)[kDim + kPad], int batch,
                                           int kv_head, const Window& window, int first, int count, int64_t tokens) {
  constexpr int kPieces = kDim / 8;
  for (int i = threadIdx.x; i < count * kKeyBlock * kPieces; i += blockDim.x) {
    const int key = i / kPieces, column = i % kPieces * 8;
    const int64_t token = int64_t{window.block(first + key / kKeyBlock)} * kKeyBlock + key % kKeyBlock;
    const bool present = token < tokens;
    copy_async(&keys[key][column],
               token_at<const __nv_bfloat16>(call.keys, batch, kv_head, present ? token : tokens - 1) + column, present);
  }
  copy_commit();
  copy_wait<0>();
}

// Running log-sum-exp of one row, over this thread's columns; scores come in powers of two.
struct LogSumExp {
  float top = -3.0e38f, total = 0.0f;

  template <int kCount>
  __device__ __forceinline__ void take(const float (&x)[kCount]) {
    float most = top;
#pragma unroll
    for (int i = 0; i < kCount; ++i) most = fmaxf(most, x[i]);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += exp2_fast(x[i] - most);
    total = fmaf(total, exp2_fast(top - most), sum);
    top = most;
  }
  __device__ __forceinline__ float of_quad() {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const float other_top = __shfl_xor_sync(0xffffffffu, top, distance);
      const float other_total = __shfl_xor_sync(0xffffffffu, total, distance);
      const float most = fmaxf(top, other_top);
      total = total * exp2_fast(top - most) + other_total * exp2_fast(other_top - most);
      top = most;
    }
    return (top + log2f(total)) * 0.693147181f;
  }
};

template <int kDim, int kHeads>
__global__ void __launch_bounds__(32 * kHeadWarps * kHeads, 4 / kHeads) sink_local_bf16(const SaleCudaSinkLocal call) {
  extern __shared__ uint4 memory[];
  auto keys = reinterpret_cast<__nv_bfloat16(*)[kDim + kPad]>(memory);
  const Blocks blocks(call.grid);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, batch = blockIdx.z;
  const int head = blockIdx.y * kHeads + warp / kHeadWarps, kv_head = head / (call.grid.heads / call.grid.kv_heads);
  const int64_t first = (blocks.offset / kTileRows + blockIdx.x) * kTileRows;  // absolute position
  const int64_t position = first + warp % kHeadWarps * 16 + lane / 4;  // of this thread's first row; the other is 8 further
  const Window window(blocks, first);

  uint32_t query[kDim / 16][4];
  float shift[2] = {0.0f, 0.0f};  // q . centre
  const float* centre = call.centre + (static_cast<int64_t>(batch) * call.grid.kv_heads + kv_head) * kDim;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = min(max(static_cast<long long>(position + 8 * half - blocks.offset), 0LL),
                            static_cast<long long>(call.grid.rows - 1));
    const uint32_t* source = reinterpret_cast<const uint32_t*>(row_at<const __nv_bfloat16>(call.query, batch, head, row));
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step)
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int column = step * 16 + part * 8 + lane % 4 * 2;
        const uint32_t bits = source[column / 2];
        query[step][half + 2 * part] = bits;
        const float2 q = pair_of(bits);
        shift[half] = fmaf(q.x, centre[column], fmaf(q.y, centre[column + 1], shift[half]));
      }
    shift[half] += __shfl_xor_sync(0xffffffffu, shift[half], 1);
    shift[half] += __shfl_xor_sync(0xffffffffu, shift[half], 2);
  }

  LogSumExp sums[2];
  const float scale = call.scale * 1.44269504f;
  for (int chunk = 0; chunk < window.count; chunk += kChunkBlocks) {
    const int count = min(kChunkBlocks, window.count - chunk);
    if (chunk > 0) __syncthreads();
    load_chunk<kDim>(call, keys, batch, kv_head, window, chunk, count, blocks.tokens);
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      float scores[4][4] = {};
#pragma unroll
      for (int step = 0; step < kDim / 16; step += 2) {
        uint32_t b[4][4];
#pragma unroll
        for (int n = 0; n < 4; ++n)
          load_matrices(b[n], &keys[i * kKeyBlock + n * 8 + lane % 8][step * 16 + lane / 8 * 8]);
        // Four sums side by side: one product's latency hides behind the others.
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply_bf16(scores[n], query[step], b[n][0], b[n][1]);
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply_bf16(scores[n], query[step + 1], b[n][2], b[n][3]);
      }
      const int64_t block_start = int64_t{window.block(chunk + i)} * kKeyBlock, key = block_start + lane % 4 * 2;
      const bool crosses = block_start + kKeyBlock > first + warp % kHeadWarps * 16;  // some row of the warp sees not all
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = (scores[j / 2][2 * half + j % 2] - shift[half]) * scale;
        if (crosses) {
          const int visible = static_cast<int>(min(position + 8 * half - key, static_cast<int64_t>(64)));
#pragma unroll
          for (int j = 0; j < 8; ++j)
            if (j / 2 * 8 + j % 2 > visible) x[j] = -INFINITY;
        }
        sums[half].take(x);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float result = sums[half].of_quad();
    const int64_t at = position + 8 * half;
    if (lane % 4 == 0 && at >= blocks.offset && at < blocks.tokens)
      call.lse[(static_cast<int64_t>(batch) * call.grid.heads + head) * call.grid.rows + at - blocks.offset] = result;
  }
}

template <int kDim, int kHeads>
int run(const SaleCudaSinkLocal& call, cudaStream_t stream) {
  constexpr int kBytes = kChunkBlocks * kKeyBlock * (kDim + kPad) * 2;
  static const cudaError_t raised =
      cudaFuncSetAttribute(sink_local_bf16<kDim, kHeads>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (raised != cudaSuccess) return raised;
  const int64_t first = call.grid.offset / kTileRows, end = (call.grid.offset + call.grid.rows + kTileRows - 1) / kTileRows;
  const dim3 tiles(static_cast<unsigned>(end - first), call.grid.heads / kHeads, call.grid.batch);
  sink_local_bf16<kDim, kHeads><<<tiles, 32 * kHeadWarps * kHeads, kBytes, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace
}  // namespace sale::cuda

extern "C" int32_t sale_cuda_sink_local(const SaleCudaSinkLocal* call, void* stream) {
  using namespace sale::cuda;
  const auto at = static_cast<cudaStream_t>(stream);
  const bool pairs = call->grid.heads / call->grid.kv_heads % 2 == 0;
  if (call->grid.head_dim == 128) return pairs ? run<128, 2>(*call, at) : run<128, 1>(*call, at);
  return pairs ? run<64, 2>(*call, at) : run<64, 1>(*call, at);
}

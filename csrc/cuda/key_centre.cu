// Mean of a session's first keys, summed in float64 and rounded once (`quantise.default_key_centre`).
//
// One CTA a KV head: a thread sums eight columns of every kRows-th key, whose loads are all in flight before the first
// addition; threads of a warp with the same columns join by shuffles, warps through shared memory (16 KiB at most).
#include "layout.cuh"
#include "mma.cuh"

namespace sale::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kValues = 8;
constexpr int kAtOnce = 4;

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads) key_centre(const SaleCudaKeyCentre call) {
  constexpr int kLanes = kDim / kValues, kRows = kThreads / kLanes, kWarps = kThreads / 32;
  __shared__ double sums[kWarps / 2][kDim];
  const int column = threadIdx.x % kLanes * kValues, head = blockIdx.x, batch = blockIdx.y, warp = threadIdx.x / 32;
  double sum[kValues] = {};
  for (int64_t first = threadIdx.x / kLanes; first < call.tokens; first += kRows * kAtOnce) {
    uint4 raw[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      raw[i] = first + i * kRows < call.tokens
                   ? *reinterpret_cast<const uint4*>(token_at<const T>(call.keys, batch, head, first + i * kRows) + column)
                   : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float x[kValues];
      unpack_eight<T>(x, raw[i]);
#pragma unroll
      for (int j = 0; j < kValues; ++j) sum[j] += x[j];
    }
  }
#pragma unroll
  for (int distance = kLanes; distance < 32; distance *= 2)
#pragma unroll
    for (int j = 0; j < kValues; ++j) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], distance);
  const bool speaks = threadIdx.x % 32 < kLanes;
  for (int left = kWarps / 2; left > 0; left /= 2) {  // halves of the warps, one onto the other
    if (speaks && warp >= left && warp < 2 * left)
#pragma unroll
      for (int j = 0; j < kValues; ++j) sums[warp - left][column + j] = sum[j];
    __syncthreads();
    if (speaks && warp < left)
#pragma unroll
      for (int j = 0; j < kValues; ++j) sum[j] += sums[warp][column + j];
    __syncthreads();
  }
  if (!speaks || warp != 0) return;
  float* centre = call.centre + (static_cast<int64_t>(batch) * gridDim.x + head) * kDim + column;
#pragma unroll
  for (int j = 0; j < kValues; ++j) centre[j] = static_cast<float>(sum[j] / static_cast<double>(call.tokens));
}

}  // namespace
}  // namespace sale::cuda

extern "C" int32_t sale_cuda_key_centre(const SaleCudaKeyCentre* call, void* stream) {
  using namespace sale::cuda;
  const SaleCudaGrid& grid = call->grid;
  const bool half = grid.dtype == SALE_CUDA_F16;
  const auto kernel = grid.head_dim == 128 ? (half ? key_centre<__half, 128> : key_centre<__nv_bfloat16, 128>)
                                           : (half ? key_centre<__half, 64> : key_centre<__nv_bfloat16, 64>);
  kernel<<<dim3(grid.kv_heads, grid.batch), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*call);
  return cudaGetLastError();
}

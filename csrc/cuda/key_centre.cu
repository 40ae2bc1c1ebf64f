// Mean of a session's first keys, summed in float64 and rounded once (`quantise.default_key_centre`).
//
// One CTA a KV head: a thread sums two columns of every kRows-th key; shared memory joins the kRows partial sums (8 KiB).
#include "mma.cuh"
#include "layout.cuh"

namespace sale::cuda {
namespace {

constexpr int kThreads = 512;

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads) key_centre(const SaleCudaKeyCentre call) {
  constexpr int kPairs = kDim / 2, kRows = kThreads / kPairs;
  __shared__ double2 sums[kRows][kPairs];
  const int pair = threadIdx.x % kPairs, row = threadIdx.x / kPairs, head = blockIdx.x, batch = blockIdx.y;
  double2 sum = make_double2(0.0, 0.0);
#pragma unroll 8
  for (int64_t token = row; token < call.tokens; token += kRows) {
    const T* source = token_at<const T>(call.keys, batch, head, token);
    const float2 values = Wide<T>::unpack(reinterpret_cast<const uint32_t*>(source)[pair]);
    sum.x += values.x;
    sum.y += values.y;
  }
  sums[row][pair] = sum;
  __syncthreads();
  if (row != 0) return;
#pragma unroll
  for (int i = 1; i < kRows; ++i) {
    sum.x += sums[i][pair].x;
    sum.y += sums[i][pair].y;
  }
  float* centre = call.centre + (static_cast<int64_t>(batch) * gridDim.x + head) * kDim + 2 * pair;
  centre[0] = static_cast<float>(sum.x / static_cast<double>(call.tokens));
  centre[1] = static_cast<float>(sum.y / static_cast<double>(call.tokens));
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

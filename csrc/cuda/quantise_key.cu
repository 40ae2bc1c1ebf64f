// Keys to 8-bit codes, bit-identical to `quantise.py`: IEEE division, round half to even, NaN codes 0, NaN or inf in the
// scale.
//
// A thread holds eight neighbouring values (16 bytes). Two warps take one 32-key block and keep it in registers between the
// maximum and the codes, so memory is read once. One __syncthreads; 8 bytes of shared memory.
#include "codes.cuh"
#include "mma.cuh"
#include "layout.cuh"

namespace sale::cuda {
namespace {

constexpr int kWarps = 2;
constexpr int kValues = 8;

template <class T, int kDim>
__global__ void __launch_bounds__(32 * kWarps) quantise_key(const SaleCudaQuantiseKey call) {
  constexpr int kLanes = kDim / kValues, kKeysAtOnce = 32 * kWarps / kLanes, kTimes = kKeyBlock / kKeysAtOnce;
  __shared__ uint32_t tops[kWarps];
  const int column = threadIdx.x % kLanes * kValues, head = blockIdx.y, batch = blockIdx.z;
  const int64_t block = call.start / kKeyBlock + blockIdx.x, tokens = call.grid.offset + call.grid.rows;
  const int64_t first = block * kKeyBlock + threadIdx.x / kLanes;
  uint4 raw[kTimes];
#pragma unroll
  for (int i = 0; i < kTimes; ++i)
    raw[i] = first + i * kKeysAtOnce < tokens
                 ? *reinterpret_cast<const uint4*>(token_at<const T>(call.keys, batch, head, first + i * kKeysAtOnce) + column)
                 : make_uint4(0, 0, 0, 0);
  float centre[kValues];
#pragma unroll
  for (int j = 0; j < kValues; ++j)
    centre[j] = call.centre[(static_cast<int64_t>(batch) * call.grid.kv_heads + head) * kDim + column + j];
  const auto centred = [&](int i, float (&x)[kValues]) {
    const uint32_t pairs[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      const float2 pair = Wide<T>::unpack(pairs[j / 2]);
      x[j] = __fsub_rn(j % 2 ? pair.y : pair.x, centre[j]);
    }
  };
  uint32_t top = 0;
#pragma unroll
  for (int i = 0; i < kTimes; ++i) {
    float x[kValues];
    centred(i, x);
    if (first + i * kKeysAtOnce < tokens)
#pragma unroll
      for (int j = 0; j < kValues; ++j) top = max(top, magnitude(x[j]));
  }
  top = __reduce_max_sync(0xffffffffu, top);
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
  const float scale = scale_of(max(tops[0], tops[1])), reciprocal = __frcp_rn(scale);
#pragma unroll
  for (int i = 0; i < kTimes; ++i) {
    const int64_t token = first + i * kKeysAtOnce;
    if (token >= tokens) continue;
    float x[kValues];
    centred(i, x);
    *reinterpret_cast<uint2*>(token_at<int8_t>(call.codes, batch, head, token) + column) = codes_of(x, scale, reciprocal);
  }
  if (threadIdx.x == 0) *token_at<float>(call.scales, batch, head, block) = scale;
}

template <class T, int kDim>
int run(const SaleCudaQuantiseKey& call, cudaStream_t stream) {
  const int64_t tokens = call.grid.offset + call.grid.rows;
  const int64_t blocks = (tokens + kKeyBlock - 1) / kKeyBlock - call.start / kKeyBlock;
  const dim3 ctas(static_cast<unsigned>(blocks), call.grid.kv_heads, call.grid.batch);
  quantise_key<T, kDim><<<ctas, 32 * kWarps, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace
}  // namespace sale::cuda

extern "C" int32_t sale_cuda_quantise_key(const SaleCudaQuantiseKey* call, void* stream) {
  using namespace sale::cuda;
  const auto at = static_cast<cudaStream_t>(stream);
  if (call->grid.dtype == SALE_CUDA_F16)
    return call->grid.head_dim == 128 ? run<__half, 128>(*call, at) : run<__half, 64>(*call, at);
  return call->grid.head_dim == 128 ? run<__nv_bfloat16, 128>(*call, at) : run<__nv_bfloat16, 64>(*call, at);
}

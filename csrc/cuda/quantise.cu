// 8-bit codes, bit-identical to `quantise.py`: IEEE division, round half to even, NaN codes 0, NaN or inf in the scale.
//
// A lane holds eight neighbouring values (16 bytes), so head_dim / 8 lanes hold a row. Queries: a warp takes kRowsAtOnce
// groups of rows, all loads in flight together. Keys: one CTA a 32-key block, kept in registers between the maximum and
// the codes. Both read memory once.
#include <cuda_bf16.h>

#include "layout.cuh"

namespace sale::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kRowsAtOnce = 4;
constexpr int kValues = 8;

struct Row {
  float x[kValues];

  __device__ __forceinline__ void load(const __nv_bfloat16* p) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(pairs[i] << 16);
      x[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
  }
  // Magnitudes as integers: their order is that of floats, with NaN above infinity, so that NaN wins a maximum.
  __device__ __forceinline__ uint32_t largest() const {
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < kValues; ++i) top = max(top, __float_as_uint(x[i]) & 0x7fffffffu);
    return top;
  }
  __device__ __forceinline__ void store(int8_t* codes, float scale) const {
    uint32_t packed[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const float quotient = __fdiv_rn(x[i], scale);
      const float limited = fminf(fmaxf(quotient, -127.0f), 127.0f);
      const int code = isnan(quotient) ? 0 : __float2int_rn(limited);
      packed[i / 4] |= (static_cast<uint32_t>(code) & 0xffu) << (i % 4 * 8);
    }
    *reinterpret_cast<uint2*>(codes) = make_uint2(packed[0], packed[1]);
  }
};

template <int kLanes>
__device__ __forceinline__ uint32_t largest_of_row(uint32_t top) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    top = max(top, __shfl_xor_sync(0xffffffffu, top, distance));
  return top;
}

__device__ __forceinline__ float scale_of(uint32_t largest) {
  const float top = __uint_as_float(largest);
  if (isnan(top)) return top;
  return fmaxf(__fdiv_rn(top, 127.0f), 1.17549435e-38f);
}

template <int kDim>
__global__ void __launch_bounds__(32 * kWarps) quantise_query_bf16(const SaleCudaQuantiseQuery call) {
  constexpr int kLanes = kDim / kValues, kRows = 32 / kLanes;  // of a row; rows of a warp side by side
  const int lane = threadIdx.x % 32, column = lane % kLanes * kValues, head = blockIdx.y, batch = blockIdx.z;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) * kRows * kRowsAtOnce + lane / kLanes;
  Row rows[kRowsAtOnce];
#pragma unroll
  for (int i = 0; i < kRowsAtOnce; ++i) {
    const int64_t row = min(static_cast<long long>(first + i * kRows), static_cast<long long>(call.grid.rows - 1));
    rows[i].load(row_at<const __nv_bfloat16>(call.query, batch, head, row) + column);
  }
#pragma unroll
  for (int i = 0; i < kRowsAtOnce; ++i) {
    const float scale = scale_of(largest_of_row<kLanes>(rows[i].largest()));
    const int64_t row = first + i * kRows;
    if (row >= call.grid.rows) continue;
    const int64_t at = (static_cast<int64_t>(batch) * call.grid.heads + head) * call.grid.rows + row;
    rows[i].store(call.codes + at * kDim + column, scale);
    if (column == 0) call.scales[at] = scale;
  }
}

template <int kDim>
__global__ void __launch_bounds__(32 * kWarps) quantise_key_bf16(const SaleCudaQuantiseKey call) {
  constexpr int kLanes = kDim / kValues, kKeysAtOnce = 32 * kWarps / kLanes;
  constexpr int kTimes = (kKeyBlock + kKeysAtOnce - 1) / kKeysAtOnce;
  __shared__ uint32_t tops[kWarps];
  const int lane = threadIdx.x % 32, column = threadIdx.x % kLanes * kValues, head = blockIdx.y, batch = blockIdx.z;
  const int64_t block = call.start / kKeyBlock + blockIdx.x, tokens = call.grid.offset + call.grid.rows;
  const int64_t first = block * kKeyBlock + threadIdx.x / kLanes;
  const float* centre = call.centre + (static_cast<int64_t>(batch) * call.grid.kv_heads + head) * kDim + column;
  Row rows[kTimes];
  uint32_t top = 0;
#pragma unroll
  for (int i = 0; i < kTimes; ++i) {
    const int64_t token = first + i * kKeysAtOnce;
    if (token >= tokens) continue;
    rows[i].load(token_at<const __nv_bfloat16>(call.keys, batch, head, token) + column);
#pragma unroll
    for (int j = 0; j < kValues; ++j) rows[i].x[j] = __fsub_rn(rows[i].x[j], centre[j]);
    top = max(top, rows[i].largest());
  }
  top = __reduce_max_sync(0xffffffffu, top);
  if (lane == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) top = max(top, tops[i]);
  const float scale = scale_of(top);
#pragma unroll
  for (int i = 0; i < kTimes; ++i) {
    const int64_t token = first + i * kKeysAtOnce;
    if (token < tokens) rows[i].store(token_at<int8_t>(call.codes, batch, head, token) + column, scale);
  }
  if (threadIdx.x == 0) *token_at<float>(call.scales, batch, head, block) = scale;
}

}  // namespace
}  // namespace sale::cuda

using namespace sale::cuda;

extern "C" int32_t sale_cuda_quantise_query(const SaleCudaQuantiseQuery* call, void* stream) {
  const int64_t rows = kWarps * kRowsAtOnce * (32 / (call->grid.head_dim / kValues));  // of a CTA
  const dim3 blocks(static_cast<unsigned>((call->grid.rows + rows - 1) / rows), call->grid.heads, call->grid.batch);
  const auto at = static_cast<cudaStream_t>(stream);
  if (call->grid.head_dim == 128)
    quantise_query_bf16<128><<<blocks, 32 * kWarps, 0, at>>>(*call);
  else
    quantise_query_bf16<64><<<blocks, 32 * kWarps, 0, at>>>(*call);
  return cudaGetLastError();
}

extern "C" int32_t sale_cuda_quantise_key(const SaleCudaQuantiseKey* call, void* stream) {
  const int64_t tokens = call->grid.offset + call->grid.rows;
  const dim3 blocks(static_cast<unsigned>((tokens + kKeyBlock - 1) / kKeyBlock - call->start / kKeyBlock),
                    call->grid.kv_heads, call->grid.batch);
  const auto at = static_cast<cudaStream_t>(stream);
  if (call->grid.head_dim == 128)
    quantise_key_bf16<128><<<blocks, 32 * kWarps, 0, at>>>(*call);
  else
    quantise_key_bf16<64><<<blocks, 32 * kWarps, 0, at>>>(*call);
  return cudaGetLastError();
}

// 4-bit codes, bit-identical to `quantise.py`: what is subtracted, the Hadamard transform in its order of additions, IEEE
// division, round half to even, NaN codes 0, NaN or inf in the scale.
//
// A lane holds eight neighbouring values (16 bytes), so head_dim / 8 lanes hold a row, and the transform's stages run
// within a lane, then between lanes. Queries: one CTA a query block, whose rows stay in shared memory between their mean
// (float64 sums, rounded once) and their codes. Keys: one CTA a 32-key block, in registers.
// Shared memory: 128 rows x head_dim x 2 bytes and the sums of columns, 36 KiB at head_dim 128.
#include "layout.cuh"
#include "mma.cuh"

namespace sale::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kValues = 8;
constexpr int kMostRows = 128;  // of a query block
constexpr float kCodeLimit = 7.0f;

template <int kDim>
struct Row {
  static constexpr int kLanes = kDim / kValues;
  float x[kValues];

  __device__ __forceinline__ void subtract(const float* what) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) x[i] = __fsub_rn(x[i], what[i]);
  }
  // All lanes of a row together.
  __device__ __forceinline__ void transform() {
#pragma unroll
    for (int half = 1; half < kValues; half *= 2)
#pragma unroll
      for (int i = 0; i < kValues; ++i)
        if ((i & half) == 0) {
          const float first = x[i], second = x[i + half];
          x[i] = __fadd_rn(first, second);
          x[i + half] = __fsub_rn(first, second);
        }
#pragma unroll
    for (int half = 1; half < kLanes; half *= 2)
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const float other = __shfl_xor_sync(0xffffffffu, x[i], half);
        x[i] = (threadIdx.x & half) == 0 ? __fadd_rn(x[i], other) : __fsub_rn(other, x[i]);
      }
    constexpr float kNorm = kDim == 128 ? 0.08838834764831845f : 0.125f;  // 1 / sqrt(head_dim)
#pragma unroll
    for (int i = 0; i < kValues; ++i) x[i] = __fmul_rn(x[i], kNorm);
  }
  // Magnitudes as integers: their order is that of floats, with NaN above infinity, so that NaN wins a maximum.
  __device__ __forceinline__ uint32_t largest() const {
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < kValues; ++i) top = max(top, __float_as_uint(x[i]) & 0x7fffffffu);
    return top;
  }
  __device__ __forceinline__ static uint32_t largest_of_row(uint32_t top) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, distance));
    return top;
  }
  __device__ __forceinline__ void store(int8_t* codes, float scale) const {
    uint32_t packed[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const float quotient = __fdiv_rn(x[i], scale);
      const float limited = fminf(fmaxf(quotient, -kCodeLimit), kCodeLimit);
      const int code = isnan(quotient) ? 0 : __float2int_rn(limited);
      packed[i / 4] |= (static_cast<uint32_t>(code) & 0xffu) << (i % 4 * 8);
    }
    *reinterpret_cast<uint2*>(codes) = make_uint2(packed[0], packed[1]);
  }
};

__device__ __forceinline__ float scale_of(uint32_t largest) {
  const float top = __uint_as_float(largest);
  if (isnan(top)) return top;
  return fmaxf(__fdiv_rn(top, kCodeLimit), 1.17549435e-38f);
}

// Means of the columns of `rows` [count, kDim] into `means`.
template <class Element, int kDim>
__device__ __forceinline__ void mean_of_columns(const Element (*rows)[kDim], int count, double (*sums)[kDim], float* means) {
  constexpr int kShares = kThreads / kDim;
  const int column = threadIdx.x % kDim, share = threadIdx.x / kDim;
  double sum = 0.0;
  for (int row = share; row < count; row += kShares) sum += Wide<Element>::widen(rows[row][column]);
  sums[share][column] = sum;
  __syncthreads();
  if (threadIdx.x < kDim) {
    double total = sums[0][column];
#pragma unroll
    for (int i = 1; i < kShares; ++i) total += sums[i][column];
    means[column] = static_cast<float>(total / count);
  }
  __syncthreads();
}

template <class Element, int kDim>
__global__ void __launch_bounds__(kThreads) quantise_query_4bit(const SaleCudaQuantiseQuery4 call) {
  constexpr int kLanes = kDim / kValues, kRowsAtOnce = kThreads / kLanes;
  alignas(16) __shared__ Element rows[kMostRows][kDim];
  __shared__ double sums[kThreads / kDim][kDim];
  __shared__ float means[kDim];
  const Blocks blocks(call.grid);
  const int index = blockIdx.x, head = blockIdx.y, batch = blockIdx.z, column = threadIdx.x % kLanes * kValues;
  const int64_t plane = static_cast<int64_t>(batch) * call.grid.heads + head;
  const int64_t begin = blocks.start(index) > blocks.offset ? blocks.start(index) : blocks.offset;
  const int64_t first = begin - blocks.offset;  // row of the call
  const int count = static_cast<int>(blocks.end(index) - begin);
  for (int row = threadIdx.x / kLanes; row < count; row += kRowsAtOnce)
    *reinterpret_cast<uint4*>(&rows[row][column]) =
        *reinterpret_cast<const uint4*>(row_at<const Element>(call.query, batch, head, first + row) + column);
  __syncthreads();
  mean_of_columns<Element, kDim>(rows, count, sums, means);
  if (threadIdx.x < kDim) call.block_means[(plane * blocks.query_blocks() + index) * kDim + threadIdx.x] = means[threadIdx.x];
  // Whole warps go round together: the transform exchanges values.
  for (int start = 0; start < count; start += kRowsAtOnce) {
    const int row = start + threadIdx.x / kLanes;
    Row<kDim> values;
    unpack_eight<Element>(values.x, *reinterpret_cast<const uint4*>(&rows[min(row, count - 1)][column]));
    values.subtract(means + column);
    values.transform();
    const float scale = scale_of(Row<kDim>::largest_of_row(values.largest()));
    if (row >= count) continue;
    const int64_t at = plane * call.grid.rows + first + row;
    values.store(call.codes + at * kDim + column, scale);
    if (column == 0) call.scales[at] = scale;
  }
}

template <class Element, int kDim>
__global__ void __launch_bounds__(kThreads) quantise_key_4bit(const SaleCudaQuantiseKey call) {
  constexpr int kLanes = kDim / kValues, kKeysAtOnce = kThreads / kLanes, kTimes = kKeyBlock / kKeysAtOnce;
  __shared__ uint32_t tops[kWarps];
  const int column = threadIdx.x % kLanes * kValues, head = blockIdx.y, batch = blockIdx.z;
  const int64_t block = call.start / kKeyBlock + blockIdx.x, tokens = call.grid.offset + call.grid.rows;
  const int64_t first = block * kKeyBlock + threadIdx.x / kLanes;
  const float* centre = call.centre + (static_cast<int64_t>(batch) * call.grid.kv_heads + head) * kDim + column;
  Row<kDim> rows[kTimes];
  uint32_t top = 0;
#pragma unroll
  for (int i = 0; i < kTimes; ++i) {
    const int64_t token = first + i * kKeysAtOnce;
    const bool present = token < tokens;
    const Element* source = token_at<const Element>(call.keys, batch, head, present ? token : block * kKeyBlock) + column;
    unpack_eight<Element>(rows[i].x, *reinterpret_cast<const uint4*>(source));
    rows[i].subtract(centre);
    rows[i].transform();
    if (present) top = max(top, rows[i].largest());
  }
  top = __reduce_max_sync(0xffffffffu, top);
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
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

template <class Element>
int run(const SaleCudaQuantiseQuery4& call, cudaStream_t stream) {
  const dim3 blocks(Blocks(call.grid).query_blocks(), call.grid.heads, call.grid.batch);
  if (call.grid.head_dim == 128)
    quantise_query_4bit<Element, 128><<<blocks, kThreads, 0, stream>>>(call);
  else
    quantise_query_4bit<Element, 64><<<blocks, kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

template <class Element>
int run(const SaleCudaQuantiseKey& call, cudaStream_t stream) {
  const int64_t tokens = call.grid.offset + call.grid.rows;
  const dim3 blocks(static_cast<unsigned>((tokens + kKeyBlock - 1) / kKeyBlock - call.start / kKeyBlock),
                    call.grid.kv_heads, call.grid.batch);
  if (call.grid.head_dim == 128)
    quantise_key_4bit<Element, 128><<<blocks, kThreads, 0, stream>>>(call);
  else
    quantise_key_4bit<Element, 64><<<blocks, kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace
}  // namespace sale::cuda

extern "C" int32_t sale_cuda_quantise_query_4bit(const SaleCudaQuantiseQuery4* call, void* stream) {
  const auto at = static_cast<cudaStream_t>(stream);
  return call->grid.dtype == SALE_CUDA_F16 ? sale::cuda::run<__half>(*call, at) : sale::cuda::run<__nv_bfloat16>(*call, at);
}

extern "C" int32_t sale_cuda_quantise_key_4bit(const SaleCudaQuantiseKey* call, void* stream) {
  const auto at = static_cast<cudaStream_t>(stream);
  return call->grid.dtype == SALE_CUDA_F16 ? sale::cuda::run<__half>(*call, at) : sale::cuda::run<__nv_bfloat16>(*call, at);
}

// Decode attention: one query row a sequence over the first lengths[b] tokens of its keys and values (any GPU from sm_80).
//
// Bound by memory, so every key and value is read once, by one warp. An item is a chunk of one sequence's keys for the up
// to 16 query heads of a KV head (the rows of an mma; fewer are padded with zeros). A warp takes every n-th item and never
// meets another warp: it copies its own keys through its own ring of kStages x 8 KiB in shared memory, which runs on from
// one item into the next, and leaves a partial output and log-sum-exp. A second kernel merges them in a fixed order.
//
// How a sequence is cut depends on its own length alone: not on the batch, the GPU, or the order that warps run in. So
// its bits do not either. Lengths are read on the device: a captured launch serves growing sequences.
//
// A CTA is two warps with 48 KiB of shared memory: four fit a multiprocessor of sm_90, three sm_80's, two sm_86's and 89's.
#include "layout.cuh"
#include "mma.cuh"
#include "ptx.cuh"

namespace sale::cuda {
namespace {

constexpr int kWarps = 2;
constexpr int kStages = 3;
constexpr int kStageBytes = 8192;  // keys, then values
constexpr int kRows = 16;          // query heads of an item
constexpr int kMergeThreads = 256;
constexpr int kMostSplits = 1024;
constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ int length_of(const SaleCudaDecode& call, int batch) {
  const int64_t length = call.lengths_64_bit ? static_cast<const int64_t*>(call.lengths)[batch]
                                             : static_cast<const int32_t*>(call.lengths)[batch];
  const int64_t capacity = call.capacity;
  return static_cast<int>(length < capacity ? (length > 0 ? length : 0) : capacity);
}

// How the keys of one sequence are cut: chunks of whole 32-key blocks, at most `splits` of them.
struct Cut {
  int length, chunk, count;

  __device__ __forceinline__ Cut(const SaleCudaDecode& call, int batch) : length(length_of(call, batch)) {
    const int share = ((length + call.splits - 1) / call.splits + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
    chunk = max(call.least_chunk, share);
    count = (length + chunk - 1) / chunk;
  }
};

// A warp's way through its items: `first`, `first + stride` and so on, and the keys of each in steps.
struct Walk {
  int item, batch = 0, passed = 0;  // passed: items of the sequences before `batch`
  int tiles;                        // of kRows query heads, a KV head
  Cut cut;
  int kv_head, tile, split, token, end;  // where it is now

  __device__ __forceinline__ Walk(const SaleCudaDecode& call, int tiles, int first)
      : item(first), tiles(tiles), cut(call, 0) {
    settle(call);
  }
  __device__ __forceinline__ bool valid(const SaleCudaDecode& call) const { return batch < call.batch; }
  __device__ __forceinline__ void next_item(const SaleCudaDecode& call, int stride) {
    item += stride;
    settle(call);
  }
  __device__ __forceinline__ void settle(const SaleCudaDecode& call) {
    while (item - passed >= cut.count * tiles * call.kv_heads) {
      passed += cut.count * tiles * call.kv_heads;
      if (++batch == call.batch) return;
      cut = Cut(call, batch);
    }
    const int row = (item - passed) / cut.count;
    kv_head = row / tiles;
    tile = row % tiles;
    split = (item - passed) % cut.count;
    token = split * cut.chunk;
    end = min(token + cut.chunk, cut.length);
  }
};

// Brings keys and values of successive steps into the ring; always kStages - 1 steps ahead of the arithmetic.
template <class T, int kDim>
struct Producer {
  static constexpr int kStepKeys = kStageBytes / (4 * kDim);
  static constexpr int kPieces = kDim / 8;             // of 16 bytes, a row
  static constexpr int kRowsACopy = 32 / kPieces;      // that one instruction of the warp brings
  static constexpr int kCopies = kStepKeys / kRowsACopy;

  Walk walk;
  int64_t unit = 0;  // of the step that comes next: fetched a step early
  int unit_token = 0, lane, stride;
  uint32_t target;   // this lane's byte within the first rows of a stage

  __device__ __forceinline__ Producer(const SaleCudaDecode& call, int tiles, int first, int warps)
      : walk(call, tiles, first), lane(threadIdx.x % 32), stride(warps) {
    target = lane * 16 ^ lane / kPieces * 16;
    look_up(call);
  }
  __device__ __forceinline__ void look_up(const SaleCudaDecode& call) {
    if (!walk.valid(call)) return;
    unit = walk.batch;
    unit_token = walk.token;
    const SaleCudaTokens& keys = call.keys;  // values have the same table
    if (keys.page_table == nullptr) return;
    const int page_tokens = static_cast<int>(keys.unit_tokens), page = walk.token / page_tokens;
    unit = keys.page_table[walk.batch * keys.page_table_stride + page * keys.page_table_step];
    unit_token = walk.token - page * page_tokens;
  }
  __device__ __forceinline__ const T* source(const SaleCudaTokens& from) const {
    return static_cast<const T*>(from.data) + unit * from.unit_stride + walk.kv_head * from.head_stride +
           unit_token * from.token_stride;
  }
  __device__ __forceinline__ void copy(const SaleCudaTokens& from, char* stage) const {
    const T* first = source(from) + lane % kPieces * 8;
    const T* row = first + lane / kPieces * from.token_stride;
    const int left = walk.end - walk.token;
    if (left >= kStepKeys) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i, row += kRowsACopy * from.token_stride) copy_streamed(at(stage, i), row);
    } else {
#pragma unroll
      for (int i = 0; i < kCopies; ++i, row += kRowsACopy * from.token_stride) {
        const bool present = i * kRowsACopy + lane / kPieces < left;
        copy_async(at(stage, i), present ? row : first, present);
      }
    }
  }
  // Row r has its pieces permuted by r % 8, so that eight rows of one column lie in different banks.
  __device__ __forceinline__ char* at(char* stage, int i) const {
    return stage + i * 512 + (target ^ i * kRowsACopy % 8 * 16);
  }
  // One step, or nothing behind the last one; a group of copies either way.
  __device__ __forceinline__ void step(const SaleCudaDecode& call, char* stage) {
    if (walk.valid(call)) {
      copy(call.keys, stage);
      copy(call.values, stage + kStageBytes / 2);
      walk.token += kStepKeys;
      if (walk.token >= walk.end) walk.next_item(call, stride);
      look_up(call);
    }
    copy_commit();
  }
};

// Softmax and output of an item's rows so far. A thread holds two columns of every eight of row lane / 4, and of the row
// 8 further where kWide.
template <class T, int kDim, bool kWide>
struct Attention {
  static constexpr int kStepKeys = Producer<T, kDim>::kStepKeys;
  static constexpr int kHalves = kWide ? 2 : 1;

  uint32_t query[kDim / 16][4];
  float output[kDim / 8][4];
  float top[2], total[2];  // powers of two; total: of this thread's keys

  __device__ __forceinline__ void start(const SaleCudaDecode& call, int batch, int first_head, int rows, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      const bool present = (half == 0 || kWide) && row < rows;
      const uint32_t* source = reinterpret_cast<const uint32_t*>(
          row_at<const T>(call.query, batch, first_head + (present ? row : 0), 0));
#pragma unroll
      for (int part = 0; part < kDim / 8; ++part)
        query[part / 2][half + part % 2 * 2] = present ? source[part * 4 + lane % 4] : 0u;
      top[half] = -3.0e38f;
      total[half] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) output[n][i] = 0.0f;
  }

  __device__ __forceinline__ void scores_of(const char* keys, int lane, float (&scores)[kStepKeys / 8][4]) const {
#pragma unroll
    for (int n = 0; n < kStepKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
    const char* row = keys + lane % 8 * (2 * kDim);
#pragma unroll
    for (int step = 0; step < kDim / 16; step += 2)
#pragma unroll
      for (int n = 0; n < kStepKeys / 8; ++n) {
        uint32_t b[4];  // 8 keys, 32 elements
        load_matrices(b, row + n * 8 * (2 * kDim) + ((step * 2 + lane / 8) ^ lane % 8) * 16);
        Wide<T>::multiply(scores[n], query[step], b[0], b[1]);
        Wide<T>::multiply(scores[n], query[step + 1], b[2], b[3]);
      }
  }

  // Scores become weights; what is there already is scaled where a maximum rose. `left`: keys that exist.
  __device__ __forceinline__ void weigh(float (&scores)[kStepKeys / 8][4], float scale, int left, int lane) {
    float before[2];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      before[half] = top[half];
#pragma unroll
      for (int n = 0; n < kStepKeys / 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = scores[n][2 * half + j];
          x = n * 8 + lane % 4 * 2 + j < left ? x * scale : -INFINITY;
          top[half] = fmaxf(top[half], x);
        }
      top[half] = fmaxf(top[half], __shfl_xor_sync(kAll, top[half], 1));
      top[half] = fmaxf(top[half], __shfl_xor_sync(kAll, top[half], 2));
    }
    if (__any_sync(kAll, top[0] > before[0] || (kWide && top[1] > before[1]))) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const float shrink = exp2_fast(before[half] - top[half]);
        total[half] *= shrink;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          output[n][2 * half] *= shrink;
          output[n][2 * half + 1] *= shrink;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
      for (int n = 0; n < kStepKeys / 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = scores[n][2 * half + j];
          x = exp2_fast(x - top[half]);
          total[half] += x;
        }
  }

  __device__ __forceinline__ void add_values(const char* values, const float (&weights)[kStepKeys / 8][4], int lane) {
    const char* row = values + lane % 16 * (2 * kDim);
#pragma unroll
    for (int k = 0; k < kStepKeys / 16; ++k) {
      const float(&low)[4] = weights[2 * k], (&high)[4] = weights[2 * k + 1];
      const uint32_t a[4] = {Wide<T>::pack(low[0], low[1]), kWide ? Wide<T>::pack(low[2], low[3]) : 0u,
                             Wide<T>::pack(high[0], high[1]), kWide ? Wide<T>::pack(high[2], high[3]) : 0u};
#pragma unroll
      for (int n = 0; n < kDim / 8; n += 2) {
        uint32_t b[4];  // 16 keys, 16 elements
        load_matrices_transposed(b, row + k * 16 * (2 * kDim) + ((n + lane / 16) ^ lane % 8) * 16);
        Wide<T>::multiply(output[n], a, b[0], b[1]);
        Wide<T>::multiply(output[n + 1], a, b[2], b[3]);
      }
    }
  }

  __device__ __forceinline__ void step(const char* stage, float scale, int left, int lane) {
    float scores[kStepKeys / 8][4];
    scores_of(stage, lane, scores);
    weigh(scores, scale, left, lane);
    add_values(stage + kStageBytes / 2, scores, lane);
  }

  __device__ __forceinline__ void store(const SaleCudaDecode& call, int64_t first_row, int split, int rows, int lane) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      total[half] += __shfl_xor_sync(kAll, total[half], 1);
      total[half] += __shfl_xor_sync(kAll, total[half], 2);
      const int row = lane / 4 + 8 * half;
      if (row >= rows) continue;
      const int64_t slot = (first_row + row) * call.splits + split;
      float* target = call.partial + slot * kDim + lane % 4 * 2;
      const float share = 1.0f / total[half];
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
        *reinterpret_cast<float2*>(target + n * 8) =
            make_float2(output[n][2 * half] * share, output[n][2 * half + 1] * share);
      if (lane % 4 == 0) call.partial_lse[slot] = top[half] + log2f(total[half]);
    }
  }
};

template <class T, int kDim, bool kWide>
__global__ void __launch_bounds__(32 * kWarps) decode_chunks(const SaleCudaDecode call) {
  extern __shared__ uint4 memory[];
  const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32);
  char* ring = reinterpret_cast<char*>(memory) + warp * kStages * kStageBytes;
  const int group = call.heads / call.kv_heads;
  const int warps = gridDim.x * kWarps, first = warp * gridDim.x + blockIdx.x;

  Producer<T, kDim> producer(call, (group + kRows - 1) / kRows, first, warps);
  Walk walk = producer.walk;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) producer.step(call, ring + stage * kStageBytes);

  Attention<T, kDim, kWide> attention;
  const float scale = call.scale * kLog2E;
  int stage = 0, free_stage = kStages - 1;
  while (walk.valid(call)) {
    const int first_head = walk.kv_head * group + walk.tile * kRows, rows = min(kRows, group - walk.tile * kRows);
    attention.start(call, walk.batch, first_head, rows, lane);
    for (; walk.token < walk.end; walk.token += attention.kStepKeys) {
      copy_wait<kStages - 2>();
      __syncwarp();  // every lane's copies are there, and every lane has read what the next copy replaces
      producer.step(call, ring + free_stage * kStageBytes);
      attention.step(ring + stage * kStageBytes, scale, walk.end - walk.token, lane);
      free_stage = stage;
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    attention.store(call, static_cast<int64_t>(walk.batch) * call.heads + first_head, walk.split, rows, lane);
    walk.next_item(call, warps);
  }
}

// The same in every thread, in the same order every time. The caller's threads meet twice.
template <class Join>
__device__ __forceinline__ float of_block(float x, float* scratch, Join join) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = join(x, __shfl_xor_sync(kAll, x, distance));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kMergeThreads / 32; ++warp) x = join(x, scratch[warp]);
  __syncthreads();
  return x;
}

// One CTA: one row's output from its chunks.
template <class T, int kDim>
__global__ void __launch_bounds__(kMergeThreads) decode_merge(const SaleCudaDecode call) {
  constexpr int kColumns = kDim / 32, kMergeWarps = kMergeThreads / 32;
  __shared__ float weights[kMostSplits], scratch[kMergeWarps], sums[kMergeWarps][kDim];
  const int head = blockIdx.x, batch = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = static_cast<int64_t>(batch) * call.heads + head;
  const int count = Cut(call, batch).count;

  const float* lse = call.partial_lse + row * call.splits;
  float top = -3.0e38f, total = 0.0f;
  for (int i = threadIdx.x; i < count; i += kMergeThreads) top = fmaxf(top, weights[i] = lse[i]);
  top = of_block(top, scratch, [](float a, float b) { return fmaxf(a, b); });
  for (int i = threadIdx.x; i < count; i += kMergeThreads) total += weights[i] = exp2_fast(weights[i] - top);
  total = of_block(total, scratch, [](float a, float b) { return a + b; });

  float sum[kColumns] = {};
  const float* partial = call.partial + row * call.splits * kDim + lane * kColumns;
#pragma unroll 4
  for (int i = warp; i < count; i += kMergeWarps)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) sum[j] = fmaf(weights[i], partial[int64_t{i} * kDim + j], sum[j]);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) sums[warp][lane * kColumns + j] = sum[j];
  __syncthreads();
  if (threadIdx.x < kDim) {
    float result = 0.0f;
#pragma unroll
    for (int i = 0; i < kMergeWarps; ++i) result += sums[i][threadIdx.x];
    row_at<T>(call.output, batch, head, 0)[threadIdx.x] = Wide<T>::of(count > 0 ? result / total : 0.0f);
  }
  if (threadIdx.x == 0 && call.lse != nullptr) call.lse[row] = count > 0 ? (top + log2f(total)) / kLog2E : -INFINITY;
}

// ---- host
template <class T, int kDim, bool kWide>
int run(const SaleCudaDecode& call, cudaStream_t stream) {
  constexpr int kBytes = kWarps * kStages * kStageBytes;
  const auto kernel = decode_chunks<T, kDim, kWide>;
  const cudaError_t raised = [kernel] {  // without the carve-out, fewer CTAs than fit would be resident
    const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    return error != cudaSuccess
               ? error
               : cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }();
  if (raised != cudaSuccess) return raised;
  int resident = 0;
  const cudaError_t asked = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, 32 * kWarps, kBytes);
  if (asked != cudaSuccess) return asked;
  const int tiles = (call.heads / call.kv_heads + kRows - 1) / kRows;
  const int64_t items = int64_t{call.batch} * call.kv_heads * tiles * call.splits;
  const int64_t most = int64_t{resident} * call.multiprocessors;
  kernel<<<static_cast<unsigned>(items < most ? items : most), 32 * kWarps, kBytes, stream>>>(call);
  decode_merge<T, kDim><<<dim3(call.heads, call.batch), kMergeThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

template <class T>
int run(const SaleCudaDecode& call, cudaStream_t stream) {
  const bool wide = call.heads / call.kv_heads > 8;
  if (call.head_dim == 128) return wide ? run<T, 128, true>(call, stream) : run<T, 128, false>(call, stream);
  return wide ? run<T, 64, true>(call, stream) : run<T, 64, false>(call, stream);
}

}  // namespace
}  // namespace sale::cuda

extern "C" int32_t sale_cuda_decode(const SaleCudaDecode* call, void* stream) {
  using namespace sale::cuda;
  const bool fits = call->splits > 0 && call->splits <= kMostSplits && call->least_chunk > 0 &&
                    call->least_chunk % kKeyBlock == 0 && (call->head_dim == 64 || call->head_dim == 128);
  if (!fits) return cudaErrorInvalidValue;
  const auto at = static_cast<cudaStream_t>(stream);
  return call->dtype == SALE_CUDA_F16 ? run<__half>(*call, at) : run<__nv_bfloat16>(*call, at);
}

// Kept blocks by head, for reports: the set bits of a selection, added to a counter.
//
// A CTA takes a slice of one head's words; one atomic a warp. No shared memory, no barriers.
#include <cuda_runtime.h>

#include "sale_prefill/cuda_api.h"

namespace sale::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWordsEach = 16;  // of a thread

__global__ void __launch_bounds__(kThreads) count_blocks(const SaleCudaCountBlocks call) {
  const int head = blockIdx.y, batch = blockIdx.z;
  const uint32_t* words = call.words + (static_cast<int64_t>(batch) * call.heads + head) * call.head_words;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kWordsEach + threadIdx.x;
  int bits = 0;
#pragma unroll
  for (int i = 0; i < kWordsEach; ++i) {
    const int64_t word = first + i * kThreads;
    if (word < call.head_words) bits += __popc(words[word]);
  }
  bits = __reduce_add_sync(0xffffffffu, bits);
  if (threadIdx.x % 32 == 0 && bits != 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(call.kept + head), static_cast<unsigned long long>(bits));
}

}  // namespace
}  // namespace sale::cuda

extern "C" int32_t sale_cuda_count_blocks(const SaleCudaCountBlocks* call, void* stream) {
  using namespace sale::cuda;
  const int64_t each = kThreads * kWordsEach;
  const dim3 ctas(static_cast<unsigned>((call->head_words + each - 1) / each), call->heads, call->batch);
  count_blocks<<<ctas, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*call);
  return cudaGetLastError();
}

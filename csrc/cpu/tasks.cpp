#include "tasks.h"

#include <atomic>
#include <cstdlib>

namespace sale::cpu {

void run_tasks(int threads, int64_t tasks, void (*body)(void*, int64_t, int), void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};
#pragma omp parallel num_threads(threads)
  {
    const int worker = workers.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) break;
      body(context, task, worker);
    }
  }
}

Scratch::Scratch(int workers, size_t bytes_each) : stride_((bytes_each + 4095) / 4096 * 4096 + 64) {
  // The odd cache line keeps two workers' buffers from falling on the same cache sets.
  const size_t total = stride_ * static_cast<size_t>(workers < 1 ? 1 : workers);
  data_ = static_cast<char*>(std::aligned_alloc(64, (total + 63) / 64 * 64));
}

Scratch::~Scratch() { std::free(data_); }

}  // namespace sale::cpu

// Work shared between threads: tasks of very unequal length, handed out one by one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sale::cpu {

// Calls body(context, task, worker) for every task in [0, tasks), on up to `threads` OpenMP threads (torch's pool, when
// torch has loaded the same OpenMP runtime). Tasks start in ascending order, so put the longest first.
void run_tasks(int threads, int64_t tasks, void (*body)(void* context, int64_t task, int worker), void* context);

template <class Body>
void for_each_task(int threads, int64_t tasks, Body& body) {
  run_tasks(
      threads, tasks,
      [](void* context, int64_t task, int worker) { (*static_cast<Body*>(context))(task, worker); }, &body);
}

// One block of memory per worker, cache-line aligned, freed with the object. Check `ok` before use.
class Scratch {
 public:
  Scratch(int workers, size_t bytes_each);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool ok() const { return data_ != nullptr; }
  char* of(int worker) const { return data_ + static_cast<size_t>(worker) * stride_; }

 private:
  char* data_;
  size_t stride_;
};

// Hands out consecutive, cache-line aligned pieces of a worker's scratch.
class Carver {
 public:
  explicit Carver(char* base) : next_(base) {}

  template <class T>
  T* take(int64_t count) {
    char* piece = next_;
    next_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }

 private:
  char* next_;
};

}  // namespace sale::cpu

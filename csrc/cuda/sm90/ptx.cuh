// The few PTX instructions that only sm_90a has, each as a function of its name.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../ptx.cuh"

namespace sale::cuda {

// ---- mbarrier
__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// On the barrier at the same place in the shared memory of CTA `cta` of the cluster.
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, uint32_t cta) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(cta)
      : "memory");
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}

// ---- bulk tensor copies: a box at (column, token, head, batch or page)
__device__ __forceinline__ void tensor_load(void* target, const CUtensorMap* map, uint64_t* barrier, int column,
                                            int token, int head, int unit) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::
          "r"(shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(token), "r"(head), "r"(unit)
      : "memory");
}
// The same into every CTA of the cluster that `ctas` has a bit for, at the same place, with the same barrier of each.
__device__ __forceinline__ void tensor_load_multicast(void* target, const CUtensorMap* map, uint64_t* barrier, int column,
                                                      int token, int head, int unit, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(token), "r"(head), "r"(unit), "h"(ctas)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Makes ordinary shared-memory writes visible to wgmma and the copy engine; each writer, before the barrier.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- registers
template <int kRegisters>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- wgmma
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// The next multiple of 1024 in shared memory, by an addition: a cast through an integer would make every access generic.
__device__ __forceinline__ uint8_t* aligned(uint8_t* memory) { return memory + (-shared_address(memory) & 1023u); }

// `descriptor` moved on by `bytes`, a multiple of 16 that stays within shared memory: an addition to its lower half.
__device__ __forceinline__ uint64_t moved(uint64_t descriptor, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4), high = static_cast<uint32_t>(descriptor >> 32);
  return static_cast<uint64_t>(high) << 32 | low;
}

// A shared-memory matrix. `leading` and `stride` in bytes; swizzle 1: 128 bytes, 2: 64 bytes.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* start, uint32_t leading, uint32_t stride, int swizzle) {
  return static_cast<uint64_t>((shared_address(start) & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

}  // namespace sale::cuda

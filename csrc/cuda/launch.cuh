// What launches share on the host.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace sale::cuda {

// Lets a kernel have `bytes` of dynamic shared memory. The runtime is asked once a device: asking costs half a launch.
template <auto kKernel>
cudaError_t allow_shared_memory(size_t bytes) {
  constexpr int kDevices = 64;
  static std::atomic<size_t> allowed[kDevices];
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  if (device < kDevices && allowed[device].load(std::memory_order_relaxed) >= bytes) return cudaSuccess;
  const cudaError_t status =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status == cudaSuccess && device < kDevices) allowed[device].store(bytes, std::memory_order_relaxed);
  return status;
}

}  // namespace sale::cuda

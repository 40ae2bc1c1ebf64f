#include "tensor_map.cuh"

#include <cuda_runtime.h>

namespace sale::cuda {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Asked of the runtime, so that the library needs no link to the driver.
Encode encoder() {
  static const Encode found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<Encode>(entry);
  }();
  return found;
}

}  // namespace

int make_tensor_map(CUtensorMap* map, const SaleCudaTokens& tokens, CUtensorMapDataType type, int element_bytes,
                    int columns, int heads, int box_columns, int box_tokens, CUtensorMapSwizzle swizzle) {
  if (encoder() == nullptr) return -1 - CUDA_ERROR_NOT_FOUND;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(tokens.unit_tokens),
                               static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(tokens.units)};
  const cuuint64_t strides[3] = {static_cast<cuuint64_t>(tokens.token_stride * element_bytes),
                                 static_cast<cuuint64_t>(tokens.head_stride * element_bytes),
                                 static_cast<cuuint64_t>(tokens.unit_stride * element_bytes)};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_tokens), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result =
      encoder()(map, type, 4, tokens.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : -1 - static_cast<int>(result);
}

}  // namespace sale::cuda

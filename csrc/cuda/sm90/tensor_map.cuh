// Tensor maps, from which the copy engine reads keys, values, codes and query rows.
#pragma once

#include <cuda.h>

#include "sale_prefill/cuda_api.h"

namespace sale::cuda {

// A map of boxes of `box_columns` elements by `box_tokens` tokens. Returns 0, or -1 - CUresult.
int make_tensor_map(CUtensorMap* map, const SaleCudaTokens& tokens, CUtensorMapDataType type, int element_bytes,
                    int columns, int heads, int box_columns, int box_tokens, CUtensorMapSwizzle swizzle);

}  // namespace sale::cuda

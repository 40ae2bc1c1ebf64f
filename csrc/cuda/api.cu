#include "sale_prefill/cuda_api.h"

extern "C" int32_t sale_cuda_abi() { return SALE_CUDA_ABI; }

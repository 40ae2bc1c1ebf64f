// Kernels for Zen 4, Cooper Lake, Sapphire Rapids and later: AVX-512 with VNNI and BF16.
// Shared headers come before the target pragma: their inline functions are those of the rest of the library.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "grid.h"
#include "kernel_table.h"
#include "tasks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#define SALE_ISA isa_avx512
#define SALE_HAS_BF16 1
#include "simd/avx512.h"

#include "kernels/table.h"

namespace sale::cpu {

const KernelTable kAvx512Table = isa_avx512::kernel_table<isa_avx512::Avx512<true>>();

}  // namespace sale::cpu

#endif  // __x86_64__

// Kernels for Haswell, Zen 1 and later: AVX2, FMA, F16C.
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
#pragma GCC target("avx2,fma,f16c")
#define SALE_ISA isa_avx2

#include "simd/avx2.h"

#include "kernels/table.h"

namespace sale::cpu {

const KernelTable kAvx2Table = isa_avx2::kernel_table<isa_avx2::Avx2>();

}  // namespace sale::cpu

#endif  // __x86_64__

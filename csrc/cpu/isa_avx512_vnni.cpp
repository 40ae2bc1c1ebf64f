// Kernels for Cascade Lake, Ice Lake, Tiger Lake: AVX-512 with VNNI, no BF16.
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
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#define SALE_ISA isa_avx512_vnni
#define SALE_HAS_BF16 0
#include "simd/avx512.h"

#include "kernels/table.h"

namespace sale::cpu {

const KernelTable kAvx512VnniTable = isa_avx512_vnni::kernel_table<isa_avx512_vnni::Avx512<false>>();

}  // namespace sale::cpu

#endif  // __x86_64__

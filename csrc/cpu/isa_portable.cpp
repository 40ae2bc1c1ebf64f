// Kernels for any processor: plain C++.
// Standard headers come before the target pragma: their inline functions are shared with the rest of the library.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>


#define SALE_ISA isa_portable

#include "simd/portable.h"

#include "kernels/table.h"

namespace sale::cpu {

const KernelTable kPortableTable = isa_portable::kernel_table<isa_portable::Portable>();

}  // namespace sale::cpu

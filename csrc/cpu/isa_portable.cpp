// Kernels for any processor: plain C++.
// Shared headers come before the target pragma: their inline functions are those of the rest of the library.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "grid.h"
#include "kernel_table.h"
#include "tasks.h"


#define SALE_ISA isa_portable

#include "simd/portable.h"

#include "kernels/table.h"

namespace sale::cpu {

const KernelTable kPortableTable = isa_portable::kernel_table<isa_portable::Portable>();

}  // namespace sale::cpu

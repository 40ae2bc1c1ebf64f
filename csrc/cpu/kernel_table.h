// One table of kernels per instruction set, each defined by its own isa_*.cpp.
#pragma once

#include "sale_prefill/cpu_api.h"

namespace sale::cpu {

struct KernelTable {
  int32_t (*quantise_query)(const SaleQuantiseQuery&);
  int32_t (*quantise_key)(const SaleQuantiseKey&);
  int32_t (*sink_local)(const SaleSinkLocal&);
  int32_t (*sampled)(const SaleSampled&);
  int32_t (*select)(const SaleSelect&);
  int32_t (*attend)(const SaleAttend&);
};

extern const KernelTable kAvx512Table;
extern const KernelTable kAvx512VnniTable;
extern const KernelTable kAvx2Table;
extern const KernelTable kPortableTable;

}  // namespace sale::cpu

// The kernels of one instruction set as a table.
#pragma once

#include "../kernel_table.h"
#include "attend.h"
#include "quantise.h"
#include "sampled.h"
#include "select.h"
#include "sink_local.h"

namespace sale::cpu {
namespace SALE_ISA {

template <class S>
int32_t attend(const SaleAttend& call) {
  if constexpr (S::kBf16Dot) {
    const bool bf16 = call.query.dtype == SALE_BF16 && call.keys.dtype == SALE_BF16 && call.values.dtype == SALE_BF16;
    if (bf16) return Attend<S, true>::run(call);
  }
  return Attend<S, false>::run(call);
}

template <class S>
constexpr KernelTable kernel_table() {
  return {Quantise<S>::query, Quantise<S>::key, SinkLocal<S>::run, Sampled<S>::run, Select<S>::run, attend<S>};
}

}  // namespace SALE_ISA
}  // namespace sale::cpu

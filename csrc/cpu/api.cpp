// Entry points: pick the table of an instruction set and call it. What this machine can run is asked of CPUID.
#include "sale_prefill/cpu_api.h"

#include "kernel_table.h"

namespace sale::cpu {
namespace {

struct Isa {
  const char* name;
  const KernelTable* table;
  bool (*supported)();
};

bool has_portable() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

bool has_avx512_vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_avx512() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

const Isa kIsas[] = {
    {"avx512", &kAvx512Table, has_avx512},
    {"avx512_vnni", &kAvx512VnniTable, has_avx512_vnni},
    {"avx2", &kAvx2Table, has_avx2},
    {"portable", &kPortableTable, has_portable},
};
#else
const Isa kIsas[] = {{"portable", &kPortableTable, has_portable}};
#endif

constexpr int32_t kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

template <class Call>
int32_t dispatch(int32_t isa, int32_t (*KernelTable::*kernel)(const Call&), const Call* call) {
  if (isa < 0 || isa >= kIsaCount) return SALE_UNKNOWN_ISA;
  return (kIsas[isa].table->*kernel)(*call);
}

}  // namespace
}  // namespace sale::cpu

using sale::cpu::dispatch;
using sale::cpu::KernelTable;

extern "C" {

int32_t sale_cpu_abi() { return SALE_CPU_ABI; }
int32_t sale_cpu_isa_count() { return sale::cpu::kIsaCount; }
const char* sale_cpu_isa_name(int32_t isa) { return sale::cpu::kIsas[isa].name; }
int32_t sale_cpu_supports(int32_t isa) { return sale::cpu::kIsas[isa].supported() ? 1 : 0; }

int32_t sale_cpu_quantise_query(int32_t isa, const SaleQuantiseQuery* call) {
  return dispatch(isa, &KernelTable::quantise_query, call);
}
int32_t sale_cpu_quantise_key(int32_t isa, const SaleQuantiseKey* call) {
  return dispatch(isa, &KernelTable::quantise_key, call);
}
int32_t sale_cpu_sink_local(int32_t isa, const SaleSinkLocal* call) {
  return dispatch(isa, &KernelTable::sink_local, call);
}
int32_t sale_cpu_sampled(int32_t isa, const SaleSampled* call) { return dispatch(isa, &KernelTable::sampled, call); }
int32_t sale_cpu_select(int32_t isa, const SaleSelect* call) { return dispatch(isa, &KernelTable::select, call); }
int32_t sale_cpu_attend(int32_t isa, const SaleAttend* call) { return dispatch(isa, &KernelTable::attend, call); }

}  // extern "C"

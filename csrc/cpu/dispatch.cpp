// Choice of the instruction set, once per process.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/rows.h"

namespace capo {

#define CAPO_DECLARE(isa)              \
  namespace isa {                      \
  extern const RowKernels kRowKernels; \
  }
#if CAPO_HAS_AVX512
CAPO_DECLARE(avx512)
#endif
#if CAPO_HAS_AVX2
CAPO_DECLARE(avx2)
#endif
CAPO_DECLARE(baseline)
#undef CAPO_DECLARE

namespace {

bool supported(const char* isa) {
  (void)isa;
#if CAPO_HAS_AVX512 || CAPO_HAS_AVX2
  __builtin_cpu_init();
#endif
#if CAPO_HAS_AVX512
  if (std::strcmp(isa, "avx512") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd");
#endif
#if CAPO_HAS_AVX2
  // x86-64-v3 code also uses these; every machine with AVX2 that matters has them.
  if (std::strcmp(isa, "avx2") == 0)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2");
#endif
  return true;
}

const RowKernels& choose() {
  const RowKernels* const built[] = {// the best first
#if CAPO_HAS_AVX512
                                     &avx512::kRowKernels,
#endif
#if CAPO_HAS_AVX2
                                     &avx2::kRowKernels,
#endif
                                     &baseline::kRowKernels};
  const char* wanted = std::getenv("CAPO_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  std::string names;
  for (const RowKernels* kernels : built) {
    if (!supported(kernels->isa)) continue;
    if (any || std::strcmp(wanted, kernels->isa) == 0) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  throw std::invalid_argument("CAPO_ISA=" + std::string(wanted) + ": this machine has " + names);
}

}  // namespace

const RowKernels& row_kernels() {
  static const RowKernels& kernels = choose();
  return kernels;
}

}  // namespace capo

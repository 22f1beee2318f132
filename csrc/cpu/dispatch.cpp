// Choice of the instruction set, once per process.
#include <cstdlib>
#include <cstring>

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

static const RowKernels& choose() {
  const char* wanted = std::getenv("CAPO_ISA");
  const auto allowed = [&](const char* isa) { return wanted == nullptr || std::strcmp(wanted, isa) == 0; };
#if CAPO_HAS_AVX512 || CAPO_HAS_AVX2
  __builtin_cpu_init();
#endif
#if CAPO_HAS_AVX512
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    return avx512::kRowKernels;
#endif
#if CAPO_HAS_AVX2
  // x86-64-v3 code also uses these; every machine with AVX2 that matters has them.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  if ((allowed("avx2") || allowed("avx512")) && v3) return avx2::kRowKernels;
#endif
  return baseline::kRowKernels;
}

const RowKernels& row_kernels() {
  static const RowKernels& kernels = choose();
  return kernels;
}

}  // namespace capo

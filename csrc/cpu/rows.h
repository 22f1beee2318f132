// Row kernels over logits: compiled once per instruction set (csrc/cpu/simd), chosen when the module is loaded.
#pragma once
#include <cstdint>

namespace capo {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// What one pass over a row of logits gives, with z the logits, m their maximum and s the inverse temperature:
struct RowStats {
  float max;      // m
  float sum;      // sum of e^(s (z - m))
  float centred;  // sum of e^(s (z - m)) * s (z - m); 0 if not asked for
};

// The gradient of a row: alpha * e + beta * e * d with d = s (z - m), e = e^d; the label's entry is given.
struct RowGrad {
  float max;
  float inverse_temperature;
  float alpha;
  float beta;
  int64_t label;
  float label_grad;
  bool stream;  // the gradient will not be read soon: write it past the caches
};

struct RowKernels {
  const char* isa;
  // Indexed by Dtype. The vocabulary is `size` elements long.
  RowStats (*stats[3])(const void* row, int64_t size, float inverse_temperature);
  // `next`: a row that will be read soon, fetched into the cache meanwhile, or null.
  void (*grad[3])(const void* row, void* grad, int64_t size, const RowGrad& how, const void* next);
  void (*fill[3])(void* grad, int64_t size, float value);
  void (*scale[3])(void* values, int64_t size, float factor);
  float (*load[3])(const void* row, int64_t index);
};

// The kernels of the best instruction set that this machine has, or of the one named in CAPO_ISA.
const RowKernels& row_kernels();

}  // namespace capo

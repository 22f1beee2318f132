// Row kernels over logits: compiled once per instruction set (csrc/cpu/simd), chosen when the module is loaded.
#pragma once
#include <cstdint>

namespace capo {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// What one pass over a row of logits z gives. Exponents are t = (z - top) * rate, where rate is log2(e) / temperature;
// top is the largest logit or one near it, which keeps the powers of two in range.
struct RowStats {
  float top;
  double sum;      // of 2^t; NaN if the row has NaN, +inf, or nothing but -inf
  double centred;  // of 2^t * t
  bool infinite;   // the row has -inf
};

// The gradient of a row: 2^t * (alpha + beta * t); the label's entry is given, unless the label is -1.
struct RowGrad {
  double rate;
  float top;
  double alpha;
  double beta;
  int64_t label;
  float label_grad;
  bool infinite;
  bool stream;  // the gradient will not be read soon: write it past the caches
};

struct RowKernels {
  const char* isa;
  // Indexed by Dtype. A row is `size` elements long. `infinite`: a guess whether the row has -inf, right or wrong alike
  // in its result.
  RowStats (*stats[3])(const void* row, int64_t size, double rate, int64_t label, bool infinite);
  void (*grad[3])(const void* row, void* grad, int64_t size, const RowGrad& how);
  void (*fill[3])(void* grad, int64_t size, float value, bool stream);
  float (*load[3])(const void* row, int64_t index);
};

// The kernels of the best instruction set that this machine has, or of the one named in CAPO_ISA; std::invalid_argument
// if the machine has none of that name.
const RowKernels& row_kernels();

}  // namespace capo

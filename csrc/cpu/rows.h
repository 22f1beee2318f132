// Row kernels over logits: compiled once per instruction set (csrc/cpu/simd), chosen when the module is loaded.
#pragma once
#include <cstdint>

#include "common/rows.h"

namespace capo {

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

// What the bindings have in common.
#pragma once
#include <pybind11/pybind11.h>

#include "common/policy_loss.h"

namespace capo {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline TokenValues token_values(Address advantages, Address old_logprobs, Address ref_logprobs,
                                Address rollout_logprobs) {
  return {pointer<const float>(advantages), pointer<const float>(old_logprobs), pointer<const float>(ref_logprobs),
          pointer<const float>(rollout_logprobs)};
}

inline LossRule loss_rule(float ratio_low, float ratio_high, float clip_dual, int ratio, int reduce, float constant,
                          float kl_coef, int kl, float entropy_coef, float temperature, int objective,
                          float importance_cap) {
  return {ratio_low,
          ratio_high,
          clip_dual,
          static_cast<Ratio>(ratio),
          static_cast<Reduce>(reduce),
          constant,
          kl_coef,
          kl_coef > 0.f ? static_cast<Kl>(kl) : Kl::kNone,
          entropy_coef,
          temperature,
          static_cast<Objective>(objective),
          importance_cap};
}

// The functions of csrc/cuda.
void bind_cuda(pybind11::module_& m);

}  // namespace capo

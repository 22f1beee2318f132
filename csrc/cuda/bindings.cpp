// The functions of this folder for Python. Tensors arrive as addresses (0 for none); capo/cuda.py makes them.
#include "bindings.h"

#include "cuda/credit.h"
#include "cuda/logprobs.h"
#include "cuda/policy_loss.h"
#include "cuda/rows.h"
#include "cuda/runtime.h"

namespace py = pybind11;

namespace capo {
namespace {

using namespace capo::cuda;

Stream stream_of(Address stream) { return pointer<void>(stream); }

Head head_of(Address logits, int64_t stride, int dtype, int64_t rows, int64_t vocab, Address labels, float temperature,
             Address temperatures) {
  return {pointer<const void>(logits),
          stride,
          static_cast<Dtype>(dtype),
          rows,
          vocab,
          pointer<const int64_t>(labels),
          false,
          temperature,
          pointer<const float>(temperatures)};
}

void bind_steps(py::module_& m) {
  m.def("size_of_tiles", &size_of_tiles, "Bytes of workspace for rows and vocab.");
  m.def(
      "row_stats",
      [](Address logits, int64_t stride, int dtype, int64_t rows, int64_t vocab, Address labels, float temperature,
         Address temperatures, Address workspace, Address stats, Address stream) {
        Head head = head_of(logits, stride, dtype, rows, vocab, labels, temperature, temperatures);
        head.partial = true;
        return read_rows(head, {nullptr, nullptr}, {pointer<double>(stats), nullptr, nullptr}, pointer<void>(workspace),
                         stream_of(stream));
      },
      "Logits, labels -> sums over each row.");
  m.def(
      "row_logprobs",
      [](Address logits, int64_t stride, int dtype, int64_t rows, int64_t vocab, Address labels, float temperature,
         Address temperatures, Address stats, Address logprobs, Address entropy, Address stream) {
        return row_logprobs(head_of(logits, stride, dtype, rows, vocab, labels, temperature, temperatures),
                            pointer<const double>(stats), pointer<float>(logprobs), pointer<float>(entropy),
                            stream_of(stream));
      },
      "Sums over each row -> log-probabilities and entropies.");
  m.def(
      "row_grads",
      [](Address logits, int64_t stride, int dtype, int64_t rows, int64_t vocab, Address labels, float temperature,
         Address temperatures, int64_t count, Address moves, Address stats, Address slopes, Address entropy_slopes,
         Address grad, int64_t grad_stride, Address stream) {
        return row_grads(
            {head_of(logits, stride, dtype, rows, vocab, labels, temperature, temperatures), count,
             pointer<const int64_t>(moves), pointer<const double>(stats), pointer<const double>(slopes),
             pointer<const double>(entropy_slopes), 0.0, nullptr, nullptr, pointer<void>(grad), grad_stride},
            stream_of(stream));
      },
      "Gradients of some rows of logits, one after the other.");
  m.def(
      "loss_terms",
      [](Address advantages, Address old_logprobs, Address ref_logprobs, Address rollout_logprobs, Address logprobs_in,
         Address entropy, Address weights, Address cu_seqlens, int64_t rows, int64_t responses, float ratio_low,
         float ratio_high, float clip_dual, int ratio, int reduce, float constant, float kl_coef, int kl,
         float entropy_coef, float temperature, int objective, float importance_cap, Address loss, Address kl_out,
         Address clipped, Address slopes, Address stream) {
        return loss_terms(
            {token_values(advantages, old_logprobs, ref_logprobs, rollout_logprobs), pointer<const float>(logprobs_in),
             pointer<const float>(entropy), pointer<const double>(weights), true, nullptr,
             pointer<const int64_t>(cu_seqlens), rows, responses,
             loss_rule(ratio_low, ratio_high, clip_dual, ratio, reduce, constant, kl_coef, kl, entropy_coef,
                       temperature, objective, importance_cap),
             pointer<float>(loss), pointer<float>(kl_out), pointer<bool>(clipped), pointer<double>(slopes)},
            stream_of(stream));
      },
      "Log-probabilities and weights of live tokens -> their losses and slopes.");
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("error_text", &error_text, "What the number that a function gave means.");
  py::class_<CreditArgs>(m, "Credit", py::module_local(), "What advantages are made of, and where they go.")
      .def(py::init([](Address outcomes, Address votes, Address starts, Address ends, Address cu_steps,
                       Address cu_seqlens, Address groups, Address advantages, int64_t responses, int64_t steps,
                       int64_t votes_per_step, int64_t tokens, int vote, double outcome_weight, double process_weight,
                       int normalize, double std_floor, double clamp, int reward) {
        const CreditRule rule = {static_cast<Vote>(vote),           outcome_weight, process_weight,
                                 static_cast<Normalize>(normalize), std_floor,      clamp,
                                 static_cast<Reward>(reward)};
        return CreditArgs{pointer<const float>(outcomes),
                          pointer<const int8_t>(votes),
                          pointer<const int64_t>(starts),
                          pointer<const int64_t>(ends),
                          pointer<const int64_t>(cu_steps),
                          pointer<const int64_t>(cu_seqlens),
                          pointer<const int64_t>(groups),
                          pointer<float>(advantages),
                          responses,
                          steps,
                          votes_per_step,
                          tokens,
                          rule,
                          0};
      }));
  m.def(
      "credit", [](const CreditArgs& args, Address stream) { return credit(args, stream_of(stream)); },
      "Votes, outcomes, steps, groups -> advantages.");
  m.def(
      "policy_loss",
      [](Address logits, int64_t logits_stride, Address grad, int64_t grad_stride, int dtype, int64_t rows,
         int64_t vocab, int64_t tokens, int64_t responses, Address token_of, Address labels, Address advantages,
         Address old_logprobs, Address ref_logprobs, Address rollout_logprobs, Address mask, Address cu_seqlens,
         float ratio_low, float ratio_high, float clip_dual, int ratio, int reduce, float constant, float kl_coef,
         int kl, float entropy_coef, float temperature, int objective, float importance_cap, Address loss,
         Address logprobs_out, Address entropy, Address clip_fraction, Address kl_out, const CreditArgs* credit,
         int form, const py::function& workspace, Address stream) {
        const PolicyLoss args = {head_of(logits, logits_stride, dtype, rows, vocab, labels, temperature, 0),
                                 pointer<void>(grad),
                                 grad_stride,
                                 tokens,
                                 responses,
                                 pointer<const int64_t>(token_of),
                                 token_values(advantages, old_logprobs, ref_logprobs, rollout_logprobs),
                                 pointer<const bool>(mask),
                                 pointer<const int64_t>(cu_seqlens),
                                 credit,
                                 loss_rule(ratio_low, ratio_high, clip_dual, ratio, reduce, constant, kl_coef, kl,
                                           entropy_coef, temperature, objective, importance_cap),
                                 pointer<float>(loss),
                                 pointer<float>(logprobs_out),
                                 pointer<float>(entropy),
                                 pointer<float>(clip_fraction),
                                 pointer<float>(kl_out),
                                 static_cast<Form>(form)};
        const Form chosen = form_of(args);
        const Address memory = workspace(workspace_of(args, chosen)).cast<Address>();
        return policy_loss(args, chosen, pointer<void>(memory), stream_of(stream));
      },
      "Logits, labels, advantages or a Credit -> loss, metrics and gradient. `workspace(size)` gives memory.");
  m.def(
      "logprobs",
      [](Address logits, int64_t stride, int dtype, int64_t rows, int64_t vocab, Address labels, float temperature,
         Address mask, Address workspace, Address logprobs_out, Address entropy, Address stream) {
        return logprobs({head_of(logits, stride, dtype, rows, vocab, labels, temperature, 0), pointer<const bool>(mask),
                         pointer<float>(logprobs_out), pointer<float>(entropy)},
                        pointer<void>(workspace), stream_of(stream));
      },
      "Logits, labels -> log-probabilities and entropies.");
  bind_steps(m);
}

}  // namespace capo

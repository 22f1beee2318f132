// capo._native: the table of contents of this folder. Tensors arrive as addresses (0 for none); capo/native.py makes
// them.
#include "bindings.h"

#include <algorithm>
#include <cctype>

#include "cpu/credit.h"
#include "cpu/policy_loss.h"
#include "cpu/rows.h"
#include "text/critique.h"
#include "text/segment.h"

namespace py = pybind11;
using namespace capo;

namespace {

// A Python string as UTF-8; halves of characters, which have none, as three bytes each. `owner` keeps it alive.
std::string_view utf8(const py::handle text, py::object& owner) {
  Py_ssize_t size = 0;
  if (const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size)) return {data, static_cast<size_t>(size)};
  PyErr_Clear();
  owner = py::reinterpret_steal<py::object>(PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogatepass"));
  if (!owner) throw py::error_already_set();
  return {PyBytes_AS_STRING(owner.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(owner.ptr()))};
}

Reason read_reply(py::handle reply, py::handle nonce, int64_t max_reply, int64_t num_steps, Said& said) {
  py::object owner, nonce_owner;
  const std::string_view plain_or_nonce = nonce.is_none() ? std::string_view() : utf8(nonce, nonce_owner);
  return read_reply(utf8(reply, owner), plain_or_nonce, max_reply, num_steps, said);
}

// Verdict and flagged steps; None if the reply does not count.
py::object parse_reply(const py::str& reply, const py::object& nonce, int64_t max_reply, int64_t num_steps) {
  Said said;
  if (read_reply(reply, nonce, max_reply, num_steps, said) != Reason::kNone) return py::none();
  py::tuple flagged(said.flagged.size());
  for (size_t i = 0; i < said.flagged.size(); ++i) flagged[i] = said.flagged[i];
  const py::object verdict = said.verdict ? py::object(py::bool_(*said.verdict)) : py::none();
  return py::make_tuple(verdict, flagged);
}

void read_votes(const py::list& said, const py::list& nonces, Address cu_said, Address cu_steps, int64_t num_responses,
                int64_t max_reply, Address votes, int64_t num_votes, Address states) {
  const int64_t* const firsts = pointer<const int64_t>(cu_said);
  const int64_t* const steps = pointer<const int64_t>(cu_steps);
  Said found;
  for (int64_t i = 0; i < num_responses; ++i) {
    const int64_t num_steps = steps[i + 1] - steps[i];
    for (int64_t place = firsts[i]; place < firsts[i + 1]; ++place) {
      const py::handle reply = PyList_GET_ITEM(said.ptr(), place);
      const py::handle nonce = PyList_GET_ITEM(nonces.ptr(), place);
      found.flagged.clear();
      Reason reason = Reason::kNone;
      if (PyUnicode_Check(reply.ptr()))
        reason = read_reply(reply, nonce, max_reply, num_steps, found);
      else if (PyList_Check(reply.ptr()))
        for (const py::handle step : py::reinterpret_borrow<py::list>(reply))
          found.flagged.push_back(PyLong_AsLongLong(step.ptr()));
      else
        continue;
      pointer<uint8_t>(states)[place] = static_cast<uint8_t>(reason);
      if (reason != Reason::kNone) continue;
      int8_t* const column = pointer<int8_t>(votes) + steps[i] * num_votes + (place - firsts[i]);
      for (int64_t step = 0; step < num_steps; ++step) column[step * num_votes] = 0;
      for (const int64_t step : found.flagged) column[step * num_votes] = 1;
    }
  }
}

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// As capo.critique.check_nonce has it.
bool is_nonce(PyObject* text) {
  if (!PyUnicode_CheckExact(text) || !PyUnicode_IS_ASCII(text)) return false;
  const Py_ssize_t length = PyUnicode_GET_LENGTH(text);
  const Py_UCS1* const begin = PyUnicode_1BYTE_DATA(text);
  return 4 <= length && length <= 64 && std::all_of(begin, begin + length, [](Py_UCS1 c) { return std::isalnum(c); });
}

// What a critique says, and about it; null if it has none of the usual forms.
struct PlainCritique {
  PyObject* what = nullptr;
  PyObject* about = nullptr;
};

PlainCritique flagged_steps(PyObject* critique, int64_t num_steps) {
  static PyObject* const kValid = interned("valid");
  static PyObject* const kError = interned("error");
  static PyObject* const kFlagged = interned("flagged");
  PyObject* const valid = PyDict_GetItem(critique, kValid);
  if (valid == Py_False) {
    PyObject* const error = PyDict_GetItem(critique, kError);
    if (error == nullptr || !PyUnicode_CheckExact(error) || PyUnicode_GET_LENGTH(error) == 0) return {};
    return {Py_None, error};
  }
  PyObject* const flagged = PyDict_GetItem(critique, kFlagged);
  if ((valid != nullptr && valid != Py_True) || flagged == nullptr || !PyList_CheckExact(flagged)) return {};
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(flagged); ++i) {
    PyObject* const step = PyList_GET_ITEM(flagged, i);
    int overflow = 0;
    const int64_t value = PyLong_CheckExact(step) ? PyLong_AsLongLongAndOverflow(step, &overflow) : -1;
    if (overflow != 0 || value < 0 || value >= num_steps) return {};
  }
  return {flagged, Py_None};
}

PlainCritique plain_critique(PyObject* critique, PyObject* nonce, int64_t num_steps) {
  static PyObject* const kText = interned("text");
  static PyObject* const kNonce = interned("nonce");
  PyObject* text = critique;
  if (PyDict_CheckExact(critique)) {
    text = PyDict_GetItem(critique, kText);
    if (text == nullptr) return flagged_steps(critique, num_steps);
    if (PyObject* const own = PyDict_GetItem(critique, kNonce)) nonce = own;
  }
  if (text == Py_None) return {Py_None, Py_None};
  if (!PyUnicode_CheckExact(text) || (nonce != Py_None && !is_nonce(nonce))) return {};
  return {text, nonce};
}

// What the critiques of a response say, and about it, a list each; None if one of them has none of the usual forms.
py::object plain_critiques(const py::list& critiques, const py::object& nonce, int64_t num_steps) {
  const size_t count = critiques.size();
  py::list what(count), about(count);
  for (size_t i = 0; i < count; ++i) {
    const PlainCritique said = plain_critique(PyList_GET_ITEM(critiques.ptr(), i), nonce.ptr(), num_steps);
    if (said.what == nullptr) return py::none();
    PyList_SET_ITEM(what.ptr(), i, Py_NewRef(said.what));
    PyList_SET_ITEM(about.ptr(), i, Py_NewRef(said.about));
  }
  return py::make_tuple(what, about);
}

// Integers below `limit` as int32 bytes; None if there is anything else in the list.
py::object pack_ids(const py::list& ids, int64_t limit) {
  const Py_ssize_t count = PyList_GET_SIZE(ids.ptr());
  py::bytes packed(nullptr, static_cast<size_t>(count) * sizeof(int32_t));
  auto* const out = reinterpret_cast<int32_t*>(PyBytes_AS_STRING(packed.ptr()));
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const id = PyList_GET_ITEM(ids.ptr(), i);
    int overflow = 0;
    const int64_t value = PyLong_CheckExact(id) ? PyLong_AsLongLongAndOverflow(id, &overflow) : -1;
    if (overflow != 0 || value < 0 || value >= limit) return py::none();
    out[i] = static_cast<int32_t>(value);
  }
  return std::move(packed);
}

HeadRows head_rows(Address logits, int64_t stride, int dtype, int64_t vocab, Address labels, float temperature,
                   Address temperatures, int num_threads) {
  return {pointer<const void>(logits),    stride,      static_cast<Dtype>(dtype),          vocab,
          pointer<const int64_t>(labels), temperature, pointer<const float>(temperatures), num_threads};
}

void bind_head(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "row_stats",
      [](Address logits, int64_t stride, int dtype, int64_t vocab, Address labels, float temperature,
         Address temperatures, int num_threads, int64_t rows, Address stats) {
        row_stats(head_rows(logits, stride, dtype, vocab, labels, temperature, temperatures, num_threads), rows,
                  pointer<double>(stats));
      },
      release(), "Logits, labels -> sums over each row.");
  m.def(
      "row_logprobs",
      [](Address logits, int64_t stride, int dtype, int64_t vocab, Address labels, float temperature,
         Address temperatures, int num_threads, int64_t rows, Address stats, Address logprobs, Address entropy) {
        row_logprobs(head_rows(logits, stride, dtype, vocab, labels, temperature, temperatures, num_threads), rows,
                     pointer<const double>(stats), pointer<float>(logprobs), pointer<float>(entropy));
      },
      release(), "Sums over each row -> log-probabilities and entropies.");
  m.def(
      "row_grads",
      [](Address logits, int64_t stride, int dtype, int64_t vocab, Address labels, float temperature,
         Address temperatures, int num_threads, int64_t count, Address rows, Address stats, Address slopes,
         Address entropy_slopes, Address grad) {
        row_grads(head_rows(logits, stride, dtype, vocab, labels, temperature, temperatures, num_threads), count,
                  pointer<const int64_t>(rows), pointer<const double>(stats), pointer<const double>(slopes),
                  pointer<const double>(entropy_slopes), pointer<void>(grad));
      },
      release(), "Gradients of some rows of logits, one after the other.");
  m.def(
      "loss_terms",
      [](Address advantages, Address old_logprobs, Address ref_logprobs, Address rollout_logprobs, Address logprobs_in,
         Address entropy, Address weights, Address cu_seqlens, int64_t responses, float ratio_low, float ratio_high,
         float clip_dual, int ratio, int reduce, float constant, float kl_coef, int kl, float entropy_coef,
         float temperature, int objective, float importance_cap, Address loss, Address kl_out, Address clipped,
         Address slopes) {
        loss_terms({token_values(advantages, old_logprobs, ref_logprobs, rollout_logprobs),
                    pointer<const float>(logprobs_in), pointer<const float>(entropy), pointer<const double>(weights),
                    pointer<const int64_t>(cu_seqlens), responses,
                    loss_rule(ratio_low, ratio_high, clip_dual, ratio, reduce, constant, kl_coef, kl, entropy_coef,
                              temperature, objective, importance_cap),
                    pointer<float>(loss), pointer<float>(kl_out), pointer<bool>(clipped), pointer<double>(slopes)});
      },
      release(), "Log-probabilities and weights of live tokens -> their losses and slopes.");
}

void bind_text(py::module_& m) {
  m.def("read_votes", &read_votes, py::arg("said"), py::arg("nonces"), py::arg("cu_said"), py::arg("cu_steps"),
        py::arg("num_responses"), py::arg("max_reply"), py::arg("votes"), py::arg("num_votes"), py::arg("states"),
        "Replies and lists of flagged steps -> votes and states; the lists must fit.");
  m.def("parse_reply", &parse_reply, py::arg("reply"), py::arg("nonce"), py::arg("max_reply"), py::arg("num_steps"),
        "A reply -> verdict and flagged steps; None if it does not count.");
  m.def("plain_critiques", &plain_critiques, py::arg("critiques"), py::arg("nonce"), py::arg("num_steps"),
        "Critiques of the usual forms -> what they say, and about it.");
  m.def("pack_ids", &pack_ids, py::arg("ids"), py::arg("limit"), "A list of token ids -> int32 bytes.");
  m.def(
      "token_flags",
      [](Address data, Address offsets, int64_t size, Address special, Address eos, Address flags) {
        const TokenTable table{size, pointer<const uint8_t>(data), pointer<const int64_t>(offsets), nullptr};
        token_flags(table, pointer<const uint8_t>(special), pointer<const uint8_t>(eos), pointer<uint8_t>(flags));
      },
      py::arg("data"), py::arg("offsets"), py::arg("size"), py::arg("special"), py::arg("eos"), py::arg("flags"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "segment",
      [](Address ids, bool ids_are_int64, Address cu_seqlens, int64_t num_responses, Address data, Address offsets,
         Address flags, int64_t size, int64_t newlines, Address span_starts, Address span_ends, Address cu_spans,
         int64_t max_steps, Address starts, Address ends, Address cu_steps, int num_threads) {
        const TokenTable table{size, pointer<const uint8_t>(data), pointer<const int64_t>(offsets),
                               pointer<const uint8_t>(flags)};
        const Delimiters delimiters{newlines, pointer<const int64_t>(span_starts), pointer<const int64_t>(span_ends),
                                    pointer<const int64_t>(cu_spans)};
        const auto run = [&](const auto* typed_ids) {
          return segment(typed_ids, pointer<const int64_t>(cu_seqlens), num_responses, table, delimiters, max_steps,
                         num_threads, pointer<int64_t>(starts), pointer<int64_t>(ends), pointer<int64_t>(cu_steps));
        };
        return ids_are_int64 ? run(pointer<const int64_t>(ids)) : run(pointer<const int32_t>(ids));
      },
      py::arg("ids"), py::arg("ids_are_int64"), py::arg("cu_seqlens"), py::arg("num_responses"), py::arg("data"),
      py::arg("offsets"), py::arg("flags"), py::arg("size"), py::arg("newlines"), py::arg("span_starts"),
      py::arg("span_ends"), py::arg("cu_spans"), py::arg("max_steps"), py::arg("starts"), py::arg("ends"),
      py::arg("cu_steps"), py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ kernels of capo; called through capo.native";
  using release = py::call_guard<py::gil_scoped_release>;

  m.def("isa", [] { return row_kernels().isa; }, "Instruction set of the row kernels in use.");

  m.def(
      "credit",
      [](Address outcomes, Address votes, Address starts, Address ends, Address cu_steps, Address cu_seqlens,
         Address groups, Address advantages, int64_t responses, int64_t steps, int64_t votes_per_step, int64_t tokens,
         int vote, double outcome_weight, double process_weight, int normalize, double std_floor, double clamp,
         int reward, int num_threads) {
        CreditArgs args;
        args.outcomes = pointer<const float>(outcomes);
        args.votes = pointer<const int8_t>(votes);
        args.starts = pointer<const int64_t>(starts);
        args.ends = pointer<const int64_t>(ends);
        args.cu_steps = pointer<const int64_t>(cu_steps);
        args.cu_seqlens = pointer<const int64_t>(cu_seqlens);
        args.groups = pointer<const int64_t>(groups);
        args.advantages = pointer<float>(advantages);
        args.responses = responses;
        args.steps = steps;
        args.votes_per_step = votes_per_step;
        args.tokens = tokens;
        args.rule = {static_cast<Vote>(vote),           outcome_weight, process_weight,
                     static_cast<Normalize>(normalize), std_floor,      clamp,
                     static_cast<Reward>(reward)};
        args.num_threads = num_threads;
        return credit(args);
      },
      release(), "Votes, outcomes, steps, groups -> advantages; false if the input does not fit.");

  m.def(
      "policy_loss",
      [](Address logits, int64_t logits_stride, Address grad, int64_t grad_stride, bool grad_is_zero, int dtype,
         int64_t rows, int64_t vocab, int64_t tokens, int64_t responses, Address token_of, Address labels,
         Address advantages, Address old_logprobs, Address ref_logprobs, Address rollout_logprobs, Address mask,
         Address cu_seqlens, float ratio_low, float ratio_high, float clip_dual, int ratio, int reduce, float constant,
         float kl_coef, int kl, float entropy_coef, float temperature, int objective, float importance_cap,
         Address loss, Address logprobs_out, Address entropy, Address clip_fraction, Address kl_out, int num_threads) {
        PolicyLossArgs args;
        args.logits = pointer<const void>(logits);
        args.logits_stride = logits_stride;
        args.grad = pointer<void>(grad);
        args.grad_stride = grad_stride;
        args.grad_is_zero = grad_is_zero;
        args.dtype = static_cast<Dtype>(dtype);
        args.rows = rows;
        args.vocab = vocab;
        args.tokens = tokens;
        args.responses = responses;
        args.token_of = pointer<const int64_t>(token_of);
        args.labels = pointer<const int64_t>(labels);
        args.values = token_values(advantages, old_logprobs, ref_logprobs, rollout_logprobs);
        args.mask = pointer<const bool>(mask);
        args.cu_seqlens = pointer<const int64_t>(cu_seqlens);
        args.rule = loss_rule(ratio_low, ratio_high, clip_dual, ratio, reduce, constant, kl_coef, kl, entropy_coef,
                              temperature, objective, importance_cap);
        args.loss = pointer<float>(loss);
        args.logprobs = pointer<float>(logprobs_out);
        args.entropy = pointer<float>(entropy);
        args.clip_fraction = pointer<float>(clip_fraction);
        args.kl = pointer<float>(kl_out);
        args.num_threads = num_threads;
        return policy_loss(args);
      },
      release(), "Logits, labels, advantages -> loss, metrics and gradient; false if the input does not fit.");

  m.def(
      "logprobs",
      [](Address logits, int64_t logits_stride, int dtype, int64_t rows, int64_t vocab, Address labels, Address mask,
         float temperature, Address logprobs_out, Address entropy, int num_threads) {
        return logprobs({pointer<const void>(logits), logits_stride, static_cast<Dtype>(dtype), rows, vocab,
                         pointer<const int64_t>(labels), pointer<const bool>(mask), temperature,
                         pointer<float>(logprobs_out), pointer<float>(entropy), num_threads});
      },
      release(), "Logits, labels -> log-probabilities and entropies; false if a label does not fit.");

  bind_head(m);
  bind_text(m);
#ifdef CAPO_CUDA_ARCHITECTURES
  py::module_ cuda = m.def_submodule("cuda", "CUDA kernels of capo; called through capo.cuda");
  cuda.attr("architectures") = CAPO_CUDA_ARCHITECTURES;
  bind_cuda(cuda);
#endif
}

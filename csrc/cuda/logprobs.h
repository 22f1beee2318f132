// logprobs on the GPU.
#pragma once
#include "cuda/rows.h"

namespace capo::cuda {

struct Logprobs {
  Head head;
  const bool* mask;  // [N] or null: all are read
  float* logprobs;   // [N]
  float* entropy;    // [N]
};

int logprobs(const Logprobs& args, void* workspace, Stream stream);

}  // namespace capo::cuda

#include "cuda/logprobs.h"

namespace capo::cuda {

int logprobs(const Logprobs& args, void* workspace, Stream stream) {
  return read_rows(args.head, {nullptr, args.mask}, {nullptr, args.logprobs, args.entropy}, workspace, stream);
}

}  // namespace capo::cuda

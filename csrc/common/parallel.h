// Threads for the CPU kernels: started per call, so there is nothing to break after fork and nothing left spinning.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace capo {

// Calls body(first, last) on pieces of [0, count) of at most `grain` items, on up to `num_threads` threads. Which
// thread takes which piece varies from run to run, so body must write only what belongs to its own items. body must not
// throw.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, int num_threads, const Body& body) {
  grain = std::max<int64_t>(grain, 1);
  const int64_t num_pieces = (count + grain - 1) / grain;
  const int workers = static_cast<int>(std::min<int64_t>(std::max(num_threads, 1), num_pieces));
  if (workers <= 1) {
    for (int64_t first = 0; first < count; first += grain) body(first, std::min(first + grain, count));
    return;
  }
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t piece = next++; piece < num_pieces; piece = next++)
      body(piece * grain, std::min((piece + 1) * grain, count));
  };
  std::vector<std::thread> threads;
  threads.reserve(workers - 1);
  for (int i = 1; i < workers; ++i) threads.emplace_back(work);
  work();
  for (auto& thread : threads) thread.join();
}

}  // namespace capo

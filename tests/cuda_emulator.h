// What csrc/cuda/device.cuh has, for the CPU: the kernels run as they are, every thread of a cluster as a fiber. Which
// thread goes on where several could is drawn by lot, so that a barrier that is missing shows; shared memory starts as
// NaN; threads that wait for each other for ever abort the process.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define CAPO_DEVICE inline
#define CAPO_SLOW inline
#define CAPO_SLOW_MEMBER
#define CAPO_KERNEL(threads, blocks) void

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

namespace capo::device {

constexpr int kLanes = 32;
constexpr bool kHasClusters = true;

struct alignas(16) Vector {
  uint32_t word[4];
};

// The device that is played; the tests change it.
struct Device {
  bool clusters = true;
  int multiprocessors = 4;
  int64_t most_memory = 227 * 1024, target_memory = 40 * 1024;
  uint64_t seed = 1;
  int64_t launches = 0;
};
inline Device emulated;

inline bool has_clusters() { return emulated.clusters; }
inline int multiprocessors() { return emulated.multiprocessors; }
inline int64_t most_memory() { return emulated.most_memory; }
inline int64_t target_memory() { return emulated.target_memory; }
inline const char* text_of(cudaError_t) { return "an error of the emulator"; }

// Those who meet at it, and what they bring along: in turns, as one may come again before all have read.
struct Barrier {
  int size = 0, arrived = 0;
  uint64_t phase = 0;
  std::vector<int> waiting;
  uint64_t values[2][kLanes] = {};
  bool any[2] = {};
};

class Machine {
 public:
  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  void run(int64_t first_block, int blocks, int threads_each, int memory_each, const std::function<void()>& what) {
    base = first_block, threads = threads_each, kernel = &what;
    const int count = blocks * threads;
    while (static_cast<int>(fibers.size()) < count) fibers.push_back(std::make_unique<Fiber>());
    memory.resize(blocks);
    for (auto& m : memory) m.assign(memory_each + 16, static_cast<char>(0xff));
    warps.assign(blocks * (threads / kLanes), {});
    for (auto& w : warps) w.size = kLanes;
    whole.assign(blocks, {});
    for (auto& b : whole) b.size = threads;
    cluster = {};
    cluster.size = count;
    arrived_in.assign(count, 0);
    has_met.assign(count, false);
    nowhere.assign(memory_each + 16, static_cast<char>(0xff));
    ready.clear();
    for (int i = 0; i < count; ++i) ready.push_back(i);
    remaining = count;
    if (_setjmp(home) == 0) next();
  }

  int self = 0;
  int64_t base = 0;
  int threads = 0;

  int block_of_cluster() const { return self / threads; }
  Barrier& warp() { return warps[self / kLanes]; }
  Barrier& block() { return whole[self / threads]; }
  char* block_memory(int rank) { return start_of(memory[rank]); }

  // Gives the phase that ends when all have come.
  uint64_t arrive(Barrier& barrier) {
    const uint64_t phase = barrier.phase;
    if (++barrier.arrived == barrier.size) {
      barrier.arrived = 0;
      ++barrier.phase;
      barrier.any[barrier.phase % 2] = false;
      ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
      barrier.waiting.clear();
    }
    return phase;
  }
  void wait(Barrier& barrier, uint64_t phase) {
    if (barrier.phase != phase) return;
    barrier.waiting.push_back(self);
    if (_setjmp(fibers[self]->where) == 0) next();
  }
  void meet(Barrier& barrier) { wait(barrier, arrive(barrier)); }
  void arrive_at_cluster() { arrived_in[self] = arrive(cluster); }
  void wait_for_cluster() {
    wait(cluster, arrived_in[self]);
    has_met[self] = true;
  }
  // That of another block; before a thread has met those of the others, there may be none yet.
  char* memory_of(int rank) { return has_met[self] ? block_memory(rank) : start_of(nowhere); }

 private:
  struct Fiber {
    std::vector<char> stack = std::vector<char>(64 * 1024);
    ucontext_t context;
    jmp_buf where;
    bool started = false;
  };

  static char* start_of(std::vector<char>& bytes) {
    return bytes.data() + (16 - reinterpret_cast<uintptr_t>(bytes.data()) % 16) % 16;
  }

  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::vector<char>> memory;
  std::vector<char> nowhere;
  std::vector<bool> has_met;
  std::vector<Barrier> warps, whole;
  Barrier cluster;
  std::vector<uint64_t> arrived_in;
  std::vector<int> ready;
  int remaining = 0;
  const std::function<void()>* kernel = nullptr;
  jmp_buf home;

  static void loop() {
    Machine& m = instance();
    for (;;) {
      (*m.kernel)();
      Fiber& own = *m.fibers[m.self];
      if (_setjmp(own.where) == 0) {
        if (--m.remaining == 0) _longjmp(m.home, 1);
        m.next();
      }
    }
  }

  [[noreturn]] void next() {
    if (ready.empty()) {
      fprintf(stderr, "cuda_emulator: %d threads wait for ever\n", remaining);
      abort();
    }
    emulated.seed = emulated.seed * 6364136223846793005u + 1442695040888963407u;
    const size_t pick = (emulated.seed >> 33) % ready.size();
    self = ready[pick];
    ready[pick] = ready.back();
    ready.pop_back();
    Fiber& fiber = *fibers[self];
    if (!fiber.started) {
      fiber.started = true;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, loop, 0);
      setcontext(&fiber.context);
    }
    _longjmp(fiber.where, 1);
  }
};

inline Machine& machine() { return Machine::instance(); }

inline int thread() { return machine().self % machine().threads; }
inline int64_t block() { return machine().base + machine().block_of_cluster(); }

inline void sync_warp() { machine().meet(machine().warp()); }
inline void sync_block() { machine().meet(machine().block()); }
inline void arrive_at_cluster() { machine().arrive_at_cluster(); }
inline void wait_for_cluster() { machine().wait_for_cluster(); }

// What the lanes of the warp bring, [kLanes].
inline const uint64_t* brought(uint64_t own) {
  Barrier& warp = machine().warp();
  uint64_t* const values = warp.values[warp.phase % 2];
  values[machine().self % kLanes] = own;
  machine().meet(warp);
  return values;
}
template <typename T>
T shuffle(T x, int lane) {
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof(T));
  const uint64_t* const all = brought(bits);
  memcpy(&x, all + lane, sizeof(T));
  return x;
}
template <typename T>
T shuffle_xor(T x, int mask) {
  return shuffle(x, (machine().self % kLanes) ^ mask);
}
inline uint32_t ballot(bool x) {
  const uint64_t* const all = brought(x);
  uint32_t result = 0;
  for (int i = 0; i < kLanes; ++i) result |= static_cast<uint32_t>(all[i]) << i;
  return result;
}
inline bool any_of_block(bool x) {
  Barrier& all = machine().block();
  bool& any = all.any[all.phase % 2];
  any |= x;
  machine().meet(all);
  return any;
}
inline int count_bits(uint32_t x) { return __builtin_popcount(x); }

inline char* block_memory() { return machine().block_memory(machine().block_of_cluster()); }
template <typename T>
T* in_block(T* shared, int rank) {
  return reinterpret_cast<T*>(machine().memory_of(rank) + (reinterpret_cast<char*>(shared) - block_memory()));
}

// Rows of logits and of gradients: while there are any, what is read or written by vectors or elements must lie in one
// of them as a whole. Counts what does not.
struct Rows {
  std::vector<std::pair<uintptr_t, uintptr_t>> all;  // begin, end
  int64_t outside = 0;

  void check(const void* p, size_t size) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
    for (const auto& row : all)
      if (row.first <= begin && begin + size <= row.second) return;
    outside += !all.empty();
  }
};
inline Rows rows;
inline int64_t elements = 0;  // read and written one by one

template <typename T>
T load_element(const T* p) {
  ++elements;
  rows.check(p, sizeof(T));
  return *p;
}
template <typename T>
void store_element(T* p, T x) {
  ++elements;
  rows.check(p, sizeof(T));
  *p = x;
}
inline uint32_t shift_right(uint32_t low, uint32_t high, int bits) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> bits);
}

// Addresses must be those that a GPU accepts.
inline void* aligned(const void* p) {
  rows.check(p, 16);
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) {
    fprintf(stderr, "cuda_emulator: 16 bytes at an address that is no multiple of 16\n");
    abort();
  }
  return const_cast<void*>(p);
}
inline Vector load_once(const void* p) { return *static_cast<const Vector*>(aligned(p)); }
inline Vector load_and_keep(const void* p) { return load_once(p); }
inline void store(void* p, const Vector& x) { *static_cast<Vector*>(aligned(p)) = x; }
inline void store_once(void* p, const Vector& x) { store(p, x); }

inline float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float larger_or_nan(float x, float y) { return isnan(x) || isnan(y) ? NAN : fmaxf(x, y); }
inline float power_of_two(float x) { return x < -126.f ? 0.f : exp2f(x); }
inline float half_to_float(uint16_t bits) {
  _Float16 x;
  memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}
inline uint32_t half_bits(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
inline uint32_t bf16_bits(float x) {
  const uint32_t bits = float_to_bits(x);
  return isnan(x) ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline uint32_t pack_halves(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
inline uint32_t pack_bf16s(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline void add_to_count(unsigned long long* total, unsigned long long count) { *total += count; }

struct Launch {
  int64_t blocks;
  int threads;
  int memory = 0;
  int cluster = 1;
  cudaStream_t stream = nullptr;
};

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& how, const Arguments&... arguments) {
  if (how.memory > emulated.most_memory || how.blocks % how.cluster != 0 || how.cluster > 8) return 1;
  ++emulated.launches;
  const std::function<void()> body = [&] { kernel(Parameters(arguments)...); };
  for (int64_t block = 0; block < how.blocks; block += how.cluster)
    machine().run(block, how.cluster, how.threads, how.memory, body);
  return cudaSuccess;
}

inline cudaError_t clear(void* memory, size_t size, cudaStream_t) {
  memset(memory, 0, size);
  return cudaSuccess;
}

}  // namespace capo::device

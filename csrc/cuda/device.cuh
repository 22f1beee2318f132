// The few things that the kernels ask of the device. tests/cuda_emulator.h has the same for the CPU, so that the tests
// run the kernels without a GPU.
#pragma once
#ifdef CAPO_EMULATED
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#define CAPO_DEVICE __device__ __forceinline__
#define CAPO_SLOW static __device__ __noinline__
#define CAPO_SLOW_MEMBER __device__ __noinline__
#define CAPO_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace capo::device {

constexpr int kLanes = 32;

struct alignas(16) Vector {
  uint32_t word[4];
};

CAPO_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
CAPO_DEVICE int64_t block() { return blockIdx.x; }

CAPO_DEVICE void sync_warp() { __syncwarp(); }
CAPO_DEVICE void sync_block() { __syncthreads(); }

template <typename T>
CAPO_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <typename T>
CAPO_DEVICE T shuffle(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
CAPO_DEVICE bool any_of_block(bool x) { return __syncthreads_or(x) != 0; }
CAPO_DEVICE int count_bits(uint32_t x) { return __popc(x); }
CAPO_DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }

// Shared memory of the block, of the size given at the launch.
CAPO_DEVICE char* block_memory() {
  extern __shared__ char4 memory[];
  return reinterpret_cast<char*>(memory);
}

// Blocks of a cluster run at the same time; `rank` is one's place among them. A block's memory may be touched by the
// others from the first synchronisation, which all reach alive, up to the last.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif
CAPO_DEVICE void arrive_at_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
CAPO_DEVICE void wait_for_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
template <typename T>
CAPO_DEVICE T* in_block(T* shared, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(address);
#else
  return shared;
#endif
}

// Reads and writes of 16 bytes that nobody will ask for again soon, and reads of which the cache should keep a copy.
CAPO_DEVICE Vector load_once(const void* p) {
  const uint4 x = __ldcs(static_cast<const uint4*>(p));
  return {x.x, x.y, x.z, x.w};
}
CAPO_DEVICE Vector load_and_keep(const void* p) {
  Vector x;
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "l"(p), "l"(policy));
  return x;
}
CAPO_DEVICE void store_once(void* p, const Vector& x) {
  __stcs(static_cast<uint4*>(p), make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]));
}

CAPO_DEVICE void store(void* p, const Vector& x) {
  *static_cast<uint4*>(p) = make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
}

// One element of a row of logits or gradients.
template <typename T>
CAPO_DEVICE T load_element(const T* p) {
  return *p;
}
template <typename T>
CAPO_DEVICE void store_element(T* p, T x) {
  *p = x;
}

// The lower word of two, shifted by 0 to 31 bits.
CAPO_DEVICE uint32_t shift_right(uint32_t low, uint32_t high, int bits) { return __funnelshift_r(low, high, bits); }

// 2^x; results below the smallest normal number are 0.
CAPO_DEVICE float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The larger; NaN if one is.
CAPO_DEVICE float larger_or_nan(float x, float y) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
}

CAPO_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
CAPO_DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }
CAPO_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
CAPO_DEVICE uint32_t pack_halves(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return static_cast<uint32_t>(__half_as_ushort(__low2half(both))) |
         static_cast<uint32_t>(__half_as_ushort(__high2half(both))) << 16;
}
CAPO_DEVICE uint32_t pack_bf16s(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return static_cast<uint32_t>(__bfloat16_as_ushort(__low2bfloat16(both))) |
         static_cast<uint32_t>(__bfloat16_as_ushort(__high2bfloat16(both))) << 16;
}

CAPO_DEVICE void add_to_count(unsigned long long* total, unsigned long long count) { atomicAdd(total, count); }

// What the current device has; 0 where there is none.
inline int attribute(cudaDeviceAttr which) {
  int number = 0, value = 0;
  if (cudaGetDevice(&number) != cudaSuccess || cudaDeviceGetAttribute(&value, which, number) != cudaSuccess) return 0;
  return value;
}
inline bool has_clusters() { return attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }
inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
// Shared memory that a block may have, and as much that several of them fit on a multiprocessor.
inline int64_t most_memory() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
inline int64_t target_memory() { return 40 * 1024; }

// What a launch has besides its arguments.
struct Launch {
  int64_t blocks;
  int threads;
  int memory = 0;   // bytes of shared memory
  int cluster = 1;  // blocks in one
  cudaStream_t stream = nullptr;
};

// cudaErrorInvalidValue and the like at once; faults of the kernel itself come later.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& how, const Arguments&... arguments) {
  if (how.blocks == 0) return cudaSuccess;
  if (how.memory > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.memory);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = static_cast<size_t>(how.memory);
  config.stream = how.stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(how.cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = how.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

inline const char* text_of(cudaError_t error) { return cudaGetErrorString(error); }

inline cudaError_t clear(void* memory, size_t size, cudaStream_t stream) {
  return cudaMemsetAsync(memory, 0, size, stream);
}

}  // namespace capo::device
#endif

// Marks the formulas that host and device compilers share.
#pragma once
#ifdef __CUDACC__
#define CAPO_HD __host__ __device__ inline
#else
#define CAPO_HD inline
#endif

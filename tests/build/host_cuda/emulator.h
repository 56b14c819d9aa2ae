// A CUDA block on the host: 256 threads, a barrier, and warp-wide matrix fragments held whole by every lane. Enough to
// run the device headers of csrc/ as they stand and look at their numbers without a GPU. Asynchronous copies land as
// late as the kernel's waits allow, so a wait that is missing or too weak shows up as poison in the result.
#pragma once

#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __align__(n)
#define __launch_bounds__(n)

struct Index3 {
  unsigned x;
};
inline thread_local Index3 threadIdx, blockIdx;
inline pthread_barrier_t block_barrier, warp_barriers[8];

struct float4 {
  float x, y, z, w;
};

inline void __syncthreads() { pthread_barrier_wait(&block_barrier); }
inline void __syncwarp() { pthread_barrier_wait(&warp_barriers[threadIdx.x / 32]); }

struct Copy {
  void* to;
  unsigned char from[16];
};
inline thread_local std::vector<Copy> open_batch;
inline thread_local std::deque<std::vector<Copy>> batches;

inline void __pipeline_memcpy_async(void* to, const void* from, std::size_t bytes, std::size_t zeros = 0) {
  Copy copy{to, {}};
  std::memcpy(copy.from, from, bytes - zeros);
  open_batch.push_back(copy);
}
inline void __pipeline_commit() {
  batches.push_back(std::move(open_batch));
  open_batch.clear();
}
inline void __pipeline_wait_prior(std::size_t left) {
  while (batches.size() > left) {
    for (const Copy& copy : batches.front()) std::memcpy(copy.to, copy.from, 16);
    batches.pop_front();
  }
}

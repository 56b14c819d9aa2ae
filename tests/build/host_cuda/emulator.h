// A CUDA block on the host: every thread is a fiber, so that barriers are cheap, runs can be repeated, and the order in
// which threads and warps run can be turned round (a missing barrier then gives another result). A barrier that some
// threads never reach is reported. Enough to run the device headers of csrc/ as they stand and look at their numbers
// without a GPU. Asynchronous copies land as late as the kernel's waits allow, so a wait that is missing or too weak
// shows up as poison in the result.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __restrict__

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
inline Index3 threadIdx, blockIdx, gridDim, blockDim;

struct float2 {
  float x, y;
};
struct __attribute__((aligned(16))) float4 {
  float x, y, z, w;
};
struct __attribute__((aligned(8))) uint2 {
  unsigned x, y;
};
struct __attribute__((aligned(16))) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

struct Copy {
  unsigned char* to;
  std::size_t bytes;
  unsigned char from[16];
};

struct Barrier {
  int members = 0, arrived = 0;
  long generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  const Barrier* waits = nullptr;
  long generation = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> batches;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline Fiber* current;
inline Barrier block_barrier, warp_barriers[32];
inline std::function<void()> body;
inline bool backwards = false;  // the last thread first
inline int any;                 // what __syncthreads_or collects
inline std::uint32_t exchange[32][32][8];

inline void enter() {
  body();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

inline void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  current->waits = &barrier;
  current->generation = barrier.generation;
  swapcontext(&current->context, &scheduler);
}

inline int lane() { return threadIdx.x % 32; }
inline int warp() { return threadIdx.x / 32; }
inline void warp_wait() { wait(warp_barriers[warp()]); }

inline void run_block(int threads) {
  constexpr std::size_t kStack = 1 << 16;
  fibers.resize(threads);
  block_barrier = {threads, 0, 0};
  for (auto& barrier : warp_barriers) barrier = {32, 0, 0};
  for (auto& fiber : fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.done = false;
    fiber.waits = nullptr;
    fiber.open.clear();
    fiber.batches.clear();
  }
  // One warp runs as far as it can before the next one starts: what a missing barrier would let it read is not there.
  const int warps = (threads + 31) / 32;
  for (int left = threads; left;) {
    bool moved = false;
    for (int n = 0; n < warps; ++n)
      for (bool again = true; again;) {
        again = false;
        for (int l = 0; l < 32; ++l) {
          const int t = backwards ? (warps - 1 - n) * 32 + 31 - l : n * 32 + l;
          if (t >= threads) continue;
          Fiber& fiber = fibers[t];
          if (fiber.done || (fiber.waits && fiber.waits->generation == fiber.generation)) continue;
          fiber.waits = nullptr;
          current = &fiber;
          threadIdx.x = static_cast<unsigned>(t);
          swapcontext(&scheduler, &fiber.context);
          left -= fiber.done;
          moved = again = true;
        }
      }
    if (!moved) {
      std::printf("WRONG: %d threads wait at a barrier that the others never reach\n", left);
      std::exit(3);
    }
  }
}

// kernel(arguments...) for every block, over shared memory that holds NaN in every type.
template <typename Function>
void launch(Index3 grid, int threads, void* shared, std::size_t bytes, Function kernel) {
  body = kernel;
  gridDim = grid;
  blockDim.x = static_cast<unsigned>(threads);
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        std::memset(shared, 0xff, bytes);
        run_block(threads);
      }
}

// Every lane's word, in the order of lanes.
template <typename T>
void gather(T value, T (&out)[32]) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(exchange[warp()][lane()], &value, sizeof(T));
  warp_wait();
  for (int l = 0; l < 32; ++l) std::memcpy(&out[l], exchange[warp()][l], sizeof(T));
  warp_wait();
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block_barrier); }
inline void __syncwarp() { emulator::warp_wait(); }
inline int __syncthreads_or(int value) {
  __syncthreads();
  emulator::any = 0;
  __syncthreads();
  emulator::any |= value != 0;
  __syncthreads();
  return emulator::any;
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  T all[32];
  emulator::gather(value, all);
  return all[emulator::lane() ^ mask];
}
inline unsigned __ballot_sync(unsigned, int value) {
  int all[32];
  unsigned bits = 0;
  emulator::gather(value, all);
  for (int l = 0; l < 32; ++l) bits |= unsigned{all[l] != 0} << l;
  return bits;
}

template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}
template <typename T>
T atomicExch(T* to, T value) {
  const T before = *to;
  *to = value;
  return before;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const std::uint64_t both = std::uint64_t{y} << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= (both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return out;
}

inline void __pipeline_memcpy_async(void* to, const void* from, std::size_t bytes, std::size_t zeros = 0) {
  emulator::Copy copy{static_cast<unsigned char*>(to), bytes, {}};
  if (bytes != zeros) std::memcpy(copy.from, from, bytes - zeros);
  if (reinterpret_cast<std::uintptr_t>(to) % bytes ||
      (bytes != zeros && reinterpret_cast<std::uintptr_t>(from) % bytes)) {
    std::printf("WRONG: an asynchronous copy of %zu bytes is not aligned\n", bytes);
    std::exit(4);
  }
  emulator::current->open.push_back(copy);
}
inline void __pipeline_commit() {
  emulator::current->batches.push_back(std::move(emulator::current->open));
  emulator::current->open.clear();
}
inline void __pipeline_wait_prior(std::size_t left) {
  auto& batches = emulator::current->batches;
  while (batches.size() > left) {
    for (const auto& copy : batches.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    batches.pop_front();
  }
}

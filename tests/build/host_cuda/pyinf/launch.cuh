// csrc/include/pyinf/launch.cuh for the emulator: the kernel runs at once, block after block.
#pragma once

#include "cuda_runtime.h"

#define PYINF_SHARED_MEMORY(name) unsigned char* name = emulator::memory

namespace emulator {
inline unsigned char* memory;
inline std::size_t largest = 0;  // bytes of shared memory that a launch asked for
}  // namespace emulator

namespace pyinf {

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, unsigned threads, std::size_t shared, cudaStream_t,
                          Arguments... arguments) {
  constexpr std::size_t kGuard = 4096;
  std::vector<unsigned char> storage(shared + 128 + kGuard);
  const auto base = (reinterpret_cast<std::uintptr_t>(storage.data()) + 127) / 128 * 128;
  emulator::memory = reinterpret_cast<unsigned char*>(base);
  emulator::largest = std::max(emulator::largest, shared);
  unsigned char* end = emulator::memory + shared;
  std::fill(end, storage.data() + storage.size(), 0x5a);
  emulator::launch({grid.x, grid.y, grid.z}, static_cast<int>(threads), emulator::memory, shared,
                   [&] { kernel(arguments...); });
  for (unsigned char* p = end; p != storage.data() + storage.size(); ++p)
    if (*p != 0x5a) {
      std::printf("WRONG: a kernel wrote past its shared memory\n");
      std::exit(5);
    }
  return cudaSuccess;
}

}  // namespace pyinf

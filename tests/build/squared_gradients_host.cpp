// Runs the device code of accumulate_squared_gradients on the host and compares it with a double loop in double.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <random>

#include "pyinf/accumulate_squared_gradients.cuh"

namespace pyinf::squared_gradients {
alignas(128) unsigned char shared[1 << 18];
}

using namespace pyinf;
using namespace pyinf::squared_gradients;

template <typename T, bool kVectorised>
void run(const Problem& p) {
  const std::int64_t blocks = ceil_div(p.d_out, kTile) * ceil_div(p.d_in, kTile);
  emulator::launch({static_cast<unsigned>(blocks), 1, 1}, kThreads, shared, sizeof(shared),
                   [&] { accumulate_squared_gradients_kernel<T, kVectorised>(p); });
}

template <typename T, bool kVectorised>
int check(const char* name, std::vector<std::int64_t> lengths, int d_out, int d_in, int pad) {
  std::vector<std::int64_t> offsets{3};  // the first sequence need not start at row 0
  for (auto n : lengths) offsets.push_back(offsets.back() + n);
  const std::int64_t rows = offsets.back(), ld_g = d_out + pad, ld_a = d_in + pad, ld_lam = d_in + 1;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<T> g(rows * ld_g + 8), a(rows * ld_a + 8);
  for (auto& x : g) x = T(normal(random));
  for (auto& x : a) x = T(normal(random));
  std::vector<float> lam(d_out * ld_lam);
  for (auto& x : lam) x = normal(random);
  std::vector<double> expected(lam.begin(), lam.end());
  for (std::size_t b = 0; b < lengths.size(); ++b)
    for (int o = 0; o < d_out; ++o)
      for (int i = 0; i < d_in; ++i) {
        double sum = 0;
        for (auto t = offsets[b]; t < offsets[b + 1]; ++t)
          sum += static_cast<double>(static_cast<float>(g[t * ld_g + o])) * static_cast<float>(a[t * ld_a + i]);
        expected[o * ld_lam + i] += sum * sum;
      }
  run<T, kVectorised>({lam.data(), g.data(), a.data(), offsets.data(), ld_lam, ld_g, ld_a,
                       static_cast<std::int64_t>(lengths.size()), d_out, d_in});
  double error = 0, norm = 0;
  for (std::size_t k = 0; k < lam.size(); ++k) {
    error += (lam[k] - expected[k]) * (lam[k] - expected[k]);
    norm += expected[k] * expected[k];
  }
  const double relative = std::sqrt(error / norm);
  const bool good = relative < 1e-6;  // false for NaN
  std::printf("%s %s d_out=%d d_in=%d relative error %.2e\n", good ? "ok" : "WRONG", name, d_out, d_in, relative);
  return good ? 0 : 1;
}

int main() {
  int wrong = 0;
  wrong += check<float, true>("float32 vectors", {5, 0, 40, 16, 1}, 132, 20, 4);
  wrong += check<float, false>("float32 scalars", {17, 33, 0}, 7, 131, 1);
  wrong += check<__half, true>("float16 vectors", {5, 0, 100, 32, 1}, 136, 24, 8);
  wrong += check<__half, false>("float16 scalars", {33, 1}, 9, 35, 1);
  wrong += check<__nv_bfloat16, true>("bfloat16 vectors", {0, 64, 31}, 40, 136, 0);
  wrong += check<__nv_bfloat16, false>("bfloat16 scalars", {0, 0, 3}, 129, 5, 3);
  return wrong;
}

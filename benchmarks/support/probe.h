// The machine's limit for a fused update: a bare read-modify-write loop over as many streams, with next to no
// arithmetic.
#pragma once

#include <cstdint>

namespace torch_ext::bench {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PROBE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), optimize("O3")))
#else
#define PROBE_CLONES
#endif

// Reads and writes p, m and v and reads g and h: 32 bytes an element.
PROBE_CLONES inline void probe_refresh(float* __restrict p, float* __restrict m, float* __restrict v,
                                       const float* __restrict g, const float* __restrict h, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    p[i] += g[i];
    m[i] += h[i];
    v[i] += g[i];
  }
}

// Reads and writes p and m and reads v and g: 24 bytes an element.
PROBE_CLONES inline void probe_lazy(float* __restrict p, float* __restrict m, const float* __restrict v,
                                    const float* __restrict g, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    p[i] += g[i];
    m[i] += v[i];
  }
}

// Reads x once: the limit of a pass over it.
PROBE_CLONES inline float probe_read(const float* __restrict x, int64_t n) {
  constexpr int64_t kLanes = 64;
  float lane[kLanes] = {};
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lane[l] += x[i + l];
  }
  float total = 0;
  for (const float value : lane) total += value;
  return total;
}

}  // namespace torch_ext::bench

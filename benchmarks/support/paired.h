// Interleaved pairs on a noisy machine: every round runs each side once, in random order; what is reported is the
// median over rounds of the per-round ratio, next to the ratio of a side to itself, which says how far to trust it.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace torch_ext::bench {

inline double seconds(const std::function<void()>& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

inline double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

struct Side {
  std::string name;
  double bytes;  // that one run moves at least; 0 if bandwidth means nothing
  std::function<void()> run;
};

// Reports, for each side after the first: <name>/first = time ratio (and bytes-per-second ratio if both have bytes).
// The first side is run twice a round: "self" is its ratio to itself.
inline void report_pairs(benchmark::State& state, const std::vector<Side>& sides, int rounds = 21, int inner = 1) {
  for (auto _ : state) {
    std::vector<std::vector<double>> ratio(sides.size()), time(sides.size());
    std::mt19937 generator(0);  // a fixed order would give each side the same predecessor's cache and heap
    for (const Side& side : sides) side.run();
    for (int round = 0; round < rounds; ++round) {
      std::vector<double> t(sides.size() + 1);
      std::vector<size_t> order(sides.size() + 1);
      std::iota(order.begin(), order.end(), size_t{0});
      std::shuffle(order.begin(), order.end(), generator);
      for (const size_t slot : order) {
        const Side& side = sides[slot == sides.size() ? 0 : slot];
        t[slot] = seconds([&] {
          for (int i = 0; i < inner; ++i) side.run();
        });
      }
      ratio[0].push_back(t.back() / t[0]);
      time[0].push_back(t[0] / inner);
      for (size_t k = 1; k < sides.size(); ++k) {
        ratio[k].push_back(t[k] / t[0]);
        time[k].push_back(t[k] / inner);
      }
    }
    state.counters["self"] = median(ratio[0]);
    for (size_t k = 0; k < sides.size(); ++k) {
      state.counters[sides[k].name + " ms"] = median(time[k]) * 1e3;
      if (k > 0) state.counters[sides[k].name + " time x"] = median(ratio[k]);
      if (sides[k].bytes > 0) {
        state.counters[sides[k].name + " GB/s"] = sides[k].bytes / median(time[k]) / 1e9;
        if (k > 0) state.counters[sides[k].name + " bandwidth x"] = sides[k].bytes / sides[0].bytes / median(ratio[k]);
      }
    }
  }
}

}  // namespace torch_ext::bench

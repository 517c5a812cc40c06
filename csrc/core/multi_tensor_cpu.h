// CPU driver: every chunk of every tensor once, over at::parallel_for. Results never depend on the thread count because
// chunks are fixed and write disjoint elements.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "core/multi_tensor.h"

namespace torch_ext::core {

// work(tensor index, first element, last element) for all chunks; several small tensors share one thread's turn.
template <typename Work>
void for_each_chunk(const std::vector<Split>& splits, const std::vector<int64_t>& numels, const Work& work) {
  std::vector<int64_t> first(splits.size() + 1, 0);
  int64_t elements = 0;
  for (size_t i = 0; i < splits.size(); ++i) {
    first[i + 1] = first[i] + splits[i].chunks;
    elements += numels[i];
  }
  const int64_t chunks = first.back();
  if (chunks == 0) return;
  constexpr int64_t kMinPerThread = 32768;  // below this a second thread costs more than it saves
  const int64_t grain = std::max<int64_t>(1, chunks * kMinPerThread / std::max<int64_t>(1, elements));
  at::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    auto tensor = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1);
    for (int64_t c = begin; c < end; ++c) {
      while (c >= first[tensor + 1]) ++tensor;
      const int64_t from = (c - first[tensor]) * splits[tensor].chunk;
      work(tensor, from, std::min(numels[tensor], from + splits[tensor].chunk));
    }
  });
}

}  // namespace torch_ext::core

#include "ops/rademacher/rademacher_kernel.h"

#include <algorithm>

#include "core/dtype_dispatch.h"

namespace torch_ext::kernels {
namespace {

constexpr int64_t kBatch = 64;  // Philox blocks made together, so that the rounds run in vector registers

TX_CLONES void philox_words(uint32_t first_block, core::PhiloxStream stream, uint32_t* __restrict words) {
  for (int64_t b = 0; b < kBatch; ++b) {
    const core::Philox4 block = stream.block(first_block + static_cast<uint32_t>(b));
    words[b * 4] = block.x;
    words[b * 4 + 1] = block.y;
    words[b * 4 + 2] = block.z;
    words[b * 4 + 3] = block.w;
  }
}

// Whole words to signs: 32 elements each.
template <typename S>
TX_CLONES void expand_words(const uint32_t* __restrict words, int64_t count, S* __restrict out) {
  for (int64_t w = 0; w < count; ++w) {
    const uint32_t word = words[w];
    for (uint32_t bit = 0; bit < 32; ++bit) store_sign(out[w * 32 + bit], word >> bit);
  }
}

template <typename S>
void fill(S* out, const core::PhiloxStream& stream, int64_t begin, int64_t end) {
  uint32_t words[kBatch * 4];
  constexpr int64_t kPerBatch = kBatch * kSignsPerBlock;
  for (int64_t at = begin / kSignsPerBlock * kSignsPerBlock; at < end; at += kPerBatch) {
    philox_words(static_cast<uint32_t>(at / kSignsPerBlock), stream, words);
    int64_t from = std::max(at, begin);
    const int64_t to = std::min(at + kPerBatch, end);
    const auto single = [&](int64_t e) { store_sign(out[e], words[(e - at) / 32] >> ((e - at) % 32)); };
    while (from < to && from % 32 != 0) single(from++);
    expand_words(words + (from - at) / 32, (to - from) / 32, out + from);
    for (from += (to - from) / 32 * 32; from < to; ++from) single(from);
  }
}

}  // namespace

void rademacher_cpu(const RademacherTensor& t, core::DType type, int64_t begin, int64_t end) {
  core::dispatch_dtype(type, [&](auto storage) { fill(static_cast<decltype(storage)*>(t.out), t.stream, begin, end); });
}

}  // namespace torch_ext::kernels

#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/ops/philox4x32.h>
#include <torch_ext/ops/rademacher.h>

#include "support/check.h"

namespace torch_ext::ops {
namespace {

using test::equal_bits;
using test::expect_error;
using test::same_bits;
using test::ThreadCount;

const std::vector<at::ScalarType> kDtypes{at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};

// The header's formula through the public Philox op.
at::Tensor restated(int64_t numel, int64_t seed, int64_t stream, int64_t ordinal, int64_t epoch) {
  const int64_t blocks = (numel + 127) / 128;
  at::Tensor counter = torch::zeros({blocks, 4}, at::kLong);
  counter.select(1, 0).copy_(torch::arange(blocks));
  counter.select(1, 1).fill_(stream);
  counter.select(1, 2).fill_(ordinal << 8 | 3);
  counter.select(1, 3).fill_(epoch);
  const at::Tensor key = torch::tensor({seed & 0xffffffff, seed >> 32 & 0xffffffff}, at::kLong);
  const at::Tensor words = philox4x32(counter, key).reshape({-1, 1});
  const at::Tensor bits = words.bitwise_right_shift(torch::arange(32)).bitwise_and(1).reshape({-1});
  return bits.narrow(0, 0, numel) * 2 - 1;
}

TEST(Rademacher, IsTheDocumentedBit) {
  for (const auto dtype : kDtypes) {
    for (const int64_t numel : {0, 1, 31, 32, 33, 127, 128, 129, 8192, 8193, 20000}) {
      const at::Tensor got = rademacher_(torch::empty({numel}, dtype), -123456789012345, 5, 77, 9);
      EXPECT_TRUE(equal_bits(got, restated(numel, -123456789012345, 5, 77, 9).to(dtype))) << numel << ' ' << dtype;
    }
  }
}

TEST(Rademacher, FillsEveryLayoutInRowMajorOrder) {
  const at::Tensor expected = rademacher_(torch::empty({6, 50}), 1, 2).clone();
  at::Tensor transposed = torch::empty({50, 6}).t(), wide = torch::zeros({6, 101});
  rademacher_(transposed, 1, 2);
  rademacher_(wide.slice(1, 1, std::nullopt, 2), 1, 2);
  EXPECT_TRUE(same_bits(transposed, expected));
  EXPECT_TRUE(same_bits(wide.slice(1, 1, std::nullopt, 2), expected));
  EXPECT_EQ(wide.slice(1, 0, std::nullopt, 2).abs().max().item<float>(), 0);
  expect_error<c10::Error>([] { rademacher_(torch::empty({1, 3}).expand({4, 3}), 0, 0); }, "expanded");
}

TEST(Rademacher, ThreadsAndListsDoNotChangeTheBits) {
  std::vector<at::Tensor> like;
  std::vector<int64_t> ordinals;
  for (int64_t i = 0; i < 200; ++i) {
    like.push_back(torch::empty({i % 7, 3}, kDtypes[static_cast<size_t>(i) % 4]));
    ordinals.push_back(3 * i);
  }
  like.push_back(torch::empty({300000}));
  ordinals.push_back(1000);
  std::vector<std::vector<at::Tensor>> results;
  for (const int threads : {1, 2}) {
    const ThreadCount guard(threads);
    results.push_back(rademacher_probe(like, ordinals, 4, 1, 6));
  }
  EXPECT_TRUE(equal_bits(results[0], results[1]));
  for (size_t i = 0; i < like.size(); ++i) {
    EXPECT_TRUE(equal_bits(results[0][i], rademacher_(torch::empty_like(like[i]), 4, 1, ordinals[i], 6))) << i;
  }
}

TEST(Rademacher, IsBalancedAndIndependentAcrossStreams) {
  constexpr double kSize = 1 << 20;
  const at::Tensor a = rademacher_(torch::empty({1 << 20}, at::kDouble), 0, 0);
  EXPECT_LT(std::abs(a.sum().item<double>()), 5 * std::sqrt(kSize));
  for (const auto& b : {rademacher_(torch::empty_like(a), 1, 0), rademacher_(torch::empty_like(a), 0, 1),
                        rademacher_(torch::empty_like(a), 0, 0, 1), rademacher_(torch::empty_like(a), 0, 0, 0, 1)}) {
    EXPECT_LT(std::abs((a * b).sum().item<double>()), 5 * std::sqrt(kSize));
  }
  EXPECT_LT(std::abs((a.slice(0, 1) * a.slice(0, 0, -1)).sum().item<double>()), 5 * std::sqrt(kSize));
}

TEST(Rademacher, BadInput) {
  const at::Tensor tensor = torch::empty({3});
  const auto version = tensor._version();
  rademacher_(tensor, 0, 0);
  EXPECT_GT(tensor._version(), version);
  expect_error<c10::TypeError>([] { rademacher_(torch::empty({3}, at::kLong), 0, 0); }, "dtype");
  expect_error<c10::ValueError>([&] { rademacher_(tensor, 0, -1); }, "stream must be in [0, 2^32)");
  expect_error<c10::ValueError>([&] { rademacher_(tensor, 0, int64_t{1} << 32); }, "stream");
  expect_error<c10::ValueError>([&] { rademacher_(tensor, 0, 0, 1 << 24); }, "ordinal must be in [0, 2^24)");
  expect_error<c10::ValueError>([&] { rademacher_(tensor, 0, 0, 0, -1); }, "epoch");
  expect_error<c10::ValueError>([&] { rademacher_probe({tensor}, {0, 1}, 0, 0, 0); }, "ordinals has 2 tensors");
}

}  // namespace
}  // namespace torch_ext::ops

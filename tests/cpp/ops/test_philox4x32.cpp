#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/ops/philox4x32.h>

#include "support/check.h"

namespace torch_ext::ops {
namespace {

using test::expect_error;

at::Tensor words(const std::vector<int64_t>& values) { return torch::tensor(values, at::kLong); }

TEST(Philox4x32, KnownAnswersOfRandom123) {
  const at::Tensor counter = torch::stack(
      {words({0, 0, 0, 0}), words({-1, -1, -1, -1}), words({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344})});
  const at::Tensor key = torch::stack({words({0, 0}), words({-1, -1}), words({0xa4093822, 0x299f31d0})});
  const at::Tensor expected = torch::stack({words({0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}),
                                            words({0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}),
                                            words({0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1})});
  EXPECT_TRUE(philox4x32(counter, key).equal(expected));
}

TEST(Philox4x32, BroadcastsLayoutsAndWraps) {
  torch::manual_seed(0);
  const at::Tensor counter = torch::randint(int64_t{1} << 32, {5, 3, 4}),
                   key = torch::randint(int64_t{1} << 32, {3, 2});
  const at::Tensor all = philox4x32(counter, key);
  EXPECT_EQ(all.sizes(), (std::vector<int64_t>{5, 3, 4}));
  for (int64_t i = 0; i < 5; ++i) {
    for (int64_t k = 0; k < 3; ++k) EXPECT_TRUE(philox4x32(counter[i][k], key[k]).equal(all[i][k]));
  }
  EXPECT_TRUE(philox4x32(counter.permute({2, 1, 0}).contiguous().permute({2, 1, 0}), key).equal(all));
  EXPECT_TRUE(philox4x32(counter - (int64_t{1} << 32), key + (int64_t{1} << 40)).equal(all));
  EXPECT_EQ(philox4x32(torch::zeros({0, 4}, at::kLong), words({1, 2})).sizes(), (std::vector<int64_t>{0, 4}));
}

TEST(Philox4x32, BadInput) {
  const at::Tensor counter = torch::zeros({2, 4}, at::kLong), key = words({1, 2});
  expect_error<c10::TypeError>([&] { philox4x32(counter.to(at::kInt), key); }, "int64");
  expect_error<c10::TypeError>([&] { philox4x32(counter, key.to(at::kDouble)); }, "int64");
  expect_error<c10::ValueError>([&] { philox4x32(torch::zeros({2, 3}, at::kLong), key); }, "counter");
  expect_error<c10::ValueError>([&] { philox4x32(counter, words({1, 2, 3})); }, "key");
  expect_error<c10::ValueError>([&] { philox4x32(torch::zeros({}, at::kLong), key); }, "counter");
}

}  // namespace
}  // namespace torch_ext::ops

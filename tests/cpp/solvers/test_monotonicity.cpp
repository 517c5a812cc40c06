// Numbers in the names are those of the acceptance list.
#include <torch_ext/solvers/monotonicity.h>

#include "support/check.h"
#include "support/lipschitz.h"

namespace torch_ext::test {
namespace {

// relu(x0) + 2 relu(x0) - 2 relu(-x0) + last relu(-x1)
torch::nn::Sequential toy(double last) {
  return relu_net({f64({1, 0, -1, 0, 0, -1}, {3, 2}), f64({3, -2, last}, {1, 3})},
                  {at::zeros({3}, at::kDouble), at::zeros({1}, at::kDouble)});
}

TEST(Monotonicity, N9Toy) {
  const at::Tensor one = at::ones({1, 2}, at::kDouble);
  const at::Tensor rising = solvers::monotonicity(*toy(-1), -one, one);
  EXPECT_EQ(rising.scalar_type(), at::kChar);
  EXPECT_TRUE(rising.equal(at::tensor({1, 1}, at::kChar).view({1, 1, 2})));
  EXPECT_TRUE(solvers::monotonicity(*toy(1), -one, one).equal(at::tensor({1, -1}, at::kChar).view({1, 1, 2})));
}

TEST(Monotonicity, UndecidedAndMessages) {
  const auto absolute =
      relu_net({f64({1, -1}, {2, 1}), f64({1, 1}, {1, 2})}, {at::zeros({2}, at::kDouble), at::zeros({1}, at::kDouble)});
  const at::Tensor lo = f64({-1, 1, -2}, {3, 1});
  EXPECT_TRUE(solvers::monotonicity(*absolute, lo, lo + 1).flatten().equal(at::tensor({0, 1, -1}, at::kChar)));
  const std::string text = message_of<c10::Error>([&] { solvers::monotonicity(*absolute, lo, lo - 1); });
  EXPECT_NE(text.find("the box is empty"), std::string::npos) << text;
}

}  // namespace
}  // namespace torch_ext::test

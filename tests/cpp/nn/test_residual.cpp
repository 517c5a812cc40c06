#include <torch_ext/nn/residual.h>

#include <sstream>

#include "support/check.h"

namespace torch_ext::test {
namespace {

TEST(Residual, SumOfBranchesAndNames) {
  const torch::nn::Linear body(3, 2), shortcut(3, 2);
  const nn::Residual both{torch::nn::Sequential(body), torch::nn::Sequential(shortcut)};
  nn::Residual module = both;
  const at::Tensor x = at::randn({4, 3});
  EXPECT_TRUE(module->forward(x).equal(torch::nn::Linear(body)->forward(x) + torch::nn::Linear(shortcut)->forward(x)));
  EXPECT_EQ(module->named_parameters().keys(),
            (std::vector<std::string>{"body.0.weight", "body.0.bias", "shortcut.0.weight", "shortcut.0.bias"}));
  nn::Residual identity{torch::nn::Sequential(torch::nn::Linear(3, 3))};
  EXPECT_TRUE(identity->forward(x).equal(identity->body->forward(x) + x));
  std::ostringstream text;
  identity->pretty_print(text);
  EXPECT_EQ(text.str(), "torch_ext::nn::Residual");
}

}  // namespace
}  // namespace torch_ext::test

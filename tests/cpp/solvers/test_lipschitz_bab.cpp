// Numbers in the names are those of the acceptance list.
#include <torch_ext/solvers/lipschitz_bab.h>

#include <limits>

#include "support/check.h"
#include "support/lipschitz.h"

namespace torch_ext::test {
namespace {

using solvers::lipschitz_bab, solvers::LipschitzBabOptions;

// The largest norm at many points: from below, to about the width of a piece.
double sampled(const torch::nn::Sequential& net, double lo, double hi) {
  return jacobian_norms(net, at::linspace(lo, hi, 20001, at::kDouble).unsqueeze(1)).max().item<double>();
}

TEST(LipschitzBab, N5ReachesTheExactConstantInOneDimension) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const auto net = drawn_net(seed, {1, 32, 32, 32, 3});
    const double centre = at::randn({}, at::kDouble).item<double>();
    const auto result =
        lipschitz_bab(*net, f64({centre - .5}, {1}), f64({centre + .5}, {1}), LipschitzBabOptions().max_nodes(200));
    EXPECT_LE(result.lower, result.upper);
    EXPECT_LE(result.upper - result.lower, 1e-6 * result.upper) << "seed " << seed;
    EXPECT_GE(result.upper * (1 + 1e-12), sampled(net, centre - .5, centre + .5));
    EXPECT_LE(result.nodes, 200);
  }
}

TEST(LipschitzBab, N5MonotoneAlongTheSearch) {
  const auto net = drawn_net(1, {2, 12, 12, 2});
  const at::Tensor lo = f64({-.8, -1.1}, {2}), hi = f64({1.2, .9}, {2});
  for (const char* split : {"input", "activation"}) {
    double upper = std::numeric_limits<double>::infinity(), lower = 0;
    for (const int64_t nodes : {1, 2, 3, 5, 9, 33, 129, 401}) {
      const auto result = lipschitz_bab(*net, lo, hi, LipschitzBabOptions().split(split).max_nodes(nodes));
      EXPECT_LE(result.nodes, nodes);
      EXPECT_LE(result.upper, upper);
      EXPECT_GE(result.lower, lower);
      upper = result.upper;
      lower = result.lower;
    }
  }
}

TEST(LipschitzBab, HandNet) {
  const at::Tensor one = at::ones({2}, at::kDouble);
  EXPECT_NEAR(lipschitz_bab(*hand_net(), -one, one, LipschitzBabOptions().max_nodes(1)).upper, 32.0 / 7, 1e-12);
  // Over all patterns of its four open neurons, occurring or not: J = W3 S2 W2 S1 W1 has norm 4 at most.
  const auto patterns = lipschitz_bab(*hand_net(), -one, one, LipschitzBabOptions().split("activation").tol(0));
  EXPECT_NEAR(patterns.upper, 4, 1e-12);
}

TEST(LipschitzBab, LimitsAndMessages) {
  const auto net = drawn_net(0, {4, 32, 32, 3});
  const at::Tensor lo = -at::ones({4}, at::kDouble), hi = -lo;
  EXPECT_EQ(lipschitz_bab(*net, lo, hi, LipschitzBabOptions().max_seconds(0.0)).nodes, 1);
  const auto error = [&](const LipschitzBabOptions& options, const at::Tensor& low) {
    return message_of<c10::Error>([&] { lipschitz_bab(*net, low, hi, options); });
  };
  EXPECT_NE(error(LipschitzBabOptions().split("both"), lo).find("split must be"), std::string::npos);
  EXPECT_NE(error(LipschitzBabOptions().max_nodes(0), lo).find("max_nodes must be at least 1"), std::string::npos);
  EXPECT_NE(error(LipschitzBabOptions().tol(-1), lo).find("tol must be"), std::string::npos);
  EXPECT_NE(error(LipschitzBabOptions().max_seconds(-1.0), lo).find("max_seconds must be"), std::string::npos);
  EXPECT_NE(error(LipschitzBabOptions().output(3), lo).find("outputs must be in [0, 3)"), std::string::npos);
  EXPECT_NE(error({}, hi + 1).find("the box is empty"), std::string::npos);
  const torch::nn::Sequential smooth(torch::nn::Linear(4, 2), torch::nn::Tanh());
  const std::string text = message_of<c10::Error>(
      [&] { lipschitz_bab(*smooth, lo.to(at::kFloat), hi.to(at::kFloat), LipschitzBabOptions().split("activation")); });
  EXPECT_NE(text.find("layer '1' is smooth"), std::string::npos) << text;
}

}  // namespace
}  // namespace torch_ext::test

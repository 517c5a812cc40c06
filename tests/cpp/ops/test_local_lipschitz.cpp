// Numbers in the names are those of the acceptance list.
#include <torch_ext/nn/residual.h>
#include <torch_ext/ops/local_lipschitz.h>

#include "ops/local_lipschitz/local_lipschitz_kernel.h"
#include "support/check.h"
#include "support/lipschitz.h"

namespace torch_ext::test {
namespace {

using ops::local_lipschitz, ops::LocalLipschitzOptions;
constexpr const char* kMethods[] = {"tight", "recurjac", "ibp"};

at::Tensor L(const torch::nn::Sequential& net, const at::Tensor& x, double eps,
             const LocalLipschitzOptions& options = {}) {
  const at::NoGradGuard no_grad;
  return std::get<0>(local_lipschitz(*net, x, eps, options));
}

TEST(LocalLipschitz, N1HandNet) {
  const double values[] = {32.0 / 7, 5, 6};
  const at::Tensor x = at::zeros({1, 2}, at::kDouble);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_NEAR(L(hand_net(), x, 1, LocalLipschitzOptions().backward(kMethods[i])).item<double>(), values[i], 1e-12);
  }
  const auto [bound, lo, hi] = local_lipschitz(*hand_net(), x, 1.0);
  EXPECT_LT((lo.flatten() - f64({-2.5, -1}, {2})).abs().max().item<double>(), 1e-12);
  EXPECT_LT((hi.flatten() - f64({1, 2.5}, {2})).abs().max().item<double>(), 1e-12);
  const at::Tensor line = at::linspace(-1, 1, 201, at::kDouble) + 1e-4;
  EXPECT_NEAR(jacobian_norms(hand_net(), at::cartesian_prod({line, line})).max().item<double>(), 4, 1e-12);
}

TEST(LocalLipschitz, N2OneHiddenLayerIsExact) {
  const auto net =
      relu_net({f64({1, 0, 1, -1}, {2, 2}), f64({1, -2, 1, 1}, {2, 2})}, {f64({0, .5}, {2}), f64({0, 0}, {2})});
  const at::Tensor x = f64({.5, .5}, {1, 2});
  EXPECT_LT((L(net, x, .25) - f64({3, 3}, {1, 2})).abs().max().item<double>(), 1e-12);
  EXPECT_LT((L(net, x, 1) - f64({4, 3}, {1, 2})).abs().max().item<double>(), 1e-12);
}

TEST(LocalLipschitz, N3StableAndPositiveNetworksAreExact) {
  const auto net = drawn_net(3, {4, 6, 5, 3});
  const at::Tensor x = at::randn({3, 4}, at::kDouble);
  for (const char* backward : kMethods) {
    const at::Tensor at_point = L(net, x, 0, LocalLipschitzOptions().backward(backward));
    EXPECT_LT(relative_error(at_point, jacobian_norms(net, x)), 1e-13) << backward;
  }
  const auto w = [&](size_t k) { return net->ptr<torch::nn::LinearImpl>(k)->weight.detach().abs(); };
  const auto positive = relu_net(
      {w(0), w(2), w(4)}, {at::zeros({6}, at::kDouble), at::zeros({5}, at::kDouble), at::zeros({3}, at::kDouble)});
  const at::Tensor product = at::matmul(w(4), at::matmul(w(2), w(0)));
  EXPECT_LT(relative_error(L(positive, at::zeros({1, 4}, at::kDouble), 1), product.sum(1).unsqueeze(0)), 1e-13);
}

// The largest |slope| in one dimension: kinks layer by layer.
double exact_1d(const torch::nn::Sequential& net, double lo, double hi) {
  const auto affine = [&](const at::Tensor& x, size_t layers) {
    at::Tensor value = x.unsqueeze(1), slope = at::ones_like(value);
    for (size_t k = 0; k <= layers; ++k) {
      const auto linear = net->ptr<torch::nn::LinearImpl>(2 * k);
      value = at::linear(value, linear->weight, linear->bias);
      slope = at::linear(slope, linear->weight);
      if (k == layers) break;
      const at::Tensor active = value.gt(0).to(at::kDouble);
      value = value * active;
      slope = slope * active;
    }
    return std::make_pair(value, slope);
  };
  const at::NoGradGuard no_grad;
  at::Tensor points = f64({lo, hi}, {2});
  const size_t hidden = net->size() / 2;
  const auto middle = [&] { return (points.slice(0, 1) + points.slice(0, 0, -1)) / 2; };
  for (size_t k = 0; k < hidden; ++k) {
    const auto [value, slope] = affine(middle(), k);
    const at::Tensor root = middle().unsqueeze(1) - value / slope.masked_fill(slope == 0, NAN);
    const at::Tensor inside =
        root.gt(points.slice(0, 0, -1).unsqueeze(1)).logical_and(root.lt(points.slice(0, 1).unsqueeze(1)));
    points = std::get<0>(at::cat({points, root.masked_select(inside)}).sort());
  }
  return affine(middle(), hidden).second.abs().max().item<double>();
}

TEST(LocalLipschitz, N4AboveTheExactConstantAndInTheirOrder) {
  for (uint64_t seed = 0; seed < 100; ++seed) {
    const auto net = seed % 2 == 0 ? drawn_net(seed, {1, 16, 16, 3}) : drawn_net(seed, {1, 32, 32, 32, 3});
    const at::Tensor x = at::randn({1, 1}, at::kDouble);
    const double radius = seed % 4 < 2 ? .5 : .1;
    double below = exact_1d(net, x.item<double>() - radius, x.item<double>() + radius), product = 1;
    for (const char* backward : kMethods) {
      const double bound = L(net, x, radius, LocalLipschitzOptions().backward(backward)).max().item<double>();
      EXPECT_LE(below, bound * (1 + 1e-12)) << backward << ", seed " << seed;
      below = bound;
    }
    for (size_t k = 0; k < net->size(); k += 2) {
      product *= net->ptr<torch::nn::LinearImpl>(k)->weight.detach().abs().sum(1).max().item<double>();
    }
    EXPECT_LE(below, product * (1 + 1e-12));
  }
}

TEST(LocalLipschitz, N6AboveTheSampledConstant) {
  const auto net = drawn_net(6, {16, 64, 64, 10});
  const at::Tensor x = at::randn({8, 16}, at::kDouble), bound = L(net, x, .05);
  for (int i = 0; i < 20; ++i) {
    const at::Tensor near = x + .05 * (2 * at::rand({8, 16}, at::kDouble) - 1);
    EXPECT_TRUE(jacobian_norms(net, near).le(bound * (1 + 1e-12)).all().item<bool>());
  }
}

TEST(LocalLipschitz, N7GradientEqualsDifferences) {
  torch::manual_seed(7);
  torch::nn::Sequential net(torch::nn::Linear(3, 4), torch::nn::Tanh(), torch::nn::Linear(4, 4), torch::nn::ReLU(),
                            torch::nn::Linear(4, 2));
  net->to(at::kDouble);
  const at::Tensor x = at::randn({2, 3}, at::kDouble).set_requires_grad(true);
  const at::Tensor eps = at::full({}, .2, at::kDouble).set_requires_grad(true);
  std::vector<at::Tensor> inputs{x, eps};
  for (const at::Tensor& parameter : net->parameters()) inputs.push_back(parameter);
  const auto value = [&] { return std::get<0>(local_lipschitz(*net, x, eps)).sum(); };
  const auto grads = torch::autograd::grad({value()}, inputs, {}, std::nullopt, false, /*allow_unused=*/true);
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const at::Tensor flat = inputs[i].view({-1});
    for (int64_t e = 0; e < flat.size(0); ++e) {
      constexpr double kStep = 1e-6;
      const at::Tensor one = flat[e];
      one.add_(kStep);
      const double up = value().item<double>();
      one.sub_(2 * kStep);
      const double down = value().item<double>();
      one.add_(kStep);
      const double grad = grads[i].defined() ? grads[i].reshape({-1})[e].item<double>() : 0;
      EXPECT_NEAR(grad, (up - down) / (2 * kStep), 1e-6) << "input " << i << ", element " << e;
    }
  }
}

TEST(LocalLipschitz, N7BatchesAndConvolutions) {
  torch::manual_seed(77);
  const torch::nn::Conv2d conv(torch::nn::Conv2dOptions(2, 4, 3).stride(2).padding(1));
  const torch::nn::BatchNorm2d norm(4);
  torch::nn::Sequential net(conv, norm, torch::nn::ReLU(), torch::nn::Flatten(), torch::nn::Linear(64, 8),
                            torch::nn::ReLU(), torch::nn::Linear(8, 3));
  net->to(at::kDouble);
  net->eval();
  norm->running_mean.normal_();
  const at::Tensor x = at::randn({3, 2, 7, 7}, at::kDouble);
  const at::Tensor together = L(net, x, .05);
  for (int64_t i = 0; i < 3; ++i) {
    EXPECT_LT(relative_error(L(net, x.narrow(0, i, 1), .05)[0], together[i]), 1e-12);
  }
  torch::nn::Sequential front(conv, norm);
  const at::NoGradGuard no_grad;
  const at::Tensor bias = front->forward(at::zeros({1, 2, 7, 7}, at::kDouble)).flatten();
  const at::Tensor matrix = front->forward(at::eye(98, at::kDouble).view({98, 2, 7, 7})).flatten(1) - bias;
  const auto linear = [&](size_t k) { return net->ptr<torch::nn::LinearImpl>(k); };
  const auto dense =
      relu_net({matrix.t(), linear(4)->weight, linear(6)->weight}, {bias, linear(4)->bias, linear(6)->bias});
  EXPECT_LT(relative_error(L(dense, x.flatten(1), .05), together), 1e-10);
}

TEST(LocalLipschitz, ResidualsAndSmoothActivationsAreExactAtAPoint) {
  torch::manual_seed(1);
  torch::nn::Sequential net(
      torch::nn::Linear(4, 6), torch::nn::GELU(),
      nn::Residual(torch::nn::Sequential(torch::nn::Linear(6, 6), torch::nn::SiLU()),
                   torch::nn::Sequential(torch::nn::Linear(6, 6))),
      nn::Residual(torch::nn::Sequential(torch::nn::Linear(6, 6), torch::nn::Sigmoid(), torch::nn::Dropout())),
      torch::nn::LeakyReLU(), torch::nn::Softplus(), torch::nn::Identity(), torch::nn::Linear(6, 3));
  net->to(at::kDouble);
  net->eval();
  const at::Tensor x = at::randn({5, 4}, at::kDouble);
  for (const char* backward : kMethods) {
    const auto options = LocalLipschitzOptions().backward(backward);
    EXPECT_LT(relative_error(L(net, x, 0, options), jacobian_norms(net, x)), 1e-12) << backward;
    const at::Tensor bound = L(net, x, .1, options);
    for (int i = 0; i < 20; ++i) {
      const at::Tensor near = x + .1 * (2 * at::rand({5, 4}, at::kDouble) - 1);
      EXPECT_TRUE(jacobian_norms(net, near).le(bound * (1 + 1e-12)).all().item<bool>());
    }
  }
}

TEST(LocalLipschitz, OptionsOutputsSafeAndAlpha) {
  const auto net = drawn_net(12, {4, 16, 16, 16, 3});
  const at::Tensor x = at::randn({4, 4}, at::kDouble), all = L(net, x, .4);
  const at::Tensor some = L(net, x, .4, LocalLipschitzOptions().outputs(std::vector<int64_t>{2, 0}));
  EXPECT_LT(relative_error(some, at::stack({all.select(1, 2), all.select(1, 0)}, 1)), 1e-13);
  const at::Tensor safe = L(net, x, .4, LocalLipschitzOptions().safe(true));
  EXPECT_TRUE(safe.ge(all).all().item<bool>());
  EXPECT_LT(relative_error(safe, all), 1e-9);
  const at::Tensor tuned = L(net, x, .4, LocalLipschitzOptions().alpha_iters(20));
  EXPECT_LT(tuned.sum().item<double>(), all.sum().item<double>());
  EXPECT_TRUE(L(net, x, .4, LocalLipschitzOptions().forward("ibp")).ge(all * (1 - 1e-9)).all().item<bool>());
}

TEST(LocalLipschitz, BadInputIsNamed) {
  const at::Tensor x = at::zeros({1, 3});
  const auto error = [&](const torch::nn::Sequential& net, const at::Tensor& at, double eps,
                         const LocalLipschitzOptions& options = {}) {
    return message_of<c10::Error>([&] { local_lipschitz(*net, at, eps, options); });
  };
  const torch::nn::Sequential good(torch::nn::Linear(3, 2));
  const auto contains = [](const std::string& text, const char* part) {
    EXPECT_NE(text.find(part), std::string::npos) << "'" << text << "' lacks '" << part << "'";
  };
  const torch::nn::Sequential inner(torch::nn::Linear(3, 3), torch::nn::LayerNorm(torch::nn::LayerNormOptions({3})));
  const torch::nn::Sequential outer{nn::Residual(inner)};
  contains(error(outer, x, .1), "layer '0.body.1' (LayerNorm) has no bound");
  contains(error(torch::nn::Sequential(torch::nn::MaxPool2d(2)), x, .1), "layer '0' (MaxPool2d) has no bound");
  contains(error(torch::nn::Sequential(torch::nn::BatchNorm1d(3)), x, .1), "call model.eval()");
  contains(
      error(torch::nn::Sequential(torch::nn::Conv2d(torch::nn::Conv2dOptions(3, 2, 3).padding_mode(torch::kReflect))),
            x, .1),
      "only 'zeros' is linear");
  contains(error(torch::nn::Sequential(torch::nn::GELU(torch::nn::GELUOptions().approximate("tanh"))), x, .1),
           "is an approximate GELU");
  contains(error(good, x, -1), "the box is empty or holds NaN");
  contains(error(good, at::full({1, 3}, NAN), .1), "the box is empty or holds NaN");
  contains(error(good, at::zeros({1, 4}), .1), "takes 3 features");
  contains(error(good, x.to(at::kDouble), .1), "bring both together");
  contains(error(good, x.to(at::kBFloat16), .1), "x must be float64 (recommended) or float32");
  contains(error(good, x, .1, LocalLipschitzOptions().forward("lp")), "forward must be");
  contains(error(good, x, .1, LocalLipschitzOptions().backward("lp")), "backward must be");
  contains(error(good, x, .1, LocalLipschitzOptions().outputs(std::vector<int64_t>{2})), "outputs must be in [0, 2)");
  contains(message_of<c10::Error>([] { nn::Residual(torch::nn::Sequential(nullptr)); }), "body must be");
}

TEST(LocalLipschitzKernel, TailsOfEveryWidthAndMirror) {
  for (const int64_t width : {0, 1, 31, 32, 33, 64, 67, 1100}) {
    const at::Tensor a = at::randn({2, 3, width}, at::kDouble), lines = at::randn({4, 2, width}, at::kDouble);
    const at::Tensor out = at::empty({2, 6, width}, at::kDouble), sums = at::empty({2, 6}, at::kDouble);
    kernels::LipschitzRelaxWork work{};
    work.a = a.const_data_ptr();
    work.lines = lines.const_data_ptr();
    work.groups = 2;
    work.rows = 3;
    work.width = width;
    work.mirror = work.slopes = true;
    work.out = out.mutable_data_ptr();
    work.sums = sums.mutable_data_ptr();
    kernels::lipschitz_relax_cpu(work, core::DType::kDouble, 0, 6);
    const at::Tensor both = at::cat({a, -a}, 1), up = both.clamp_min(0), down = both.clamp_max(0);
    const at::Tensor c = (up * lines[1].unsqueeze(1) + down * lines[3].unsqueeze(1)).sum(2);
    EXPECT_TRUE(out.equal(up * lines[0].unsqueeze(1) + down * lines[2].unsqueeze(1))) << width;
    EXPECT_TRUE(at::allclose(sums, c, 1e-13, 1e-13)) << width;
  }
}

}  // namespace
}  // namespace torch_ext::test

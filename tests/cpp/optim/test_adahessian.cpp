// AdaHessian itself; what it shares with every optimizer, its trajectories included, is in test_optimizer_base.cpp.
// SpecNN names the numbered acceptance test.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/curvature/hutchinson_diag.h>
#include <torch_ext/curvature/hvp.h>
#include <torch_ext/ops/rademacher.h>
#include <torch_ext/optim/adahessian.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <memory>
#include <sstream>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/check.h"
#include "support/problems.h"

namespace torch_ext::optim {
namespace {

using test::clones;
using test::equal_bits;
using test::expect_error;
using test::Problem;
using test::quartic;
using test::relative_error;
using test::same_bits;
using test::same_value;
using test::tanh_layer;
using test::TemporaryFile;
using test::ThreadCount;
using LossClosure = torch::optim::Optimizer::LossClosure;

// lr, no momentum, no averaging over steps, no eps: the bare diagonal Newton step.
AdaHessianOptions newton(double lr = 1) { return AdaHessianOptions(lr).betas({0, 0}).eps(0); }

const ParamState& state_of(const AdaHessian& optimizer, const at::Tensor& param) {
  return static_cast<const ParamState&>(*optimizer.state().at(param.unsafeGetTensorImpl()));
}

void run(AdaHessian& optimizer, const Problem& problem, int steps) {
  for (int i = 0; i < steps; ++i) optimizer.step(problem.closure());
}

at::Tensor leaf(const std::vector<double>& values) { return torch::tensor(values, at::kDouble).requires_grad_(); }

// --- the interface --------------------------------------------------------------------------------------------------

template <typename First, typename Second, typename = void>
struct CanStep : std::false_type {};
template <typename First, typename Second>
struct CanStep<First, Second,
               std::void_t<decltype(std::declval<AdaHessian&>().step(std::declval<First>(), std::declval<Second>()))>>
    : std::true_type {};

static_assert(CanStep<LossClosure, LossClosure>::value);
static_assert(!CanStep<LossClosure, std::nullptr_t>::value, "a null curvature closure would be a silent mistake");
static_assert(std::is_move_constructible_v<AdaHessian> && !std::is_copy_constructible_v<AdaHessian>);
static_assert(std::is_convertible_v<double, AdaHessianOptions> && std::is_default_constructible_v<AdaHessianOptions>);

TEST(AdaHessianOptionsTest, AccessorsAndDefaults) {
  const AdaHessianOptions standard;
  EXPECT_EQ(standard.lr(), 0.15);
  EXPECT_EQ(standard.betas(), std::make_tuple(0.9, 0.999));
  EXPECT_EQ(standard.eps(), 1e-4);
  EXPECT_EQ(standard.weight_decay(), 0);
  EXPECT_EQ(standard.hessian_power(), 1);
  EXPECT_EQ(standard.n_samples(), 1);
  EXPECT_EQ(standard.update_each(), 1);
  EXPECT_EQ(standard.linear_averaging(), "none");
  EXPECT_EQ(standard.block_size(), 0);
  EXPECT_TRUE(standard.average_conv());
  EXPECT_EQ(standard.averaging(), "abs_mean");
  EXPECT_FALSE(standard.max_update().has_value());
  EXPECT_EQ(standard.hvp(), "double_backward");
  EXPECT_EQ(standard.seed(), 0);
  EXPECT_FALSE(standard.maximize());
  const auto all = AdaHessianOptions(0.1)
                       .betas({0.8, 0.9})
                       .eps(1e-3)
                       .weight_decay(0.2)
                       .hessian_power(0.5)
                       .n_samples(3)
                       .update_each(4)
                       .linear_averaging("block")
                       .block_size(2)
                       .average_conv(false)
                       .averaging("signed_mean")
                       .max_update(0.7)
                       .hvp("finite_difference")
                       .seed(-5)
                       .maximize(true);
  EXPECT_EQ(all.lr(), 0.1);
  EXPECT_EQ(all.betas(), std::make_tuple(0.8, 0.9));
  EXPECT_EQ(all.block_size(), 2);
  EXPECT_EQ(all.max_update(), 0.7);
  EXPECT_EQ(all.seed(), -5);
  EXPECT_TRUE(all.maximize() && !all.average_conv() && all != standard);
  for (const Field& field : all.schema().fields) EXPECT_TRUE(all.is_set(field.name)) << field.name;
}

// --- the three ways to give gradients -------------------------------------------------------------------------------

TEST(AdaHessianClosure, AllFormsGiveTheSameStep) {
  const Problem a = tanh_layer(), b = a.copy(), c = a.copy();
  AdaHessian returns(a.params), backward(b.params), none(c.params);
  for (int i = 0; i < 3; ++i) {
    returns.step(a.closure());
    backward.step([&] {
      backward.zero_grad();
      const at::Tensor loss = b.loss(b.params);
      loss.backward({}, /*retain_graph=*/std::nullopt, backward.is_second_order());
      return loss;
    });
    none.zero_grad();
    c.loss(c.params).backward({}, std::nullopt, none.is_second_order());
    none.step();
    EXPECT_TRUE(equal_bits(b.params, a.params)) << i;
    EXPECT_TRUE(equal_bits(c.params, a.params)) << i;
    for (const Problem* p : {&a, &b, &c}) {
      for (const auto& param : p->params) EXPECT_FALSE(param.grad().requires_grad());
    }
  }
}

TEST(AdaHessianClosure, PlainBackwardIsRefusedOnRefreshStepsOnly) {
  const Problem p = tanh_layer();
  AdaHessian optimizer(p.params, AdaHessianOptions(0.1).update_each(2));
  const auto plain = [&] {
    optimizer.zero_grad();
    const at::Tensor loss = p.loss(p.params);
    loss.backward();
    return loss;
  };
  EXPECT_TRUE(optimizer.is_second_order());
  const auto before = clones(p.params);
  expect_error<c10::Error>([&] { optimizer.step(plain); }, "create_graph");
  plain();
  expect_error<c10::Error>([&] { optimizer.step(); }, "create_graph");
  EXPECT_TRUE(equal_bits(p.params, before));
  EXPECT_TRUE(optimizer.state().empty());
  optimizer.zero_grad();
  optimizer.step(p.closure());
  EXPECT_FALSE(optimizer.is_second_order());
  optimizer.step(plain);
  EXPECT_TRUE(optimizer.is_second_order());
  AdaHessian difference(p.params, AdaHessianOptions(0.1).hvp("finite_difference"));
  EXPECT_FALSE(difference.is_second_order());
  difference.step(plain);
}

TEST(AdaHessianClosure, AConstantGradientAmongOthersIsZeroCurvature) {
  const at::Tensor x = leaf({1, 2}), y = leaf({3});
  AdaHessian optimizer({x, y}, AdaHessianOptions(0.1).max_update(1.0));
  (x * x).sum().backward({}, std::nullopt, /*create_graph=*/true);
  y.mutable_grad() = torch::tensor({5.0}, at::kDouble);
  optimizer.step();
  EXPECT_EQ(state_of(optimizer, y).at("exp_hessian_diag_sq").item<double>(), 0);
  EXPECT_DOUBLE_EQ(y.item<double>(), 2.9);
  EXPECT_FALSE(x.grad().requires_grad());
}

TEST(AdaHessianClosure, LinearLossHasNoCurvature) {
  const at::Tensor x = leaf({1, 2});
  AdaHessian optimizer({x}, AdaHessianOptions(0.1).max_update(0.5));
  optimizer.step([&] { return (x * torch::tensor({3.0, -4.0}, at::kDouble)).sum(); });
  EXPECT_TRUE(torch::allclose(x.detach(), torch::tensor({0.95, 2.05}, at::kDouble)));
}

TEST(AdaHessianClosure, UpdateEachRunsTheClosureFirstOrderBetween) {
  const Problem p = tanh_layer();
  AdaHessian optimizer(p.params, AdaHessianOptions(0.1).update_each(3));
  at::Tensor second;
  for (int i = 0; i < 7; ++i) {
    EXPECT_EQ(optimizer.is_second_order(), i % 3 == 0);
    const auto before = second.defined() ? second.clone() : second;
    run(optimizer, p, 1);
    second = state_of(optimizer, p.params[0]).at("exp_hessian_diag_sq");
    EXPECT_TRUE(!before.defined() || same_bits(second, before) == (i % 3 != 0)) << i;
  }
}

// --- curvature from elsewhere ---------------------------------------------------------------------------------------

// The formulas of the header with a given D.
struct Formula {
  at::Tensor p, m, v;
  double lr = 0.1, beta1 = 0.9, beta2 = 0.99, eps = 1e-3, decay = 0.01, power = 1;
  int t = 0;

  void step(const at::Tensor& g, const at::Tensor& d) {
    if (!m.defined()) {
      m = at::zeros_like(p);
      v = at::zeros_like(p);
    }
    ++t;
    m = beta1 * m + (1 - beta1) * g;
    v = beta2 * v + (1 - beta2) * d * d;
    const at::Tensor denominator = (v / (1 - std::pow(beta2, t))).pow(power / 2) + eps;
    p = p - lr * (m / (1 - std::pow(beta1, t)) / denominator + decay * p);
  }
  AdaHessianOptions options() const {
    return AdaHessianOptions(lr).betas({beta1, beta2}).eps(eps).weight_decay(decay).hessian_power(power);
  }
};

TEST(AdaHessianHessian, ExternalDiagonalReplacesTheEstimate) {
  torch::manual_seed(1);
  const at::Tensor p = torch::randn({4, 5}, at::kDouble).requires_grad_();
  Formula expected;
  expected.p = p.detach().clone();
  AdaHessian optimizer({p}, expected.options().update_each(2));
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(optimizer.is_second_order(), i % 2 == 0);
    const at::Tensor g = torch::randn({4, 5}, at::kDouble), d = torch::randn({4, 5}, at::kDouble);
    p.mutable_grad() = g.clone();  // no graph is needed
    AdaHessianInputs inputs;
    inputs.hessian = {d};
    optimizer.step(inputs);
    // Every step is a refresh here, each with the weight of update_each.
    expected.m = expected.m.defined() ? expected.m : at::zeros_like(p);
    expected.v = expected.v.defined() ? expected.v : at::zeros_like(p);
    const double b2 = std::pow(expected.beta2, 2);
    ++expected.t;
    expected.m = expected.beta1 * expected.m + (1 - expected.beta1) * g;
    expected.v = b2 * expected.v + (1 - b2) * d * d;
    const at::Tensor denominator = (expected.v / (1 - std::pow(b2, expected.t))).sqrt() + expected.eps;
    const at::Tensor mean = expected.m / (1 - std::pow(expected.beta1, expected.t));
    expected.p = expected.p - expected.lr * (mean / denominator + expected.decay * expected.p);
    EXPECT_LT(relative_error(p, expected.p), 1e-13) << i;
  }
}

TEST(AdaHessianHessian, ExternalDiagonalIsChecked) {
  const at::Tensor p = leaf({1, 2}), q = leaf({3});
  AdaHessian optimizer({p, q});
  const auto step = [&](std::vector<at::Tensor> hessian) {
    p.mutable_grad() = at::ones_like(p);
    q.mutable_grad() = at::ones_like(q);
    AdaHessianInputs inputs;
    inputs.hessian = std::move(hessian);
    optimizer.step(inputs);
  };
  const auto before = clones({p, q});
  expect_error<c10::ValueError>([&] { step({at::ones_like(p)}); }, "hessian has 1 tensors");
  expect_error<c10::ValueError>([&] { step({at::ones({3}, at::kDouble), at::ones_like(q)}); }, "parameter 0");
  expect_error<c10::ValueError>([&] { step({at::ones_like(p), at::ones({1, 1}, at::kDouble)}); }, "parameter 1");
  EXPECT_TRUE(equal_bits({p, q}, before));
  step({at::ones_like(p), at::Tensor()});  // undefined: no curvature
  EXPECT_EQ(state_of(optimizer, q).at("exp_hessian_diag_sq").item<double>(), 0);
}

TEST(AdaHessianHessian, CurvatureClosureGivesTheCurvatureOnly) {
  const at::Tensor x = leaf({1, 2, 3});
  AdaHessian optimizer({x}, newton());
  int calls = 0;
  const auto loss = [&] { return (x * x).sum(); };
  const auto curvature = [&] {
    ++calls;
    return (2 * x * x).sum();  // curvature 4, while the loss has 2
  };
  optimizer.step(loss, curvature);
  EXPECT_TRUE(same_bits(x, torch::tensor({0.5, 1.0, 1.5}, at::kDouble)));
  EXPECT_TRUE(same_bits(x.grad(), torch::tensor({2.0, 4.0, 6.0}, at::kDouble)));
  EXPECT_EQ(calls, 1);
  AdaHessian lazy({x}, newton().update_each(2));
  lazy.step(loss, curvature);
  lazy.step(loss, curvature);
  EXPECT_EQ(calls, 2);
  // The main loss may then be any closure: it needs no graph.
  AdaHessian plain({x}, newton());
  plain.step(
      [&] {
        plain.zero_grad();
        const at::Tensor value = loss();
        value.backward();
        return value;
      },
      curvature);
}

TEST(AdaHessianHessian, ACurvatureClosureThatThrowsChangesNothing) {
  const Problem p = tanh_layer();
  AdaHessian optimizer(p.params);
  run(optimizer, p, 1);
  const auto before = clones(p.params);
  const auto dict = optimizer.state_dict().deepcopy();
  expect_error<std::runtime_error>(
      [&] { optimizer.step(p.closure(), []() -> at::Tensor { throw std::runtime_error("no batch"); }); }, "no batch");
  EXPECT_TRUE(equal_bits(p.params, before));
  EXPECT_TRUE(same_value(optimizer.state_dict(), dict));
}

TEST(AdaHessianFiniteDifference, AgreesWithDoubleBackwardAndRestores) {
  const Problem exact = tanh_layer(), shifted = exact.copy();
  AdaHessian a(exact.params), b(shifted.params, AdaHessianOptions(0.15).hvp("finite_difference"));
  int calls = 0;
  for (int i = 0; i < 5; ++i) {
    run(a, exact, 1);
    b.step([&] {
      ++calls;
      return shifted.loss(shifted.params);
    });
  }
  EXPECT_EQ(calls, 15);  // the gradient itself and two shifted ones
  for (size_t i = 0; i < exact.params.size(); ++i) EXPECT_LT(relative_error(shifted.params[i], exact.params[i]), 1e-6);
  const auto before = clones(shifted.params);
  int call = 0;
  expect_error<std::runtime_error>(  // in the midst of the shifted evaluations
      [&] {
        b.step([&]() -> at::Tensor {
          if (++call == 3) throw std::runtime_error("third call");
          return shifted.loss(shifted.params);
        });
      },
      "third call");
  EXPECT_TRUE(equal_bits(shifted.params, before));
  b.zero_grad();
  shifted.loss(shifted.params).backward();
  expect_error<c10::Error>([&] { b.step(); }, "needs a closure");
  const Problem half = quartic({{3}}, at::kBFloat16);
  AdaHessian narrow(half.params, AdaHessianOptions(0.1).hvp("finite_difference"));
  expect_error<c10::TypeError>([&] { narrow.step(half.closure()); }, "finite_difference needs float32 or float64");
}

TEST(AdaHessianFiniteDifference, ReplaysRandomNumbers) {  // the same dropout mask in both shifted evaluations
  const at::Tensor x = torch::ones({1000}, at::kDouble).requires_grad_();
  AdaHessian optimizer({x}, newton().hvp("finite_difference"));
  at::Tensor mask;
  optimizer.step([&] {
    mask = at::bernoulli(at::full_like(x, 0.5).detach());
    return (mask * x * x).sum();
  });
  const at::Tensor second = state_of(optimizer, x).at("exp_hessian_diag_sq");
  EXPECT_TRUE(torch::allclose(second, 4 * mask, 1e-6, 1e-9));
}

// --- accumulate -----------------------------------------------------------------------------------------------------

at::Tensor row_loss(const at::Tensor& w, const at::Tensor& x, const at::Tensor& t) {
  return (torch::tanh(torch::matmul(x, w.t())) - t).square().mean();
}

TEST(AdaHessianAccumulate, Spec11MicroBatchesEqualTheirBatch) {
  torch::manual_seed(2);
  const at::Tensor x = torch::randn({12, 6}, at::kDouble), t = torch::randn({12, 4}, at::kDouble);
  for (const int64_t n_samples : {1, 3}) {
    for (const int64_t update_each : {1, 2}) {
      const at::Tensor a = torch::randn({4, 6}, at::kDouble).requires_grad_();
      const at::Tensor b = a.detach().clone().requires_grad_();
      const auto options = AdaHessianOptions(0.1).n_samples(n_samples).update_each(update_each).linear_averaging("row");
      AdaHessian whole({a}, options), parts({b}, options);
      for (int i = 0; i < 5; ++i) {
        whole.step([&] { return row_loss(a, x, t); });
        for (int64_t k = 0; k < 3; ++k) {
          parts.accumulate(row_loss(b, x.narrow(0, 4 * k, 4), t.narrow(0, 4 * k, 4)), 1.0 / 3);
        }
        EXPECT_FALSE(b.grad().defined());
        parts.step();
        EXPECT_LT(relative_error(b, a), 1e-12) << i << ", " << n_samples << ", " << update_each;
      }
    }
  }
}

TEST(AdaHessianAccumulate, HalfPrecisionSumsInFloat32) {
  const at::Tensor p = torch::ones({100}, at::kBFloat16).requires_grad_();
  AdaHessian optimizer({p}, newton());
  for (int i = 0; i < 1000; ++i) optimizer.accumulate((p * p).sum(), 1e-3);  // 1000 x 0.002 would stall in bfloat16
  optimizer.step();
  EXPECT_LT(p.abs().max().item<float>(), 0.01);
}

TEST(AdaHessianAccumulate, MisuseIsRefused) {
  const Problem p = tanh_layer();
  AdaHessian optimizer(p.params, AdaHessianOptions(0.1).update_each(2));
  const auto loss = [&] { return p.loss(p.params); };
  const auto before = clones(p.params);
  optimizer.accumulate(loss());
  expect_error<c10::Error>([&] { optimizer.step(loss); }, "step() takes its sums and no closure");
  AdaHessianInputs curvature;
  curvature.curvature_closure = loss;
  expect_error<c10::Error>([&] { optimizer.step(curvature); }, "step() takes its sums");
  AdaHessianInputs hessian;
  for (const auto& param : p.params) hessian.hessian.push_back(at::ones_like(param).detach());
  expect_error<c10::Error>([&] { optimizer.step(hessian); }, "step() takes its sums");
  EXPECT_TRUE(equal_bits(p.params, before));
  optimizer.step();  // the sums are still there
  EXPECT_FALSE(same_bits(p.params[0], before[0]));

  // What changes which parameters take part, or what a step needs, between accumulate() and step().
  const auto expect_stale = [&](const auto& change) {
    const auto values = clones(p.params);
    optimizer.accumulate(loss());
    change();
    expect_error<c10::Error>([&] { optimizer.step(); }, "accumulate()");
    EXPECT_TRUE(equal_bits(p.params, values));
  };
  expect_stale([&] { p.params[1].set_requires_grad(false); });
  p.params[1].set_requires_grad(true);
  optimizer.step(loss);  // the stale sums are gone
  const at::Tensor late = leaf({1, 2});
  expect_stale([&] { optimizer.add_param_group(torch::optim::OptimizerParamGroup({late})); });
  expect_error<c10::Error>([&] { optimizer.accumulate(loss().detach()); }, "no graph");

  AdaHessian difference(p.params, AdaHessianOptions(0.1).hvp("finite_difference"));
  expect_error<c10::Error>([&] { difference.accumulate(loss()); }, "needs a closure");
}

TEST(AdaHessianAccumulate, LoadingDropsUnfinishedSums) {
  const Problem p = tanh_layer(), q = p.copy();
  const auto options = AdaHessianOptions(0.1).update_each(2);
  AdaHessian saved(p.params, options), loaded(q.params, options);
  run(saved, p, 1);
  loaded.accumulate(q.loss(q.params), 3.0);  // of a refresh step; after the load the next one is first-order
  loaded.load_state_dict(saved.state_dict());
  const auto values = clones(p.params);
  {
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < values.size(); ++i) q.params[i].copy_(values[i]);
  }
  run(saved, p, 1);
  run(loaded, q, 1);
  EXPECT_TRUE(equal_bits(q.params, p.params));
}

// --- refusals -------------------------------------------------------------------------------------------------------

TEST(AdaHessianErrors, NameTheParameter) {
  const at::Tensor first = leaf({1, 2});
  const auto step_on = [&](const at::Tensor& param, const at::Tensor& grad) {
    AdaHessian optimizer({first, param});
    first.mutable_grad() = at::ones_like(first);
    param.mutable_grad() = grad;
    AdaHessianInputs inputs;
    inputs.hessian = {at::ones_like(first), at::ones_like(param)};
    optimizer.step(inputs);
  };
  const auto before = first.detach().clone();
  const at::Tensor table = torch::ones({4, 2}, at::kDouble).requires_grad_();
  const at::Tensor sparse = at::sparse_coo_tensor(torch::tensor({{0, 2}}), torch::ones({2, 2}, at::kDouble), {4, 2});
  expect_error<c10::Error>([&] { step_on(table, sparse); },
                           "AdaHessian does not support sparse gradients: parameter 1 (shape [4, 2])");
  const at::Tensor complex = torch::ones({3}, at::kComplexDouble).requires_grad_();
  expect_error<c10::Error>([&] { step_on(complex, at::ones_like(complex)); },
                           "AdaHessian does not support complex parameters: parameter 1 (shape [3])");
  EXPECT_TRUE(same_bits(first, before));
}

TEST(AdaHessianErrors, SparseEmbeddingsAreRefusedFromAClosure) {
  torch::nn::Embedding embedding(torch::nn::EmbeddingOptions(10, 3).sparse(true));
  AdaHessian optimizer(embedding->parameters());
  const auto loss = [&] { return embedding->forward(torch::tensor({1, 2, 3})).square().sum(); };
  const auto before = clones(embedding->parameters());
  expect_error<c10::Error>([&] { optimizer.step(loss); }, "sparse");
  EXPECT_TRUE(equal_bits(embedding->parameters(), before));
}

TEST(AdaHessianErrors, OpsWithoutSecondDerivativeNameTheCure) {
  struct Once : torch::autograd::Function<Once> {
    static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x) {
      context->save_for_backward({x});
      return x * x;
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                   torch::autograd::variable_list grads) {
      const auto x = context->get_saved_variables()[0].detach();
      return {torch::autograd::Variable(grads[0].detach() * 2 * x)};  // a constant: silently no curvature
    }
  };
  const at::Tensor x = leaf({1, 2});
  AdaHessian optimizer({x}, AdaHessianOptions(0.1).max_update(1.0));
  expect_error<c10::Error>(
      [&] {
        optimizer.step([&] {
          const auto q = x.reshape({1, 1, 1, 2}).to(at::kFloat);
          return std::get<0>(at::_scaled_dot_product_flash_attention_for_cpu(q, q, q)).sum();
        });
      },
      "finite_difference");
  EXPECT_TRUE(same_bits(x, torch::tensor({1.0, 2.0}, at::kDouble)));
  optimizer.step([&] { return Once::apply(x).sum(); });
  EXPECT_EQ(state_of(optimizer, x).at("exp_hessian_diag_sq").abs().max().item<double>(), 0);
}

// --- no leak --------------------------------------------------------------------------------------------------------

int64_t resident_bytes() {
  std::ifstream file("/proc/self/statm");
  int64_t total = 0, resident = 0;
  file >> total >> resident;
  return resident * 4096;
}

TEST(AdaHessianLeak, NoGraphOutlivesAStep) {
  const Problem p = tanh_layer();
  AdaHessian optimizer(p.params);
  std::weak_ptr<torch::autograd::Node> node;
  optimizer.step([&] {
    const at::Tensor loss = p.loss(p.params);
    node = loss.grad_fn();
    return loss;
  });
  EXPECT_TRUE(node.expired()) << "closure that returns";
  optimizer.step([&] {
    optimizer.zero_grad();
    const at::Tensor loss = p.loss(p.params);
    node = loss.grad_fn();
    loss.backward({}, std::nullopt, /*create_graph=*/true);
    return loss;
  });
  EXPECT_TRUE(node.expired()) << "closure that calls backward";
  optimizer.zero_grad();
  {
    const at::Tensor loss = p.loss(p.params) * std::numeric_limits<double>::infinity();
    node = loss.grad_fn();
    loss.backward({}, std::nullopt, /*create_graph=*/true);
  }
  optimizer.step();
  EXPECT_TRUE(node.expired()) << "skipped step without a closure";
  optimizer.zero_grad();
  expect_error<std::runtime_error>(
      [&] {
        optimizer.step([&]() -> at::Tensor {
          const at::Tensor loss = p.loss(p.params);
          node = loss.grad_fn();
          loss.backward({}, std::nullopt, /*create_graph=*/true);
          throw std::runtime_error("after backward");
        });
      },
      "after backward");
  EXPECT_TRUE(node.expired()) << "closure that throws";
}

TEST(AdaHessianLeak, RebuiltModelsDoNotAddUp) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "AddressSanitizer keeps freed memory in quarantine; its own leak check covers this";
#endif
  const auto once = [](bool backward) {
    torch::nn::Sequential model(torch::nn::Linear(64, 256), torch::nn::Tanh(), torch::nn::Linear(256, 10));
    AdaHessian optimizer(model->parameters());
    const at::Tensor x = torch::ones({256, 64});  // 1 MB of activations and more
    optimizer.step([&] {
      const at::Tensor loss = model->forward(x).square().mean();
      if (backward) loss.backward({}, std::nullopt, /*create_graph=*/true);
      return loss;
    });
  };
  for (int i = 0; i < 20; ++i) once(i % 2 == 0);
  const int64_t before = resident_bytes();
  for (int i = 0; i < 200; ++i) once(i % 2 == 0);
  EXPECT_LT(resident_bytes() - before, int64_t{64} << 20);
}

// --- the numbered tests ---------------------------------------------------------------------------------------------

TEST(AdaHessianSpec, Spec01OneStepNewton) {
  const at::Tensor a = torch::tensor({1e-3, 1.0, 50.0, 1e4}, at::kDouble);
  const auto distance = [&](const at::Tensor& start, const at::Tensor& c) {
    const at::Tensor x = start.clone().requires_grad_();
    AdaHessian optimizer({x}, newton());
    optimizer.step([&] { return (a / 2 * (x - c).square()).sum(); });
    return (x.detach() - c).abs() / at::maximum(start.abs(), c.abs());
  };
  const at::Tensor whole = torch::tensor({3.0, -7.0, 12.0, 5.0}, at::kDouble);
  EXPECT_EQ(distance(whole, torch::tensor({-2.0, 9.0, 4.0, 1.0}, at::kDouble)).max().item<double>(), 0);
  torch::manual_seed(3);
  double worst = 0;
  for (int i = 0; i < 200; ++i) {
    worst =
        std::max(worst, distance(torch::randn({4}, at::kDouble), torch::randn({4}, at::kDouble)).max().item<double>());
  }
  EXPECT_LE(worst, 4 * 2.220446049250313e-16);
}

TEST(AdaHessianSpec, Spec02ConditioningDoesNotMatter) {
  for (const double condition : {1.0, 1e3, 1e6}) {
    const at::Tensor a = torch::logspace(0, std::log10(condition), 20, 10, at::kDouble);
    const at::Tensor x = torch::ones({20}, at::kDouble).requires_grad_();
    AdaHessian optimizer({x}, AdaHessianOptions(0.15).eps(0));
    for (int i = 0; i < 200; ++i) optimizer.step([&] { return (a / 2 * x.square()).sum(); });
    EXPECT_NEAR(x.abs().max().item<double>() / 9.3475e-7, 1, 1e-4) << condition;
    EXPECT_LT(relative_error(x, x.detach()[0].expand({20})), 1e-11) << condition;
  }
}

TEST(AdaHessianSpec, Spec03HandCase) {
  const at::Tensor h = torch::tensor({{2.0, 1.0}, {1.0, 3.0}}, at::kDouble);
  int seen = 0;
  for (int64_t seed = 0; seed < 8; ++seed) {
    const at::Tensor x = leaf({1, -1});
    const at::Tensor z = ops::rademacher_probe({x}, {0}, seed, 0, 0)[0];
    AdaHessian optimizer({x}, AdaHessianOptions(0.1).eps(0).seed(seed));
    optimizer.step([&] { return torch::dot(x, torch::mv(h, x)) / 2; });
    const bool equal_signs = (z[0] * z[1]).item<double>() > 0;
    const at::Tensor expected =
        equal_signs ? torch::tensor({1 - 0.1 / 3, -0.95}, at::kDouble) : torch::tensor({0.9, -0.9}, at::kDouble);
    EXPECT_LT(relative_error(x, expected), 1e-13) << seed;
    seen |= equal_signs ? 1 : 2;
  }
  EXPECT_EQ(seen, 3);
}

TEST(AdaHessianSpec, Spec07LossScaleDoesNotMatter) {
  for (const double power : {1.0, 0.5}) {
    const Problem plain = tanh_layer(), scaled = plain.copy(), divided = plain.copy();
    const auto start = clones(plain.params);
    const auto options = AdaHessianOptions(0.1).eps(0).hessian_power(power);
    AdaHessian a(plain.params, options), b(scaled.params, options), c(divided.params, options);
    const int steps = power == 1 ? 20 : 1;
    for (int i = 0; i < steps; ++i) {
      a.step(plain.closure());
      b.step([&] { return scaled.loss(scaled.params) * 1024; });
      AdaHessianInputs inputs;
      inputs.closure = [&] { return divided.loss(divided.params) * 1024; };
      inputs.loss_scale = 1024;
      c.step(inputs);
    }
    EXPECT_TRUE(equal_bits(divided.params, plain.params));
    for (size_t i = 0; i < start.size(); ++i) {
      const at::Tensor one = plain.params[i].detach() - start[i], two = scaled.params[i].detach() - start[i];
      if (power == 1) {
        EXPECT_TRUE(equal_bits(two, one));
      } else {
        EXPECT_LT(relative_error(two, one * std::sqrt(1024.0)), 1e-12);
      }
    }
  }
}

TEST(AdaHessianSpec, Spec08NegativeCurvatureIsLeft) {
  const at::Tensor x = leaf({0.1});
  AdaHessian optimizer({x}, newton());
  optimizer.step([&] { return -(x * x).sum(); });
  EXPECT_DOUBLE_EQ(x.item<double>(), 0.2);
}

TEST(AdaHessianSpec, Spec10AveragingShapes) {
  struct Case {
    std::vector<int64_t> shape, reduced;
    std::string linear;
    int64_t block;
    bool conv;
  };
  const std::vector<Case> cases{
      {{6, 4, 5}, {6, 4, 1}, "none", 0, true},
      {{6, 4, 3, 3}, {6, 4, 1, 1}, "none", 0, true},
      {{3, 2, 3, 2, 4}, {3, 2, 1, 1, 1}, "none", 0, true},
      {{6, 4, 3, 3}, {6, 4, 3, 3}, "row", 0, false},
      {{5, 12}, {5, 12}, "none", 0, true},
      {{5, 12}, {5, 1}, "row", 0, true},
      {{5, 70}, {5, 1}, "row", 0, true},
      {{5, 12}, {5, 3}, "block", 4, true},
      {{5, 12}, {5, 12}, "block", 1, true},
      {{12}, {12}, "row", 0, true},
      {{}, {}, "row", 0, true},
  };
  torch::manual_seed(4);
  for (const Case& item : cases) {
    for (const bool is_signed : {false, true}) {
      const at::Tensor p = torch::randn(item.shape, at::kDouble).requires_grad_();
      Formula expected;
      expected.p = p.detach().clone();
      expected.power = 0.7;
      auto options = expected.options()
                         .linear_averaging(item.linear)
                         .average_conv(item.conv)
                         .averaging(is_signed ? "signed_mean" : "abs_mean");
      if (item.block > 0) options.block_size(item.block);
      AdaHessian optimizer({p}, options);
      for (int i = 0; i < 3; ++i) {
        const at::Tensor g = torch::randn(item.shape, at::kDouble), d = torch::randn(item.shape, at::kDouble);
        p.mutable_grad() = g.clone();
        AdaHessianInputs inputs;
        inputs.hessian = {d};
        optimizer.step(inputs);
        // The mean over each block, written back to its elements: the full-state formula.
        at::Tensor full = is_signed ? d : d.abs();
        const int64_t blocks = c10::multiply_integers(item.reduced);
        full = full.reshape({blocks, -1}).mean(1, /*keepdim=*/true).expand({blocks, p.numel() / blocks});
        expected.step(g, full.reshape(item.shape));
        EXPECT_LT(relative_error(p, expected.p), 1e-12) << at::IntArrayRef(item.shape) << ' ' << item.linear;
      }
      EXPECT_EQ(state_of(optimizer, p).at("exp_hessian_diag_sq").sizes(), at::IntArrayRef(item.reduced));
    }
  }
  const at::Tensor fine = torch::ones({4, 4}, at::kDouble).requires_grad_();
  const at::Tensor odd = torch::ones({4, 6}, at::kDouble).requires_grad_();
  AdaHessian optimizer({fine, odd}, AdaHessianOptions(0.1).linear_averaging("block").block_size(4));
  expect_error<c10::ValueError>([&] { optimizer.step([&] { return fine.square().sum() + odd.square().sum(); }); },
                                "block_size 4 does not divide the rows of parameter 1 (shape [4, 6])");
  EXPECT_EQ(fine.min().item<double>(), 1);
}

TEST(AdaHessianSpec, Spec10ReducedExternalDiagonalIsTakenAsItIs) {
  torch::manual_seed(5);
  const at::Tensor p = torch::randn({6, 4, 3, 3}, at::kDouble).requires_grad_();
  const at::Tensor q = p.detach().clone().requires_grad_();
  AdaHessian reduced({p}), full({q});
  const at::Tensor g = torch::randn_like(p), d = torch::rand({6, 4, 1, 1}, at::kDouble);
  p.mutable_grad() = g.detach().clone();
  q.mutable_grad() = g.detach().clone();
  AdaHessianInputs inputs;
  inputs.hessian = {d};
  reduced.step(inputs);
  inputs.hessian = {d.expand_as(q)};
  full.step(inputs);
  EXPECT_TRUE(same_bits(p, q));
}

TEST(AdaHessianSpec, Spec12MidPeriodCheckpointsAndThreads) {
  std::vector<std::vector<at::Tensor>> results;
  for (const int threads : {1, 2}) {
    const ThreadCount guard(threads);
    const Problem straight = tanh_layer(), first = straight.copy();
    const auto options = AdaHessianOptions(0.1).update_each(5).seed(11);
    AdaHessian reference(straight.params, options), saved(first.params, options);
    run(reference, straight, 17);
    run(saved, first, 8);
    const TemporaryFile file;
    saved.save_state_dict(file.path());
    const Problem second = first.copy();
    AdaHessian resumed(second.params);
    resumed.load_state_dict(file.path());
    run(resumed, second, 9);
    EXPECT_TRUE(equal_bits(second.params, straight.params));
    results.push_back(second.params);
  }
  EXPECT_TRUE(equal_bits(results[0], results[1]));
}

TEST(AdaHessianSpec, Spec12SeedsGiveOtherProbes) {
  const Problem a = tanh_layer(), b = a.copy(), c = a.copy();
  AdaHessian first(a.params, AdaHessianOptions(0.1).seed(1)), again(b.params, AdaHessianOptions(0.1).seed(1)),
      other(c.params, AdaHessianOptions(0.1).seed(2));
  run(first, a, 3);
  run(again, b, 3);
  run(other, c, 3);
  EXPECT_TRUE(equal_bits(a.params, b.params));
  EXPECT_FALSE(same_bits(a.params[0], c.params[0]));
}

// --- layouts of gradients, other checkpoints ------------------------------------------------------------------------

TEST(AdaHessianLayouts, ExpandedAndTransposedGradients) {
  const auto result = [](const at::Tensor& grad, const at::Tensor& hessian) {
    const at::Tensor p = torch::ones({4, 6}, at::kDouble).requires_grad_();
    AdaHessian optimizer({p});
    p.mutable_grad() = grad;
    AdaHessianInputs inputs;
    inputs.hessian = {hessian};
    optimizer.step(inputs);
    return p.detach();
  };
  const at::Tensor row = torch::arange(6, at::kDouble) + 1;
  const at::Tensor grad = row.expand({4, 6}).contiguous(), hessian = grad * 2;
  const at::Tensor expected = result(grad, hessian);
  EXPECT_TRUE(same_bits(result(row.expand({4, 6}), hessian), expected));
  EXPECT_TRUE(same_bits(result(grad.t().contiguous().t(), hessian.t().contiguous().t()), expected));
  EXPECT_TRUE(same_bits(result(grad, (2 * row).expand({4, 6})), expected));
}

TEST(AdaHessianLayouts, AnExpandedParameterIsRefused) {
  const at::Tensor p = torch::ones({1, 6}, at::kDouble).expand({4, 6}).detach().requires_grad_();
  const at::Tensor first = leaf({1, 2});
  AdaHessian optimizer(std::vector<torch::optim::OptimizerParamGroup>{{{first}}, {{p}}});
  expect_error<c10::Error>([&] { optimizer.step([&] { return first.square().sum() + p.square().sum(); }); },
                           "parameter 1 (shape [4, 6]) is expanded");
  EXPECT_TRUE(same_bits(first, torch::tensor({1.0, 2.0}, at::kDouble)));  // nor is a group before it stepped
  EXPECT_TRUE(optimizer.state().empty());
}

TEST(AdaHessianCheckpoint, OneThatCountsStepsOnlyContinues) {  // as other implementations write it
  const Problem p = tanh_layer(), q = p.copy();
  AdaHessian optimizer(p.params), loaded(q.params);
  run(optimizer, p, 3);
  const auto dict = optimizer.state_dict().deepcopy();
  std::ignore = dict.toGenericDict().erase("torch_ext");
  for (int64_t i = 0; i < 3; ++i) {
    const auto state = dict.toGenericDict().at("state").toGenericDict().at(i).toGenericDict();
    std::ignore = state.erase("bias_products");
    state.insert_or_assign("step", int64_t{3});
  }
  {
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < q.params.size(); ++i) q.params[i].copy_(p.params[i]);
  }
  loaded.load_state_dict(dict);
  run(optimizer, p, 2);
  run(loaded, q, 2);
  for (size_t i = 0; i < q.params.size(); ++i) EXPECT_LT(relative_error(q.params[i], p.params[i]), 1e-13);
}

TEST(AdaHessianCheckpoint, AveragingThatDoesNotFitIsRefused) {
  const Problem p = tanh_layer(), q = p.copy();
  AdaHessian none(p.params), loaded(q.params);
  run(none, p, 1);
  const auto dict = none.state_dict().deepcopy();
  const auto group = dict.toGenericDict().at("param_groups").toListRef()[0].toGenericDict();
  group.insert_or_assign("linear_averaging", "row");
  expect_error<c10::ValueError>([&] { loaded.load_state_dict(dict); }, "exp_hessian_diag_sq has shape");
  EXPECT_TRUE(loaded.state().empty());
}

TEST(AdaHessianJoin, AParameterThatJoinsBetweenRefreshesWaits) {
  const at::Tensor x = leaf({1, 2}), y = leaf({3});
  AdaHessian optimizer({x}, AdaHessianOptions(0.1).update_each(2));
  const auto loss = [&] { return x.square().sum() + y.square().sum(); };
  optimizer.step(loss);
  optimizer.add_param_group(torch::optim::OptimizerParamGroup({y}));
  optimizer.step(loss);
  EXPECT_EQ(y.item<double>(), 3);  // no curvature yet
  optimizer.step(loss);
  EXPECT_LT(y.item<double>(), 3);
  EXPECT_EQ(state_of(optimizer, y).at("step").item<float>(), 1);
}

TEST(AdaHessianDevices, StateFollowsParametersWhoseDataIsReplaced) {
  const at::Tensor x = leaf({1, 2});
  AdaHessian optimizer({x});
  const auto loss = [&] { return x.square().sum(); };
  optimizer.step(loss);
  x.set_data(torch::tensor({5.0, 6.0}, at::kDouble));  // as module->to() does
  optimizer.step(loss);
  EXPECT_EQ(state_of(optimizer, x).at("step").item<float>(), 2);
  EXPECT_LT(x.max().item<double>(), 6);
}

}  // namespace
}  // namespace torch_ext::optim

// ALFLB: its rules, routers and loads, theory's statements on fixed scores, and what every optimizer owes its users as
// far as it applies without gradients. Numbers in the names are those of the method's acceptance list; its statistical
// tests are in Python, on the same operator.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/moe/layer.h>
#include <torch_ext/moe/router.h>
#include <torch_ext/optim/alflb.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "optim/alflb/alflb_functor.h"
#include "optim/alflb/alflb_op.h"
#include "support/check.h"
#include "support/json.h"
#include "support/optimizers.h"
#include "support/problems.h"

namespace torch_ext::optim {
namespace {

using moe::MoERouter, moe::MoERouterOptions, moe::RouteOptions;
using test::equal_bits;
using test::expect_error;
using test::same_value;
using test::TemporaryFile;
using torch::optim::OptimizerParamGroup;

const std::vector<std::string>& rules() {
  static const std::vector<std::string> names{"sign", "proportional", "momentum", "quantile"};
  return names;
}

at::Tensor longs(const std::vector<int64_t>& values) { return torch::tensor(values, at::kLong); }
std::vector<double> numbers(const at::Tensor& t) {
  const at::Tensor flat = t.to(at::kDouble).contiguous();
  return {flat.data_ptr<double>(), flat.data_ptr<double>() + flat.numel()};
}

// Loads as if they had been recorded; K = 1.
void add_loads(ALFLB& balancer, const std::vector<int64_t>& counts, size_t layer = 0) {
  balancer.record(layer, longs({-1}));
  balancer.loads()[layer].add_(longs(counts));
}

// --- rules ----------------------------------------------------------------------------------------------------------

TEST(ALFLB, ClosedForms) {  // loads 3, 1, 0: L = 4/3, T = 4
  const auto moved = [](const ALFLBOptions& options, int steps = 1) {
    const at::Tensor bias = at::zeros({3});
    ALFLB balancer({bias}, ALFLBOptions(options).center(false));
    for (int i = 0; i < steps; ++i) {
      add_loads(balancer, {3, 1, 0});
      balancer.step();
    }
    return numbers(bias);
  };
  EXPECT_EQ(moved(ALFLBOptions(0.25)), (std::vector<double>{-0.25, 0.25, 0.25}));
  EXPECT_EQ(moved(ALFLBOptions(0.5).lr_power(1), 2), (std::vector<double>{-0.75, 0.75, 0.75}));
  const auto tokens = moved(ALFLBOptions(0.5).rule("proportional"));
  const auto load = moved(ALFLBOptions(0.5).rule("proportional").norm("load"));
  const auto momentum = moved(ALFLBOptions(0.1).rule("momentum").momentum(0));
  const std::vector<double> a{3, 1, 0};
  double mean = 0;
  for (const double x : a) mean += 0.1 * std::tanh(2 * (1 - x * 0.75)) / 3;
  for (size_t e = 0; e < 3; ++e) {
    EXPECT_NEAR(tokens[e], 0.5 * (4.0 / 3 - a[e]) / 4, 1e-7);
    EXPECT_NEAR(load[e], 0.5 * (1 - a[e] * 0.75), 1e-7);
    EXPECT_NEAR(momentum[e], 0.1 * std::tanh(2 * (1 - a[e] * 0.75)) - mean, 1e-8);
  }
}

TEST(ALFLB, TanhIsTheLibrarys) {
  for (double x = -400; x <= 400; x += 0.37) {
    EXPECT_NEAR(kernels::hyperbolic_tangent(x), std::tanh(x), 1e-15);
    EXPECT_NEAR(kernels::hyperbolic_tangent(x / 400), std::tanh(x / 400), 1e-15);
  }
  EXPECT_EQ(kernels::hyperbolic_tangent(0), 0);
}

TEST(ALFLB, QuantileOfAHistogram) {
  const kernels::AlflbArgs args{0, 0, 0.25, 0, 1, kernels::AlflbRule::kQuantile, true, true, nullptr};
  const kernels::AlflbStep f(args, 1, 8, 4, 1);         // K/E = 1/4
  const std::vector<int64_t> counts{0, 1, 4, 0, 3, 0};  // 8 rows: the second is the quantile, a fourth into bin 2
  const double value = -1 + (2 + 0.25) * (3.0 / 6);
  EXPECT_DOUBLE_EQ(f.quantile(counts.data(), 6, -1, 2, 0.5), 0.25 * 0.5 + 0.75 * value);
  const std::vector<int64_t> none(6), last{0, 0, 0, 0, 0, 4};
  EXPECT_EQ(f.quantile(none.data(), 6, -1, 2, 0.5), 0.5);
  EXPECT_DOUBLE_EQ(f.quantile(last.data(), 6, 0, 6, 0), 0.75 * 5.25);
}

TEST(ALFLB, RateZeroFreezes) {
  for (const std::string rule : {"sign", "proportional", "momentum"}) {
    const at::Tensor bias = torch::tensor({0.1f, 0.2f, 0.5f}), before = bias.clone();
    ALFLB balancer({bias}, ALFLBOptions(0).rule(rule));
    add_loads(balancer, {3, 1, 0});
    balancer.step();
    EXPECT_TRUE(equal_bits(bias, before)) << rule;
    EXPECT_EQ(balancer.loads()[0].sum().item<int64_t>(), 0);
  }
}

TEST(ALFLB, LayersWithoutLoadsStay) {
  const at::Tensor a = torch::tensor({0.1f, 0.2f}), b = a.clone(), before = a.clone();
  ALFLB balancer({a, b});
  add_loads(balancer, {1, 0}, 1);
  balancer.step();
  EXPECT_TRUE(equal_bits(a, before));
  EXPECT_FALSE(b.equal(before));
  balancer.step();
  const auto state = [&](const at::Tensor& bias) -> const ParamState& {
    return static_cast<const ParamState&>(*balancer.state().at(bias.unsafeGetTensorImpl()));
  };
  EXPECT_EQ(state(a).at("updates").item<int64_t>(), 0);
  EXPECT_EQ(state(b).at("updates").item<int64_t>(), 1);
}

TEST(ALFLB, Test8SignsAreThoseOfIntegers) {
  torch::manual_seed(1);
  int64_t wrong = 0;
  for (int trial = 0; trial < 20; ++trial) {
    const at::Tensor load = torch::randint(-3, 4, {256}, at::kLong) + 2000000;
    const at::Tensor bias = at::zeros({256});
    ALFLB balancer({bias}, ALFLBOptions().center(false));
    balancer.loads()[0].copy_(load);
    balancer.step();
    const at::Tensor exact = (load.sum() - 256 * load).sign();
    EXPECT_TRUE(bias.sign().to(at::kLong).equal(exact));
    const at::Tensor single = load.to(at::kFloat);
    wrong += (single.mean() - single).sign().to(at::kLong).ne(exact).sum().item<int64_t>();
  }
  EXPECT_GT(wrong, 0);  // in float32 some are: or this test could not fail
}

// --- theory, fixed scores -------------------------------------------------------------------------------------------

struct Selection {
  at::Tensor ids, load;
  double dual;
};
Selection select(const at::Tensor& scores, const at::Tensor& p, int64_t k) {
  const auto [values, ids] = at::topk(scores + p, k);
  const double target = static_cast<double>(k * scores.size(0)) / static_cast<double>(scores.size(1));
  return {ids, at::bincount(ids.reshape({-1}), {}, scores.size(1)),
          values.sum().item<double>() - target * p.sum().item<double>()};
}

TEST(ALFLB, Test4SandwichPreferenceAndSpread) {
  torch::manual_seed(2);
  for (int trial = 0; trial < 30; ++trial) {
    const int64_t experts = 3 + trial % 11, k = 1 + trial % 2, tokens = 60;
    const at::Tensor scores = torch::rand({tokens, experts}, at::kDouble) + 0.5 * torch::randn({experts}, at::kDouble);
    const at::Tensor bias = at::zeros({experts});
    const std::string rule = trial % 3 == 0 ? "sign" : "proportional";
    ALFLB balancer({bias}, ALFLBOptions(0.1).rule(rule).norm(trial % 2 == 0 ? "tokens" : "load"));
    for (int n = 0; n < 10; ++n) {
      const at::Tensor p = bias.to(at::kDouble);
      const Selection x = select(scores, p, k);
      balancer.record(0, x.ids);
      balancer.step();
      const at::Tensor q = bias.to(at::kDouble), d = q - p;
      const Selection y = select(scores, q, k);
      const double target = static_cast<double>(k * tokens) / static_cast<double>(experts), slack = 1e-9 * x.dual;
      EXPECT_LE((d * (x.load - target)).sum().item<double>(), y.dual - x.dual + slack);  // (i)
      EXPECT_LE(y.dual - x.dual, (d * (y.load - target)).sum().item<double>() + slack);
      const at::Tensor before = at::zeros({tokens, experts}, at::kBool).scatter(1, x.ids, true);
      const at::Tensor after = at::zeros({tokens, experts}, at::kBool).scatter(1, y.ids, true);
      const at::Tensor pairs = (before & ~after).unsqueeze(2) & (after & ~before).unsqueeze(1);
      const at::Tensor worse = (d.unsqueeze(0) < d.unsqueeze(1) - 1e-7).unsqueeze(0);  // d_k' < d_k
      EXPECT_FALSE((pairs & worse).any().item<bool>());                                // (ii)
    }
  }
  const double u = 0.3;  // (v): all tokens want the expert with the lowest bias
  const at::Tensor bias = at::zeros({32});
  ALFLB balancer({bias}, ALFLBOptions(u));
  double largest = 0;
  for (int n = 0; n < 200; ++n) {
    at::Tensor scores = at::zeros({40, 32}, at::kDouble);
    scores.select(1, bias.argmin().item<int64_t>()).fill_(1);
    balancer.record(0, select(scores, bias.to(at::kDouble), 1).ids);
    balancer.step();
    largest = std::max(largest, (bias.max() - bias.min()).item<double>());
  }
  EXPECT_LE(largest, 1 + 2 * u + 1e-6);
  EXPECT_GE(largest, 1);
}

TEST(ALFLB, Test5ProportionalStepsEndBalanced) {
  torch::manual_seed(3);
  const at::Tensor scores = torch::rand({256, 16}, at::kDouble) + 0.5 * torch::randn({16}, at::kDouble);
  const at::Tensor bias = at::zeros({16});
  ALFLB balancer({bias}, ALFLBOptions(3).rule("proportional").lr_power(1));
  for (int n = 0; n < 1000; ++n) {
    balancer.record(0, select(scores, bias.to(at::kDouble), 4).ids);
    balancer.step();
  }
  EXPECT_TRUE(select(scores, bias.to(at::kDouble), 4).load.eq(64).all().item<bool>());
}

// --- routers --------------------------------------------------------------------------------------------------------

struct NetImpl : torch::nn::Module {
  NetImpl() {
    torch::manual_seed(0);
    first = register_module("first", MoERouter(MoERouterOptions(6, 8)));
    second = register_module("second", MoERouter(MoERouterOptions(6, 5).route(RouteOptions().top_k(1))));
  }
  at::Tensor forward(const at::Tensor& x) {
    return first->forward(x).gates.square().sum() + second->forward(x).gates.sum();
  }
  MoERouter first{nullptr}, second{nullptr};
};
TORCH_MODULE(Net);

at::Tensor batch(uint64_t seed, int64_t tokens = 40) {
  torch::manual_seed(seed);
  return torch::randn({tokens, 6});
}

void train(Net& net, ALFLB& balancer, int steps, uint64_t seed, int64_t parts = 1) {
  for (int n = 0; n < steps; ++n) {
    for (const at::Tensor& part : batch(seed + static_cast<uint64_t>(n)).chunk(parts)) net->forward(part).backward();
    balancer.step();
  }
}

TEST(ALFLB, TakesTheRoutersOfAModel) {
  Net net;
  ALFLB balancer(*net, ALFLBOptions(0.01));
  net->forward(batch(1)).backward();
  const auto loads = balancer.loads();
  ASSERT_EQ(loads.size(), 2u);
  EXPECT_TRUE(loads[0].is_same(net->first->load));
  EXPECT_EQ(loads[0].sum().item<int64_t>(), 80);
  EXPECT_EQ(loads[1].sum().item<int64_t>(), 40);
  const auto pending = balancer.report(/*pending=*/true);
  balancer.step();
  EXPECT_FALSE(net->first->load.any().item<bool>());
  const auto report = balancer.report();
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(report[i].max_vio, pending[i].max_vio);
    EXPECT_GE(report[i].max_vio, 0);
    EXPECT_LE(report[i].entropy, 1);
  }
  EXPECT_EQ(report[0].floor, ALFLB::sampling_floor(40, 8, 2));
  EXPECT_NEAR(report[0].bias_spread, 0.02, 1e-7);
  EXPECT_TRUE(std::isnan(balancer.report(true)[0].max_vio));
  EXPECT_NEAR(ALFLB::sampling_floor(1024, 16, 2), 0.155, 0.003);
  EXPECT_NEAR(ALFLB::sampling_floor(4096, 64, 8), 0.099, 0.002);
}

TEST(ALFLB, FindsARouterAndOneThatIsShared) {
  const MoERouter router(MoERouterOptions(6, 8));
  EXPECT_EQ(ALFLB(*router).loads().size(), 1u);
  torch::nn::ModuleList twice(router, router);
  EXPECT_EQ(ALFLB(*twice).loads().size(), 1u);
}

TEST(ALFLB, Test11MicroBatchesAndRanksEqualTheWhole) {
  for (const std::string& rule : rules()) {
    Net whole, parts;
    ALFLB a(*whole, ALFLBOptions(0.05).rule(rule)), b(*parts, ALFLBOptions(0.05).rule(rule));
    train(whole, a, 4, 0);
    train(parts, b, 4, 0, 4);
    EXPECT_TRUE(equal_bits(whole->buffers(), parts->buffers())) << rule;
    EXPECT_TRUE(same_value(a.state_dict(), b.state_dict())) << rule;

    // Two ranks in one process: the callback adds the counts of the other, which has run before.
    Net one, two;
    ALFLB first(*one, ALFLBOptions(0.05).rule(rule)), second(*two, ALFLBOptions(0.05).rule(rule));
    std::vector<at::Tensor> other;
    first.set_reduce([&](std::vector<at::Tensor>& counts) {
      for (size_t i = 0; i < counts.size(); ++i) counts[i] = counts[i] + other[i];
    });
    for (uint64_t n = 0; n < 4; ++n) {
      const auto halves = batch(n).chunk(2);
      one->forward(halves[0]).backward();
      two->forward(halves[1]).backward();
      other.clear();
      for (const MoERouter& router : {two->first, two->second}) {
        other.push_back(router->load.clone());
        if (router->quantile_histogram.defined()) other.push_back(router->quantile_histogram.clone());
      }
      first.step();
      for (const auto& [from, to] : {std::pair{one->first, two->first}, std::pair{one->second, two->second}}) {
        const torch::NoGradGuard no_grad;
        to->expert_bias.copy_(from->expert_bias);
        to->load.zero_();
        if (to->quantile_histogram.defined()) {
          to->quantile_histogram.zero_();
          to->quantile_bounds.copy_(from->quantile_bounds);
        }
      }
    }
    EXPECT_TRUE(equal_bits(one->buffers(), whole->buffers())) << rule;
    EXPECT_TRUE(same_value(first.state_dict(), a.state_dict())) << rule;
  }
  Net net;
  ALFLB wrong(*net);
  wrong.set_reduce([](std::vector<at::Tensor>& counts) {
    for (at::Tensor& t : counts) t = t.to(at::kDouble) / 2;
  });
  net->forward(batch(0)).backward();
  expect_error<c10::TypeError>([&] { wrong.step(); }, "set_reduce(torch_ext::sum_over(group))");
}

TEST(ALFLB, DiscardDropsAndCounts) {
  Net net;
  ALFLB balancer(*net, ALFLBOptions().rule("quantile"));
  net->forward(batch(0)).backward();
  const auto before = test::clones(net->buffers());
  balancer.discard();
  EXPECT_FALSE(net->first->load.any().item<bool>());
  EXPECT_FALSE(net->first->quantile_histogram.any().item<bool>());
  balancer.step();
  EXPECT_TRUE(equal_bits(net->buffers(), before));
  EXPECT_EQ(balancer.skipped_steps().item<int64_t>(), 1);
}

TEST(ALFLB, NonFiniteBiasIsLeftAlone) {
  const at::Tensor bias = torch::tensor({0.0f, std::numeric_limits<float>::quiet_NaN(), 0.0f});
  ALFLB balancer({bias});
  add_loads(balancer, {1, 0, 0});
  balancer.step();
  EXPECT_EQ(balancer.skipped_steps().item<int64_t>(), 1);
  EXPECT_EQ(bias[0].item<float>(), 0);
  EXPECT_EQ(balancer.loads()[0].sum().item<int64_t>(), 0);
}

TEST(ALFLB, FollowsItsRouter) {
  Net net;
  ALFLB balancer(*net, ALFLBOptions(0.01));
  train(net, balancer, 2, 0);
  net->to(at::kBFloat16);
  EXPECT_EQ(net->first->expert_bias.scalar_type(), at::kFloat);
  net->to(at::kFloat);
  net->first->expert_bias = net->first->expert_bias.clone();  // whoever does so
  train(net, balancer, 1, 5);
  EXPECT_TRUE(balancer.param_groups()[0].params()[0].is_same(net->first->expert_bias));
  EXPECT_EQ(balancer.state().size(), 2u);
}

TEST(ALFLB, FromBuffers) {
  struct Foreign : torch::nn::Module {
    Foreign() { bias = register_buffer("e_score_correction_bias", at::zeros({4})); }
    at::Tensor bias;
  };
  struct Model : torch::nn::Module {
    Model() {
      inner = register_module("inner", std::make_shared<Foreign>());
      register_buffer("not_e_score_correction_bias", at::zeros({3}));
    }
    std::shared_ptr<Foreign> inner;
  };
  Model model;
  ALFLB balancer = ALFLB::from_buffers(model, "e_score_correction_bias", ALFLBOptions(0.5).center(false));
  balancer.record(0, longs({0, 0, 1, -1}).to(at::kInt).reshape({4, 1}));
  EXPECT_EQ(numbers(balancer.loads()[0]), (std::vector<double>{2, 1, 0, 0}));
  balancer.step();
  EXPECT_EQ(numbers(model.inner->bias), (std::vector<double>{-0.5, -0.5, 0.5, 0.5}));
  expect_error<c10::ValueError>([&] { ALFLB::from_buffers(model, "bias"); }, "no buffer named 'bias'");
  expect_error<c10::ValueError>([&] { ALFLB other(model); }, "the module has no MoERouter");
}

// --- what every optimizer owes its users ----------------------------------------------------------------------------

TEST(ALFLB, GroupsInheritAndAreChecked) {
  const at::Tensor a = at::zeros({3}), b = at::zeros({4});
  ALFLB balancer(
      {OptimizerParamGroup({a}, std::make_unique<ALFLBOptions>(ALFLBOptions(0.3))), OptimizerParamGroup({b})},
      ALFLBOptions(0.5).rule("momentum"));
  EXPECT_EQ(balancer.param_groups()[0].options().get_lr(), 0.3);
  EXPECT_EQ(balancer.param_groups()[1].options().get_lr(), 0.5);
  EXPECT_EQ(static_cast<const ALFLBOptions&>(balancer.param_groups()[0].options()).rule(), "momentum");
  expect_error<c10::ValueError>([&] { balancer.add_param_group(OptimizerParamGroup({a})); }, "appear more than once");
  expect_error<c10::TypeError>(
      [&] {
        balancer.add_param_group({{at::zeros({2})}, std::make_unique<torch::optim::SGDOptions>(0.1)});
      },
      "are of another optimizer");
  balancer.add_param_group(OptimizerParamGroup({at::zeros({2})}));
  EXPECT_EQ(balancer.loads().size(), 3u);
  expect_error<c10::TypeError>([] { ALFLB wrong({at::zeros({3}, at::kDouble)}); }, "must be float32, got Double");
  expect_error<c10::ValueError>([] { ALFLB wrong({at::zeros({3, 2})}); }, "must have one dimension");
  ALFLB empty(std::vector<at::Tensor>{});
  expect_error<c10::ValueError>([&] { empty.step(); }, "has no parameters");
}

TEST(ALFLB, ClosureReturnsItsLossAndMayThrow) {
  const at::Tensor bias = at::zeros({3});
  ALFLB balancer({bias});
  add_loads(balancer, {1, 0, 0});
  expect_error<c10::Error>([&] { balancer.step([]() -> at::Tensor { TORCH_CHECK(false, "my own error"); }); },
                           "my own error");
  EXPECT_FALSE(bias.any().item<bool>());
  EXPECT_EQ(balancer.loads()[0].sum().item<int64_t>(), 1);
  const at::Tensor x = at::ones({}).requires_grad_();
  const at::Tensor loss = balancer.step([&] {
    EXPECT_TRUE(at::GradMode::is_enabled());
    return x * 2;
  });
  EXPECT_EQ(loss.item<float>(), 2);
  EXPECT_FALSE(loss.requires_grad());
  balancer.zero_grad();
}

TEST(ALFLB, SchedulersDriveTheRate) {
  const at::Tensor bias = at::zeros({2});
  ALFLB balancer({bias}, ALFLBOptions(0.25).center(false));
  torch::optim::StepLR scheduler(balancer, 1, 0.5);
  for (int i = 0; i < 3; ++i) {
    add_loads(balancer, {1, 0});
    balancer.step();
    scheduler.step();
  }
  EXPECT_EQ(bias[1].item<float>(), 0.25f + 0.25f + 0.125f);  // StepLR does nothing on its first step
}

TEST(ALFLB, Test12ResumesWhereItStopped) {
  const TemporaryFile file;
  for (const std::string& rule : rules()) {
    for (const bool native : {false, true}) {
      Net straight, first, second;
      const auto options = ALFLBOptions(0.02).rule(rule).lr_power(0.5);
      ALFLB reference(*straight, options), saved(*first, options), resumed(*second, ALFLBOptions(0.3));
      train(straight, reference, 6, 0);
      train(first, saved, 3, 0);
      train(second, resumed, 1, 9);
      for (size_t i = 0; i < 2; ++i) second->buffers()[i].copy_(first->buffers()[i]);
      if (native) {
        std::stringstream archive;
        torch::save(saved, archive);
        torch::load(resumed, archive);
      } else {
        saved.save_state_dict(file.path());
        resumed.load_state_dict(file.path());
      }
      EXPECT_TRUE(same_value(resumed.state_dict(), saved.state_dict())) << rule;
      train(second, resumed, 3, 3);
      EXPECT_TRUE(equal_bits(second->buffers(), straight->buffers())) << rule;
      EXPECT_TRUE(same_value(resumed.state_dict(), reference.state_dict())) << rule;
    }
  }
}

TEST(ALFLB, UnfitStateChangesNothing) {
  Net net;
  ALFLB balancer(*net);
  train(net, balancer, 2, 0);
  const c10::IValue good = balancer.state_dict().deepcopy();
  const auto refuse = [&](const auto& change, const std::string& text) {
    const c10::IValue dict = good.deepcopy();
    change(dict.toGenericDict());
    expect_error<c10::Error>([&] { balancer.load_state_dict(dict); }, text);
    EXPECT_TRUE(same_value(balancer.state_dict(), good)) << text;
  };
  using Dict = c10::impl::GenericDict;
  const auto state = [](const Dict& dict) { return dict.at("state").toGenericDict().at(int64_t{0}).toGenericDict(); };
  refuse([&](const Dict& dict) { state(dict).insert_or_assign("last_load", at::zeros({3}, at::kLong)); }, "last_load");
  refuse([&](const Dict& dict) { state(dict).insert("exp_avg", at::zeros({8})); }, "it is of another optimizer");
  refuse([](const Dict& dict) { dict.at("torch_ext").toGenericDict().insert_or_assign("optimizer", "MFAC"); },
         "is of MFAC, not of ALFLB");
  // Without what later versions may add.
  const c10::IValue older = good.deepcopy();
  for (const char* name : {"updates", "last_load"}) std::ignore = state(older.toGenericDict()).erase(name);
  balancer.load_state_dict(older);
  train(net, balancer, 1, 7);
  const auto& own = static_cast<const ParamState&>(*balancer.state().at(net->first->expert_bias.unsafeGetTensorImpl()));
  EXPECT_EQ(own.at("updates").item<int64_t>(), 3);
}

TEST(ALFLB, MovesWithItsState) {
  Net net;
  auto first = std::make_unique<ALFLB>(*net);
  train(net, *first, 1, 0);
  ALFLB second(std::move(*first));
  first.reset();
  train(net, second, 1, 1);
  EXPECT_EQ(second.state().size(), 2u);
}

// --- a small training -----------------------------------------------------------------------------------------------

struct DigitsImpl : torch::nn::Module {  // 64 - 32 - mixture of 16 experts, 2 per row - 10
  DigitsImpl() {
    torch::manual_seed(0);
    inner = register_module("inner", torch::nn::Linear(64, 32));
    outer = register_module("outer", torch::nn::Linear(32, 10));
    experts = register_module("experts", moe::MoELayer(moe::MoELayerOptions(32, 16, 16)));
  }
  at::Tensor hidden(const at::Tensor& x) { return torch::tanh(inner(x)); }
  at::Tensor forward(const at::Tensor& x) {
    const at::Tensor h = hidden(x);
    return outer(h + experts(h));
  }
  torch::nn::Linear inner{nullptr}, outer{nullptr};
  moe::MoELayer experts{nullptr};
};
TORCH_MODULE(Digits);

// examples/data/digits.csv: 64 features in [0, 16] and the label.
std::pair<at::Tensor, at::Tensor> read_digits() {
  std::ifstream file(std::string(TORCH_EXT_TEST_DATA_DIR) + "/../examples/data/digits.csv");
  std::vector<float> values;
  std::string line, field;
  std::getline(file, line);  // header
  while (std::getline(file, line)) {
    std::stringstream fields(line);
    while (std::getline(fields, field, ',')) values.push_back(std::stof(field));
  }
  const at::Tensor table = torch::tensor(values).reshape({-1, 65});
  return {table.slice(1, 0, 64) / 16, table.select(1, 64).to(at::kLong)};
}

TEST(ALFLB, Test13Digits) {
  const auto [x, y] = read_digits();
  ASSERT_EQ(x.size(0), 1797);
  const auto run = [&, images = x, labels = y](bool balanced) {
    Digits net;
    ALFLB balancer(*net, ALFLBOptions(balanced ? 1 : 0).lr_power(0.5).rule("proportional"));  // lr 0 only reads
    torch::optim::AdamW optimizer(net->parameters(), torch::optim::AdamWOptions(3e-3));
    for (int step = 0; step < 300; ++step) {
      const at::Tensor rows = torch::randint(1400, {256}, at::kLong);
      torch::nn::functional::cross_entropy(net->forward(images.index({rows})), labels.index({rows})).backward();
      optimizer.step();
      balancer.step();
      optimizer.zero_grad();
    }
    const torch::NoGradGuard no_grad;
    const at::Tensor test = net->forward(images.slice(0, 1400)).argmax(1).eq(labels.slice(0, 1400));
    const at::Tensor load = net->experts->router->forward(net->hidden(images.slice(0, 0, 1400))).counts;
    return std::pair{load_report(load, net->experts->router->expert_bias, 2),
                     test.to(at::kDouble).mean().item<double>()};
  };
  const auto [balanced, accuracy] = run(true);
  EXPECT_LT(balanced.max_vio, 0.25);
  EXPECT_EQ(balanced.dead, 0);
  EXPECT_GT(accuracy, 0.85);  // the rows are in the file's order: the last writers are others than the first
  EXPECT_GT(run(false).first.max_vio, 0.8);
}

// --- tests/optim_db.json --------------------------------------------------------------------------------------------

TEST(ALFLB, FollowsTheTrajectoriesOfTheTable) {
  for (const test::Variant& variant : test::variants_of("ALFLB")) {
    const test::ExpertScores problem;
    ALFLBOptions options;
    for (const auto& item : variant.options.toGenericDict()) options.set(item.key().toStringRef(), item.value());
    ALFLB balancer(problem.biases, options);
    const auto trajectory = variant.row.at("trajectory").toGenericDict();
    const auto iterations = trajectory.at("iterations").toListRef(), losses = trajectory.at("loss").toListRef();
    const double rtol = variant.row.at("rtol").toDouble();
    size_t sample = 0;
    for (int64_t i = 0; sample < iterations.size(); ++i) {
      const auto ids = problem.ids();
      for (size_t layer = 0; layer < ids.size(); ++layer) balancer.record(layer, ids[layer]);
      const double loss = balancer.step([&] { return problem.loss(); }).item<double>();
      if (i != iterations[sample].toInt()) continue;
      EXPECT_NEAR(loss, losses[sample].toDouble(), rtol * std::abs(loss)) << variant.name << ", iteration " << i;
      for (size_t k = 0; k < problem.biases.size(); ++k) {
        std::vector<double> values;
        const auto all = trajectory.at("parameters").toGenericDict().at("bias" + std::to_string(k)).toListRef();
        for (const c10::IValue& x : all[sample].toListRef()) values.push_back(x.toDouble());
        const at::Tensor expected = torch::tensor(values, at::kDouble);
        EXPECT_LE(test::relative_error(problem.biases[k].to(at::kDouble), expected), rtol)
            << variant.name << ", iteration " << i;
      }
      ++sample;
    }
  }
}

TEST(ALFLB, RejectsTheBadOptionsOfTheTable) {
  const auto row = test::optim_db().at("ALFLB").toGenericDict();
  for (const c10::IValue& item : row.at("options_bad").toListRef()) {
    const auto pair = item.toListRef();
    expect_error<c10::ValueError>(
        [&] {
          ALFLBOptions options;
          for (const auto& entry : pair[0].toGenericDict()) options.set(entry.key().toStringRef(), entry.value());
        },
        pair[1].toStringRef());
  }
}

TEST(ALFLB, CudaEqualsCpu) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "no GPU on this machine";
  torch::manual_seed(4);
  for (const std::string rule : {"sign", "proportional", "momentum"}) {
    const at::Tensor host = torch::randn({37}), device = host.cuda();
    ALFLB a({host}, ALFLBOptions(0.05).rule(rule)), b({device}, ALFLBOptions(0.05).rule(rule));
    for (int n = 0; n < 5; ++n) {
      const at::Tensor ids = torch::randint(37, {100, 2}, at::kLong);
      a.record(0, ids);
      b.record(0, ids.cuda());
      a.step();
      b.step();
    }
    EXPECT_TRUE(equal_bits(host, device)) << rule;
  }
}

}  // namespace
}  // namespace torch_ext::optim

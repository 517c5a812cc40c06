// CPU and CUDA give the same bits. Skips, saying so, without a GPU.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/ops/philox4x32.h>
#include <torch_ext/ops/rademacher.h>
#include <torch_ext/optim/adahessian.h>

#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "core/list_ops.h"
#include "support/check.h"
#include "support/problems.h"

namespace torch_ext {
namespace {

using optim::AdaHessian;
using optim::AdaHessianInputs;
using optim::AdaHessianOptions;
using test::clones;
using test::equal_bits;
using test::Problem;
using test::quartic;
using test::same_bits;
using test::same_value;

std::string why_not() {
  if (TORCH_EXT_WITH_CUDA == 0) return "torch_ext was built without CUDA";
  return torch::cuda::is_available() ? "" : "no GPU is visible";
}

#define TORCH_EXT_NEED_GPU() \
  if (const std::string reason = why_not(); !reason.empty()) GTEST_SKIP() << reason

const std::vector<at::ScalarType>& dtypes() {
  static const std::vector<at::ScalarType> all{at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};
  return all;
}

struct Setting {
  std::string name;
  AdaHessianOptions options;
};

std::vector<Setting> settings() {
  return {
      {"none", AdaHessianOptions(0.1).average_conv(false)},
      {"row and convolution", AdaHessianOptions(0.1).linear_averaging("row").weight_decay(0.01)},
      {"block, signed mean", AdaHessianOptions(0.1).linear_averaging("block").block_size(20).averaging("signed_mean")},
      {"power 0.5", AdaHessianOptions(0.1).hessian_power(0.5)},
      {"power 0.7, lazy", AdaHessianOptions(0.1).hessian_power(0.7).update_each(3).max_update(0.3)},
      {"power 0, ascent", AdaHessianOptions(0.01).hessian_power(0).maximize(true)}};
}

const std::vector<std::vector<int64_t>>& shapes() {
  static const std::vector<std::vector<int64_t>> all{
      {},      {0},         {1},        {7},          {33},       {1000},         {200000},
      {3, 20}, {300, 1060}, {2, 70000}, {8, 4, 3, 3}, {5, 3, 40}, {2, 3, 4, 5, 6}};
  return all;
}

Problem on_gpu(const Problem& problem) {
  std::vector<at::Tensor> leaves;
  for (const auto& param : problem.params) leaves.push_back(param.detach().to(at::kCUDA).requires_grad_());
  return problem.with(leaves);
}

// Gradients and Hessian diagonals are given, so only the fused step is compared.
TEST(AdaHessianCuda, EqualsTheCpuAfter100Steps) {
  TORCH_EXT_NEED_GPU();
  for (const auto dtype : dtypes()) {
    for (const Setting& setting : settings()) {
      const Problem cpu = quartic(shapes(), dtype), gpu = on_gpu(cpu);
      AdaHessian a(cpu.params, setting.options), b(gpu.params, setting.options);
      torch::manual_seed(0);
      for (int i = 0; i < 100; ++i) {
        AdaHessianInputs x, y;
        for (size_t k = 0; k < cpu.params.size(); ++k) {
          // New random numbers now and then: making them costs more than the step.
          if (i % 10 == 0) cpu.params[k].mutable_grad() = torch::randn(cpu.params[k].sizes(), dtype);
          if (i % 10 == 0) gpu.params[k].mutable_grad() = cpu.params[k].grad().to(at::kCUDA);
          const at::Tensor diagonal = cpu.params[k].grad() * (1 + i % 3);
          x.hessian.push_back(diagonal);
          y.hessian.push_back(diagonal.to(at::kCUDA));
        }
        a.step(x);
        b.step(y);
      }
      EXPECT_TRUE(equal_bits(gpu.params, cpu.params)) << setting.name << ", " << dtype;
    }
  }
}

// The whole iteration with its probes, on a problem whose derivatives are elementwise.
TEST(AdaHessianCuda, EqualsTheCpuWithItsOwnCurvature) {
  TORCH_EXT_NEED_GPU();
  for (const auto dtype : dtypes()) {
    for (const Setting& setting : settings()) {
      const Problem cpu = quartic(shapes(), dtype), gpu = on_gpu(cpu);
      AdaHessian a(cpu.params, setting.options), b(gpu.params, setting.options);
      for (int i = 0; i < 10; ++i) {
        a.step(cpu.closure());
        b.step(gpu.closure());
      }
      EXPECT_TRUE(equal_bits(gpu.params, cpu.params)) << setting.name << ", " << dtype;
    }
  }
}

TEST(AdaHessianCuda, DevicesMayBeMixed) {
  TORCH_EXT_NEED_GPU();
  const Problem cpu = quartic({{5}, {300, 300}, {7}}), all = cpu.copy(), gpu = on_gpu(all);
  const Problem mixed = all.with({all.params[0], gpu.params[1], all.params[2]});
  const auto loss = [&] {
    at::Tensor total = torch::zeros({}, at::kDouble);
    for (const auto& p : mixed.params) total = total + mixed.loss({p}).cpu();
    return total;
  };
  AdaHessian a(cpu.params), b(mixed.params);
  for (int i = 0; i < 5; ++i) {
    a.step(cpu.closure());
    b.step(loss);
  }
  EXPECT_TRUE(equal_bits(mixed.params, cpu.params));
}

TEST(AdaHessianCuda, LayoutsGiveTheContiguousResult) {
  TORCH_EXT_NEED_GPU();
  const Problem plain = on_gpu(quartic({{40, 60}, {8, 6, 3, 3}}, at::kFloat));
  const Problem other =
      plain.with({plain.params[0].detach().t().contiguous().t().requires_grad_(),
                  plain.params[1].detach().contiguous(at::MemoryFormat::ChannelsLast).clone().requires_grad_()});
  AdaHessian a(plain.params), b(other.params);
  for (int i = 0; i < 3; ++i) {
    a.step(plain.closure());
    b.step(other.closure());
  }
  EXPECT_TRUE(equal_bits(other.params, plain.params));
}

TEST(AdaHessianCuda, NonfiniteStepChangesNothing) {
  TORCH_EXT_NEED_GPU();
  const Problem p = on_gpu(quartic({{5}, {300, 300}}, at::kFloat));
  AdaHessian optimizer(p.params);
  optimizer.step(p.closure());
  const auto before = clones(p.params);
  const at::Tensor second =
      static_cast<const optim::ParamState&>(*optimizer.state().at(p.params[0].unsafeGetTensorImpl()))
          .at("exp_avg")
          .clone();
  for (const double bad : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    optimizer.step([&] { return p.loss(p.params) + (p.params[1] * bad).sum(); });
  }
  EXPECT_TRUE(equal_bits(p.params, before));
  EXPECT_TRUE(optimizer.skipped_steps().is_cuda());
  EXPECT_EQ(optimizer.skipped_steps().item<int64_t>(), 2);
  const auto& state = static_cast<const optim::ParamState&>(*optimizer.state().at(p.params[0].unsafeGetTensorImpl()));
  EXPECT_TRUE(same_bits(state.at("exp_avg"), second));
  EXPECT_EQ(state.at("step").item<float>(), 1);
  optimizer.step(p.closure());
  EXPECT_FALSE(same_bits(p.params[0], before[0]));
}

TEST(AdaHessianCuda, StateDictRoundTripsBetweenDevices) {
  TORCH_EXT_NEED_GPU();
  const Problem cpu = quartic({{5}, {30, 20}}, at::kBFloat16), gpu = on_gpu(cpu);
  AdaHessian a(cpu.params), b(gpu.params);
  for (int i = 0; i < 3; ++i) {
    a.step(cpu.closure());
    b.step(gpu.closure());
  }
  const test::TemporaryFile file;
  b.save_state_dict(file.path());
  std::stringstream archive;
  torch::save(b, archive);

  const Problem back =
      gpu.with({gpu.params[0].detach().cpu().requires_grad_(), gpu.params[1].detach().cpu().requires_grad_()});
  AdaHessian on_cpu(back.params);
  on_cpu.load_state_dict(file.path());
  EXPECT_TRUE(same_value(on_cpu.state_dict(), a.state_dict()));
  const Problem again = on_gpu(cpu);
  AdaHessian resumed(again.params);
  torch::load(resumed, archive);
  for (const auto& item : resumed.state()) {
    for (const auto& [name, tensor] : static_cast<const optim::ParamState&>(*item.second).tensors) {
      EXPECT_EQ(tensor.is_cuda(), name != "global_calls") << name;
    }
  }
  for (int i = 0; i < 3; ++i) {
    a.step(cpu.closure());
    on_cpu.step(back.closure());
    resumed.step(again.closure());
  }
  EXPECT_TRUE(equal_bits(back.params, cpu.params));
  EXPECT_TRUE(equal_bits(again.params, cpu.params));
}

TEST(AdaHessianCuda, StateFollowsTheParameter) {
  TORCH_EXT_NEED_GPU();
  const Problem p = quartic({{5}, {30, 20}}), reference = p.copy();
  AdaHessian optimizer(p.params), straight(reference.params);
  optimizer.step(p.closure());
  for (const auto& param : p.params) param.set_data(param.detach().to(at::kCUDA));
  optimizer.zero_grad();
  optimizer.step(p.closure());
  for (int i = 0; i < 2; ++i) straight.step(reference.closure());
  EXPECT_TRUE(p.params[0].is_cuda());
  EXPECT_TRUE(equal_bits(p.params, reference.params));
}

TEST(OpsCuda, Rademacher) {
  TORCH_EXT_NEED_GPU();
  for (const auto dtype : dtypes()) {
    for (const int64_t size : {0, 1, 31, 32, 127, 128, 129, 65536, 200000}) {
      const auto options = at::TensorOptions().dtype(dtype);
      EXPECT_TRUE(equal_bits(ops::rademacher_(torch::empty({size}, options.device(at::kCUDA)), -5, 2, 3, 4),
                             ops::rademacher_(torch::empty({size}, options), -5, 2, 3, 4)))
          << size << ", " << dtype;
    }
  }
  std::vector<at::Tensor> cpu, gpu;
  std::vector<int64_t> ordinals;
  for (int64_t i = 0; i < 300; ++i) {
    cpu.push_back(torch::empty({i}));
    gpu.push_back(torch::empty({i}, at::kCUDA));
    ordinals.push_back(i);
  }
  EXPECT_TRUE(equal_bits(ops::rademacher_probe(gpu, ordinals, 9, 1, 2), ops::rademacher_probe(cpu, ordinals, 9, 1, 2)));
}

TEST(OpsCuda, Philox) {
  TORCH_EXT_NEED_GPU();
  torch::manual_seed(0);
  const at::Tensor counter = torch::randint(int64_t{1} << 32, {1000, 4}),
                   key = torch::randint(int64_t{1} << 32, {1000, 2});
  EXPECT_TRUE(equal_bits(ops::philox4x32(counter.to(at::kCUDA), key.to(at::kCUDA)), ops::philox4x32(counter, key)));
}

TEST(OpsCuda, Accumulate) {
  TORCH_EXT_NEED_GPU();
  torch::manual_seed(0);
  for (const auto dtype : dtypes()) {
    std::vector<at::Tensor> sums, x, signs, gpu_sums, gpu_x, gpu_signs;
    for (const int64_t size : {0, 1, 67, 1000, 200000}) {
      x.push_back(torch::randn({size}).to(dtype));
      signs.push_back(ops::rademacher_(torch::empty_like(x.back()), 0, 0));
      sums.push_back(torch::randn({size}).to(dtype == at::kDouble ? at::kDouble : at::kFloat));
      gpu_x.push_back(x.back().to(at::kCUDA));
      gpu_signs.push_back(signs.back().to(at::kCUDA));
      gpu_sums.push_back(sums.back().to(at::kCUDA));
    }
    for (int i = 0; i < 3; ++i) {
      core::accumulate_(sums, x, signs, 0.3);
      core::accumulate_(gpu_sums, gpu_x, gpu_signs, 0.3);
      core::accumulate_(sums, x, {}, -0.7);
      core::accumulate_(gpu_sums, gpu_x, {}, -0.7);
    }
    EXPECT_TRUE(equal_bits(gpu_sums, sums)) << dtype;
  }
}

TEST(OpsCuda, CountNonfinite) {
  TORCH_EXT_NEED_GPU();
  for (const auto dtype : dtypes()) {
    std::vector<at::Tensor> tensors;
    for (const int64_t size : {0, 5, 200000})
      tensors.push_back(torch::ones({size}, at::TensorOptions(at::kCUDA).dtype(dtype)));
    const at::Tensor skipped = torch::zeros({}, at::TensorOptions(at::kCUDA).dtype(at::kLong));
    EXPECT_EQ(core::count_nonfinite_(tensors, std::nullopt, skipped).item<float>(), 0);
    for (const double bad : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
      for (const int64_t at : {0, 70000, 199999}) {
        tensors[2][at] = bad;
        EXPECT_EQ(core::count_nonfinite_(tensors, std::nullopt, skipped).item<float>(), 1);
        tensors[2][at] = 1;
      }
    }
    EXPECT_EQ(core::count_nonfinite_(tensors, torch::ones({}, at::kCUDA), skipped).item<float>(), 1);
    EXPECT_EQ(skipped.item<int64_t>(), 7);
    tensors.push_back(torch::full({3}, std::numeric_limits<double>::quiet_NaN()));  // on the CPU
    EXPECT_EQ(core::count_nonfinite_(tensors, std::nullopt, skipped).item<float>(), 1);
  }
}

}  // namespace
}  // namespace torch_ext

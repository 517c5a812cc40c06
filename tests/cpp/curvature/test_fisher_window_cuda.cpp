// The Fisher window on CUDA: rows, products and Gram matrix have the CPU's bits; what the inverse gives is close to
// what the Cholesky factor gives. Skips, saying so, without a GPU.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/curvature/fisher_window.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "curvature/fisher_window/fisher_window_op.h"
#include "optim/mfac/mfac_op.h"
#include "support/check.h"

namespace torch_ext::curvature {
namespace {

using test::equal_bits;
using test::relative_error;

std::string why_not() {
  if (TORCH_EXT_WITH_CUDA == 0) return "torch_ext was built without CUDA";
  return torch::cuda::is_available() ? "" : "no GPU is visible";
}

#define TORCH_EXT_NEED_GPU() \
  if (const std::string reason = why_not(); !reason.empty()) GTEST_SKIP() << reason

const std::vector<std::string> kFormats{"float32", "float64", "bfloat16", "int8", "topk"};

FisherWindow::Extra on_gpu(bool feedback = false) {
  FisherWindow::Extra extra;
  extra.device = at::kCUDA;
  extra.error_feedback = feedback;
  return extra;
}

bool loses(const std::string& format) { return format != "float32" && format != "float64"; }

// m = 40 leaves several slots to a warp, 5000 columns five tiles, 70 tiles two per partial sum.
TEST(FisherWindowCuda, RowsAndProductsHaveTheCpusBits) {
  TORCH_EXT_NEED_GPU();
  for (const auto& format : kFormats) {
    for (const int64_t dim : {int64_t{1}, int64_t{1024}, int64_t{5000}, int64_t{70 * 1024 + 1}}) {
      FisherWindow::Extra here;
      here.error_feedback = loses(format);
      FisherWindow cpu(40, dim, 1e-2, format, here), gpu(40, dim, 1e-2, format, on_gpu(loses(format)));
      torch::manual_seed(0);
      for (int i = 0; i < 50; ++i) {
        at::Tensor row = torch::randn({dim});
        if (i % 9 == 3) row[dim / 2] = std::numeric_limits<float>::quiet_NaN();
        cpu.push(row);
        gpu.push(row.to(at::kCUDA));
      }
      EXPECT_EQ(gpu.rejected(), cpu.rejected());
      EXPECT_TRUE(equal_bits(gpu.gram(), cpu.gram())) << format << ' ' << dim;
      for (const char* name : {"rows", "scales", "indices", "error"}) {
        EXPECT_TRUE(equal_bits(gpu.state().at(name), cpu.state().at(name))) << format << ' ' << dim << ' ' << name;
      }
      EXPECT_LE(relative_error(gpu.solve_newest(), cpu.solve_newest()), 1e-6);
      const at::Tensor x = torch::randn({dim});
      EXPECT_LE(relative_error(gpu.ihvp(x.to(at::kCUDA)), cpu.ihvp(x)), 1e-6);
    }
  }
}

// Given the same coefficients, the second pass and the update of the parameters have the CPU's bits too.
TEST(FisherWindowCuda, UpdatesHaveTheCpusBits) {
  TORCH_EXT_NEED_GPU();
  for (const auto& format : kFormats) {
    for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
      FisherWindow cpu(6, 5000, 1e-2, format), gpu(6, 5000, 1e-2, format, on_gpu());
      torch::manual_seed(0);
      for (int i = 0; i < 9; ++i) {
        const at::Tensor row = torch::randn({5000});
        cpu.push(row);
        gpu.push(row);
      }
      const at::Tensor coefficients = torch::randn({7}, at::kDouble);
      std::vector<std::vector<at::Tensor>> results;
      for (FisherWindow* window : {&cpu, &gpu}) {
        auto s = window->state();
        const at::Device device = s.at("rows").device();
        const at::Tensor c = coefficients.to(device);
        torch::manual_seed(1);
        std::vector<at::Tensor> params, buffers, steps;
        c10::List<std::optional<at::Tensor>> grads;
        for (const int64_t size : {1, 0, 2000, 1024, 700}) {
          params.push_back(torch::randn({size}).to(device, dtype));
          buffers.push_back(
              torch::zeros({size}, params.back().options().dtype(dtype == at::kDouble ? at::kDouble : at::kFloat)));
          steps.push_back(torch::zeros({}, at::TensorOptions(device)));
          grads.push_back(size == 1024 ? std::optional<at::Tensor>() : params.back());
        }
        const std::vector<double> lr(5, 0.1), momentum{0.9, 0.9, 0.9, 0.9, 0.0}, dampening(5, 0.5), decay(5, 0.01);
        for (int i = 0; i < 2; ++i) {
          optim::mfac_update_(params, buffers, steps, grads, s.at("rows"), s.at("scales"), s.at("indices"), c,
                              s.at("ring"), std::nullopt, format, lr, momentum, dampening, decay);
        }
        optim::mfac_update_(params, buffers, steps, grads, s.at("rows"), s.at("scales"), s.at("indices"), c,
                            s.at("ring"), torch::arange(5000, at::TensorOptions(device).dtype(at::kFloat)), format, lr,
                            momentum, dampening, decay);
        auto all = params;
        all.insert(all.end(), buffers.begin(), buffers.end());
        all.insert(all.end(), steps.begin(), steps.end());
        all.push_back(
            fisher_window_combine(s.at("rows"), s.at("scales"), s.at("indices"), c, s.at("ring"), 5000, format));
        all.push_back(optim::mfac_flatten(grads, params, decay, true, std::nullopt, 4096, format));
        results.push_back(all);
      }
      EXPECT_TRUE(equal_bits(results[1], results[0])) << format << ' ' << dtype;
    }
  }
}

// Test 3 on the device: long runs, u against a fresh factorization.
TEST(FisherWindowCuda, Spec03SlidingWindow) {
  TORCH_EXT_NEED_GPU();
  constexpr int64_t kSteps = 2000, m = 64;
  torch::manual_seed(0);
  const at::Tensor base = torch::randn({1, 400}, at::kDouble);
  const at::Tensor rows = (std::sqrt(0.99) * base + 0.1 * torch::randn({kSteps, 400}, at::kDouble)).to(at::kCUDA);
  FisherWindow window(m, 400, 1e-6, "float64", on_gpu());
  for (int64_t t = 0; t < kSteps; ++t) {
    window.push(rows[t]);
    if (t % 100 != 99) continue;
    const at::Tensor g = rows.slice(0, std::max<int64_t>(0, t + 1 - m), t + 1).cpu();
    const at::Tensor k = g.matmul(g.t()) + static_cast<double>(m) * 1e-6 * torch::eye(g.size(0), at::kDouble);
    const at::Tensor e = torch::zeros({g.size(0), 1}, at::kDouble);
    e[-1] = static_cast<double>(m);
    const at::Tensor u = g.t().matmul(at::cholesky_solve(e, at::linalg_cholesky(k))).squeeze(1);
    EXPECT_LE(((window.solve_newest().cpu() - u).norm() / u.norm()).item<double>(), 1e-11) << t;
  }
}

// The device form gives the bits of the same algorithm on one CPU thread (tests/cpp/.../test_fisher_window_kernel.cpp
// tests that one), so a window of any size is checked by its residual.
TEST(FisherWindowCuda, LargeWindowsSolveTheirSystem) {
  TORCH_EXT_NEED_GPU();
  torch::manual_seed(0);
  FisherWindow window(1024, 3000, 1e-4, "float32", on_gpu());
  for (int i = 0; i < 1500; ++i) window.push(torch::randn({3000}, at::kCUDA));
  const auto s = window.state();
  const at::Tensor p = fisher_window_solve_(s.at("gram"), s.at("factor"), s.at("ring"), std::nullopt, 1e-4) / 1024;
  at::Tensor k = s.at("gram").clone();
  const int64_t spare = s.at("ring")[1].item<int64_t>();
  k.select(0, spare).zero_();
  k.select(1, spare).zero_();
  at::Tensor residual = k.mv(p) + 1024 * 1e-4 * p;
  residual[(spare + 1024) % 1025] -= 1;
  EXPECT_LE(residual.abs().max().item<double>(), 1e-8);
}

TEST(FisherWindowCuda, MovesBetweenDevices) {
  TORCH_EXT_NEED_GPU();
  torch::manual_seed(0);
  FisherWindow a(5, 2000, 1e-2), b(5, 2000, 1e-2);
  for (int i = 0; i < 20; ++i) {
    const at::Tensor row = torch::randn({2000});
    a.push(row);
    b.push(row);
    if (i % 4 == 3) b.to(i % 8 == 3 ? at::kCUDA : at::kCPU);
    EXPECT_LE(relative_error(b.solve_newest(), a.solve_newest()), 1e-6);
  }
}

}  // namespace
}  // namespace torch_ext::curvature

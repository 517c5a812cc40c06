// The Fisher window of M-FAC (arXiv:2107.03356). SpecNN names the numbered acceptance test; the kernels' own tests are
// in test_fisher_window_kernel.cpp.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/curvature/fisher_window.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "curvature/fisher_window/fisher_window_op.h"
#include "support/check.h"

namespace torch_ext::curvature {
namespace {

using test::equal_bits;
using test::expect_error;
using test::same_bits;
using test::ThreadCount;

constexpr double kEps = std::numeric_limits<double>::epsilon();
const std::vector<std::string> kFormats{"float32", "float64", "bfloat16", "int8", "topk"};

at::Tensor randn(at::IntArrayRef shape, int64_t seed = 0) {
  torch::manual_seed(static_cast<uint64_t>(seed));
  return torch::randn(shape, at::kDouble);
}

double error(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor wide = b.to(at::kDouble);
  return ((a.to(at::kDouble) - wide).norm() / wide.norm()).item<double>();
}

at::Tensor identity(int64_t n) { return torch::eye(n, at::kDouble); }

// F of the rows, with 1/m.
at::Tensor dense_fisher(const at::Tensor& rows, double damping, int64_t m) {
  return damping * identity(rows.size(1)) + torch::matmul(rows.t(), rows) / static_cast<double>(m);
}
at::Tensor damped_gram(const at::Tensor& rows, double damping, int64_t m) {
  return static_cast<double>(m) * damping * identity(rows.size(0)) + torch::matmul(rows, rows.t());
}
double condition(const at::Tensor& a) {
  const at::Tensor values = at::linalg_eigvalsh(a);
  return (values[-1] / values[0]).item<double>();
}
// m G^T K^-1 e_t with a factorization from scratch.
at::Tensor fresh(const at::Tensor& rows, double damping, int64_t m) {
  const at::Tensor factor = at::linalg_cholesky(damped_gram(rows, damping, m));
  const at::Tensor e = torch::zeros({rows.size(0), 1}, at::kDouble);
  e[-1] = static_cast<double>(m);
  return torch::matmul(rows.t(), at::cholesky_solve(e, factor)).squeeze(1);
}

FisherWindow filled(const at::Tensor& rows, double damping, const std::string& format = "float64") {
  FisherWindow window(rows.size(0), rows.size(1), damping, format);
  for (int64_t i = 0; i < rows.size(0); ++i) window.push(rows[i]);
  return window;
}

// The operators with the arguments that FisherWindow does not offer.
struct RawWindow {
  FisherWindowLayout layout;
  FisherWindowState state;
  at::Tensor dots, coefficients;
  double damping;
  bool warmup_scaling = false;
  int64_t warmup_steps = 0, refactor_every = -1;

  RawWindow(int64_t m, int64_t d, double lambda, const std::string& format = "float64") : damping(lambda) {
    layout.num_grads = m;
    layout.dim = d;
    layout.format = format;
    state = fisher_window_state(layout, at::kCPU);
    dots = torch::zeros({m + 1}, at::kDouble);
    coefficients = torch::zeros({m + 1}, at::kDouble);
  }
  void products(const at::Tensor& row) {
    c10::List<std::optional<at::Tensor>> grads;
    grads.push_back(row);
    fisher_window_dots_(state.rows, state.scales, state.indices, state.error, dots, state.ring, grads, {row}, {0.0},
                        false, std::nullopt, layout.format);
  }
  void commit() {
    fisher_window_commit_(state.gram, state.factor, state.ring, coefficients, dots, damping, warmup_scaling,
                          warmup_steps, refactor_every, std::nullopt);
  }
  at::Tensor combine() const {
    return fisher_window_combine(state.rows, state.scales, state.indices, coefficients, state.ring, layout.dim,
                                 layout.format);
  }
  at::Tensor step(const at::Tensor& row) {
    products(row);
    commit();
    return combine();
  }
};

TEST(FisherWindow, Spec01HandCase) {
  for (const std::string format : {"float64", "float32", "bfloat16"}) {
    FisherWindow window(2, 2, 0.5, format);
    window.push(torch::tensor({1.0, 0.0}));
    window.push(torch::tensor({1.0, 1.0}));
    EXPECT_EQ(window.count(), 2);
    EXPECT_TRUE(same_bits(window.gram(), torch::tensor({1.0, 1.0, 1.0, 2.0}, at::kDouble).view({2, 2})));
    const at::Tensor expected = torch::tensor({0.4, 0.8}, at::kDouble);
    const double tolerance = format == "float64" ? 1e-15 : 1e-7;
    EXPECT_LE(error(window.solve_newest(), expected), tolerance) << format;
    EXPECT_LE(error(window.ihvp(torch::tensor({1.0, 1.0})), expected), tolerance) << format;
    EXPECT_EQ(window.solve_newest().scalar_type(), format == "float64" ? at::kDouble : at::kFloat);
  }
}

TEST(FisherWindow, Spec02TwoWaysAndTheDenseSolve) {
  for (const auto& [m, d, damping] :
       {std::tuple<int64_t, int64_t, double>{32, 100, 1e-5}, {32, 20, 1e-3}, {64, 300, 1e-6}}) {
    for (const std::string kind : {"random", "zero rows", "permuted"}) {
      at::Tensor rows = randn({m, d});
      if (kind == "zero rows") rows.slice(0, 0, m - 1, 3).zero_();
      const at::Tensor x = randn({d}, 5), dense = dense_fisher(rows, damping, m);
      const at::Tensor expected = at::linalg_solve(dense, rows[-1]), expected_x = at::linalg_solve(dense, x);
      const double bound = 20 * std::max(condition(dense), condition(damped_gram(rows, damping, m))) * kEps;
      if (kind == "permuted") {
        rows = torch::cat({rows.slice(0, 0, m - 1).index({torch::randperm(m - 1)}), rows.slice(0, m - 1)});
      }
      FisherWindow window = filled(rows, damping);
      EXPECT_LE(error(window.solve_newest(), expected), bound) << kind;
      EXPECT_LE(error(window.ihvp(rows[-1]), expected), bound) << kind;
      EXPECT_LE(error(window.ihvp(x), expected_x), bound) << kind;
    }
  }
}

TEST(FisherWindow, Spec03SlidingWindow) {
  constexpr int64_t kSteps = 2000, m = 64;
  const at::Tensor base = randn({1, 400});
  const at::Tensor decay = torch::logspace(0, -3, kSteps, 10, at::kDouble).unsqueeze(1);
  const std::vector<std::tuple<std::string, double, at::Tensor>> cases{
      {"correlated", 1e-6, std::sqrt(0.99) * base + 0.1 * randn({kSteps, 400}, 1)},
      {"more rows than columns", 1e-3, randn({kSteps, 40})},
      {"decaying", 1e-6, randn({kSteps, 400}) * decay}};
  for (const auto& [name, damping, rows] : cases) {
    for (const int64_t refactor_every : {-1, 0}) {
      RawWindow window(m, rows.size(1), damping);
      window.refactor_every = refactor_every;
      for (int64_t t = 0; t < kSteps; ++t) {
        const at::Tensor u = window.step(rows[t]);
        if (t % 100 == 99) {
          EXPECT_LE(error(u, fresh(rows.slice(0, std::max<int64_t>(0, t + 1 - m), t + 1), damping, m)), 1e-11)
              << name << " at " << t;
        }
      }
    }
  }
}

TEST(FisherWindow, Spec04NoCancellation) {
  at::Tensor rows = randn({1024, 4000});
  rows = (rows * (10 / rows.norm(2, {1}, true))).to(at::kFloat);
  EXPECT_LE(error(filled(rows, 1e-6, "float32").solve_newest(), fresh(rows.to(at::kDouble), 1e-6, 1024)), 1e-5);
}

TEST(FisherWindow, Spec05LowPrecision) {
  const at::Tensor rows =
      (std::sqrt(0.9) * randn({1, 2000}) + std::sqrt(0.1) * randn({64, 2000}, 1)) / std::sqrt(2000.);
  const at::Tensor exact = fresh(rows, 1e-6, 64);
  const std::vector<std::pair<std::string, double>> cases{{"bfloat16", 0.9999}, {"int8", 0.999}};
  for (const auto& [format, least] : cases) {
    const at::Tensor u = filled(rows, 1e-6, format).solve_newest().to(at::kDouble);
    EXPECT_GE(at::cosine_similarity(u, exact, 0).item<double>(), least) << format;
  }
}

TEST(FisherWindow, Spec06ScalingTheRowsScalesTheUpdateExactly) {
  const at::Tensor rows = randn({40, 1500});
  for (const std::string format : {"float64", "float32", "bfloat16", "int8"}) {
    for (const double c : {std::ldexp(1.0, -9), std::ldexp(1.0, 5)}) {
      FisherWindow a = filled(rows, 0.01, format), b = filled(rows * c, 0.01 * c * c, format);
      EXPECT_TRUE(equal_bits(a.solve_newest() / c, b.solve_newest())) << format;
      EXPECT_TRUE(equal_bits(a.gram() * (c * c), b.gram())) << format;
    }
  }
}

TEST(FisherWindow, Spec06PermutingTheColumnsPermutesTheUpdate) {
  const at::Tensor rows = randn({40, 1500}), order = torch::randperm(1500);
  const at::Tensor a = filled(rows, 1e-3).solve_newest(), b = filled(rows.index_select(1, order), 1e-3).solve_newest();
  EXPECT_LE(error(b, a.index_select(0, order)), 1e-12);
}

TEST(FisherWindow, Spec06ColumnsOverSimulatedRanks) {
  constexpr int64_t m = 24, d = 5000;
  const at::Tensor rows = randn({60, d});
  for (const int64_t ranks : {2, 3, 4}) {
    RawWindow whole(m, d, 1e-3);
    std::vector<RawWindow> parts;
    const auto cut = [&](int64_t r) { return r * d / ranks; };
    for (int64_t r = 0; r < ranks; ++r) parts.emplace_back(m, cut(r + 1) - cut(r), 1e-3);
    for (int64_t t = 0; t < rows.size(0); ++t) {
      const at::Tensor expected = whole.step(rows[t]);
      at::Tensor total = torch::zeros({m + 1}, at::kDouble);
      for (int64_t r = 0; r < ranks; ++r) {
        parts[r].products(rows[t].slice(0, cut(r), cut(r + 1)).contiguous());
        total += parts[r].dots;
      }
      std::vector<at::Tensor> pieces;
      for (RawWindow& part : parts) {
        part.dots.copy_(total);
        part.commit();
        pieces.push_back(part.combine());
        EXPECT_TRUE(same_bits(part.coefficients, parts[0].coefficients));
      }
      EXPECT_LE(error(torch::cat(pieces), expected), 1e-12);
    }
  }
}

TEST(FisherWindow, Spec07Limits) {
  const at::Tensor g = randn({3000});
  const double damping = 0.3, norm = g.dot(g).item<double>();
  const at::Tensor expected = g / (damping + norm);
  for (const int64_t copies : {1, 7}) {  // the condition of K where all rows are equal
    EXPECT_LE(error(filled(g.expand({copies, 3000}), damping).solve_newest(), expected),
              20 * (1 + norm / damping) * kEps);
  }
  const at::Tensor rows = randn({5, 3000}, 1);
  for (const double large : {1e6, 1e9}) {
    EXPECT_LE(error(filled(rows, large).solve_newest(), rows[-1] / large),
              rows[-1].dot(rows[-1]).item<double>() / large);
  }
}

TEST(FisherWindow, Spec08WarmupScaling) {
  constexpr int64_t m = 16;
  const at::Tensor rows = randn({40, 300});
  RawWindow scaled(m, 300, 1e-3), plain(m, 300, 1e-3);
  scaled.warmup_scaling = true;
  for (int64_t t = 1; t <= rows.size(0); ++t) {
    const at::Tensor u = scaled.step(rows[t - 1]), v = plain.step(rows[t - 1]);
    if (t < m) {
      const double share = static_cast<double>(m) / static_cast<double>(t);
      const at::Tensor dense = dense_fisher(rows.slice(0, 0, t), 1e-3 * share, t);
      EXPECT_LE(error(u, at::linalg_solve(dense, rows[t - 1])), 1e-12 + 20 * condition(dense) * kEps) << t;
      EXPECT_LE(error(u, fresh(rows.slice(0, 0, t), 1e-3 * share, t)), 1e-12) << t;
    } else {
      EXPECT_TRUE(same_bits(u, v)) << t;
    }
  }
}

TEST(FisherWindow, Spec13ARowThatIsNotFiniteChangesNothing) {
  const at::Tensor rows = randn({12, 1300});
  const double infinity = std::numeric_limits<double>::infinity();
  for (const std::string& format : kFormats) {
    for (const double bad : {std::nan(""), infinity, -infinity}) {
      FisherWindow a(5, 1300, 0.1, format), b(5, 1300, 0.1, format);
      for (int64_t t = 0; t < rows.size(0); ++t) {
        if (t == 0 || t == 3 || t == 8 || t == 9) {
          for (const int64_t column : {0, 700, 1299}) {
            const at::Tensor broken = rows[t].clone();
            broken[column] = bad;
            b.push(broken);
            EXPECT_EQ(b.count(), a.count());
          }
        }
        a.push(rows[t]);
        b.push(rows[t]);
        EXPECT_TRUE(equal_bits(a.gram(), b.gram())) << format;
        EXPECT_TRUE(equal_bits(a.solve_newest(), b.solve_newest())) << format;
        EXPECT_TRUE(equal_bits(a.ihvp(rows[0]), b.ihvp(rows[0]))) << format;
      }
    }
  }
}

TEST(FisherWindow, Spec13ThreadCountsGiveTheSameBits) {
  const at::Tensor rows = randn({12, 150000}).to(at::kFloat);
  for (const std::string& format : kFormats) {
    std::vector<at::Tensor> first;
    for (const int threads : {1, 2, 3}) {
      const ThreadCount guard(threads);
      FisherWindow window(8, rows.size(1), 0.01, format);
      for (int64_t t = 0; t < rows.size(0); ++t) window.push(rows[t]);
      const std::vector<at::Tensor> result{window.gram(), window.solve_newest(), window.ihvp(rows[0])};
      if (first.empty()) first = result;
      EXPECT_TRUE(equal_bits(result, first)) << format << ", " << threads << " threads";
    }
  }
}

TEST(FisherWindow, RowsOfAnyTypeAndLayout) {
  const at::Tensor wide = randn({6, 2201});
  for (const std::string& format : kFormats) {
    for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
      FisherWindow a(4, 1100, 0.1, format), b(4, 1100, 0.1, format);
      for (int64_t t = 0; t < 6; ++t) {
        const at::Tensor row = wide[t].slice(0, 1, 2201, 2).to(type);
        const at::Tensor strided = torch::zeros({2201}, type).slice(0, 1, 2201, 2);
        strided.copy_(row);
        a.push(strided);
        b.push(row.to(at::kDouble));
      }
      EXPECT_TRUE(equal_bits(a.solve_newest(), b.solve_newest())) << format;
    }
  }
}

TEST(FisherWindow, Bug1AnyNumberOfRowsOnTheCpu) {  // the published code: a GPU, m <= 1024 and a multiple of 32
  for (const int64_t m : {1, 2, 31, 33, 100, 1025}) {
    const at::Tensor rows = randn({std::min<int64_t>(m, 40), 60});
    FisherWindow window(m, 60, 0.1, "float64");
    for (int64_t t = 0; t < rows.size(0); ++t) window.push(rows[t]);
    EXPECT_LE(error(window.solve_newest(), at::linalg_solve(dense_fisher(rows, 0.1, m), rows[-1])), 1e-11) << m;
  }
}

TEST(FisherWindow, Bug3TheFactorIsUpdatedNotMadeAnew) {  // the published code factorizes at every step
  constexpr int64_t m = 16;
  const at::Tensor rows = randn({400, 50});
  RawWindow window(m, 50, 0.1);
  for (int64_t t = 0; t < rows.size(0); ++t) window.step(rows[t]);
  const int64_t refactors = window.state.ring[7].item<int64_t>();
  EXPECT_LE(refactors, 1 + rows.size(0) / (16 * m));
  EXPECT_GE(refactors, 1);  // but now and then it is, so that nothing can drift
}

TEST(FisherWindow, Spec13StateOfAnotherDamping) {
  const at::Tensor rows = randn({9, 20});
  FisherWindow source(4, 20, 0.1, "float64"), equal(4, 20, 0.1, "float64"), fresh(4, 20, 0.9, "float64");
  FisherWindow window(4, 20, 0.9, "float64");
  for (int64_t t = 0; t < 9; ++t) {
    source.push(rows[t]);
    fresh.push(rows[t]);
  }
  equal.load_state(source.state());
  EXPECT_TRUE(equal_bits(equal.solve_newest(), source.solve_newest()));
  window.load_state(source.state());
  EXPECT_LE(error(window.solve_newest(), fresh.solve_newest()), 1e-13);
  FisherWindow other(4, 21, 0.1, "float64"), narrow(4, 20, 0.1, "float32"), longer(5, 20, 0.1, "float64");
  for (FisherWindow* refuses : {&other, &narrow, &longer}) {
    expect_error<c10::ValueError>([&] { refuses->load_state(source.state()); }, "FisherWindow");
    EXPECT_EQ(refuses->count(), 0);
  }
}

TEST(FisherWindow, BadInput) {
  expect_error<c10::ValueError>([] { FisherWindow(0, 3, 0.1); }, "num_grads");
  expect_error<c10::ValueError>([] { FisherWindow(4, 0, 0.1); }, "dim");
  expect_error<c10::ValueError>([] { FisherWindow(4, 3, 0.0); }, "damping");
  expect_error<c10::ValueError>([] { FisherWindow(4, 3, std::nan("")); }, "damping");
  expect_error<c10::ValueError>([] { FisherWindow(4, 3, 0.1, "fp8"); }, "window_format");
  expect_error<c10::ValueError>([] { FisherWindow(1024, 1000000000000, 0.1); }, "num_grads");
  FisherWindow window(4, 3, 0.1);
  expect_error<c10::Error>([&] { window.push(torch::ones({4})); }, "3");
  expect_error<c10::Error>([&] { window.push(torch::ones({3}, at::kComplexFloat)); }, "complex");
  expect_error<c10::Error>([&] { window.solve_newest(); }, "row");
}

}  // namespace
}  // namespace torch_ext::curvature

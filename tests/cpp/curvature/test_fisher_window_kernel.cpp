// The kernels of the Fisher window against plain loops in double: encoding, both passes, the two forms of the m x m
// part.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "curvature/fisher_window/fisher_window_encode.h"
#include "curvature/fisher_window/fisher_window_kernel.h"
#include "optim/mfac/mfac_kernel.h"

namespace torch_ext::kernels {
namespace {

using core::DType;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
const std::vector<WindowFormat> kFormats{WindowFormat::kFloat, WindowFormat::kDouble, WindowFormat::kBFloat16,
                                         WindowFormat::kInt8, WindowFormat::kTopK};

// Memory of a window, and what its rows mean.
struct Window {
  int64_t m, dim, tiles, kept;
  WindowFormat format;
  std::vector<char> rows;
  std::vector<float> scales, error;
  std::vector<int16_t> indices;
  std::vector<double> gram, factor, dots, coefficients;
  std::vector<int64_t> ring = std::vector<int64_t>(kRingSize, 0);
  int64_t pad = 5;

  Window(int64_t num_grads, int64_t columns, WindowFormat stored, bool feedback = false, int64_t kept_of_tile = 11)
      : m(num_grads),
        dim(columns),
        tiles((columns + kTile - 1) / kTile),
        kept(stored == WindowFormat::kTopK ? kept_of_tile : kTile),
        format(stored) {
    const size_t places = static_cast<size_t>(tiles * (m + 1));
    const size_t size = format == WindowFormat::kDouble ? 8 : format == WindowFormat::kFloat ? 4 : 2;
    rows.resize(places * static_cast<size_t>(kept) * size);
    scales.resize(places * kScales);
    indices.resize(format == WindowFormat::kTopK ? places * static_cast<size_t>(kept) : 0);
    error.resize(feedback ? static_cast<size_t>(2 * tiles * kTile) : 0);
    gram.resize(static_cast<size_t>((m + 1) * (m + 1)));
    factor.resize(static_cast<size_t>((m + pad) * (m + pad)));
    dots.resize(static_cast<size_t>(m + 1));
    coefficients.resize(static_cast<size_t>(m + 1));
  }
  WindowView view() {
    return {rows.data(), scales.data(), indices.data(), error.empty() ? nullptr : error.data(), ring.data(), tiles,
            m + 1,       kept,          format};
  }
  CommitTensors tensors() {
    return {gram.data(), factor.data(), ring.data(), coefficients.data(), dots.data(), nullptr};
  }
  CommitArgs args(double damping) const { return {damping, m + 1, m + pad, 0, -1, false}; }

  // What `slot` holds at `column`.
  double element(int64_t slot, int64_t column) const {
    const int64_t place = column / kTile * (m + 1) + slot, inside = column % kTile, at = place * kTile + inside;
    switch (format) {
      case WindowFormat::kFloat:
        return reinterpret_cast<const float*>(rows.data())[at];
      case WindowFormat::kDouble:
        return reinterpret_cast<const double*>(rows.data())[at];
      case WindowFormat::kBFloat16:
        return core::load(reinterpret_cast<const core::BFloat16*>(rows.data())[at]);
      case WindowFormat::kInt8:
        return static_cast<double>(reinterpret_cast<const int8_t*>(rows.data())[at]) *
               static_cast<double>(scales[static_cast<size_t>(place * kScales + inside / kScaleBlock)]);
      case WindowFormat::kTopK:
        for (int64_t i = place * kept; i < (place + 1) * kept; ++i) {
          if (indices[static_cast<size_t>(i)] == inside) {
            return core::load(reinterpret_cast<const core::BFloat16*>(rows.data())[i]);
          }
        }
    }
    return 0;
  }
  void products(const std::vector<float>& row, double factor = 1) {
    const std::vector<RowSegment> segments{{row.data(), nullptr, 0, 0, dim, DType::kFloat, DType::kFloat}};
    const int64_t groups = (tiles + tiles_per_group(tiles) - 1) / tiles_per_group(tiles);
    std::vector<double> partial(static_cast<size_t>(groups * (m + 1)), 0.0);
    for (int64_t g = 0; g < groups; ++g) window_dots_cpu(view(), segments, factor, g, partial.data() + g * (m + 1));
    window_fold_cpu(partial.data(), groups, m + 1, dots.data());
  }
  void push(const std::vector<float>& row, double damping = 0.1) {
    products(row);
    window_commit_cpu(tensors(), args(damping));
  }
  std::vector<int64_t> live() const {
    std::vector<int64_t> slots;
    for (int64_t a = 0; a < ring[kRingCount]; ++a)
      slots.push_back(slot_of_age(a, ring[kRingCount], ring[kRingNext], m + 1));
    return slots;
  }
};

std::vector<float> normal_row(int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> row(static_cast<size_t>(size));
  for (float& x : row) x = normal(random);
  return row;
}

// K p - e for the newest row, from the Gram matrix.
double residual_of(const Window& w, double damping, const std::vector<double>& p) {
  double worst = 0;
  const auto slots = w.live();
  for (const int64_t i : slots) {
    double sum = i == slots.back() ? -1.0 : 0.0;
    for (const int64_t j : slots) {
      const double shift = i == j ? static_cast<double>(w.m) * damping : 0.0;
      sum += (w.gram[static_cast<size_t>(i * (w.m + 1) + j)] + shift) * p[static_cast<size_t>(j)];
    }
    worst = std::max(worst, std::abs(sum));
  }
  return worst;
}

TEST(FisherWindowKernel, BothPassesEqualPlainSums) {
  for (const WindowFormat format : kFormats) {
    for (const int64_t dim :
         {1, 255, 1024, 1025, 5000, 70 * 1024 + 3}) {  // the last one: several tiles per partial sum
      Window w(3, dim, format);
      for (unsigned k = 0; k < 5; ++k) {
        const auto before = w.live();
        const int64_t spare = w.ring[kRingNext];
        w.products(normal_row(dim, k));
        for (int64_t s = 0; s <= w.m; ++s) {
          double sum = 0, size = 0;
          for (int64_t c = 0; c < dim; ++c) sum += w.element(s, c) * w.element(spare, c);
          for (int64_t c = 0; c < dim; ++c) size += std::abs(w.element(s, c) * w.element(spare, c));
          const bool wanted = s == spare || std::count(before.begin(), before.end(), s) > 0;
          EXPECT_NEAR(w.dots[static_cast<size_t>(s)], wanted ? sum : 0.0, 2e-7 * size + 1e-300) << dim << ' ' << s;
        }
        window_commit_cpu(w.tensors(), w.args(0.1));
      }
      w.coefficients = {0.5, -1.25, 3, 0.75};
      w.coefficients[static_cast<size_t>(w.ring[kRingNext])] = kNan;  // the spare slot is not read
      const auto rows = window_live(w.ring.data(), w.coefficients.data());
      const std::vector<double> x(kTile, 0.5);
      for (int64_t tile = 0; tile < w.tiles; ++tile) {
        alignas(64) double out[kTile], rest[kTile];
        window_combine_cpu(w.view(), rows, tile, out);
        window_residual_cpu(w.view(), rows, tile, x.data(), kTile, 2.0, rest);
        for (int64_t i = 0; i < std::min(kTile, dim - tile * kTile); ++i) {
          double sum = 0;
          for (const LiveRow& row : rows) sum += row.coefficient * w.element(row.slot, tile * kTile + i);
          const bool wide = format == WindowFormat::kDouble;
          EXPECT_NEAR(wide ? out[i] : reinterpret_cast<float*>(out)[i], sum, 2e-6);
          EXPECT_NEAR(wide ? rest[i] : reinterpret_cast<float*>(rest)[i], (0.5 - sum) / 2, 1e-6);
        }
      }
    }
  }
}

TEST(FisherWindowKernel, GathersPiecesOfAnyType) {
  const auto g = normal_row(3000, 1), p = normal_row(3000, 2);
  std::vector<double> wide(g.begin(), g.end());
  std::vector<core::BFloat16> narrow(3000);
  std::vector<core::Half> half(3000);
  for (size_t i = 0; i < 3000; ++i) core::store(narrow[i], g[i]);
  for (size_t i = 0; i < 3000; ++i) core::store(half[i], p[i]);
  const std::vector<RowSegment> segments{
      {g.data(), p.data(), 0.5, 0, 1500, DType::kFloat, DType::kFloat},
      {nullptr, p.data(), 0.5, 1500, 10, DType::kFloat, DType::kFloat},  // no gradient, so no decay either
      {narrow.data(), half.data(), 0.25, 1510, 2000, DType::kBFloat16, DType::kHalf},
      {wide.data(), nullptr, 0, 3510, 3000, DType::kDouble, DType::kFloat}};
  std::vector<float> row(7000);
  window_gather_cpu(segments, -0.5, false, 0, 7000, row.data());
  for (int64_t c = 0; c < 7000; ++c) {
    float expected = 0;
    if (c < 1500) expected = -0.5f * g[static_cast<size_t>(c)] + 0.5f * p[static_cast<size_t>(c)];
    if (c >= 1510 && c < 3510) {
      const auto i = static_cast<size_t>(c - 1510);
      expected = -0.5f * core::load(narrow[i]) + 0.25f * core::load(half[i]);
    }
    if (c >= 3510 && c < 6510) expected = static_cast<float>(-0.5 * wide[static_cast<size_t>(c - 3510)]);
    ASSERT_EQ(row[static_cast<size_t>(c)], expected) << c;
  }
  std::vector<float> middle(1300);  // any stretch is the same
  window_gather_cpu(segments, -0.5, false, 1400, 2700, middle.data());
  EXPECT_TRUE(std::equal(middle.begin(), middle.end(), row.begin() + 1400));
}

TEST(FisherWindowKernel, TopKKeepsTheFirstOfEqualOnes) {
  std::vector<float> row(2 * kTile, 0.0f);
  for (const int64_t c : {900, 17, 18, 19, 500}) row[static_cast<size_t>(c)] = c % 2 == 0 ? -2.0f : 2.0f;
  row[40] = 3;
  Window w(1, 2 * kTile, WindowFormat::kTopK, false, 4);
  w.products(row);
  EXPECT_EQ(std::vector<int16_t>(w.indices.begin(), w.indices.begin() + 4), (std::vector<int16_t>{17, 18, 19, 40}));
  // A tile of zeros keeps its first columns.
  EXPECT_EQ(std::vector<int16_t>(w.indices.begin() + 8, w.indices.begin() + 12), (std::vector<int16_t>{0, 1, 2, 3}));
  Window all(1, kTile, WindowFormat::kTopK, false, kTile);
  all.products(normal_row(kTile, 3));
  for (int64_t i = 0; i < kTile; ++i) EXPECT_EQ(all.indices[static_cast<size_t>(i)], i);
}

TEST(FisherWindowKernel, Int8CodesAndScales) {
  std::vector<float> row(kTile, 0.0f);
  row[0] = 127;
  for (size_t i = 1; i < 9; ++i) row[i] = static_cast<float>(i) - 4.5f;  // ties go to the even code
  row[256] = -3.4028234663852886e38f;
  row[257] = 1e38f;
  row[512] = 1e-44f;  // too small for a scale
  row[768] = 2e-43f;  // 143 times the least number: the scale is one of them, the code stops at 127
  Window w(1, kTile, WindowFormat::kInt8);
  w.products(row);
  const auto* codes = reinterpret_cast<const int8_t*>(w.rows.data());
  EXPECT_EQ(std::vector<int>(codes, codes + 9), (std::vector<int>{127, -4, -2, -2, 0, 0, 2, 2, 4}));
  EXPECT_EQ(w.scales[0], 1.0f);
  EXPECT_EQ(codes[256], -127);
  EXPECT_EQ(codes[512], 0);
  EXPECT_EQ(codes[768], 127);
  EXPECT_TRUE(std::isfinite(w.dots[0]));
}

TEST(FisherWindowKernel, OneElementThatIsNotFiniteRejectsTheRow) {
  for (const WindowFormat format : kFormats) {
    for (const bool feedback : {false, true}) {
      if (feedback && (format == WindowFormat::kFloat || format == WindowFormat::kDouble)) continue;
      Window w(2, 3000, format, feedback);
      for (unsigned k = 0; k < 4; ++k) w.push(normal_row(3000, k));
      const Window before = w;
      for (const double bad : {kNan, kInf, -kInf}) {
        for (const size_t at : {size_t{0}, size_t{1500}, size_t{2999}}) {
          auto row = normal_row(3000, 9);
          row[at] = static_cast<float>(bad);
          w.push(row);
          EXPECT_EQ(w.ring[kRingAccepted], 0);
          EXPECT_EQ(w.coefficients, std::vector<double>(3, 0.0));
        }
      }
      EXPECT_EQ(w.ring[kRingRejected], 9);
      EXPECT_EQ(w.gram, before.gram);
      EXPECT_EQ(w.factor, before.factor);
      w.ring[kRingRejected] = before.ring[kRingRejected];
      w.ring[kRingAccepted] = before.ring[kRingAccepted];
      EXPECT_EQ(w.ring, before.ring);
      Window other = before;
      w.push(normal_row(3000, 10));
      other.push(normal_row(3000, 10));
      EXPECT_EQ(w.coefficients, other.coefficients);
      const size_t half = w.error.size() / 2, now = static_cast<size_t>(w.ring[kRingTotal] % 2);
      for (size_t i = now * half; i < (now + 1) * half; ++i) ASSERT_EQ(w.error[i], other.error[i]);
    }
  }
}

TEST(FisherWindowKernel, ErrorFeedbackLosesNothing) {
  for (const WindowFormat format : {WindowFormat::kBFloat16, WindowFormat::kInt8, WindowFormat::kTopK}) {
    constexpr int64_t kDim = 2000;
    Window w(40, kDim, format, true);
    std::vector<double> sum(kDim, 0.0);
    for (unsigned k = 0; k < 40; ++k) {
      const auto row = normal_row(kDim, k);
      for (size_t i = 0; i < kDim; ++i) sum[i] += static_cast<double>(row[i]);
      w.push(row);
    }
    const size_t half = w.error.size() / 2, now = static_cast<size_t>(w.ring[kRingTotal] % 2);
    for (int64_t c = 0; c < kDim; ++c) {
      double stored = static_cast<double>(w.error[now * half + static_cast<size_t>(c)]);
      for (const int64_t slot : w.live()) stored += w.element(slot, c);
      ASSERT_NEAR(stored, sum[static_cast<size_t>(c)], 1e-4);
    }
  }
}

using Commit = void (*)(const CommitTensors&, const CommitArgs&);
struct Form {
  const char* name;
  Commit commit;
  void (*solve)(const CommitTensors&, const CommitArgs&, const double*, double*);
};
const std::vector<Form> kForms{{"Cholesky", window_commit_cpu, window_solve_cpu},
                               {"inverse", window_commit_inverse_cpu, window_solve_inverse_cpu}};

// Test 3 for both forms: long runs with correlated rows, with more rows than columns, and with decaying ones.
TEST(FisherWindowKernel, Spec03BothFormsKeepTheirAccuracy) {
  struct Case {
    const char* name;
    int64_t m, dim;
    double damping, common, decay;
  };
  for (const Case& c :
       {Case{"correlated", 64, 400, 1e-6, 0.99, 1.0}, Case{"more rows than columns", 64, 40, 1e-3, 0.0, 1.0},
        Case{"decaying", 32, 300, 1e-6, 0.0, 0.995}, Case{"one row", 1, 20, 1e-3, 0.0, 1.0},
        Case{"two rows", 2, 20, 1e-6, 0.9999, 1.0}}) {
    const auto base = normal_row(c.dim, 77);
    for (const Form& form : kForms) {
      Window w(c.m, c.dim, WindowFormat::kFloat);
      double size = 1, worst = 0;
      for (unsigned t = 0; t < 1000; ++t, size *= c.decay) {
        auto row = normal_row(c.dim, t);
        for (size_t i = 0; i < row.size(); ++i) {
          row[i] = static_cast<float>(size * (std::sqrt(c.common) * static_cast<double>(base[i]) +
                                              std::sqrt(1 - c.common) * static_cast<double>(row[i])));
        }
        w.products(row);
        form.commit(w.tensors(), w.args(c.damping));
        if (t % 10 != 9) continue;
        std::vector<double> p = w.coefficients;
        for (double& x : p) x /= static_cast<double>(c.m);
        worst = std::max(worst, residual_of(w, c.damping, p));
        std::vector<double> again(p.size());
        form.solve(w.tensors(), w.args(c.damping), nullptr, again.data());
        for (size_t i = 0; i < p.size(); ++i) {
          ASSERT_NEAR(again[i], w.coefficients[i], 1e-9 * (std::abs(w.coefficients[i]) + 1)) << form.name;
        }
      }
      EXPECT_LE(worst, 1e-8) << c.name << ", " << form.name;
      EXPECT_EQ(w.ring[kRingTotal], 1000);
    }
  }
}

// Within 20 cond(K) eps, the bound of any stable solver: K's largest eigenvalue is about 600 (two equal rows of norm^2
// 300), its smallest m lambda = 0.02.
TEST(FisherWindowKernel, BothFormsAgree) {
  constexpr double kBound = 20 * (600 / 0.02) * 2.2e-16;
  Window a(20, 300, WindowFormat::kFloat), b = a;
  for (unsigned t = 0; t < 70; ++t) {
    auto row = normal_row(300, t);
    if (t % 7 == 3) row[5] = static_cast<float>(kNan);
    if (t % 11 == 5) row = normal_row(300, t - 1);  // a repeated row
    for (Window* w : {&a, &b}) w->products(row);
    CommitArgs args = a.args(1e-3);
    args.warmup_steps = 5;
    args.warmup_scaling = true;
    window_commit_cpu(a.tensors(), args);
    window_commit_inverse_cpu(b.tensors(), args);
    double largest = 0;
    for (const double x : a.coefficients) largest = std::max(largest, std::abs(x));
    for (size_t s = 0; s < a.coefficients.size(); ++s) {
      ASSERT_NEAR(a.coefficients[s], b.coefficients[s], kBound * largest) << t << ' ' << s;
    }
    for (const int field : {kRingCount, kRingNext, kRingAccepted, kRingRejected, kRingTotal}) {
      ASSERT_EQ(a.ring[static_cast<size_t>(field)], b.ring[static_cast<size_t>(field)]) << field;
    }
    EXPECT_EQ(a.gram, b.gram);
  }
  // A window that moves to the other kind of device: the factor is made anew from the Gram matrix.
  std::vector<double> right = a.dots, x(right.size()), y(right.size());
  right[static_cast<size_t>(a.ring[kRingNext])] = 0;
  window_solve_cpu(a.tensors(), a.args(1e-3), right.data(), x.data());
  window_solve_inverse_cpu(a.tensors(), a.args(1e-3), right.data(), y.data());
  EXPECT_EQ(a.ring[kRingForm], kFormInverse);
  for (size_t s = 0; s < x.size(); ++s) EXPECT_NEAR(x[s], y[s], 1e-12);
  window_solve_cpu(a.tensors(), a.args(1e-3), right.data(), y.data());
  EXPECT_EQ(a.ring[kRingForm], kFormCholesky);
  for (size_t s = 0; s < x.size(); ++s) EXPECT_NEAR(x[s], y[s], 1e-13);
}

TEST(FisherWindowKernel, AFlagRejectsAFiniteRow) {
  for (const Form& form : kForms) {
    Window w(3, 50, WindowFormat::kFloat);
    const float raised = 1, lowered = 0;
    w.products(normal_row(50, 0));
    CommitTensors t = w.tensors();
    t.nonfinite = &raised;
    form.commit(t, w.args(0.1));
    EXPECT_EQ(w.ring[kRingRejected], 1);
    EXPECT_EQ(w.ring[kRingCount], 0);
    t.nonfinite = &lowered;
    form.commit(t, w.args(0.1));
    EXPECT_EQ(w.ring[kRingCount], 1);
  }
}

TEST(FisherWindowKernel, AFactorThatWentWrongIsMadeAnew) {
  for (const Form& form : kForms) {
    Window w(6, 200, WindowFormat::kFloat);
    for (unsigned t = 0; t < 63; ++t) {
      w.products(normal_row(200, t));
      form.commit(w.tensors(), w.args(1e-2));
    }
    const int64_t refactors = w.ring[kRingRefactors];
    w.ring[kRingSince] = 63;  // the probe of the Cholesky form comes each 64 rows, that of the inverse at each
    const int64_t offset = w.ring[kRingOffset];
    for (int64_t k = 0; k < w.m + w.pad; ++k) w.factor[static_cast<size_t>(k * (w.m + w.pad + 1))] *= 1.01;
    EXPECT_GE(offset, 0);
    w.products(normal_row(200, 99));
    form.commit(w.tensors(), w.args(1e-2));
    EXPECT_EQ(w.ring[kRingRefactors], refactors + 1) << form.name;
    std::vector<double> p = w.coefficients;
    for (double& x : p) x /= 6;
    EXPECT_LE(residual_of(w, 1e-2, p), 1e-13) << form.name;
  }
}

TEST(FisherWindowKernel, RefactorSchedule) {
  for (const Form& form : kForms) {
    for (const int64_t every : {int64_t{0}, int64_t{1}, int64_t{5}}) {
      Window w(4, 60, WindowFormat::kFloat);
      for (unsigned t = 0; t < 41; ++t) {
        w.products(normal_row(60, t));
        CommitArgs args = w.args(1e-2);
        args.refactor_every = every;
        form.commit(w.tensors(), args);
      }
      EXPECT_EQ(w.ring[kRingRefactors], every == 0 ? 1 : every == 1 ? 41 : 9) << form.name << ' ' << every;
    }
  }
}

TEST(MfacKernel, UpdateEqualsItsFormula) {
  const auto p = normal_row(1000, 1), b = normal_row(1000, 2), u = normal_row(1000, 3);
  auto param = p, buffer = b;
  float step = 0;
  const MfacTensor t{param.data(), buffer.data(), &step, 0, 1000, 0.1, 0.9, 0.5, 0.01, DType::kFloat};
  mfac_update_cpu(t, u.data() + 100, false, 100, 1000);
  for (size_t i = 0; i < 1000; ++i) {
    const float moved = 0.9f * b[i] + 0.5f * u[i];
    EXPECT_EQ(buffer[i], i < 100 ? b[i] : moved);
    EXPECT_EQ(param[i], i < 100 ? p[i] : static_cast<float>(1 - 0.1 * 0.01) * p[i] - 0.1f * moved);
  }
}

}  // namespace
}  // namespace torch_ext::kernels

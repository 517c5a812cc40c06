// The AdaHessian CPU kernel against its functor applied element by element.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <tuple>
#include <vector>

#include "core/block_reduce.h"
#include "optim/adahessian/adahessian_kernel.h"

namespace torch_ext::kernels {
namespace {

using core::BFloat16;
using core::DType;
using core::Half;
using core::load;
using core::opmath_t;

template <typename S>
constexpr DType dtype_of_storage() {
  if (std::is_same_v<S, double>) return DType::kDouble;
  if (std::is_same_v<S, BFloat16>) return DType::kBFloat16;
  return std::is_same_v<S, Half> ? DType::kHalf : DType::kFloat;
}

template <typename S>
bool same(const S& a, const S& b) {
  return std::memcmp(&a, &b, sizeof(S)) == 0 || (std::isnan(load(a)) && std::isnan(load(b)));
}

// A parameter with its buffers, which start `offset` elements after an aligned address.
template <typename S, typename G>
struct Param {
  using T = opmath_t<S>;
  size_t offset, size;
  int64_t block;
  std::vector<S> param;
  std::vector<G> grad, curvature;
  std::vector<T> exp_avg, second;
  float step = 3;
  double bias_products[2] = {0.9 * 0.9 * 0.9, 0.997};

  Param(size_t size_, size_t offset_, int64_t block_, std::mt19937& random, bool special)
      : offset(offset_), size(size_), block(block_) {
    std::normal_distribution<double> normal;
    const auto fill = [&](auto& buffer, size_t count, bool positive) {
      buffer.resize(offset + count + 8);
      for (auto& element : buffer) {
        double x = normal(random) * std::exp(normal(random));
        if (special) {
          const std::vector<double> values{0.0,
                                           -0.0,
                                           std::nan(""),
                                           1e-42,
                                           -1e-42,
                                           1e-320,
                                           3e38,
                                           65504,
                                           1e-7,
                                           1e300,
                                           std::numeric_limits<double>::infinity(),
                                           -std::numeric_limits<double>::infinity()};
          if (random() % 2 == 0) x = values[random() % values.size()];
        }
        if (positive) x = std::abs(x);
        core::store(element, static_cast<opmath_t<std::decay_t<decltype(element)>>>(x));
      }
    };
    fill(param, size, false);
    fill(grad, size, false);
    fill(curvature, size, false);
    fill(exp_avg, size, false);
    fill(second, size / static_cast<size_t>(block), true);
  }

  AdaHessianTensor tensor() {
    return {param.data() + offset,   grad.data() + offset,       curvature.data() + offset,
            exp_avg.data() + offset, second.data() + offset,     &step,
            bias_products,           static_cast<int64_t>(size), block};
  }

  bool equals(const Param& other) const {
    const auto all = [](const auto& a, const auto& b) {
      using E = typename std::decay_t<decltype(a)>::value_type;
      return std::equal(a.begin(), a.end(), b.begin(), b.end(), same<E>);
    };
    return all(param, other.param) && all(exp_avg, other.exp_avg) && all(second, other.second) && step == other.step &&
           bias_products[0] == other.bias_products[0] && bias_products[1] == other.bias_products[1];
  }
};

AdaHessianArgs arguments(DType param_type, DType grad_type, double hessian_power, bool refresh,
                         const float* nonfinite) {
  AdaHessianArgs a{};
  a.lr = 0.15;
  a.beta1 = 0.9;
  a.beta2 = 0.999;
  a.eps = 1e-4;
  a.weight_decay = 0.01;
  a.hessian_power = hessian_power;
  a.max_update = std::numeric_limits<double>::infinity();
  a.grad_factor = -0.5;
  a.curvature_factor = 0.25;
  a.scaled_curvature = true;
  a.refresh = refresh;
  a.param_type = param_type;
  a.grad_type = grad_type;
  a.nonfinite = nonfinite;
  return a;
}

// The update as the functor and the averaging rule define it.
template <typename S, typename G, Root R>
void restate(Param<S, G>& p, const AdaHessianArgs& a) {
  using T = opmath_t<S>;
  const auto f = adahessian_scalars<T, R>(a, p.bias_products);
  for (size_t b = 0; b * static_cast<size_t>(p.block) < p.size; ++b) {
    const size_t first = p.offset + b * static_cast<size_t>(p.block);
    T& v = p.second[p.offset + b];
    if (a.refresh) {
      T d = static_cast<T>(load(p.curvature[first]));
      if (p.block > 1) {
        const double sum = core::sum_block(p.block, [&](int64_t i) {
          const auto x = static_cast<double>(load(p.curvature[first + static_cast<size_t>(i)]));
          return a.signed_mean ? x : std::abs(x);
        });
        d = static_cast<T>(sum / static_cast<double>(p.block));
      }
      v = f.second_moment(v, d * f.curvature_scale);
    }
    for (size_t i = first; i < first + static_cast<size_t>(p.block); ++i) {
      T value = load(p.param[i]);
      f.parameter(value, p.exp_avg[i], static_cast<T>(load(p.grad[i])), f.denominator(v));
      core::store(p.param[i], value);
    }
  }
}

template <typename S, typename G>
void restate_any(Param<S, G>& p, const AdaHessianArgs& a) {
  if (a.hessian_power == 1) return restate<S, G, Root::kSqrt>(p, a);
  if (a.hessian_power == 0.5) return restate<S, G, Root::kQuartic>(p, a);
  if (a.hessian_power == 0) return restate<S, G, Root::kNone>(p, a);
  return restate<S, G, Root::kPower>(p, a);
}

template <typename Types>
class AdaHessianKernel : public ::testing::Test {
 protected:
  using S = std::tuple_element_t<0, Types>;
  using G = std::tuple_element_t<1, Types>;

  static AdaHessianArgs args(double hessian_power, bool refresh, const float* nonfinite) {
    return arguments(dtype_of_storage<S>(), dtype_of_storage<G>(), hessian_power, refresh, nonfinite);
  }

  void check(size_t size, size_t offset, int64_t block, const AdaHessianArgs& a, bool special = false) {
    Param<S, G> got(size, offset, block, random_, special);
    Param<S, G> expected = got;
    adahessian_step_cpu(got.tensor(), a, 0, static_cast<int64_t>(size));
    restate_any(expected, a);
    ASSERT_TRUE(got.equals(expected)) << "size " << size << ", offset " << offset << ", block " << block << ", power "
                                      << a.hessian_power << ", refresh " << a.refresh << ", special " << special;
  }

  std::mt19937 random_{5};
  float fine_ = 0, bad_ = 1;
};

using Storages = ::testing::Types<std::tuple<float, float>, std::tuple<double, double>, std::tuple<BFloat16, BFloat16>,
                                  std::tuple<BFloat16, float>, std::tuple<Half, Half>, std::tuple<Half, float>>;
TYPED_TEST_SUITE(AdaHessianKernel, Storages);

TYPED_TEST(AdaHessianKernel, EqualsTheFunctorForTailsAndMisalignedPointers) {
  for (const double power : {1.0, 0.5, 0.0, 0.7}) {
    for (const bool refresh : {true, false}) {
      const auto a = this->args(power, refresh, &this->fine_);
      for (size_t offset = 0; offset < 5; ++offset) {
        for (size_t size = 0; size < 68; ++size) ASSERT_NO_FATAL_FAILURE(this->check(size, offset, 1, a));
      }
    }
  }
}

TYPED_TEST(AdaHessianKernel, EqualsTheFunctorForBlocks) {
  for (const int64_t block : {2, 9, 31, 32, 64, 65, 1000, 5000}) {
    for (const size_t blocks : {1u, 2u, 3u, 67u, 500u}) {
      if (block * static_cast<int64_t>(blocks) > 70000) continue;
      for (const bool signed_mean : {false, true}) {
        auto a = this->args(blocks % 2 == 0 ? 1.0 : 0.7, true, &this->fine_);
        a.signed_mean = signed_mean;
        ASSERT_NO_FATAL_FAILURE(this->check(blocks * static_cast<size_t>(block), blocks % 4, block, a));
        a.refresh = false;
        ASSERT_NO_FATAL_FAILURE(this->check(blocks * static_cast<size_t>(block), blocks % 4, block, a));
      }
    }
  }
}

TYPED_TEST(AdaHessianKernel, EqualsTheFunctorForSpecialValues) {
  for (const double power : {1.0, 0.5, 0.0, 0.7}) {
    for (const bool refresh : {true, false}) {
      auto a = this->args(power, refresh, &this->fine_);
      for (const double max_update : {std::numeric_limits<double>::infinity(), 0.25}) {
        a.max_update = max_update;
        for (const int64_t block : {1, 9, 64}) {
          ASSERT_NO_FATAL_FAILURE(this->check(static_cast<size_t>(block) * 200, 1, block, a, /*special=*/true));
        }
      }
    }
  }
}

TYPED_TEST(AdaHessianKernel, DoesNotDependOnTheChunks) {
  using Buffers = Param<typename TestFixture::S, typename TestFixture::G>;
  const auto a = this->args(1.0, true, &this->fine_);
  for (const int64_t block : {1, 9, 32, 64, 1000}) {
    Buffers whole(static_cast<size_t>(block) * 150, 1, block, this->random_, false);
    Buffers pieces = whole;
    adahessian_step_cpu(whole.tensor(), a, 0, block * 150);
    for (int64_t begin = 0; begin < 150;) {
      const int64_t end = std::min<int64_t>(150, begin + 1 + static_cast<int64_t>(this->random_() % 40));
      adahessian_step_cpu(pieces.tensor(), a, begin * block, end * block);
      begin = end;
    }
    EXPECT_TRUE(whole.equals(pieces)) << block;
  }
}

TYPED_TEST(AdaHessianKernel, NonfiniteFlagLeavesEverything) {
  using Buffers = Param<typename TestFixture::S, typename TestFixture::G>;
  for (const int64_t block : {1, 9}) {
    Buffers got(static_cast<size_t>(block) * 50, 0, block, this->random_, false);
    const Buffers before = got;
    const auto a = this->args(1.0, true, &this->bad_);
    adahessian_advance(a, got.tensor());
    adahessian_step_cpu(got.tensor(), a, 0, block * 50);
    EXPECT_TRUE(got.equals(before));
  }
}

TYPED_TEST(AdaHessianKernel, ScaleOfTheLossDividesGradientAndCurvature) {
  using Buffers = Param<typename TestFixture::S, typename TestFixture::G>;
  const float scale = 4;
  auto a = this->args(1.0, true, &this->fine_);
  auto scaled = a;
  scaled.grad_scale = &scale;
  a.grad_factor /= 4;
  a.curvature_factor /= 4;
  Buffers x(100, 0, 1, this->random_, false);
  Buffers y = x, external = x, z = x;
  adahessian_step_cpu(x.tensor(), a, 0, 100);
  adahessian_step_cpu(y.tensor(), scaled, 0, 100);
  EXPECT_TRUE(x.equals(y));
  a.curvature_factor *= 4;  // a user's Hessian is not scaled
  scaled.scaled_curvature = false;
  adahessian_step_cpu(external.tensor(), scaled, 0, 100);
  adahessian_step_cpu(z.tensor(), a, 0, 100);
  EXPECT_TRUE(external.equals(z));
}

// --- counters and functor -------------------------------------------------------------------------------------------

TEST(AdaHessianCounters, AdvanceOnAcceptedStepsOnly) {
  float fine = 0, bad = 1, step = 0;
  double products[2] = {1, 1};
  AdaHessianTensor t{};
  t.step = &step;
  t.bias_products = products;
  auto a = arguments(DType::kFloat, DType::kFloat, 1, /*refresh=*/false, &fine);
  adahessian_advance(a, t);  // no curvature yet: the parameter waits for the next refresh
  EXPECT_EQ(step, 0);
  EXPECT_TRUE(adahessian_waits(a, t));
  a.refresh = true;
  a.nonfinite = &bad;
  adahessian_advance(a, t);
  EXPECT_EQ(step, 0);
  EXPECT_EQ(products[0], 1);
  a.nonfinite = &fine;
  adahessian_advance(a, t);
  EXPECT_EQ(step, 1);
  EXPECT_EQ(products[0], a.beta1);
  EXPECT_EQ(products[1], a.beta2);
  EXPECT_FALSE(adahessian_waits(a, t));
  a.refresh = false;
  adahessian_advance(a, t);
  EXPECT_EQ(step, 2);
  EXPECT_EQ(products[0], a.beta1 * a.beta1);
  EXPECT_EQ(products[1], a.beta2);
}

TEST(AdaHessianFunctor, EveryBranch) {
  float fine = 0;
  auto a = arguments(DType::kDouble, DType::kDouble, 1, true, &fine);
  a.eps = 0;
  a.weight_decay = 0;
  a.grad_factor = 1;
  a.max_update = 2;
  const double products[2] = {0.9, 0.999};
  const auto f = adahessian_scalars<double, Root::kSqrt>(a, products);
  double p = 1, m = 0;
  f.parameter(p, m, 0.0, f.denominator(0.0));  // 0 / 0 is no step
  EXPECT_EQ(p, 1);
  f.parameter(p, m, 5.0, f.denominator(0.0));  // 5 / 0 is clipped
  EXPECT_EQ(p, 1 - 0.15 * 2);
  m = 0;
  f.parameter(p, m, -5.0, f.denominator(1e-9));
  EXPECT_EQ(p, 1 - 0.15 * 2 + 0.15 * 2);
  const auto f32 = adahessian_scalars<float, Root::kSqrt>(a, products);
  EXPECT_TRUE(std::isfinite(f32.second_moment(0.0f, 1e30f)));  // D^2 saturates
  EXPECT_TRUE(std::isfinite(f.second_moment(0.0, 1e200)));
  const auto none = adahessian_scalars<double, Root::kNone>(a, products);
  EXPECT_EQ(none.denominator(123.0), 1);
  const auto quartic = adahessian_scalars<double, Root::kQuartic>(a, products);
  EXPECT_NEAR(quartic.denominator(16e-3), 2, 1e-12);  // the bias correction is 1 / 0.001
  a.hessian_power = 0.5;
  const auto any = adahessian_scalars<double, Root::kPower>(a, products);
  EXPECT_NEAR(any.denominator(16e-3), 2, 1e-12);
}

}  // namespace
}  // namespace torch_ext::kernels

#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/ops/eggroll.h>
#include <torch_ext/ops/philox4x32.h>

#include <cmath>
#include <limits>

#include "core/noise_kernel.h"
#include "core/noise_words_kernel.h"
#include "support/check.h"

namespace torch_ext::ops {
namespace {

using test::equal_bits;
using test::expect_error;
using test::relative_error;
using test::ThreadCount;

const std::vector<std::string> kLaws{"gaussian", "binomial16", "binomial64", "rademacher"};
const std::vector<at::ScalarType> kDtypes{at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};

double tolerance(at::ScalarType dtype) {
  return dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 1e-5 : dtype == at::kBFloat16 ? 2e-2 : 5e-3;
}

double fourth_moment(const std::string& law) {
  return law == "gaussian" ? 2.99662 : law == "binomial16" ? 2.875 : law == "binomial64" ? 2.96875 : 1;
}

at::Tensor ones_of(const at::Tensor& words, int64_t bits) {
  return words.unsqueeze(-1).bitwise_right_shift(torch::arange(bits)).bitwise_and(1).sum(-1);
}

// The header's formulas through the public Philox operator.
at::Tensor restated(const std::string& law, int64_t numel, int64_t seed, int64_t ordinal, int64_t tag, int64_t pair,
                    int64_t epoch) {
  const int64_t per = law == "gaussian" ? 4 : law == "binomial16" ? 8 : law == "binomial64" ? 2 : 128;
  at::Tensor counter = torch::zeros({(numel + per - 1) / per, 4}, at::kLong);
  counter.select(1, 0).copy_(torch::arange(counter.size(0)));
  counter.select(1, 1).fill_(pair);
  counter.select(1, 2).fill_(ordinal << 8 | tag);
  counter.select(1, 3).fill_(epoch);
  const at::Tensor words = philox4x32(counter, torch::tensor({seed & 0xffffffff, seed >> 32 & 0xffffffff}, at::kLong));
  at::Tensor z;
  if (law == "gaussian") {
    const at::Tensor knots = torch::tensor(at::ArrayRef<float>(core::kGaussianKnots));
    const at::Tensor cell = words.bitwise_right_shift(21).bitwise_and(1023);
    const at::Tensor slope = knots.index({cell + 1}) - knots.index({cell});
    z = knots.index({cell}) + slope * (words.bitwise_and(0x1fffff).to(at::kFloat) * std::ldexp(1.0, -21));
    z = torch::where(words.bitwise_right_shift(31).ne(0), -z, z);
  } else if (law == "binomial16") {
    z = (ones_of(torch::stack({words.bitwise_and(0xffff), words.bitwise_right_shift(16)}, -1), 16) - 8) / 2.0;
  } else if (law == "binomial64") {
    z = (ones_of(words, 32).view({-1, 2}).sum(-1) - 32) / 4.0;
  } else {
    z = words.unsqueeze(-1).bitwise_right_shift(torch::arange(32)).bitwise_and(1) * 2 - 1;
  }
  return z.to(at::kFloat).reshape({-1}).narrow(0, 0, numel);
}

at::Tensor draw(const std::string& law, int64_t numel, int64_t ordinal = 1, int64_t tag = 0, int64_t pair = 0,
                int64_t epoch = 0, at::ScalarType dtype = at::kFloat) {
  return eggroll_noise(numel, 1, 3, ordinal, tag, pair, pair + 1, epoch, law, dtype).view({-1});
}

// E_p in float64, as its factors are rounded for weights of `dtype`.
at::Tensor direction(at::IntArrayRef shape, bool vector, int64_t ordinal, int64_t pair, const EggrollNoise& noise,
                     at::ScalarType dtype) {
  const auto part = [&](int64_t rows, int64_t rank, int64_t tag) {
    return eggroll_noise(rows, rank, noise.seed, ordinal, tag, pair, pair + 1, noise.epoch, noise.law, dtype)[0].to(
        at::kDouble);
  };
  int64_t numel = 1;
  for (const int64_t size : shape) numel *= size;
  if (vector) return part(numel, 1, 2).view(shape);
  const at::Tensor a = part(shape[0], noise.rank, 0), b = part(numel / shape[0], noise.rank, 1);
  return (a.mm(b.t()) / std::sqrt(static_cast<double>(noise.rank))).view(shape);
}

at::Tensor perturbed(const at::Tensor& theta, bool vector, int64_t ordinal, int64_t member, const EggrollNoise& noise) {
  if (ordinal < 0) return theta.to(at::kDouble);
  const int64_t pair = noise.antithetic ? member / 2 : member, sign = noise.antithetic && member % 2 != 0 ? -1 : 1;
  return theta.to(at::kDouble) + static_cast<double>(sign) * noise.sigma *
                                     direction(theta.sizes(), vector, ordinal, pair, noise, theta.scalar_type());
}

TEST(Eggroll, Test1NoiseIsTheDocumentedFunctionOfItsCounter) {
  for (const auto& law : kLaws) {
    for (const int64_t numel : {1, 3, 127, 128, 129, 1000, 9000}) {
      const at::Tensor got = eggroll_noise(numel, 1, -77777777777, 9, 1, 4000000000, 4000000001, 12, law);
      EXPECT_TRUE(equal_bits(got.view({-1}), restated(law, numel, -77777777777, 9, 1, 4000000000, 12)))
          << law << ' ' << numel;
    }
  }
}

TEST(Eggroll, Test1EveryRangeEqualsTheScalarForm) {
  for (const auto law : {core::NoiseLaw::kGaussian, core::NoiseLaw::kBinomial16, core::NoiseLaw::kBinomial64,
                         core::NoiseLaw::kRademacher}) {
    const core::PhiloxStream stream = core::philox_stream(11, 5, 2, core::PhiloxTag::kEsFactorA, 1);
    std::vector<float> out(700);
    for (const int64_t begin : {0, 1, 63, 127, 128, 5000}) {
      for (const int64_t size : {1, 2, 15, 64, 129, 700}) {
        kernels::noise_range_cpu(law, stream, begin, begin + size, out.data());
        for (int64_t i = 0; i < size; ++i) {
          const float expected = core::dispatch_noise(law, [&](auto constant) {
            return core::noise_at<constant()>(stream, begin + i, kernels::gaussian_cells_cpu());
          });
          ASSERT_EQ(core::float_bits(out[static_cast<size_t>(i)]), core::float_bits(expected)) << begin << ' ' << i;
        }
      }
    }
  }
}

TEST(Eggroll, Test1MomentsAndRounding) {
  constexpr int64_t kDraws = 1000000;
  for (const auto& law : kLaws) {
    const at::Tensor z = draw(law, kDraws).to(at::kDouble), fourth = z.pow(4);
    EXPECT_LT(std::abs(z.mean().item<double>()), 4e-3) << law;
    EXPECT_NEAR(z.var().item<double>(), 1, 5e-3) << law;
    EXPECT_NEAR(fourth.mean().item<double>(), fourth_moment(law), 5e-3 * fourth.std().item<double>() + 1e-12) << law;
    for (const auto dtype : kDtypes) {
      EXPECT_TRUE(equal_bits(draw(law, 333, 1, 0, 0, 0, dtype), draw(law, 333).to(dtype))) << law;
    }
  }
  EXPECT_TRUE(equal_bits(draw("binomial16", 99, 1, 0, 0, 0, at::kChar).to(at::kFloat) / 2, draw("binomial16", 99)));
  EXPECT_TRUE(equal_bits(draw("binomial64", 99, 1, 0, 0, 0, at::kChar).to(at::kFloat) / 4, draw("binomial64", 99)));
  EXPECT_TRUE(equal_bits(draw("rademacher", 99, 1, 0, 0, 0, at::kChar).to(at::kFloat), draw("rademacher", 99)));
}

TEST(Eggroll, Test2PairsAreOppositeAndStreamsUncorrelated) {
  constexpr int64_t kDraws = 100000;
  for (const auto& law : kLaws) {
    EggrollNoise noise;
    noise.sigma = 0.25;
    noise.law = law;
    const at::Tensor out = eggroll_vector(torch::zeros({50}), 6, noise, 3);
    EXPECT_TRUE(out.slice(0, 0, 6, 2).equal(-out.slice(0, 1, 6, 2))) << law;
    noise.antithetic = false;
    EXPECT_TRUE(equal_bits(eggroll_vector(torch::zeros({50}), 3, noise, 3), out.slice(0, 0, 6, 2).contiguous()));
    const at::Tensor one = draw(law, kDraws, 4, 0, 6, 2).to(at::kDouble);
    for (const auto& other :
         {draw(law, kDraws, 5, 0, 6, 2), draw(law, kDraws, 4, 1, 6, 2), draw(law, kDraws, 4, 2, 6, 2),
          draw(law, kDraws, 4, 0, 7, 2), draw(law, kDraws, 4, 0, 6, 3)}) {
      EXPECT_LT(std::abs((one * other).mean().item<double>()), 4 / std::sqrt(kDraws)) << law;
    }
  }
}

TEST(Eggroll, Test3LinearIsTheMaterialisedOne) {
  torch::manual_seed(0);
  for (const auto dtype : kDtypes) {
    for (const auto& law : kLaws) {
      for (const int64_t rank : {1, 2, 4}) {
        for (const bool transposed : {false, true}) {
          EggrollNoise noise{9, 4, 3, true, 0.3, rank, law};
          const at::Tensor w = torch::randn({7, 13}).to(dtype), x = torch::randn({5, 3, transposed ? 7 : 13}).to(dtype);
          const at::Tensor bias = torch::randn({transposed ? 13 : 7}).to(dtype);
          const at::Tensor y = eggroll_linear(x, w, bias, noise, 2, 3, transposed);
          std::vector<at::Tensor> expected;
          for (int64_t i = 0; i < 5; ++i) {
            const at::Tensor e = perturbed(w, false, 2, 3 + i, noise);
            expected.push_back(x[i].to(at::kDouble).matmul(transposed ? e : e.t()) +
                               perturbed(bias, true, 3, 3 + i, noise));
          }
          EXPECT_LT(relative_error(y, torch::stack(expected)), tolerance(dtype)) << law << ' ' << rank << ' ' << dtype;
        }
      }
    }
  }
}

TEST(Eggroll, Test3EmbeddingVectorAndConvolution) {
  torch::manual_seed(0);
  for (const auto& law : kLaws) {
    const EggrollNoise noise{1, 2, 3, true, 0.4, 3, law};
    const at::Tensor w = torch::randn({70, 30}), ids = torch::randint(0, 70, {4, 10}, at::kLong);
    const at::Tensor rows = eggroll_embedding(ids, w, noise, 6), vectors = eggroll_vector(w, 4, noise, 6);
    for (int64_t i = 0; i < 4; ++i) {
      EggrollNoise one = noise;
      one.member_begin += i;
      at::Tensor matrix = w.clone(), vector = w.clone();
      eggroll_perturb_({matrix, vector}, {6, 6}, {"embedding", "vector"}, one);
      EXPECT_TRUE(equal_bits(matrix.index({ids[i]}), rows[i])) << law;
      EXPECT_TRUE(equal_bits(vector, vectors[i])) << law;
      EXPECT_LT(relative_error(matrix, perturbed(w, false, 6, 3 + i, noise)), 1e-5) << law;
    }
    const at::Tensor kernel = torch::randn({5, 3, 3, 2}, at::kDouble), x = torch::randn({4, 2, 3, 6, 7}, at::kDouble);
    const at::Tensor y = eggroll_conv2d(x, kernel, std::nullopt, noise, 1, -1, {2, 1}, {1, 0}, {1, 2});
    for (int64_t i = 0; i < 4; ++i) {
      const at::Tensor expected =
          at::conv2d(x[i], perturbed(kernel, false, 1, 3 + i, noise), {}, {2, 1}, {1, 0}, {1, 2});
      EXPECT_LT(relative_error(y[i], expected), 1e-12);
    }
  }
}

TEST(Eggroll, Test4UpdateIsTheSumOverMembers) {
  torch::manual_seed(0);
  const at::Tensor z = torch::randn({24}, at::kDouble);
  for (const auto& law : kLaws) {
    for (const std::string kind : {"matrix", "vector"}) {
      EggrollNoise noise{4, 2, 0, true, 1, 2, law};
      at::Tensor total = torch::zeros({7, 13}, at::kDouble);
      for (int64_t i = 0; i < 24; ++i) {
        total += z[i] * (perturbed(torch::zeros({7, 13}, at::kDouble), kind == "vector", 3, i, noise));
      }
      EggrollUpdateOptions options;
      options.kind = kind;
      options.seed = 4;
      options.ordinal = 3;
      options.epoch = 2;
      options.rank = 2;
      options.law = law;
      options.dtype = at::kDouble;
      const at::Tensor c = z.slice(0, 0, 24, 2) - z.slice(0, 1, 24, 2);
      EXPECT_LT(relative_error(eggroll_update(c, {7, 13}, options), total), 1e-12) << law << kind;
    }
  }
}

TEST(Eggroll, Test4IntegerLawsAreExactForEveryChunkAndThreadCount) {
  torch::manual_seed(1);
  const at::Tensor c = torch::randint(-1, 2, {700}).to(at::kFloat);
  for (size_t law = 1; law < kLaws.size(); ++law) {
    EggrollUpdateOptions options;
    options.rank = 4;
    options.law = kLaws[law];
    const EggrollNoise noise{0, 0, 0, false, 1, 4, kLaws[law]};
    at::Tensor exact = torch::zeros({33, 21}, at::kDouble);
    for (int64_t k = 0; k < 700; ++k) {
      if (c[k].item<float>() != 0) exact += c[k] * direction({33, 21}, false, 0, k, noise, at::kFloat);
    }
    for (const int threads : {1, 2}) {
      const ThreadCount guard(threads);
      for (const int64_t chunk : {0, 1, 37, 699}) {
        options.chunk_pairs = chunk;
        EXPECT_TRUE(equal_bits(eggroll_update(c, {33, 21}, options), exact.to(at::kFloat))) << kLaws[law] << chunk;
      }
    }
  }
}

// f(W) = <G, W>: E ghat = G, E |ghat|^2 = M2 |G|^2, M2 = (m-1+k)(n-1+k)/r + (1-1/r)(mn+2), k = E z^4.
TEST(Eggroll, Test5And6MomentsOfTheEstimator) {
  constexpr int64_t kPairs = 400000, kRows = 4, kColumns = 3;
  torch::manual_seed(3);
  const at::Tensor g = torch::randn({kRows, kColumns}, at::kDouble);
  for (const auto& law : {std::string("gaussian"), std::string("binomial16"), std::string("rademacher")}) {
    for (const int64_t rank : {1, 2}) {
      const auto factor = [&](int64_t rows, int64_t tag) {
        return eggroll_noise(rows, rank, 1, 0, tag, 0, kPairs, 0, law, at::kDouble);
      };
      const double r = static_cast<double>(rank), k = fourth_moment(law);
      const at::Tensor e = factor(kRows, 0).bmm(factor(kColumns, 1).transpose(1, 2)) / std::sqrt(r);
      const at::Tensor ghat = (e * g).sum({1, 2}).view({-1, 1, 1}) * e;
      const double m2 = (kRows - 1 + k) * (kColumns - 1 + k) / r + (1 - 1 / r) * (kRows * kColumns + 2);
      EXPECT_NEAR(ghat.square().sum().item<double>() / kPairs / g.square().sum().item<double>(), m2, 0.03 * m2);
      EXPECT_LT(((ghat.mean(0) - g).norm() / g.norm()).item<double>(), 3 * std::sqrt((m2 - 1) / kPairs));
      // f = W_11^3 at M = 1/2, sigma = 1: E ghat_11 = 3 M^2 + 3 + (k^2 - 3) / r.
      const at::Tensor v = e.select(1, 0).select(1, 0);
      const at::Tensor cube = ((0.5 + v).pow(3) - (0.5 - v).pow(3)) / 2 * v;
      EXPECT_NEAR(cube.mean().item<double>(), 0.75 + 3 + (k * k - 3) / r,
                  4 * cube.std().item<double>() / std::sqrt(kPairs) + 1e-12);
    }
  }
}

TEST(Eggroll, NoiseHasEqualBitsInForwardAndUpdate) {
  for (const auto dtype : kDtypes) {
    for (const auto& law : kLaws) {
      const EggrollNoise noise{3, 1, 10, true, 1, 1, law};
      EggrollUpdateOptions options;
      options.seed = 3;
      options.ordinal = 2;
      options.epoch = 1;
      options.pair_begin = 5;
      options.law = law;
      options.dtype = dtype;
      const at::Tensor one = torch::ones({1}, dtype == at::kDouble ? at::kDouble : at::kFloat);
      const at::Tensor y =
          eggroll_linear(torch::eye(40, dtype).unsqueeze(0), torch::zeros({6, 40}, dtype), std::nullopt, noise, 2);
      EXPECT_TRUE(eggroll_update(one, {6, 40}, options).to(dtype).equal(y[0].t()))  // a zero may change sign
          << law << dtype;
      options.kind = "vector";
      EXPECT_TRUE(equal_bits(eggroll_update(one, {40}, options).to(dtype),
                             eggroll_vector(torch::zeros({40}, dtype), 1, noise, 2)[0]));
    }
  }
}

TEST(Eggroll, SeededNoiseReplaysInEveryLayout) {
  at::Tensor plain = torch::zeros({6, 50}), transposed = torch::zeros({50, 6}).t();
  seeded_noise_add_({plain, transposed}, {0.5, 0.5}, 8, {4, 4}, 9, 2, "gaussian");
  EXPECT_TRUE(equal_bits(plain, transposed));
  EXPECT_TRUE(equal_bits(plain.view({-1}), eggroll_noise(300, 1, 8, 4, 2, 9, 10, 2).view({-1}) * 0.5));
  const auto version = plain._version();
  seeded_noise_add_({plain}, {-0.5}, 8, {4}, 9, 2);
  EXPECT_GT(plain._version(), version);
  EXPECT_EQ(plain.abs().max().item<float>(), 0);
}

TEST(Eggroll, IsDifferentiableWhereTheModelIs) {
  const at::Tensor x = torch::randn({3, 2, 5}, at::kDouble).requires_grad_();
  const at::Tensor w = torch::randn({4, 5}, at::kDouble).requires_grad_(), b = torch::randn({4}, at::kDouble);
  const EggrollNoise noise{1, 0, 2, true, 0.3, 2, "gaussian"};
  const at::Tensor weight = torch::randn({3, 2, 4}, at::kDouble);
  const auto grads = torch::autograd::grad({(eggroll_linear(x, w, b, noise, 0, 1) * weight).sum()}, {x, w});
  for (int64_t i = 0; i < 3; ++i) {
    EXPECT_LT(relative_error(grads[0][i], weight[i].matmul(perturbed(w.detach(), false, 0, 2 + i, noise))), 1e-12);
  }
  EXPECT_LT(relative_error(grads[1], weight.view({6, 4}).t().mm(x.detach().view({6, 5}))), 1e-12);
}

TEST(Eggroll, BadInput) {
  const at::Tensor x = torch::zeros({4, 5}), w = torch::zeros({3, 5}), none;
  const auto with = [](auto change) {
    EggrollNoise noise;
    change(noise);
    return noise;
  };
  const auto linear = [&](const EggrollNoise& noise, int64_t ordinal = 0) {
    eggroll_linear(x, w, none, noise, ordinal);
  };
  for (const double sigma : {0.0, -1.0, std::numeric_limits<double>::infinity(), std::nan("")}) {
    expect_error<c10::ValueError>([&] { linear(with([&](auto& n) { n.sigma = sigma; })); }, "sigma must be positive");
  }
  expect_error<c10::ValueError>([&] { linear(with([](auto& n) { n.rank = 4; })); }, "rank must be in [1, 3]");
  expect_error<c10::ValueError>([&] { linear(with([](auto& n) { n.rank = 0; })); }, "rank must be at least 1");
  expect_error<c10::ValueError>([&] { linear(with([](auto& n) { n.law = "normal"; })); }, "law must be 'gaussian'");
  expect_error<c10::ValueError>([&] { linear(with([](auto& n) { n.epoch = -1; })); }, "epoch must be in");
  expect_error<c10::ValueError>([&] { linear(EggrollNoise(), 1 << 24); }, "ordinal must be in [0, 2^24)");
  expect_error<c10::ValueError>([&] { eggroll_linear(x, w, none, {}, 0, 1); }, "there is no bias");
  expect_error<c10::TypeError>([&] { eggroll_linear(x, w.to(at::kDouble), none, {}, 0); }, "weight has dtype Double");
  expect_error<c10::IndexError>([&] { eggroll_embedding(torch::full({1}, 3, at::kLong), w, {}, 0); }, "outside [0, 3)");
  expect_error<c10::ValueError>([&] { eggroll_perturb_({x[0]}, {0}, {"matrix"}, {}); }, "is no matrix");
  expect_error<c10::ValueError>([&] { eggroll_update(x, {3, 5}, {}); }, "coeff must be [pairs]");
  expect_error<c10::ValueError>([&] { eggroll_noise(3, 1, 0, 0, 3, 0, 1); }, "tag must be");
  expect_error<c10::ValueError>([&] { eggroll_noise(3, 1, 0, 0, 0, 2, 1); }, "must not be negative");
}

}  // namespace
}  // namespace torch_ext::ops

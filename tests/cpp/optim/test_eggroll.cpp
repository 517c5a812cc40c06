// EGGROLL as a C++ optimizer. The numbers are those of the method's acceptance list; 1 to 6 are in
// tests/cpp/ops/test_eggroll.cpp, 9 is in examples/cpp/cartpole_eggroll.cpp, and what is the same in both languages is
// tested from Python.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/nn/eggroll.h>
#include <torch_ext/optim/eggroll.h>

#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "optim/eggroll/eggroll_trits.h"
#include "support/allocations.h"
#include "support/check.h"

namespace torch_ext::optim {
namespace {

using test::clones;
using test::equal_bits;
using test::expect_error;

at::Tensor leaf(at::IntArrayRef shape, int64_t seed, at::ScalarType dtype = at::kDouble) {
  torch::manual_seed(seed);
  return torch::randn(shape, at::kDouble).to(dtype).requires_grad_();
}

at::Tensor normal(int64_t n, int64_t seed) {
  torch::manual_seed(static_cast<uint64_t>(seed) + 100);
  return torch::randn({n}, at::kDouble);
}

TEST(Eggroll, Test02NoiseReuse) {
  for (const auto& [reuse, epochs] : std::vector<std::pair<int64_t, std::vector<int64_t>>>{
           {3, {0, 0, 0, 1, 1, 1, 2}}, {1, {0, 1, 2, 3}}, {0, {0, 0, 0, 0}}}) {
    Eggroll optimizer(std::vector<at::Tensor>{leaf({3, 4}, 0)}, EggrollOptions().noise_reuse(reuse).population(4));
    for (const int64_t epoch : epochs) {
      EXPECT_EQ(optimizer.ask().noise().epoch, epoch);
      optimizer.tell(at::zeros({4}));
    }
  }
}

TEST(Eggroll, Test07XorWithAdam) {
  torch::manual_seed(3);
  auto model =
      nn::eggroll_convert(torch::nn::Sequential(torch::nn::Linear(2, 8), torch::nn::Tanh(), torch::nn::Linear(8, 1)));
  const at::Tensor x = torch::tensor({{0.0F, 0.0F}, {0.0F, 1.0F}, {1.0F, 0.0F}, {1.0F, 1.0F}});
  const at::Tensor y = torch::tensor({0.0F, 1.0F, 1.0F, 0.0F});
  Eggroll es(model->parameters(), EggrollOptions().sigma(0.2).population(64));
  torch::optim::Adam adam(model->parameters(), torch::optim::AdamOptions(0.05));
  const torch::NoGradGuard no_grad;
  double error = 1;
  int steps = 0;
  for (; steps < 500 && error >= 0.01; ++steps) {
    const Population pop = es.ask();
    at::Tensor values;
    {
      const auto guard = pop.applied_to(model);
      values = (model->forward(x.expand({64, 4, 2})).squeeze(-1) - y).square().mean(1);
    }
    es.tell(values, /*update=*/false);
    adam.step();
    error = (model->forward(x).squeeze(-1) - y).square().mean().item<double>();
  }
  EXPECT_LT(error, 0.01) << steps;
}

// Four processes one after another: what they would send is recorded, what they receive is made by the caller.
struct Wire {
  std::vector<at::Tensor> sent;
  at::Tensor received;
  ColumnShards shards(int64_t rank, int64_t count) {
    ColumnShards s;
    s.rank = rank;
    s.count = count;
    s.all_gather = [this](const at::Tensor& own) {
      sent.push_back(own.clone());
      return received.defined() ? received : own.repeat({4});
    };
    return s;
  }
};

TEST(Eggroll, Test11ProcessesSendFourBytesAMemberOrAFifthAPair) {
  for (const bool sign : {false, true}) {
    const int64_t n = 48;
    const at::Tensor values = normal(n, 1).to(at::kFloat);
    EggrollOptions options = EggrollOptions(0.5).population(n).noise("rademacher").chunk_members(4);
    if (sign) options.shaping("sign");
    const auto run = [&](int64_t rank, int64_t count, Wire& wire) {
      std::vector<at::Tensor> params{leaf({5, 4}, 2), leaf({3}, 3)};
      Eggroll optimizer(params, options);
      if (count > 1) optimizer.set_shards(wire.shards(rank, count));
      const auto [begin, end] = optimizer.members();
      optimizer.ask();
      optimizer.tell(values.slice(0, begin, end));
      return clones(params);
    };
    Wire unused;
    const auto alone = run(0, 1, unused);
    std::vector<at::Tensor> parts;
    for (int64_t rank = 0; rank < 4; ++rank) {
      Wire wire;
      run(rank, 4, wire);
      ASSERT_EQ(wire.sent.size(), 1u);
      parts.push_back(wire.sent[0]);
    }
    const at::Tensor whole = at::cat(parts);
    EXPECT_EQ(static_cast<int64_t>(whole.nbytes()), sign ? 4 * ((n / 8 + 4) / 5) : 4 * n);
    for (int64_t rank = 0; rank < 4; ++rank) {
      Wire wire;
      wire.received = whole;
      EXPECT_TRUE(equal_bits(run(rank, 4, wire), alone)) << sign << ", rank " << rank;
    }
  }
}

TEST(Eggroll, MembersOfProcesses) {
  const auto members = [](int64_t n, int64_t rank, int64_t count, std::optional<int64_t> chunk) {
    Eggroll optimizer(std::vector<at::Tensor>{leaf({2}, 0)}, EggrollOptions().population(n).chunk_members(chunk));
    ColumnShards shards;
    shards.rank = rank;
    shards.count = count;
    optimizer.set_shards(shards);
    return optimizer.members();
  };
  using Range = std::pair<int64_t, int64_t>;
  EXPECT_EQ(members(10, 0, 1, std::nullopt), Range(0, 10));
  EXPECT_EQ(members(10, 0, 4, std::nullopt), Range(0, 4));
  EXPECT_EQ(members(10, 2, 4, std::nullopt), Range(8, 10));
  EXPECT_EQ(members(10, 3, 4, std::nullopt), Range(10, 10));
  EXPECT_EQ(members(64, 1, 2, 8), Range(32, 64));
  EXPECT_EQ(members(64, 1, 3, 8), Range(24, 48));
}

TEST(Eggroll, ShardedUpdateIsTheUpdate) {
  const at::Tensor values = normal(16, 1);
  const auto options = EggrollOptions(0.5).population(16).noise("binomial16").shaping("sign");
  std::vector<at::Tensor> whole{leaf({7, 4}, 2), leaf({3}, 3)}, shared{leaf({7, 4}, 2), leaf({3}, 3)};
  Eggroll alone(whole, options);
  alone.ask();
  alone.tell(values);
  // Two processes that hold the same values: each computes half of the rows. What the other sends is recorded first.
  std::vector<std::vector<at::Tensor>> sent(2);
  for (int round = 0; round < 2; ++round) {
    for (int64_t rank = 0; rank < 2; ++rank) {
      std::vector<at::Tensor> params{leaf({7, 4}, 2), leaf({3}, 3)};
      Eggroll optimizer(params, options);
      ColumnShards shards;
      shards.rank = rank;
      shards.count = 2;
      size_t call = 0;
      shards.all_gather = [&](const at::Tensor& own) {
        if (round == 0) {
          sent[static_cast<size_t>(rank)].push_back(own.clone());
          return own.repeat({2});
        }
        const at::Tensor both = at::cat({sent[0][call], sent[1][call]});
        ++call;
        return both;
      };
      optimizer.set_shards(shards);
      optimizer.set_sharded_update(true);
      optimizer.ask();
      const auto [begin, end] = optimizer.members();
      optimizer.tell(values.slice(0, begin, end));
      if (round == 1) {
        EXPECT_TRUE(equal_bits(clones(params), clones(whole))) << rank;
      }
    }
    if (round == 0) {  // the update that the first round sent was that of half of the signs: make it anew
      const at::Tensor signs = at::cat({sent[0][0], sent[1][0]});
      for (int64_t rank = 0; rank < 2; ++rank) {
        std::vector<at::Tensor> params{leaf({7, 4}, 2), leaf({3}, 3)};
        Eggroll optimizer(params, options);
        ColumnShards shards;
        shards.rank = rank;
        shards.count = 2;
        auto& list = sent[static_cast<size_t>(rank)];
        list.resize(1);
        shards.all_gather = [&](const at::Tensor& own) {
          if (own.scalar_type() == at::kByte) return signs;
          list.push_back(own.clone());
          return own.repeat({2});
        };
        optimizer.set_shards(shards);
        optimizer.set_sharded_update(true);
        optimizer.ask();
        const auto [begin, end] = optimizer.members();
        optimizer.tell(values.slice(0, begin, end));
      }
    }
  }
}

TEST(Eggroll, CheckParametersFindsADifferentBit) {
  std::vector<at::Tensor> params{leaf({5, 4}, 2), leaf({3}, 3, at::kBFloat16)};
  Eggroll optimizer(params, EggrollOptions().population(4));
  optimizer.check_parameters();  // alone
  Wire wire;
  optimizer.set_shards(wire.shards(1, 4));
  optimizer.check_parameters();
  wire.received = wire.sent[0].repeat({4});
  const torch::NoGradGuard no_grad;
  params[1][1] += 1e-2;
  expect_error<c10::Error>([&] { optimizer.check_parameters(); }, "parameter 1 (shape [3]) differs between process 1");
}

TEST(Eggroll, Test12EqualValuesMoveNothingAndMemoryDoesNotGrow) {
  std::vector<at::Tensor> params{leaf({64, 48}, 0, at::kFloat), leaf({64}, 1, at::kFloat)};
  const auto start = clones(params);
  std::vector<int64_t> peaks;
  for (const int64_t n : {int64_t{256}, int64_t{65536}}) {
    Eggroll optimizer(params, EggrollOptions(0.5).population(n).sigma(0.1));
    optimizer.ask();
    optimizer.tell(at::full({n}, 0.1));
    EXPECT_TRUE(equal_bits(clones(params), start));
    optimizer.ask();
    const at::Tensor values = normal(n, 5).to(at::kFloat);
    const test::Allocations allocations;
    optimizer.tell(values);
    peaks.push_back(allocations.peak() - 3 * 8 * n);  // values in double, coefficients, and these in float
    const torch::NoGradGuard no_grad;
    for (size_t i = 0; i < params.size(); ++i) params[i].copy_(start[i]);
  }
  EXPECT_LT(peaks[1], peaks[0] + (int64_t{9} << 20));  // the update's workspace: 8 MiB, whatever N is
}

TEST(Eggroll, BothClosuresAndAskAndTellAreTheSame) {
  const auto options = EggrollOptions(0.5).population(8).sigma(0.1).momentum(0.5);
  std::vector<std::vector<at::Tensor>> results;
  for (int form = 0; form < 3; ++form) {
    std::vector<at::Tensor> params{leaf({4, 3}, 0), leaf({3}, 1)};
    Eggroll optimizer(params, options);
    const auto loss = [&] { return (params[0].square().sum() + (params[1] - 1).square().sum()).detach(); };
    const auto values = [&](const Population& pop) {
      std::vector<at::Tensor> found;
      for (int64_t i = 0; i < pop.size(); ++i) {
        const auto guard = pop.member(i);
        found.push_back(loss());
      }
      return at::stack(found);
    };
    const double before = loss().item<double>();
    for (int t = 0; t < 30; ++t) {
      if (form == 0) optimizer.step(loss);
      if (form == 1) optimizer.step(values);
      if (form == 2) optimizer.tell(values(optimizer.ask()));
    }
    EXPECT_LT(loss().item<double>(), before);
    EXPECT_EQ(optimizer.updates(), 30);
    results.push_back(clones(params));
  }
  EXPECT_TRUE(equal_bits(results[0], results[1]));
  EXPECT_TRUE(equal_bits(results[0], results[2]));
}

TEST(Eggroll, ErrorsChangeNothing) {
  std::vector<at::Tensor> params{leaf({4, 3}, 0)};
  const auto start = clones(params);
  Eggroll optimizer(params, EggrollOptions().population(8));
  expect_error<c10::Error>([&] { optimizer.tell(at::zeros({8})); }, "tell() without ask()");
  expect_error<c10::ValueError>([&] { optimizer.ask(0, 10); }, "of a population of 8");
  expect_error<c10::ValueError>([&] { optimizer.ask(1, 4); }, "must be even");
  optimizer.ask();
  expect_error<c10::ValueError>([&] { optimizer.tell(at::zeros({7})); }, "one value for each of 8 members");
  const double inf = std::numeric_limits<double>::infinity();
  expect_error<c10::ValueError>([&] { optimizer.tell(at::full({8}, inf)); }, "infinite or NaN");
  optimizer.set_sigma(0.5);
  expect_error<c10::ValueError>([&] { optimizer.tell(at::zeros({8})); }, "changed between ask() and tell()");
  expect_error<c10::ValueError>([&] { optimizer.set_sigma(-1); }, "Invalid sigma");
  expect_error<c10::Error>([&] { optimizer.step(); }, "needs a closure");
  EXPECT_TRUE(equal_bits(clones(params), start));
  EXPECT_TRUE(optimizer.state().empty());
  expect_error<c10::ValueError>(
      [&] {
        Eggroll wide(std::vector<at::Tensor>{leaf({2, 5}, 0)}, EggrollOptions().rank(3));
        wide.ask();
      },
      "Invalid rank: 3 is above 2");
}

}  // namespace
}  // namespace torch_ext::optim

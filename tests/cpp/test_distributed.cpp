// Data-parallel steps equal one process on the whole batch. The ranks are threads; their all-reduce goes through c10d's
// own ProcessGroup and Backend classes. (Gloo itself is tested from Python: torch's packages ship the library but not
// the headers that ProcessGroupGloo.hpp includes.)
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/distributed.h>
#include <torch_ext/optim/adahessian.h>
#include <torch_ext/optim/mfac.h>

#include <cmath>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <utility>
#include <vector>

#include "support/check.h"

namespace torch_ext {
namespace {

using optim::AdaHessian;
using optim::AdaHessianOptions;
using optim::MFAC;
using optim::MFACOptions;
using test::equal_bits;
using test::expect_error;
using test::relative_error;

// Where the ranks meet: adds their tensors in rank order, so that all get the same bits.
class Meeting {
 public:
  explicit Meeting(int size) : size_(size), parts_(static_cast<size_t>(size)) {}

  at::Tensor sum(int rank, const at::Tensor& part) {
    std::unique_lock<std::mutex> lock(mutex_);
    parts_[static_cast<size_t>(rank)] = part;
    const int64_t round = round_;
    if (++arrived_ == size_) {
      total_ = parts_[0].clone();
      for (size_t r = 1; r < parts_.size(); ++r) total_.add_(parts_[r]);
      arrived_ = 0;
      ++round_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return round_ != round; });
    }
    return total_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int size_, arrived_ = 0;
  int64_t round_ = 0;
  std::vector<at::Tensor> parts_;
  at::Tensor total_;
};

class Finished : public c10d::Work {
 public:
  bool isCompleted() override { return true; }
  bool wait(std::chrono::milliseconds) override { return true; }
};

class ThreadBackend : public c10d::Backend {
 public:
  ThreadBackend(std::shared_ptr<Meeting> meeting, int rank, int size)
      : Backend(rank, size), meeting_(std::move(meeting)) {}
  const std::string getBackendName() const override { return "threads"; }
  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions&) override {
    ++calls;
    for (at::Tensor& tensor : tensors) tensor.copy_(meeting_->sum(getRank(), tensor.clone()));
    return c10::make_intrusive<Finished>();
  }
  c10::intrusive_ptr<c10d::Work> _reduce_scatter_base(at::Tensor& own, at::Tensor& whole,
                                                      const c10d::ReduceScatterOptions&) override {
    own.copy_(meeting_->sum(getRank(), whole.clone()).narrow(0, getRank() * own.numel(), own.numel()));
    return c10::make_intrusive<Finished>();
  }
  c10::intrusive_ptr<c10d::Work> _allgather_base(at::Tensor& whole, at::Tensor& own,
                                                 const c10d::AllgatherOptions&) override {
    at::Tensor part = at::zeros_like(whole);
    part.narrow(0, getRank() * own.numel(), own.numel()).copy_(own);
    whole.copy_(meeting_->sum(getRank(), part));
    return c10::make_intrusive<Finished>();
  }
  int calls = 0;

 private:
  std::shared_ptr<Meeting> meeting_;
};

// Runs body(rank, reduce, shards) on one thread per rank, over a Backend or a ProcessGroup; rethrows what a rank threw.
void on_ranks(int size, bool process_group,
              const std::function<void(int, const optim::ReduceFn&, const optim::ColumnShards&)>& body) {
  const auto meeting = std::make_shared<Meeting>(size);
  const auto store = c10::make_intrusive<c10d::HashStore>();
  std::vector<std::exception_ptr> errors(static_cast<size_t>(size));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        c10::intrusive_ptr<c10d::Backend> backend = c10::make_intrusive<ThreadBackend>(meeting, rank, size);
        if (!process_group) return body(rank, mean_over(backend), shards_over(backend));
        auto group = c10::make_intrusive<c10d::ProcessGroup>(store, rank, size);
        group->setBackend(at::kCPU, c10d::ProcessGroup::BackendType::CUSTOM, backend);
        group->setDefaultBackend(c10d::ProcessGroup::BackendType::CUSTOM);
        body(rank, mean_over(group), shards_over(group));
      } catch (...) {
        errors[static_cast<size_t>(rank)] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& error : errors) {
    if (error != nullptr) std::rethrow_exception(error);
  }
}

void on_ranks(int size, bool process_group, const std::function<void(int, const optim::ReduceFn&)>& body) {
  on_ranks(size, process_group,
           [&](int rank, const optim::ReduceFn& reduce, const optim::ColumnShards&) { body(rank, reduce); });
}

class MeanOver : public ::testing::TestWithParam<std::tuple<int, bool>> {
 protected:
  int size() const { return std::get<0>(GetParam()); }
  bool process_group() const { return std::get<1>(GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(All, MeanOver, ::testing::Combine(::testing::Values(2, 4), ::testing::Bool()),
                         [](const auto& info) {
                           return std::to_string(std::get<0>(info.param)) + "ranks_" +
                                  (std::get<1>(info.param) ? "ProcessGroup" : "Backend");
                         });

TEST_P(MeanOver, AveragesEveryShapeAndDtype) {
  std::vector<std::vector<at::Tensor>> results(static_cast<size_t>(size()));
  on_ranks(size(), process_group(), [&](int rank, const optim::ReduceFn& reduce) {
    const at::Tensor base = torch::arange(6, at::kDouble).reshape({2, 3}) * (rank + 1);
    std::vector<at::Tensor> tensors{base.clone(), base.to(at::kFloat).t(), base.to(at::kBFloat16), base.new_empty({0}),
                                    torch::full({}, rank, at::kDouble)};
    reduce(tensors);
    results[static_cast<size_t>(rank)] = tensors;
  });
  const double mean = (size() + 1) / 2.0;
  const at::Tensor expected = torch::arange(6, at::kDouble).reshape({2, 3}) * mean;
  for (const auto& tensors : results) {
    ASSERT_EQ(tensors.size(), 5u);
    EXPECT_TRUE(test::same_bits(tensors[0], expected));
    EXPECT_TRUE(test::same_bits(tensors[1], expected.to(at::kFloat).t()));
    EXPECT_TRUE(test::same_bits(tensors[2], expected.to(at::kFloat)));  // half precision comes back in float32
    EXPECT_EQ(tensors[3].numel(), 0);
    EXPECT_EQ(tensors[4].item<double>(), mean - 1);
  }
}

struct Data {
  at::Tensor x, t;
  Data() {
    torch::manual_seed(7);
    x = torch::randn({16, 6}, at::kDouble);
    t = torch::randn({16, 4}, at::kDouble);
  }
};

struct Model {
  at::Tensor w, b;
  Model() {
    torch::manual_seed(8);
    w = torch::randn({4, 6}, at::kDouble).requires_grad_();
    b = torch::zeros({4}, at::kDouble).requires_grad_();
  }
  std::vector<at::Tensor> parameters() const { return {w, b}; }
  at::Tensor loss(const at::Tensor& x, const at::Tensor& t) const {
    return (torch::tanh(torch::matmul(x, w.t()) + b) - t).square().mean();
  }
};

TEST_P(MeanOver, Spec11AdaHessianEqualsOneProcessOnTheWholeBatch) {
  const Data data;
  std::vector<std::pair<std::string, AdaHessianOptions>> cases{
      {"default", AdaHessianOptions(0.1)},
      {"row", AdaHessianOptions(0.1).linear_averaging("row").n_samples(2)},
      {"lazy", AdaHessianOptions(0.1).update_each(3).averaging("signed_mean").linear_averaging("row")},
      {"finite difference", AdaHessianOptions(0.1).hvp("finite_difference")}};
  for (const auto& [name, options] : cases) {
    const Model whole;
    AdaHessian single(whole.parameters(), options);
    for (int i = 0; i < 8; ++i) single.step([&] { return whole.loss(data.x, data.t); });
    std::vector<Model> models(static_cast<size_t>(size()));
    on_ranks(size(), process_group(), [&, &options = options](int rank, const optim::ReduceFn& reduce) {
      const Model& model = models[static_cast<size_t>(rank)];
      const int64_t share = 16 / size();
      const at::Tensor x = data.x.narrow(0, rank * share, share), t = data.t.narrow(0, rank * share, share);
      AdaHessian optimizer(model.parameters(), options);
      optimizer.set_reduce(reduce);
      for (int i = 0; i < 8; ++i) optimizer.step([&] { return model.loss(x, t); });
    });
    for (size_t r = 0; r < models.size(); ++r) {
      const double tolerance = name == "finite difference" ? 1e-9 : 1e-12;
      EXPECT_LT(relative_error(models[r].w, whole.w), tolerance) << name;
      EXPECT_LT(relative_error(models[r].b, whole.b), tolerance) << name;
      EXPECT_TRUE(equal_bits(models[r].parameters(), models[0].parameters())) << name;
    }
  }
}

TEST_P(MeanOver, MicroBatchesAndHalfPrecision) {
  const Data data;
  const Model whole;
  AdaHessian single(whole.parameters());
  for (int i = 0; i < 4; ++i) single.step([&] { return whole.loss(data.x, data.t); });
  std::vector<Model> models(static_cast<size_t>(size()));
  std::vector<at::Tensor> halves(static_cast<size_t>(size()));
  on_ranks(size(), process_group(), [&](int rank, const optim::ReduceFn& reduce) {
    const Model& model = models[static_cast<size_t>(rank)];
    AdaHessian optimizer(model.parameters());
    optimizer.set_reduce(reduce);
    const int64_t share = 8 / size();
    for (int i = 0; i < 4; ++i) {
      for (int64_t k = 0; k < 2; ++k) {
        const int64_t begin = (2 * rank + k) * share;
        optimizer.accumulate(model.loss(data.x.narrow(0, begin, share), data.t.narrow(0, begin, share)), 0.5);
      }
      optimizer.step();
    }
    const at::Tensor half = torch::ones({5}, at::kBFloat16).requires_grad_();
    AdaHessian narrow({half}, AdaHessianOptions(0.25).betas({0, 0}).eps(0));
    narrow.set_reduce(reduce);
    narrow.step([&] { return (half * half).sum() * (rank + 1); });
    halves[static_cast<size_t>(rank)] = half.detach();
  });
  for (const Model& model : models) EXPECT_LT(relative_error(model.w, whole.w), 1e-12);
  for (const at::Tensor& half : halves) EXPECT_TRUE(test::same_bits(half, torch::full({5}, 0.75, at::kBFloat16)));
}

TEST_P(MeanOver, OneRanksNonfiniteGradientSkipsAll) {
  std::vector<Model> models(static_cast<size_t>(size()));
  const Data data;
  const Model start;
  on_ranks(size(), process_group(), [&](int rank, const optim::ReduceFn& reduce) {
    const Model& model = models[static_cast<size_t>(rank)];
    AdaHessian optimizer(model.parameters());
    optimizer.set_reduce(reduce);
    optimizer.step([&] {
      const at::Tensor loss = model.loss(data.x, data.t);
      return rank == 1 ? loss * std::numeric_limits<double>::infinity() : loss;
    });
    EXPECT_EQ(optimizer.skipped_steps().item<int64_t>(), 1);
  });
  for (const Model& model : models) EXPECT_TRUE(equal_bits(model.parameters(), start.parameters()));
}

// The window whole on every process (set_reduce), and its columns shared out (set_shards).
TEST_P(MeanOver, MFACEqualsOneProcessOnTheWholeBatch) {
  const Data data;
  const auto loss = [&](const Model& model, const at::Tensor& large, const at::Tensor& x, const at::Tensor& t) {
    return model.loss(x, t) + (large * large).mean() * x.square().mean();
  };
  const auto params = [](const Model& model, const at::Tensor& large) {
    return std::vector<at::Tensor>{model.w, large, model.b};
  };
  const at::Tensor start = torch::arange(2500, at::kDouble).sin();  // three tiles of columns
  const MFACOptions options =
      MFACOptions(0.02).num_grads(8).damping(1e-2).momentum(0.5).weight_decay(0.01).window_format("float64");
  for (const bool shards : {false, true}) {
    const Model whole;
    const at::Tensor large = start.clone().requires_grad_();
    MFAC single(params(whole, large), options);
    for (int i = 0; i < 12; ++i) single.step([&] { return loss(whole, large, data.x, data.t); });
    const std::vector<at::Tensor> direction = single.precondition({whole.w.detach(), {}, whole.b.detach()});
    std::vector<Model> models(static_cast<size_t>(size()));
    std::vector<at::Tensor> larges(models.size()), directions(models.size());
    std::vector<int64_t> bytes(models.size());
    on_ranks(size(), process_group(), [&](int rank, const optim::ReduceFn& reduce, const optim::ColumnShards& columns) {
      const auto r = static_cast<size_t>(rank);
      const int64_t share = 16 / size();
      const at::Tensor x = data.x.narrow(0, rank * share, share), t = data.t.narrow(0, rank * share, share);
      larges[r] = start.clone().requires_grad_();
      MFAC optimizer(params(models[r], larges[r]), options);
      if (shards) {
        optimizer.set_shards(columns);
      } else {
        optimizer.set_reduce(reduce);
      }
      bytes[r] = optimizer.memory_bytes();
      for (int i = 0; i < 12; ++i) optimizer.step([&] { return loss(models[r], larges[r], x, t); });
      EXPECT_EQ(optimizer.memory_bytes(), bytes[r]);
      directions[r] = optimizer.precondition({models[r].w.detach(), {}, models[r].b.detach()})[0];
      optimizer.step([&] { return loss(models[r], larges[r], x, t) * (rank == 1 ? NAN : 1); });
      EXPECT_EQ(optimizer.skipped_steps().item<int64_t>(), 1);
    });
    for (size_t r = 0; r < models.size(); ++r) {
      EXPECT_LT(relative_error(models[r].w, whole.w), 1e-12) << shards;
      EXPECT_LT(relative_error(larges[r], large), 1e-12) << shards;
      EXPECT_LT(relative_error(directions[r], direction[0]), 1e-9) << shards;  // divided by the damping
      EXPECT_TRUE(equal_bits(params(models[r], larges[r]), params(models[0], larges[0]))) << shards;
      EXPECT_EQ(bytes[r] < single.memory_bytes(), shards);
    }
  }
}

TEST_P(MeanOver, MFACShardsLoadAWholeWindow) {
  const at::Tensor start = torch::arange(2500, at::kDouble).sin();
  const auto loss = [](const at::Tensor& p) { return (p * p * p).sum() + (p * p).mean(); };
  const MFACOptions options = MFACOptions(0.02).num_grads(4).damping(1e-2).window_format("float64");
  const at::Tensor whole = start.clone().requires_grad_();
  MFAC single({whole}, options);
  for (int i = 0; i < 6; ++i) single.step([&] { return loss(whole); });
  const c10::IValue saved = single.state_dict().deepcopy();
  const at::Tensor middle = whole.detach().clone();
  for (int i = 0; i < 3; ++i) single.step([&] { return loss(whole); });
  on_ranks(size(), process_group(), [&](int rank, const optim::ReduceFn&, const optim::ColumnShards& columns) {
    const at::Tensor mine = middle.clone().requires_grad_();
    MFAC optimizer({mine}, options);
    optimizer.set_shards(columns);
    optimizer.load_state_dict(saved);
    for (int i = 0; i < 3; ++i) optimizer.step([&] { return loss(mine); });
    EXPECT_LT(relative_error(mine, whole), 1e-12);
    const c10::IValue part = optimizer.state_dict();
    MFAC alone({mine}, options);
    alone.load_state_dict(part);
    expect_error<c10::ValueError>([&] { alone.step([&] { return loss(mine); }); },
                                  "this state's window holds slice " + std::to_string(rank));
  });
}

TEST(MeanOverErrors, NoGroup) {
  expect_error<c10::ValueError>([] { shards_over(c10::intrusive_ptr<c10d::ProcessGroup>()); }, "no process group");
  expect_error<c10::ValueError>([] { shards_over(c10::intrusive_ptr<c10d::Backend>()); }, "no process group");
  expect_error<c10::ValueError>([] { mean_over(c10::intrusive_ptr<c10d::ProcessGroup>()); }, "no process group");
  expect_error<c10::ValueError>([] { mean_over(c10::intrusive_ptr<c10d::Backend>()); }, "no process group");
}

}  // namespace
}  // namespace torch_ext

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <torch_ext/optim/eggroll.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "core/check.h"
#include "optim/eggroll/eggroll_op.h"
#include "optim/eggroll/eggroll_tell.h"

namespace torch_ext::optim {
namespace {

// Groups without options may be written as parameters only; the base class fills them in.
std::vector<torch::optim::OptimizerParamGroup> one_group(std::vector<at::Tensor> params) {
  return {torch::optim::OptimizerParamGroup(std::move(params))};
}

void check_combinations(const Options& o) {
  const bool antithetic = o.get("antithetic").toBool();
  check_eggroll_shape(o.get("population").toInt(), o.get("shaping").toStringRef(), o.get("group_size").toInt(),
                      antithetic);
  const auto chunk = o.get("chunk_members").toOptional<int64_t>();
  TORCH_CHECK_VALUE(!chunk.has_value() || !antithetic || *chunk % 2 == 0, "Invalid chunk_members: ", *chunk, " (",
                    kEggroll, " evaluates pairs, so it needs an even number; antithetic=False does without them)");
  const auto kind = o.get("kind").toOptional<std::string>();
  TORCH_CHECK_VALUE(!kind.has_value() || *kind == "matrix" || *kind == "embedding" || *kind == "vector",
                    "Invalid kind: '", kind.value_or(""), "' (", kEggroll, " knows 'matrix', 'embedding', 'vector')");
}

bool same_params(const std::vector<PopulationParam>& a, const std::vector<PopulationParam>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& x, const auto& y) {
    return x.param.is_same(y.param) && x.ordinal == y.ordinal && x.kind == y.kind;
  });
}

bool same_noise(const ops::EggrollNoise& a, const ops::EggrollNoise& b) {
  return a.seed == b.seed && a.epoch == b.epoch && a.antithetic == b.antithetic && a.sigma == b.sigma &&
         a.rank == b.rank && a.law == b.law;
}

}  // namespace

const Schema& Eggroll::static_schema() {
  using Type = Field::Type;
  using DType = StateField::DType;
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const auto choice = [](const char* name, const char* value, std::vector<std::string> choices) {
    return Field{name, Type::kString, value, -kInf, kInf, false, false, std::move(choices), /*global=*/true};
  };
  const auto global_int = [](const char* name, int64_t value, double low) {
    return Field{name, Type::kInt, value, low, kInf, false, false, {}, /*global=*/true};
  };
  const auto global_bool = [](const char* name, bool value) {
    return Field{name, Type::kBool, value, -kInf, kInf, false, false, {}, /*global=*/true};
  };
  static const Schema schema{
      kEggroll,
      /*format_version=*/1,
      {
          {"lr", Type::kFloat, 1e-3, 0, kInf, false, true},
          {"momentum", Type::kFloat, 0.0, 0, 1, false, true},
          {"weight_decay", Type::kFloat, 0.0, 0, kInf, false, true},
          {"kind", Type::kOptionalString, c10::IValue()},
          {"sigma", Type::kFloat, 1e-2, 0, kInf, true, true, {}, /*global=*/true},
          global_int("rank", 1, 1),
          global_int("population", 256, 2),
          global_bool("antithetic", true),
          global_int("group_size", 0, 0),
          global_int("noise_reuse", 1, 0),
          choice("shaping", "zscore", {"zscore", "grouped", "centered_rank", "sign", "raw", "softmax", "baseline"}),
          {"temperature", Type::kFloat, 1.0, 0, kInf, true, true, {}, /*global=*/true},
          choice("noise", "gaussian", {"gaussian", "binomial16", "binomial64", "rademacher"}),
          choice("update_scale", "reference", {"reference", "paper", "unbiased"}),
          choice("nonfinite", "error", {"error", "min"}),
          {"chunk_members", Type::kOptionalInt, c10::IValue(), 1, kInf, false, false, {}, /*global=*/true},
          global_int("seed", 0, -kInf),
          global_bool("maximize", false),
      },
      {
          {"step", DType::kFloat32},
          {"momentum_buffer", DType::kArithmetic},
          {"global_updates", DType::kInt64, /*on_cpu=*/true},
          {"global_skipped", DType::kInt64},
      },
      check_combinations};
  return schema;
}

EggrollOptions::EggrollOptions() : OptionsOf(Eggroll::static_schema()) {}
EggrollOptions::EggrollOptions(double lr) : EggrollOptions() { this->lr(lr); }

Eggroll::Eggroll(const std::vector<torch::optim::OptimizerParamGroup>& groups, EggrollOptions defaults)
    : OptimizerBase(groups, std::make_unique<EggrollOptions>(std::move(defaults))) {}

Eggroll::Eggroll(std::vector<at::Tensor> params, EggrollOptions defaults)
    : Eggroll(one_group(std::move(params)), std::move(defaults)) {}

// Every parameter that requires a gradient, checked.
std::vector<PopulationParam> Eggroll::perturbed() const {
  std::vector<PopulationParam> params;
  for (const Entry& entry : entries()) {
    if (!entry.param.requires_grad()) continue;
    const Options& options = group_options(entry.group);
    options.check();
    eggroll_check_param(entry.param, entry.ordinal, options);
    if (entry.param.numel() == 0) continue;
    params.push_back({entry.param, entry.ordinal, eggroll_kind(entry.param, options)});
  }
  return params;
}

std::pair<int64_t, int64_t> Eggroll::members() const {
  first_param();
  return eggroll_members(shared_options(), shards_.rank, shards_.count);
}

Population Eggroll::ask(int64_t begin, std::optional<int64_t> end) {
  const auto own = members();
  const Options& shared = shared_options();
  const bool all = begin == 0 && !end.has_value();
  const int64_t from = all ? own.first : begin, to = all ? own.second : end.value_or(shared.get("population").toInt());
  TORCH_CHECK_VALUE(from >= 0 && to <= shared.get("population").toInt() && from < to, kEggroll, ": ask(", from, ", ",
                    to, ") of a population of ", shared.get("population").toInt());
  auto params = perturbed();
  const ops::EggrollNoise noise = eggroll_noise_of(shared, updates(), from);
  Population population(noise, to - from, params, eggroll_baseline(shared));
  asked_ = Asked{noise, std::move(params)};
  return population;
}

at::Tensor Eggroll::tell(const at::Tensor& values, bool update) {
  const at::NoGradGuard no_grad;
  TORCH_CHECK(asked_.has_value(), kEggroll, ": tell() without ask(): the values belong to no population");
  const Options& shared = shared_options();
  auto params = perturbed();
  TORCH_CHECK_VALUE(
      same_noise(asked_->noise, eggroll_noise_of(shared, updates(), 0)) && same_params(asked_->params, params),
      kEggroll, ": parameters or options changed between ask() and tell(): ask again");
  const EggrollShaped shaped = eggroll_shaped(shared, values, shards_);
  const ops::EggrollNoise noise = asked_->noise;
  asked_.reset();
  const auto all = entries();
  std::vector<EggrollTarget> targets;
  for (const PopulationParam& p : params) {
    const Options& options = group_options(all[static_cast<size_t>(p.ordinal)].group);
    EggrollTarget target{p.param, p.ordinal, &options, {}, {}};
    if (update) {
      StateTensors& state = state_of(p.param).tensors;
      eggroll_init_state(p.param, options, state);
      target.step = state.at("step");
      if (state.count("momentum_buffer") != 0) target.momentum_buffer = state.at("momentum_buffer");
    }
    targets.push_back(std::move(target));
  }
  eggroll_update(targets, noise, shaped, global_counter("global_skipped"), update, shards_, sharded_update_);
  global_counter("global_updates").add_(1);
  return shaped.mean;
}

at::Tensor Eggroll::step(const PopulationClosure& closure) {
  TORCH_CHECK(closure, kEggroll, ": step() needs a closure that returns the members' values; or use ask() and tell()");
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> parts;
  for (const auto& [begin, end] : eggroll_chunks(shared_options(), shards_.rank, shards_.count)) {
    const Population population = ask(begin, end);
    parts.push_back(closure(population));
    eggroll_check_values(parts.back(), end - begin);
    parts.back() = parts.back().detach();
  }
  if (parts.empty()) {  // more processes than chunks
    ask(0, shared_options().get("population").toInt());
    parts.push_back(at::empty({0}, first_param().options().requires_grad(false).dtype(at::kFloat)));
  }
  return tell(parts.size() == 1 ? parts[0] : at::cat(parts));
}

at::Tensor Eggroll::step(LossClosure closure) {
  TORCH_CHECK(closure, kEggroll, ": step() needs a closure that returns the members' values; or use ask() and tell()");
  return step(PopulationClosure([&](const Population& population) {
    std::vector<at::Tensor> values;
    for (int64_t i = 0; i < population.size(); ++i) {
      const auto guard = population.member(i);
      const at::Tensor value = closure();
      TORCH_CHECK(value.defined() && value.numel() == 1, kEggroll, ": the closure must return one number");
      values.push_back(value.detach().reshape({}));
    }
    return at::stack(values);
  }));
}

void Eggroll::set_sigma(double sigma) {
  EggrollOptions checked;
  checked.sigma(sigma);
  for (auto& group : param_groups_) static_cast<Options&>(group.options()).set("sigma", sigma);
  static_cast<Options&>(*defaults_).set("sigma", sigma);
}

void Eggroll::check_parameters() const {
  std::vector<at::Tensor> params;
  for (const Entry& entry : entries()) params.push_back(entry.param);
  eggroll_check_equal(params, shards_);
}

void Eggroll::check_state(const at::Tensor& param, const Options& options, const StateTensors& state) const {
  eggroll_check_state(param, options, state);
}

}  // namespace torch_ext::optim

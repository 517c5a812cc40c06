#include "optim/eggroll/eggroll_tell.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "optim/eggroll/eggroll_op.h"
#include "optim/eggroll/eggroll_trits.h"

namespace torch_ext::optim {
namespace {

int64_t population_of(const Options& o) { return o.get("population").toInt(); }
bool is_antithetic(const Options& o) { return o.get("antithetic").toBool(); }

// Members of one call of a closure.
int64_t chunk_of(const Options& o, int64_t processes) {
  const auto chunk = o.get("chunk_members").toOptional<int64_t>();
  if (chunk.has_value()) return *chunk;
  const int64_t unit = is_antithetic(o) ? 2 : 1, units = population_of(o) / unit;
  return (units + processes - 1) / processes * unit;
}

// What every process but the last few evaluates.
int64_t share_of(const Options& o, int64_t processes) {
  const int64_t chunk = chunk_of(o, processes), chunks = (population_of(o) + chunk - 1) / chunk;
  return (chunks + processes - 1) / processes * chunk;
}

double kappa(const Options& o) {
  const double n = static_cast<double>(population_of(o)), sigma = o.get("sigma").toDouble();
  const std::string& scale = o.get("update_scale").toStringRef();
  return scale == "paper" ? 1 / n : scale == "unbiased" ? 1 / (n * sigma) : sigma / std::sqrt(n);
}

EggrollShaped shaped_of(const Options& o, const at::Tensor& values) {
  const auto [coefficients, mean, nonfinite] = eggroll_shape(
      values, o.get("shaping").toStringRef(), o.get("group_size").toInt(), o.get("temperature").toDouble(),
      is_antithetic(o), o.get("maximize").toBool(), o.get("nonfinite").toStringRef());
  return {coefficients, mean, nonfinite};
}

// With shaping "sign" a pair is worth one digit of base 3.
EggrollShaped gather_signs(const Options& o, const at::Tensor& values, const ColumnShards& shards) {
  const int64_t share = share_of(o, shards.count), pairs = share / 2;
  EggrollShaped own{at::zeros({0}, at::kDouble), at::zeros({}, at::kDouble), at::zeros({}, at::kFloat)};
  if (values.size(0) > 0) {
    const auto [coefficients, mean, nonfinite] =
        eggroll_shape(values, "sign", 0, 1.0, true, o.get("maximize").toBool(), o.get("nonfinite").toStringRef());
    own = {coefficients.cpu(), mean.cpu(), nonfinite.cpu()};
  }
  const at::Tensor whole =
      shards.all_gather(pack_trits(own.coefficients, pairs, own.nonfinite.item<float>() != 0).to(values.device()));
  const bool must_be_finite = o.get("nonfinite").toStringRef() == "error";
  bool bad = false;
  const at::Tensor all = unpack_trits(whole.cpu(), pairs, &bad).narrow(0, 0, population_of(o) / 2);
  const float flag = bad && must_be_finite ? 1.0F : 0.0F;  // a process without finite values counts as undecided
  return {all.to(values.device()), own.mean,
          at::zeros({}, at::TensorOptions(values.device()).dtype(at::kFloat)) + flag};
}

EggrollShaped gather_values(const Options& o, const at::Tensor& values, const ColumnShards& shards) {
  const auto type = values.scalar_type();
  const bool narrow = type == at::kFloat || type == at::kHalf || type == at::kBFloat16;
  const at::Tensor own = values.detach().to(narrow ? at::kFloat : at::kDouble);
  const int64_t missing = share_of(o, shards.count) - own.size(0);
  const at::Tensor padded = at::cat({own, at::zeros({missing}, own.options())});
  return shaped_of(o, shards.all_gather(padded).narrow(0, 0, population_of(o)));
}

// Rows of a parameter's pseudo-gradient, all of them or a share put together again.
at::Tensor pseudo_gradient(const EggrollTarget& t, ops::EggrollUpdateOptions options, const at::Tensor& coefficients,
                           const ColumnShards& shards, bool sharded) {
  const auto sizes = t.param.sizes();
  if (!sharded || shards.count == 1 || t.param.dim() == 0) return ops::eggroll_update(coefficients, sizes, options);
  const int64_t rows = sizes[0], share = (rows + shards.count - 1) / shards.count;
  const int64_t row_size = t.param.numel() / std::max<int64_t>(1, rows);
  options.row_begin = std::min(rows, shards.rank * share);
  options.row_end = std::min(rows, options.row_begin + share);
  const auto dtype = core::arithmetic_type(t.param.scalar_type());
  const at::Tensor own = at::zeros({share * row_size}, t.param.options().dtype(dtype).requires_grad(false));
  if (options.row_end > options.row_begin) {
    own.narrow(0, 0, (options.row_end - options.row_begin) * row_size)
        .copy_(ops::eggroll_update(coefficients, sizes, options).reshape({-1}));
  }
  return shards.all_gather(own).narrow(0, 0, t.param.numel()).view(sizes);
}

}  // namespace

ops::EggrollNoise eggroll_noise_of(const Options& o, int64_t updates, int64_t begin) {
  const int64_t reuse = o.get("noise_reuse").toInt();
  ops::EggrollNoise noise;
  noise.seed = o.get("seed").toInt();
  noise.epoch = reuse == 0 ? 0 : updates / reuse;
  noise.member_begin = begin;
  noise.antithetic = is_antithetic(o);
  noise.sigma = o.get("sigma").toDouble();
  noise.rank = o.get("rank").toInt();
  noise.law = o.get("noise").toStringRef();
  return noise;
}

int64_t eggroll_baseline(const Options& o) {
  if (o.get("shaping").toStringRef() != "baseline") return 0;
  const int64_t group = o.get("group_size").toInt();
  return group > 0 ? group : population_of(o);
}

std::string eggroll_kind(const at::Tensor& param, const Options& o) {
  const auto kind = o.get("kind").toOptional<std::string>();
  return kind.value_or(param.dim() >= 2 ? "matrix" : "vector");
}

void eggroll_check_param(const at::Tensor& param, int64_t ordinal, const Options& o) {
  const auto name = [&] { return core::describe("parameter", static_cast<size_t>(ordinal), param); };
  core::check_gradient(kEggroll, static_cast<size_t>(ordinal), param, param);
  if (param.numel() == 0 || eggroll_kind(param, o) == "vector") return;
  TORCH_CHECK_VALUE(param.dim() >= 2, "Invalid kind: '", eggroll_kind(param, o), "' needs two dimensions, ", name(),
                    " (", kEggroll, " perturbs it as a \"vector\")");
  const int64_t rank = o.get("rank").toInt(), most = std::min(param.size(0), param.numel() / param.size(0));
  TORCH_CHECK_VALUE(rank <= most, "Invalid rank: ", rank, " is above ", most, ", the smaller side of ", name(),
                    "; lower it, or put the parameter into a group with kind=\"vector\"");
}

std::pair<int64_t, int64_t> eggroll_members(const Options& o, int64_t rank, int64_t count) {
  const int64_t n = population_of(o), share = share_of(o, count);
  return {std::min(n, rank * share), std::min(n, (rank + 1) * share)};
}

std::vector<std::pair<int64_t, int64_t>> eggroll_chunks(const Options& o, int64_t rank, int64_t count) {
  const auto [begin, end] = eggroll_members(o, rank, count);
  const int64_t chunk = chunk_of(o, count);
  std::vector<std::pair<int64_t, int64_t>> chunks;
  for (int64_t at = begin; at < end; at += chunk) chunks.emplace_back(at, std::min(end, at + chunk));
  return chunks;
}

void eggroll_check_values(const at::Tensor& values, int64_t size) {
  TORCH_CHECK_TYPE(values.defined(), kEggroll, ": there are no values: does the closure return them?");
  TORCH_CHECK_TYPE(!values.is_complex(), kEggroll, ": values must be real numbers, got ", values.scalar_type());
  TORCH_CHECK_VALUE(values.dim() == 1 && values.size(0) == size, kEggroll, ": expected one value for each of ", size,
                    " members, got a tensor of shape ", values.sizes());
}

EggrollShaped eggroll_shaped(const Options& o, const at::Tensor& values, const ColumnShards& shards) {
  const at::NoGradGuard no_grad;
  const auto [begin, end] = eggroll_members(o, shards.rank, shards.count);
  eggroll_check_values(values, end - begin);
  EggrollShaped shaped;
  if (shards.count == 1) {
    shaped = shaped_of(o, values);
  } else if (o.get("shaping").toStringRef() == "sign") {
    shaped = gather_signs(o, values, shards);
  } else {
    shaped = gather_values(o, values, shards);
  }
  if (o.get("nonfinite").toStringRef() == "error") {  // the one place where the host waits for the values
    TORCH_CHECK_VALUE(shaped.nonfinite.item<float>() == 0, kEggroll,
                      ": some values are infinite or NaN; nothing was changed. nonfinite=\"min\" takes them for the "
                      "worst of the finite ones");
  }
  return shaped;
}

void eggroll_init_state(const at::Tensor& param, const Options& o, StateTensors& state) {
  const at::NoGradGuard no_grad;
  for (auto& [name, tensor] : state) {
    if (name != "global_updates" && tensor.device() != param.device()) tensor = tensor.to(param.device());
  }
  const auto blank = param.options().requires_grad(false).memory_format(c10::nullopt);
  if (state.count("step") == 0) state["step"] = at::zeros({}, blank.dtype(at::kFloat));
  if (o.get("momentum").toDouble() != 0 && state.count("momentum_buffer") == 0) {
    state["momentum_buffer"] =
        at::zeros_like(param, param.options().dtype(core::arithmetic_type(param.scalar_type())).requires_grad(false));
  }
}

void eggroll_check_state(const at::Tensor& param, const Options&, const StateTensors& state) {
  for (const auto& [name, tensor] : state) {
    const bool fits = name == "momentum_buffer" ? tensor.sizes() == param.sizes() : tensor.numel() == 1;
    TORCH_CHECK_VALUE(fits, kEggroll, ": loaded ", name, " has shape ", tensor.sizes(), ", its parameter ",
                      param.sizes());
  }
}

void eggroll_update(const std::vector<EggrollTarget>& targets, const ops::EggrollNoise& noise,
                    const EggrollShaped& shaped, const at::Tensor& skipped, bool update, const ColumnShards& shards,
                    bool sharded) {
  const at::NoGradGuard no_grad;
  skipped.add_(shaped.nonfinite.to(skipped.device(), at::kLong));
  at::Tensor coefficients = shaped.coefficients;
  for (const EggrollTarget& t : targets) {
    if (coefficients.device() != t.param.device()) coefficients = shaped.coefficients.to(t.param.device());
    ops::EggrollUpdateOptions options;
    options.kind = eggroll_kind(t.param, *t.options);
    options.seed = noise.seed;
    options.ordinal = t.ordinal;
    options.epoch = noise.epoch;
    options.rank = noise.rank;
    options.law = noise.law;
    options.scale = -kappa(*t.options);
    options.dtype = t.param.scalar_type();
    const at::Tensor g = pseudo_gradient(t, options, coefficients, shards, sharded);
    if (!update) {
      t.param.mutable_grad() = g.to(t.param.scalar_type());
      continue;
    }
    const double momentum = t.options->get("momentum").toDouble();
    const std::vector<at::Tensor> buffers = momentum != 0 ? std::vector{t.momentum_buffer} : std::vector<at::Tensor>{};
    eggroll_step_({t.param}, {g}, buffers, {t.step}, shaped.nonfinite, t.options->get("lr").toDouble(), momentum,
                  t.options->get("weight_decay").toDouble());
  }
}

void eggroll_check_equal(const std::vector<at::Tensor>& tensors, const ColumnShards& shards) {
  if (shards.count == 1) return;
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> sums;
  sums.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) sums.push_back(bit_checksum(tensor));
  if (sums.empty()) return;
  const at::Tensor own = at::cat(sums), all = shards.all_gather(own).view({shards.count, -1});
  for (int64_t rank = 0; rank < shards.count; ++rank) {
    const at::Tensor same = all.select(0, rank).eq(own).cpu();
    for (size_t i = 0; i < tensors.size(); ++i) {
      TORCH_CHECK(same[static_cast<int64_t>(i)].item<bool>(), kEggroll, ": ",
                  core::describe("parameter", i, tensors[i]), " differs between process ", shards.rank, " and process ",
                  rank,
                  ": start from equal parameters, and take an integer noise law or the sharded update where machines "
                  "multiply differently");
    }
  }
}

}  // namespace torch_ext::optim

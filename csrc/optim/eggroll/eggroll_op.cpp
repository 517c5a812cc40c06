#include "optim/eggroll/eggroll_op.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>

#include <string>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/library.h"
#include "core/multi_tensor_cpu.h"
#include "optim/eggroll/eggroll_kernel.h"

namespace torch_ext::optim {
namespace {

kernels::Shaping shaping_of(std::string_view name) {
  static const std::vector<std::pair<std::string, kernels::Shaping>> known{
      {"zscore", kernels::Shaping::kZScore},    {"grouped", kernels::Shaping::kGrouped},
      {"sign", kernels::Shaping::kSign},        {"centered_rank", kernels::Shaping::kCenteredRank},
      {"raw", kernels::Shaping::kRaw},          {"softmax", kernels::Shaping::kSoftmax},
      {"baseline", kernels::Shaping::kBaseline}};
  for (const auto& [word, shaping] : known) {
    if (word == name) return shaping;
  }
  TORCH_CHECK_VALUE(false, "Invalid shaping: '", name, "' (", kEggroll,
                    " knows 'zscore', 'grouped', 'centered_rank', 'sign', 'raw', 'softmax', 'baseline')");
}

void check_values(const at::Tensor& values, double temperature, std::string_view nonfinite) {
  TORCH_CHECK_TYPE(!values.is_complex(), kEggroll, ": values must be real numbers, got ", values.scalar_type());
  TORCH_CHECK_VALUE(values.dim() == 1, kEggroll, ": values must be one number per member, [members]; got shape ",
                    values.sym_sizes());
  TORCH_CHECK_VALUE(temperature > 0, "Invalid temperature: ", temperature, " (", kEggroll, " needs it in (0, inf))");
  TORCH_CHECK_VALUE(nonfinite == "error" || nonfinite == "min", "Invalid nonfinite: '", nonfinite, "' (", kEggroll,
                    " knows 'error', 'min')");
}

kernels::EggrollShapeArgs arguments(int64_t n, std::string_view shaping, int64_t group_size, double temperature,
                                    bool antithetic, bool maximize, std::string_view nonfinite) {
  return {shaping_of(shaping), n, group_size > 0 ? group_size : n, temperature, maximize ? 1.0 : -1.0, antithetic,
          nonfinite == "min"};
}

using Shaped = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Shaped shape_impl(const at::Tensor& values, std::string_view shaping, int64_t group_size, double temperature,
                  bool antithetic, bool maximize, std::string_view nonfinite) {
  const at::NoGradGuard no_grad;
  check_values(values, temperature, nonfinite);
  const int64_t n = values.size(0);
  check_eggroll_shape(n, shaping, group_size, antithetic);
  const auto args = arguments(n, shaping, group_size, temperature, antithetic, maximize, nonfinite);
  const at::Tensor wide = values.detach().to(at::kDouble).contiguous();
  const auto options = wide.options();
  constexpr int64_t kStats = sizeof(kernels::EggrollStats) / sizeof(double);
  const at::Tensor stats = at::empty({kStats}, options), groups = at::empty({n / args.group, 2}, options);
  const at::Tensor coefficients = at::empty({antithetic ? n / 2 : n}, options), mean = at::empty({}, options);
  const at::Tensor bad = at::empty({}, options.dtype(at::kFloat));
  auto* const raw = reinterpret_cast<kernels::EggrollStats*>(stats.data_ptr<double>());
  kernels::EggrollShapeData data{wide.const_data_ptr<double>(),   nullptr,
                                 groups.data_ptr<double>(),       raw,
                                 coefficients.data_ptr<double>(), bad.data_ptr<float>(),
                                 mean.data_ptr<double>(),         coefficients.size(0)};
  const c10::OptionalDeviceGuard guard(wide.is_cuda() ? std::optional<at::Device>(wide.device()) : std::nullopt);
  [[maybe_unused]] void* const stream = core::current_stream(wide.device());
  const bool cuda = wide.is_cuda();
  if (cuda) {
#if TORCH_EXT_WITH_CUDA
    kernels::eggroll_range_cuda(args, data.values, raw, stream);
#endif
  } else {
    kernels::eggroll_range_cpu(args, data.values, raw);
  }
  at::Tensor sorted;
  if (args.shaping == kernels::Shaping::kCenteredRank) {
    const at::Tensor f = maximize ? wide : wide.neg();
    sorted = std::get<0>(at::sort(at::where(f.isfinite(), f, stats.select(0, 1))));
    data.sorted = sorted.const_data_ptr<double>();
  }
  if (cuda) {
#if TORCH_EXT_WITH_CUDA
    kernels::eggroll_shape_cuda(args, data, stream);
#endif
  } else {
    kernels::eggroll_shape_cpu(args, data);
  }
  return {coefficients, mean, bad};
}

Shaped shape_meta(const at::Tensor& values, std::string_view shaping, int64_t, double temperature, bool antithetic,
                  bool, std::string_view nonfinite) {
  check_values(values, temperature, nonfinite);
  shaping_of(shaping);
  const auto options = values.options().dtype(at::kDouble);
  const c10::SymInt n = values.sym_size(0);
  return {at::empty_symint({antithetic ? n / 2 : n}, options), at::empty({}, options),
          at::empty({}, options.dtype(at::kFloat))};
}

void check_step(at::TensorList params, at::TensorList grads, at::TensorList buffers, at::TensorList steps,
                double momentum) {
  core::check_same_length("eggroll_step_", "grads", params.size(), grads.size());
  core::check_same_length("eggroll_step_", "momentum_buffers", momentum != 0 ? params.size() : 0, buffers.size());
  core::check_same_length("eggroll_step_", "steps", params.size(), steps.size());
  for (size_t i = 0; i < params.size(); ++i) {
    core::check_gradient(kEggroll, i, params[i], grads[i]);
    const auto dtype = core::arithmetic_type(params[i].scalar_type());
    const auto fits = [&](const at::Tensor& t) {
      return t.scalar_type() == dtype && t.sizes() == params[i].sizes() && t.device() == params[i].device();
    };
    TORCH_CHECK_VALUE(fits(grads[i]) && (momentum == 0 || fits(buffers[i])),
                      "eggroll_step_: gradient and buffer must be ", dtype, " and have the shape and device of ",
                      core::describe("parameter", i, params[i]));
    TORCH_CHECK_VALUE(
        steps[i].scalar_type() == at::kFloat && steps[i].numel() == 1 && steps[i].device() == params[i].device(),
        "eggroll_step_: steps must be float32 numbers on the device of ", core::describe("parameter", i, params[i]));
  }
}

void step_impl(at::TensorList params, at::TensorList grads, at::TensorList buffers, at::TensorList steps,
               const at::Tensor& nonfinite, double lr, double momentum, double weight_decay) {
  const at::NoGradGuard no_grad;
  check_step(params, grads, buffers, steps, momentum);
  for (const auto& bucket : core::buckets(params)) {
    const at::Tensor& first = params[bucket[0]];
    const at::Tensor flag = nonfinite.to(first.device(), at::kFloat, /*non_blocking=*/true);
    const kernels::EggrollStepArgs args{lr, momentum, weight_decay, core::dtype_of(first, "eggroll_step_: a parameter"),
                                        flag.const_data_ptr<float>()};
    std::vector<core::Staged> staged;
    std::vector<size_t> written;
    std::vector<kernels::EggrollTensor> tensors;
    std::vector<core::Split> splits;
    std::vector<int64_t> numels;
    staged.reserve(3 * bucket.size());
    for (const size_t i : bucket) {
      const auto strides = core::walking_strides(params[i], true, "parameter", i);
      const auto stage = [&](const at::Tensor& tensor, bool writes) {
        if (writes) written.push_back(staged.size());
        return staged.emplace_back(tensor, strides).data();
      };
      void* const param = stage(params[i], true);
      const void* const grad = stage(grads[i], false);
      void* const buffer = momentum != 0 ? stage(buffers[i], true) : nullptr;
      tensors.push_back({param, grad, buffer, steps[i].data_ptr<float>(), params[i].numel()});
      splits.push_back(core::Split::of(params[i].numel(), 1));
      numels.push_back(params[i].numel());
    }
    if (first.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
      const c10::DeviceGuard guard(first.device());
      kernels::eggroll_step_cuda(tensors, args, core::current_stream(first.device()));
#endif
    } else {
      core::for_each_chunk(splits, numels, [&](size_t i, int64_t begin, int64_t end) {
        kernels::eggroll_step_cpu(tensors[i], args, begin, end);
      });
      for (const auto& tensor : tensors) *tensor.step += *args.nonfinite == 0 ? 1.0F : 0.0F;
    }
    for (const size_t k : written) staged[k].finish();
  }
}

void step_meta(at::TensorList params, at::TensorList grads, at::TensorList buffers, at::TensorList steps,
               const at::Tensor&, double, double momentum, double) {
  core::check_same_length("eggroll_step_", "grads", params.size(), grads.size());
  core::check_same_length("eggroll_step_", "momentum_buffers", momentum != 0 ? params.size() : 0, buffers.size());
  core::check_same_length("eggroll_step_", "steps", params.size(), steps.size());
}

}  // namespace

void check_eggroll_shape(int64_t population, std::string_view shaping, int64_t group_size, bool antithetic) {
  TORCH_CHECK_VALUE(population >= 2, "Invalid population: ", population, " (", kEggroll, " needs two members or more)");
  TORCH_CHECK_VALUE(!antithetic || population % 2 == 0, "Invalid population: ", population, " (", kEggroll,
                    " needs an even number for pairs; antithetic=False does without them)");
  TORCH_CHECK_VALUE(group_size == 0 || (group_size % 2 == 0 && group_size > 0 && population % group_size == 0),
                    "Invalid group_size: ", group_size, " (", kEggroll, " needs an even divisor of the population ",
                    population, ", or 0 for no groups)");
  const bool baseline = shaping == "baseline";
  TORCH_CHECK_VALUE(shaping != "grouped" || group_size > 0, "Invalid group_size: shaping=\"grouped\" needs one");
  TORCH_CHECK_VALUE(!baseline || (group_size > 0 ? group_size : population) >= 4,
                    "Invalid group_size: shaping=\"baseline\" compares with the first pair of a group, which needs "
                    "four members or more");
  TORCH_CHECK_VALUE(shaping != "sign" || antithetic,
                    "Invalid shaping: \"sign\" compares the members of a pair, so it needs antithetic=True");
}

Shaped eggroll_shape(const at::Tensor& values, std::string_view shaping, int64_t group_size, double temperature,
                     bool antithetic, bool maximize, std::string_view nonfinite) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::eggroll_shape", "").typed<decltype(eggroll_shape)>();
  return op.call(values, shaping, group_size, temperature, antithetic, maximize, nonfinite);
}

void eggroll_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, at::TensorList steps,
                   const at::Tensor& nonfinite, double lr, double momentum, double weight_decay) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::eggroll_step_", "").typed<decltype(eggroll_step_)>();
  op.call(params, grads, momentum_buffers, steps, nonfinite, lr, momentum, weight_decay);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "eggroll_shape(Tensor values, *, str shaping='zscore', int group_size=0, float temperature=1.0, "
      "bool antithetic=True, bool maximize=False, str nonfinite='error') -> (Tensor, Tensor, Tensor)");
  m.def(
      "eggroll_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] steps, "
      "Tensor nonfinite, *, float lr, float momentum=0.0, float weight_decay=0.0) -> ()");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("eggroll_shape", shape_impl);
  m.impl("eggroll_step_", step_impl);
}
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("eggroll_shape", shape_impl);
  m.impl("eggroll_step_", step_impl);
}
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("eggroll_shape", shape_meta);
  m.impl("eggroll_step_", step_meta);
}
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("eggroll_shape", core::not_differentiable());
  m.impl("eggroll_step_", core::not_differentiable());
}
TORCH_LIBRARY_IMPL(torch_ext, ADInplaceOrView, m) { m.impl("eggroll_step_", core::mutating()); }

}  // namespace torch_ext::optim

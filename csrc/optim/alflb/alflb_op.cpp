#include "optim/alflb/alflb_op.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include "core/check.h"
#include "core/library.h"
#include "core/list_ops.h"
#include "optim/alflb/alflb_kernel.h"

namespace torch_ext::optim {
namespace {

kernels::AlflbRule rule_of(std::string_view name) {
  if (name == "sign") return kernels::AlflbRule::kSign;
  if (name == "proportional") return kernels::AlflbRule::kProportional;
  if (name == "quantile") return kernels::AlflbRule::kQuantile;
  TORCH_CHECK_VALUE(name == "momentum", "alflb_update_: unknown rule '", name, "'");
  return kernels::AlflbRule::kMomentum;
}

struct Lists {
  at::TensorList biases, loads, last_loads, steps, updates, momenta, histograms, bounds;
  at::IntArrayRef top_k;
};

void check_lengths(const Lists& lists, kernels::AlflbRule rule) {
  const size_t n = lists.biases.size(), momenta = rule == kernels::AlflbRule::kMomentum ? n : 0;
  const size_t histograms = rule == kernels::AlflbRule::kQuantile ? n : 0;
  core::check_same_length("alflb_update_", "loads", n, lists.loads.size());
  core::check_same_length("alflb_update_", "last_loads", n, lists.last_loads.size());
  core::check_same_length("alflb_update_", "steps", n, lists.steps.size());
  core::check_same_length("alflb_update_", "updates", n, lists.updates.size());
  core::check_same_length("alflb_update_", "momenta", momenta, lists.momenta.size());
  core::check_same_length("alflb_update_", "histograms", histograms, lists.histograms.size());
  core::check_same_length("alflb_update_", "bounds", histograms, lists.bounds.size());
  core::check_same_length("alflb_update_", "top_k", n, lists.top_k.size());
}

void check_like(const at::Tensor& tensor, const char* what, at::ScalarType dtype, int64_t numel, const at::Tensor& bias,
                size_t i) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype && tensor.numel() == numel && tensor.device() == bias.device() &&
                        tensor.is_contiguous(),
                    kAlflbName, ": ", what, " of ", core::describe("bias", i, bias), " must be ", dtype, " of ", numel,
                    numel == 1 ? " element" : " elements", " on its device, contiguous; got ", tensor.scalar_type(),
                    " ", tensor.sizes(), " on ", tensor.device());
}

void check_top_k(int64_t top_k, kernels::AlflbRule rule, bool per_token, const at::Tensor& bias, size_t i) {
  const bool quantile = rule == kernels::AlflbRule::kQuantile;
  if (!quantile && !(rule == kernels::AlflbRule::kProportional && per_token)) return;
  TORCH_CHECK_VALUE(top_k != kUnknownTopK, kAlflbName, ": the number of experts per token of ",
                    core::describe("bias", i, bias),
                    " is not known: count its loads with record(layer, ids), or take norm=\"load\"");
  TORCH_CHECK_VALUE(top_k >= 1 && top_k <= bias.numel(), kAlflbName, ": ", top_k, " experts per token for ",
                    core::describe("bias", i, bias));
  TORCH_CHECK_VALUE(!quantile || top_k < bias.numel(), kAlflbName,
                    ": rule=\"quantile\" is undefined where all experts of ", core::describe("bias", i, bias),
                    " are selected");
}

// One layer in kernel form, checked.
kernels::AlflbLayer layer_of(const Lists& lists, size_t i, kernels::AlflbRule rule, bool per_token) {
  const at::Tensor& bias = lists.biases[i];
  alflb_check_bias(bias, i);
  const int64_t experts = bias.numel();
  check_like(lists.loads[i], "the load", at::kLong, experts, bias, i);
  check_like(lists.last_loads[i], "last_load", at::kLong, experts, bias, i);
  check_like(lists.steps[i], "step", at::kFloat, 1, bias, i);
  check_like(lists.updates[i], "updates", at::kLong, 1, bias, i);
  check_top_k(lists.top_k[i], rule, per_token, bias, i);
  kernels::AlflbLayer layer{};
  layer.bias = bias.data_ptr<float>();
  layer.load = lists.loads[i].data_ptr<int64_t>();
  layer.last_load = lists.last_loads[i].data_ptr<int64_t>();
  layer.step = lists.steps[i].data_ptr<float>();
  layer.updates = lists.updates[i].data_ptr<int64_t>();
  layer.numel = experts;
  layer.top_k = lists.top_k[i];
  if (rule == kernels::AlflbRule::kMomentum) {
    check_like(lists.momenta[i], "momentum_buffer", at::kFloat, experts, bias, i);
    layer.momentum = lists.momenta[i].data_ptr<float>();
  }
  if (rule == kernels::AlflbRule::kQuantile) {
    const at::Tensor& histogram = lists.histograms[i];
    layer.bins = histogram.numel() / experts;
    TORCH_CHECK_VALUE(layer.bins >= 1, kAlflbName, ": the histogram of ", core::describe("bias", i, bias), " is empty");
    check_like(histogram, "the histogram", at::kLong, experts * layer.bins, bias, i);
    check_like(lists.bounds[i], "bounds", at::kFloat, 2, bias, i);
    layer.histogram = histogram.data_ptr<int64_t>();
    layer.bounds = lists.bounds[i].data_ptr<float>();
  }
  return layer;
}

void update_impl(at::TensorList biases, at::TensorList loads, at::TensorList last_loads, at::TensorList steps,
                 at::TensorList updates, at::TensorList momenta, at::TensorList histograms, at::TensorList bounds,
                 const at::Tensor& nonfinite, at::IntArrayRef top_k, double lr, double lr_power, std::string_view rule,
                 std::string_view norm, bool center, double ema, double momentum, double kappa) {
  const at::NoGradGuard no_grad;
  const Lists lists{biases, loads, last_loads, steps, updates, momenta, histograms, bounds, top_k};
  kernels::AlflbArgs args{lr, lr_power, ema, momentum, kappa, rule_of(rule), norm == "tokens", center, nullptr};
  check_lengths(lists, args.rule);
  std::vector<kernels::AlflbLayer> layers;  // every check comes before the first write
  layers.reserve(biases.size());
  for (size_t i = 0; i < biases.size(); ++i) layers.push_back(layer_of(lists, i, args.rule, args.per_token));
  for (const auto& bucket : core::buckets(biases)) {
    const at::Device device = biases[bucket[0]].device();
    const at::Tensor flag = nonfinite.to(device, at::kFloat, /*non_blocking=*/true);
    args.nonfinite = flag.const_data_ptr<float>();
    if (device.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
      std::vector<kernels::AlflbLayer> own;
      for (const size_t i : bucket) own.push_back(layers[i]);
      const c10::DeviceGuard guard(device);
      kernels::alflb_update_cuda(own, args, core::current_stream(device));
#endif
    } else {
      for (const size_t i : bucket) kernels::alflb_update_cpu(layers[i], args);
    }
  }
}

void update_meta(at::TensorList biases, at::TensorList loads, at::TensorList last_loads, at::TensorList steps,
                 at::TensorList updates, at::TensorList momenta, at::TensorList histograms, at::TensorList bounds,
                 const at::Tensor&, at::IntArrayRef top_k, double, double, std::string_view rule, std::string_view,
                 bool, double, double, double) {
  check_lengths({biases, loads, last_loads, steps, updates, momenta, histograms, bounds, top_k}, rule_of(rule));
}

void check_record(const at::Tensor& load, const at::Tensor& ids) {
  TORCH_CHECK_TYPE(load.scalar_type() == at::kLong && load.dim() == 1, "record: the load must be int64 [E], got ",
                   load.scalar_type(), " with ", load.dim(), " dimensions");
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kInt || ids.scalar_type() == at::kLong,
                   "record: ids must be int32 or int64, got ", ids.scalar_type());
}

// Adding by index: integers, so that any order gives the same, and no copy to the host.
void record_impl(const at::Tensor& load, const at::Tensor& ids) {
  const at::NoGradGuard no_grad;
  check_record(load, ids);
  const at::Tensor flat = ids.reshape({-1}).to(load.device(), at::kLong);
  TORCH_CHECK_VALUE(flat.is_cuda() || flat.numel() == 0 || flat.max().item<int64_t>() < load.numel(),
                    "record: ids must be below the number of experts, ", load.numel());
  load.scatter_add_(0, flat.clamp(0, load.numel() - 1), flat.ge(0).to(at::kLong));
}

void record_meta(const at::Tensor& load, const at::Tensor& ids) { check_record(load, ids); }

}  // namespace

void alflb_check_bias(const at::Tensor& bias, size_t ordinal) {
  TORCH_CHECK_TYPE(bias.scalar_type() == at::kFloat, kAlflbName, ": ", core::describe("bias", ordinal, bias),
                   " must be float32, got ", bias.scalar_type(),
                   ": smaller types lose the update (convert the buffer before, and keep it float32)");
  TORCH_CHECK_VALUE(bias.dim() == 1 && bias.numel() >= 1 && bias.layout() == at::kStrided && bias.is_contiguous(),
                    kAlflbName, ": ", core::describe("bias", ordinal, bias),
                    " must have one dimension, the experts, and be contiguous");
}

void alflb_make_histogram(const at::Tensor& bias, int64_t bins, at::Tensor& histogram, at::Tensor& bounds) {
  const at::NoGradGuard no_grad;
  histogram = at::zeros({bias.numel(), bins}, bias.options().dtype(at::kLong).requires_grad(false));
  const auto [low, high] = at::aminmax(bias.detach());
  bounds = at::stack({low.sub(1), high.add(1)}).contiguous();
}

void alflb_init_state(const at::Tensor& bias, const Options& options, StateTensors& state) {
  const at::NoGradGuard no_grad;
  const auto blank = bias.options().requires_grad(false).memory_format(c10::nullopt);
  for (auto& item : state) {
    if (item.second.device() != bias.device()) item.second = item.second.to(bias.device());
  }
  if (state.count("updates") == 0) {  // new, or a checkpoint that counts steps only
    state["updates"] = state.count("step") != 0 ? state["step"].round().to(at::kLong).reshape({})
                                                : at::zeros({}, blank.dtype(at::kLong));
  }
  if (state.count("step") == 0) state["step"] = state["updates"].to(at::kFloat);
  if (state.count("last_load") == 0) state["last_load"] = at::zeros({bias.numel()}, blank.dtype(at::kLong));
  if (state.count("momentum_buffer") == 0 && options.get("rule").toStringRef() == "momentum") {
    state["momentum_buffer"] = at::zeros({bias.numel()}, blank);
  }
}

void alflb_check_state(const at::Tensor& bias, const Options&, const StateTensors& state) {
  for (const auto& [name, tensor] : state) {
    const bool per_expert = name == "last_load" || name == "momentum_buffer";
    const bool counter = name == "step" || name == "updates" || name.rfind("global_", 0) == 0;
    TORCH_CHECK_VALUE(per_expert || counter, kAlflbName, ": loaded state has ", name, ": it is of another optimizer");
    TORCH_CHECK_VALUE(tensor.numel() == (per_expert ? bias.numel() : 1) && (!per_expert || tensor.dim() == 1),
                      kAlflbName, ": loaded ", name, " has shape ", tensor.sizes(), ", its bias ", bias.sizes());
  }
}

void alflb_update_(at::TensorList biases, at::TensorList loads, at::TensorList last_loads, at::TensorList steps,
                   at::TensorList updates, at::TensorList momenta, at::TensorList histograms, at::TensorList bounds,
                   const at::Tensor& nonfinite, at::IntArrayRef top_k, double lr, double lr_power,
                   std::string_view rule, std::string_view norm, bool center, double ema, double momentum,
                   double kappa) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::alflb_update_", "").typed<decltype(alflb_update_)>();
  op.call(biases, loads, last_loads, steps, updates, momenta, histograms, bounds, nonfinite, top_k, lr, lr_power, rule,
          norm, center, ema, momentum, kappa);
}

void alflb_record_(const at::Tensor& load, const at::Tensor& ids) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::alflb_record_", "").typed<decltype(alflb_record_)>();
  op.call(load, ids);
}

void alflb_apply(const std::vector<AlflbLayers>& groups, const std::vector<const Options*>& options,
                 const std::optional<at::Tensor>& found_inf, const at::Tensor& skipped) {
  std::vector<at::Tensor> biases;
  for (const AlflbLayers& group : groups) biases.insert(biases.end(), group.biases.begin(), group.biases.end());
  if (biases.empty()) return;
  for (size_t i = 0; i < biases.size(); ++i) alflb_check_bias(biases[i], i);
  const at::Tensor nonfinite = core::count_nonfinite_(biases, found_inf, skipped);
  for (size_t g = 0; g < groups.size(); ++g) {
    const AlflbLayers& layers = groups[g];
    if (layers.biases.empty()) continue;
    const Options& o = *options[g];
    const std::string& rule = o.get("rule").toStringRef();
    const std::vector<at::Tensor> none;
    alflb_update_(layers.biases, layers.loads, layers.last_loads, layers.steps, layers.updates,
                  rule == "momentum" ? layers.momenta : none, rule == "quantile" ? layers.histograms : none,
                  rule == "quantile" ? layers.bounds : none, nonfinite, layers.top_k, o.get("lr").toDouble(),
                  o.get("lr_power").toDouble(), rule, o.get("norm").toStringRef(), o.get("center").toBool(),
                  o.get("ema").toDouble(), o.get("momentum").toDouble(), o.get("kappa").toDouble());
  }
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "alflb_update_(Tensor(a!)[] biases, Tensor(b!)[] loads, Tensor(c!)[] last_loads, Tensor(d!)[] steps, "
      "Tensor(e!)[] updates, Tensor(f!)[] momenta, Tensor(g!)[] histograms, Tensor(h!)[] bounds, Tensor nonfinite, "
      "int[] top_k, *, float lr, float lr_power, str rule, str norm, bool center, float ema, float momentum, "
      "float kappa) -> ()");
  m.def("alflb_record_(Tensor(a!) load, Tensor ids) -> ()");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("alflb_update_", update_impl);
  m.impl("alflb_record_", record_impl);
}
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("alflb_update_", update_impl);
  m.impl("alflb_record_", record_impl);
}
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("alflb_update_", update_meta);
  m.impl("alflb_record_", record_meta);
}
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("alflb_update_", core::not_differentiable());
  m.impl("alflb_record_", core::not_differentiable());
}
TORCH_LIBRARY_IMPL(torch_ext, ADInplaceOrView, m) {
  m.impl("alflb_update_", core::mutating());
  m.impl("alflb_record_", core::mutating());
}

}  // namespace torch_ext::optim

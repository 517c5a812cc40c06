#include "optim/adahessian/adahessian_op.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/check.h"
#include "core/library.h"
#include "core/list_ops.h"
#include "core/multi_tensor_cpu.h"
#include "optim/adahessian/adahessian_kernel.h"

namespace torch_ext::optim {
namespace {

struct Lists {
  at::TensorList params, grads, curvature, exp_avg, exp_hessian_diag_sq, steps, bias_products;
};

void check_lengths(const Lists& lists, bool refresh) {
  const size_t n = lists.params.size();
  core::check_same_length("adahessian_step_", "grads", n, lists.grads.size());
  core::check_same_length("adahessian_step_", "curvature", refresh ? n : 0, lists.curvature.size());
  core::check_same_length("adahessian_step_", "exp_avg", n, lists.exp_avg.size());
  core::check_same_length("adahessian_step_", "exp_hessian_diag_sq", n, lists.exp_hessian_diag_sq.size());
  core::check_same_length("adahessian_step_", "steps", n, lists.steps.size());
  core::check_same_length("adahessian_step_", "bias_products", n, lists.bias_products.size());
}

void check_tensor(const at::Tensor& param, const at::Tensor& exp_avg, const at::Tensor& second, const at::Tensor& step,
                  const at::Tensor& bias_products, int64_t block, size_t i) {
  const auto dtype = core::arithmetic_type(param.scalar_type());
  const auto fits = [&](const at::Tensor& t, at::ScalarType type) {
    return t.scalar_type() == type && t.device() == param.device();
  };
  TORCH_CHECK_VALUE(fits(exp_avg, dtype) && exp_avg.sizes() == param.sizes(), kAdaHessian, ": exp_avg of ",
                    core::describe("parameter", i, param), " must be ", dtype, " of its shape on its device");
  TORCH_CHECK_VALUE(
      fits(second, dtype) && second.numel() * block == param.numel() && (block == 1 || second.is_contiguous()),
      kAdaHessian, ": exp_hessian_diag_sq of ", core::describe("parameter", i, param), " has shape ", second.sizes(),
      ", its options average over blocks of ", block);
  TORCH_CHECK_VALUE(fits(step, at::kFloat) && step.numel() == 1 && fits(bias_products, at::kDouble) &&
                        bias_products.numel() == 2 && bias_products.is_contiguous(),
                    kAdaHessian, ": step must be one float32 and bias_products two float64 on the device of ",
                    core::describe("parameter", i, param));
}

// The tensors of one bucket in kernel form; finish() writes back what had to be copied.
class Batch {
 public:
  Batch(const Lists& lists, const std::vector<size_t>& bucket, const std::vector<int64_t>& blocks, bool refresh,
        core::DType* grad_type) {
    bool same = true;
    for (const size_t i : bucket) {
      same = same && lists.grads[i].scalar_type() == lists.params[i].scalar_type() &&
             (!refresh || lists.curvature[i].scalar_type() == lists.params[i].scalar_type());
    }
    const at::Tensor& first = lists.params[bucket[0]];
    const auto type = same ? first.scalar_type() : core::arithmetic_type(first.scalar_type());
    *grad_type = type == at::kDouble ? core::DType::kDouble
                 : same              ? core::dtype_of(first, "gradient")
                                     : core::DType::kFloat;
    staged_.reserve(5 * bucket.size());
    for (const size_t i : bucket) {
      const at::Tensor& param = lists.params[i];
      const auto strides = core::walking_strides(param, blocks[i] == 1, "parameter", i);
      const auto stage = [&](const at::Tensor& tensor, bool written) {
        const auto& staged = staged_.emplace_back(tensor, strides);
        if (written) written_.push_back(staged_.size() - 1);
        return staged.data();
      };
      kernels::AdaHessianTensor t{};
      t.param = stage(param, true);
      t.grad = stage(same ? lists.grads[i] : lists.grads[i].to(type), false);  // even a vacuous to() costs a dispatch
      t.curvature = refresh ? stage(same ? lists.curvature[i] : lists.curvature[i].to(type), false) : nullptr;
      t.exp_avg = stage(lists.exp_avg[i], true);
      const at::Tensor& second = lists.exp_hessian_diag_sq[i];
      if (blocks[i] == 1) {
        t.exp_hessian_diag_sq = stage(second, true);
      } else {
        t.exp_hessian_diag_sq = second.data_ptr();
      }
      t.step = lists.steps[i].data_ptr<float>();
      t.bias_products = lists.bias_products[i].data_ptr<double>();
      t.numel = param.numel();
      t.block = blocks[i];
      tensors.push_back(t);
      splits.push_back(core::Split::of(t.numel, t.block));
      numels.push_back(t.numel);
    }
  }
  void finish() const {
    for (const size_t k : written_) staged_[k].finish();
  }

  std::vector<kernels::AdaHessianTensor> tensors;
  std::vector<core::Split> splits;
  std::vector<int64_t> numels;

 private:
  std::vector<core::Staged> staged_;
  std::vector<size_t> written_;
};

void run(Batch& batch, const kernels::AdaHessianArgs& args, const at::Device& device) {
  if (device.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    const c10::DeviceGuard guard(device);
    kernels::adahessian_step_cuda(batch.tensors, args, core::current_stream(device));
#endif
  } else {
    for (const auto& tensor : batch.tensors) kernels::adahessian_advance(args, tensor);
    core::for_each_chunk(batch.splits, batch.numels, [&](size_t i, int64_t begin, int64_t end) {
      kernels::adahessian_step_cpu(batch.tensors[i], args, begin, end);
    });
  }
  batch.finish();
}

void step_impl(at::TensorList params, at::TensorList grads, at::TensorList curvature, at::TensorList exp_avg,
               at::TensorList exp_hessian_diag_sq, at::TensorList steps, at::TensorList bias_products,
               const at::Tensor& nonfinite, const std::optional<at::Tensor>& grad_scale, double lr, double beta1,
               double beta2, double eps, double weight_decay, double hessian_power, std::optional<double> max_update,
               std::string_view linear_averaging, int64_t block_size, bool average_conv, std::string_view averaging,
               int64_t update_each, bool refresh, bool maximize, double loss_scale, bool grads_unscaled,
               bool external_curvature) {
  const at::NoGradGuard no_grad;
  const Lists lists{params, grads, curvature, exp_avg, exp_hessian_diag_sq, steps, bias_products};
  check_lengths(lists, refresh);
  const std::string linear(linear_averaging);
  std::vector<int64_t> blocks;
  blocks.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    core::check_gradient(kAdaHessian, i, params[i], grads[i]);
    if (refresh) core::check_gradient(kAdaHessian, i, params[i], curvature[i]);
    blocks.push_back(adahessian_block(params[i], linear, block_size, average_conv, static_cast<int64_t>(i)));
    check_tensor(params[i], exp_avg[i], exp_hessian_diag_sq[i], steps[i], bias_products[i], blocks[i], i);
  }
  kernels::AdaHessianArgs args{};
  args.lr = lr;
  args.beta1 = beta1;
  args.beta2 = std::pow(beta2, static_cast<double>(update_each));
  args.eps = eps;
  args.weight_decay = weight_decay;
  args.hessian_power = hessian_power;
  args.max_update = max_update.value_or(std::numeric_limits<double>::infinity());
  args.grad_factor = (maximize ? -1.0 : 1.0) / (grads_unscaled ? 1.0 : loss_scale);
  args.curvature_factor = external_curvature ? 1.0 : 1.0 / loss_scale;
  args.scaled_curvature = !external_curvature;
  args.refresh = refresh;
  args.signed_mean = averaging == "signed_mean";
  for (const auto& bucket : core::buckets(params)) {
    const at::Tensor& first = params[bucket[0]];
    args.param_type = core::dtype_of(first, core::describe("parameter", bucket[0], first));
    Batch batch(lists, bucket, blocks, refresh, &args.grad_type);
    const at::Tensor flag = nonfinite.to(first.device(), at::kFloat, /*non_blocking=*/true);
    at::Tensor scale;
    if (grad_scale.has_value()) scale = grad_scale->to(first.device(), at::kFloat, /*non_blocking=*/true);
    args.nonfinite = flag.const_data_ptr<float>();
    args.grad_scale = scale.defined() ? scale.const_data_ptr<float>() : nullptr;
    run(batch, args, first.device());
  }
}

void step_meta(at::TensorList params, at::TensorList grads, at::TensorList curvature, at::TensorList exp_avg,
               at::TensorList exp_hessian_diag_sq, at::TensorList steps, at::TensorList bias_products,
               const at::Tensor&, const std::optional<at::Tensor>&, double, double, double, double, double, double,
               std::optional<double>, std::string_view, int64_t, bool, std::string_view, int64_t, bool refresh, bool,
               double, bool, bool) {
  check_lengths({params, grads, curvature, exp_avg, exp_hessian_diag_sq, steps, bias_products}, refresh);
}

int64_t block_of(const at::Tensor& param, const Options& options, int64_t ordinal) {
  return adahessian_block(param, options.get("linear_averaging").toStringRef(), options.get("block_size").toInt(),
                          options.get("average_conv").toBool(), ordinal);
}

at::ScalarType state_type(const at::Tensor& param) { return core::arithmetic_type(param.scalar_type()); }

}  // namespace

int64_t adahessian_block(const at::Tensor& param, const std::string& linear_averaging, int64_t block_size,
                         bool average_conv, int64_t ordinal) {
  if (param.numel() == 0) return 1;
  if (param.dim() == 2 && linear_averaging == "row") return param.size(1);
  if (param.dim() == 2 && linear_averaging == "block") {
    TORCH_CHECK_VALUE(block_size >= 1 && param.size(1) % block_size == 0, kAdaHessian, ": block_size ", block_size,
                      " does not divide the rows of ",
                      core::describe("parameter", static_cast<size_t>(ordinal), param));
    return block_size;
  }
  if (param.dim() >= 3 && param.dim() <= 5 && average_conv) return param.numel() / (param.size(0) * param.size(1));
  return 1;
}

std::vector<int64_t> adahessian_reduced_shape(const at::Tensor& param, int64_t block) {
  std::vector<int64_t> shape = param.sizes().vec();
  if (block == 1) return shape;
  if (param.dim() == 2) {
    shape[1] /= block;
  } else {
    std::fill(shape.begin() + 2, shape.end(), 1);
  }
  return shape;
}

void adahessian_init_state(const at::Tensor& param, const Options& options, int64_t ordinal, StateTensors& state) {
  const at::NoGradGuard no_grad;
  const int64_t block = block_of(param, options, ordinal);
  const bool fresh = state.count("step") == 0;
  const auto blank = param.options().requires_grad(false).memory_format(c10::nullopt);
  for (auto& [name, tensor] : state) {
    if (name != "global_calls" && tensor.device() != param.device()) tensor = tensor.to(param.device());
  }
  if (fresh) state["step"] = at::zeros({}, blank.dtype(at::kFloat));
  if (state.count("exp_avg") == 0) {
    state["exp_avg"] = at::zeros_like(param, param.options().dtype(state_type(param)).requires_grad(false));
  }
  if (state.count("exp_hessian_diag_sq") == 0) {
    state["exp_hessian_diag_sq"] =
        block == 1 ? at::zeros_like(param, param.options().dtype(state_type(param)).requires_grad(false))
                   : at::zeros(adahessian_reduced_shape(param, block), blank.dtype(state_type(param)));
  }
  if (state.count("bias_products") == 0) {  // new, or a checkpoint that counts steps only
    const auto& betas = options.get("betas").toTupleRef().elements();
    const double steps = fresh ? 0 : state["step"].item<double>();
    const auto u = static_cast<double>(options.get("update_each").toInt());
    const std::vector<double> products{std::pow(betas[0].toDouble(), steps),
                                       std::pow(betas[1].toDouble(), u * std::ceil(steps / u))};
    state["bias_products"] = at::tensor(products, at::kDouble).to(param.device());
  }
}

void adahessian_check_state(const at::Tensor& param, const Options& options, const StateTensors& state) {
  const auto shape_of = [&](const char* name) { return state.find(name)->second.sizes(); };
  for (const auto& [name, tensor] : state) {
    TORCH_CHECK_VALUE(state.count("exp_avg") != 0 || name.rfind("global_", 0) == 0, kAdaHessian, ": loaded state has ",
                      name, " but no exp_avg: it is of another optimizer");
    const bool counter = name == "step" || name.rfind("global_", 0) == 0;
    const int64_t numel = counter ? 1 : name == "bias_products" ? 2 : tensor.numel();
    TORCH_CHECK_VALUE(tensor.numel() == numel, kAdaHessian, ": loaded ", name, " has shape ", tensor.sizes());
  }
  TORCH_CHECK_VALUE(state.count("exp_avg") == state.count("exp_hessian_diag_sq"), kAdaHessian,
                    ": loaded state has only one of exp_avg and exp_hessian_diag_sq: it is of another optimizer");
  TORCH_CHECK_VALUE(state.count("bias_products") == 0 || (state.count("step") != 0 && state.count("exp_avg") != 0),
                    kAdaHessian, ": loaded state has bias_products but lacks step or exp_avg");
  if (state.count("exp_avg") != 0) {
    TORCH_CHECK_VALUE(shape_of("exp_avg") == param.sizes(), kAdaHessian, ": loaded exp_avg has shape ",
                      shape_of("exp_avg"), ", its parameter ", param.sizes());
  }
  if (state.count("exp_hessian_diag_sq") != 0) {
    const auto expected = adahessian_reduced_shape(param, block_of(param, options, 0));
    TORCH_CHECK_VALUE(shape_of("exp_hessian_diag_sq") == expected, kAdaHessian,
                      ": loaded exp_hessian_diag_sq has shape ", shape_of("exp_hessian_diag_sq"),
                      ", the averaging options of its group make it ", at::IntArrayRef(expected));
  }
}

void adahessian_step_(at::TensorList params, at::TensorList grads, at::TensorList curvature, at::TensorList exp_avg,
                      at::TensorList exp_hessian_diag_sq, at::TensorList steps, at::TensorList bias_products,
                      const at::Tensor& nonfinite, const std::optional<at::Tensor>& grad_scale, double lr, double beta1,
                      double beta2, double eps, double weight_decay, double hessian_power,
                      std::optional<double> max_update, std::string_view linear_averaging, int64_t block_size,
                      bool average_conv, std::string_view averaging, int64_t update_each, bool refresh, bool maximize,
                      double loss_scale, bool grads_unscaled, bool external_curvature) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::adahessian_step_", "")
                             .typed<decltype(adahessian_step_)>();
  op.call(params, grads, curvature, exp_avg, exp_hessian_diag_sq, steps, bias_products, nonfinite, grad_scale, lr,
          beta1, beta2, eps, weight_decay, hessian_power, max_update, linear_averaging, block_size, average_conv,
          averaging, update_each, refresh, maximize, loss_scale, grads_unscaled, external_curvature);
}

void adahessian_apply(const std::vector<AdaHessianLists>& groups, const std::vector<const Options*>& options,
                      at::TensorList read, const std::optional<at::Tensor>& found_inf, const at::Tensor& skipped,
                      bool refresh, const AdaHessianScaling& scaling) {
  const at::Tensor nonfinite = core::count_nonfinite_(read, found_inf, skipped);
  for (size_t g = 0; g < groups.size(); ++g) {
    const AdaHessianLists& lists = groups[g];
    if (lists.params.empty()) continue;
    const Options& o = *options[g];
    const auto& betas = o.get("betas").toTupleRef().elements();
    adahessian_step_(lists.params, lists.grads, lists.curvature, lists.exp_avg, lists.exp_hessian_diag_sq, lists.steps,
                     lists.bias_products, nonfinite, scaling.grad_scale, o.get("lr").toDouble(), betas[0].toDouble(),
                     betas[1].toDouble(), o.get("eps").toDouble(), o.get("weight_decay").toDouble(),
                     o.get("hessian_power").toDouble(), o.get("max_update").toOptional<double>(),
                     o.get("linear_averaging").toStringRef(), o.get("block_size").toInt(),
                     o.get("average_conv").toBool(), o.get("averaging").toStringRef(), o.get("update_each").toInt(),
                     refresh, o.get("maximize").toBool(), scaling.loss_scale, scaling.grads_unscaled,
                     scaling.external_curvature);
  }
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "adahessian_step_(Tensor(a!)[] params, Tensor[] grads, Tensor[] curvature, Tensor(b!)[] exp_avg, "
      "Tensor(c!)[] exp_hessian_diag_sq, Tensor(d!)[] steps, Tensor(e!)[] bias_products, Tensor nonfinite, "
      "Tensor? grad_scale, *, float lr, float beta1, float beta2, float eps, float weight_decay, float hessian_power, "
      "float? max_update, str linear_averaging, int block_size, bool average_conv, str averaging, int update_each, "
      "bool refresh, bool maximize, float loss_scale=1.0, bool grads_unscaled=False, bool external_curvature=False) "
      "-> ()");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { m.impl("adahessian_step_", step_impl); }
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { m.impl("adahessian_step_", step_impl); }
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) { m.impl("adahessian_step_", step_meta); }
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) { m.impl("adahessian_step_", core::not_differentiable()); }
TORCH_LIBRARY_IMPL(torch_ext, ADInplaceOrView, m) { m.impl("adahessian_step_", core::mutating()); }

}  // namespace torch_ext::optim

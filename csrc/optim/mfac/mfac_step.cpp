#include "optim/mfac/mfac_step.h"

#include <ATen/core/List.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <string>

#include "core/check.h"
#include "core/list_ops.h"
#include "optim/mfac/mfac_op.h"

namespace torch_ext::optim {
namespace {

using curvature::FisherWindowState;
using OptionalTensors = c10::List<std::optional<at::Tensor>>;

OptionalTensors optional(const std::vector<at::Tensor>& tensors) {
  OptionalTensors result;
  result.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    result.push_back(tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt);
  }
  return result;
}

// One number per parameter from its group's options.
template <typename Value>
std::vector<double> each(const MFACBlock& block, const Value& value) {
  std::vector<double> result;
  result.reserve(block.options.size());
  for (const Options* options : block.options) result.push_back(value(*options));
  return result;
}

double decay(const Options& options, bool decoupled) {
  return options.get("decoupled_weight_decay").toBool() == decoupled ? options.get("weight_decay").toDouble() : 0;
}

double dampening(const Options& options) {
  return options.get("dampening").toOptional<double>().value_or(options.get("momentum").toDouble());
}

// A block while its step is under way.
struct Pass {
  const MFACBlock& block;
  const Options& options;  // the global ones
  FisherWindowState window;
  const ColumnShards& shards;

  Pass(const MFACBlock& of, const ColumnShards& shared)
      : block(of), options(*of.shared), window(mfac_window(of.states[0])), shards(shared) {}
  std::string format() const { return options.get("window_format").toStringRef(); }
  // Columns of this process.
  int64_t own_columns() const { return mfac_layout(options, mfac_columns(block.params), shards.count).dim; }
  at::TensorOptions numbers() const { return window.gram.options(); }
  // Where the processes talk: the window may be on another device than their group knows.
  at::Device meeting() const { return block.params[0].device(); }

  at::Tensor sum_over_processes(const at::Tensor& partial) const {
    if (shards.count == 1) return partial;
    at::Tensor sum = partial.to(meeting());
    shards.all_reduce_sum(sum);
    return sum.to(partial.device());
  }
  at::Tensor gather(const at::Tensor& own) const { return shards.all_gather(own.to(meeting())); }
};

// Pass 1: the row into the spare slot; its products with all rows.
at::Tensor products(const Pass& pass, const std::optional<at::Tensor>& grad_scale) {
  const FisherWindowState& w = pass.window;
  at::Tensor dots = at::empty({pass.options.get("num_grads").toInt() + 2}, pass.numbers());
  const std::vector<double> coupled = each(pass.block, [](const Options& o) { return decay(o, false); });
  const OptionalTensors grads = optional(pass.block.grads);
  const bool negate = pass.options.get("maximize").toBool();
  const std::string format = pass.format();
  if (pass.shards.count == 1) {
    curvature::fisher_window_dots_(w.rows, w.scales, w.indices, w.error, dots, w.ring, grads, pass.block.params,
                                   coupled, negate, grad_scale, format);
    return dots;
  }
  const at::Tensor whole = mfac_flatten(grads, pass.block.params, coupled, negate, grad_scale,
                                        pass.own_columns() * pass.shards.count, format);
  const at::Tensor own = pass.shards.reduce_scatter_mean(whole.to(pass.meeting())).to(w.rows.device());
  OptionalTensors row;
  row.push_back(own);
  curvature::fisher_window_dots_(w.rows, w.scales, w.indices, w.error, dots, w.ring, row, {own}, {0.0}, false,
                                 std::nullopt, format);
  return pass.sum_over_processes(dots);
}

// Pass 2: from the window into the parameters.
void update(const Pass& pass, const at::Tensor& coefficients) {
  const FisherWindowState& w = pass.window;
  std::vector<at::Tensor> buffers, steps;
  const at::Tensor none = at::empty({0}, at::kFloat), unused = at::zeros({}, at::kFloat);
  for (size_t i = 0; i < pass.block.params.size(); ++i) {
    const StateTensors& state = pass.block.states[i];
    const bool written = pass.block.grads[i].defined();
    const bool averaged = written && pass.block.options[i]->get("momentum").toDouble() != 0;
    buffers.push_back(averaged ? state.find("momentum_buffer")->second : none);
    steps.push_back(written ? state.find("step")->second : unused);
  }
  std::optional<at::Tensor> gathered;
  if (pass.shards.count > 1) {
    gathered = pass.gather(curvature::fisher_window_combine(w.rows, w.scales, w.indices, coefficients, w.ring,
                                                            pass.own_columns(), pass.format()));
  }
  mfac_update_(pass.block.params, buffers, steps, optional(pass.block.grads), w.rows, w.scales, w.indices, coefficients,
               w.ring, gathered, pass.format(), each(pass.block, [](const Options& o) { return o.get_lr(); }),
               each(pass.block, [](const Options& o) { return o.get("momentum").toDouble(); }),
               each(pass.block, dampening), each(pass.block, [](const Options& o) { return decay(o, true); }));
}

}  // namespace

void mfac_step(const std::vector<MFACBlock>& blocks, const MFACInputs& inputs) {
  const at::NoGradGuard no_grad;
  std::vector<Pass> passes;
  std::vector<at::Tensor> dots;
  for (const MFACBlock& block : blocks) {
    passes.emplace_back(block, inputs.shards);
    dots.push_back(products(passes.back(), inputs.grad_scale));
  }
  std::optional<at::Tensor> found_inf = inputs.found_inf;
  if (found_inf.has_value()) found_inf = passes[0].sum_over_processes(*found_inf);
  const at::Tensor nonfinite = core::count_nonfinite_(dots, found_inf, inputs.skipped);
  for (size_t i = 0; i < passes.size(); ++i) {
    const Pass& pass = passes[i];
    const FisherWindowState& w = pass.window;
    const at::Tensor coefficients = at::empty({w.gram.size(0)}, pass.numbers());
    curvature::fisher_window_commit_(w.gram, w.factor, w.ring, coefficients, dots[i],
                                     pass.options.get("damping").toDouble(),
                                     pass.options.get("warmup_scaling").toBool(),
                                     pass.options.get("warmup_steps").toInt(), /*refactor_every=*/-1, nonfinite);
    update(pass, coefficients);
  }
}

void mfac_check_vectors(const std::vector<at::Tensor>& params, const std::vector<at::Tensor>& x) {
  TORCH_CHECK_VALUE(x.size() == params.size(), "MFAC: precondition() takes one tensor for each of the ", params.size(),
                    " parameters, got ", x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    TORCH_CHECK_VALUE(!x[i].defined() || (mfac_has_columns(params[i]) && x[i].sizes() == params[i].sizes() &&
                                          x[i].layout() == at::kStrided && mfac_has_columns(x[i])),
                      "MFAC: precondition() got a vector of shape ", x[i].sizes(), " and dtype ", x[i].scalar_type(),
                      " for ", core::describe("parameter", i, params[i]));
  }
}

std::vector<at::Tensor> mfac_precondition(const MFACBlock& block, const ColumnShards& shards) {
  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor>& x = block.grads;
  const Pass pass(block, shards);
  const double damping = pass.options.get("damping").toDouble();
  const FisherWindowState& w = pass.window;
  const int64_t all = mfac_columns(block.params), padded = pass.own_columns() * shards.count;
  const at::TensorOptions wide = at::TensorOptions(pass.meeting()).dtype(at::kDouble);
  std::vector<at::Tensor> parts;
  for (size_t i = 0; i < x.size(); ++i) {
    const int64_t numel = block.params[i].numel();
    parts.push_back(x[i].defined() ? x[i].detach().reshape({-1}).to(wide) : at::zeros({numel}, wide));
  }
  if (shards.count > 1) parts.push_back(at::zeros({padded - all}, wide));
  at::Tensor result = at::cat(parts);
  if (!w.rows.defined()) {
    result = result.div(damping);  // no rows: F = damping I
  } else {
    const at::Tensor own = result
                               .narrow(0, shards.count > 1 ? shards.rank * pass.own_columns() : 0,
                                       shards.count > 1 ? pass.own_columns() : all)
                               .to(w.rows.device());
    const at::Tensor projected = pass.sum_over_processes(
        curvature::fisher_window_project(w.rows, w.scales, w.indices, w.ring, own, pass.format()));
    const at::Tensor coefficients = curvature::fisher_window_solve_(w.gram, w.factor, w.ring, projected, damping);
    result = curvature::fisher_window_residual(w.rows, w.scales, w.indices, coefficients, w.ring, own, damping,
                                               pass.format());
    if (shards.count > 1) result = pass.gather(result);
  }
  std::vector<at::Tensor> out(x.size());
  int64_t begin = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const int64_t numel = block.params[i].numel();
    if (x[i].defined()) out[i] = result.narrow(0, begin, numel).to(x[i].options(), false, true).view(x[i].sizes());
    begin += numel;
  }
  return out;
}

}  // namespace torch_ext::optim

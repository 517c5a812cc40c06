#include "ops/local_lipschitz/lipschitz_bounds.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>

#include <algorithm>
#include <numeric>

#include "ops/local_lipschitz/lipschitz_rows.h"

namespace torch_ext::ops {

LipschitzMethod lipschitz_method(const LipschitzNetwork& network, at::ScalarType type, std::string_view forward,
                                 std::string_view backward, int64_t alpha_iters, bool safe, bool detach_intermediate) {
  TORCH_CHECK_VALUE(forward == "crown" || forward == "ibp",
                    "local_lipschitz: forward must be \"crown\" or \"ibp\", got \"", forward, "\"");
  TORCH_CHECK_VALUE(backward == "tight" || backward == "recurjac" || backward == "ibp",
                    "local_lipschitz: backward must be \"tight\", \"recurjac\" or \"ibp\", got \"", backward, "\"");
  TORCH_CHECK_VALUE(alpha_iters >= 0, "local_lipschitz: alpha_iters must be at least 0, got ", alpha_iters);
  TORCH_CHECK_VALUE(alpha_iters == 0 || forward == "crown",
                    "local_lipschitz: alpha_iters optimises the slopes of forward=\"crown\"; set it to 0 with \"",
                    forward, "\"");
  LipschitzMethod method;
  method.crown = forward == "crown";
  method.backward = backward == "tight"      ? LipschitzBackward::kTight
                    : backward == "recurjac" ? LipschitzBackward::kRecurJac
                                             : LipschitzBackward::kIbp;
  method.alpha_iters = alpha_iters;
  method.detach_intermediate = detach_intermediate;
  method.gamma = safe ? lipschitz_gamma(network, type) : 0;
  return method;
}

std::vector<int64_t> lipschitz_outputs(const LipschitzNetwork& network, at::OptionalIntArrayRef outputs) {
  const int64_t count = network.output_size();
  if (!outputs.has_value()) {
    std::vector<int64_t> all(static_cast<size_t>(count));
    std::iota(all.begin(), all.end(), int64_t{0});
    return all;
  }
  TORCH_CHECK_VALUE(!outputs->empty(), "local_lipschitz: outputs must name at least one output");
  for (const int64_t output : *outputs) {
    TORCH_CHECK_VALUE(output >= 0 && output < count, "local_lipschitz: outputs must be in [0, ", count, "), got ",
                      output);
  }
  return outputs->vec();
}

void lipschitz_check_precision(const LipschitzNetwork& network, const at::Tensor& input) {
  if (input.scalar_type() != at::kFloat) return;
  const auto backend = input.is_cuda() ? at::Float32Backend::CUDA : at::Float32Backend::MKLDNN;
  const auto reduced = [&](at::Float32Op op) {
    const auto precision = at::globalContext().float32Precision(backend, op);
    return precision == at::Float32Precision::TF32 || precision == at::Float32Precision::BF16;
  };
  TORCH_CHECK_VALUE(!reduced(at::Float32Op::MATMUL),
                    "local_lipschitz: TF32 or bfloat16 products are on, and no bound would be certain: call "
                    "torch.set_float32_matmul_precision(\"highest\"), or use float64");
  for (const LipschitzNode& node : network.nodes) {
    if (node.kind != LipschitzKind::kConv2d) continue;
    TORCH_CHECK_VALUE(!reduced(at::Float32Op::CONV), "local_lipschitz: layer '", node.name,
                      "' convolves in TF32 or bfloat16, and no bound would be certain: set "
                      "torch.backends.cudnn.allow_tf32 = False, or use float64");
  }
}

LipschitzJacobian lipschitz_jacobian(const LipschitzNetwork& network, const at::Tensor& lo, const at::Tensor& hi,
                                     at::IntArrayRef outputs, const LipschitzMethod& method) {
  LipschitzIntervals slopes;
  {
    // Slopes of ReLUs are piecewise constant: nothing of the forward pass has a gradient then.
    const bool smooth = std::any_of(network.nodes.begin(), network.nodes.end(), [](const LipschitzNode& node) {
      return node.kind == LipschitzKind::kActivation && !lipschitz_has_alpha(node);
    });
    const at::AutoGradMode mode(at::GradMode::is_enabled() && smooth && !method.detach_intermediate);
    slopes = lipschitz_all_slopes(network, lipschitz_forward(network, lo, hi, method), method);
  }
  return lipschitz_backward(network, slopes, length(lo, 0), lo.options(), outputs, method);
}

at::Tensor lipschitz_norm_at(const LipschitzNetwork& network, const at::Tensor& x, at::IntArrayRef outputs) {
  std::vector<at::Tensor> value{x};
  for (const LipschitzNode& node : network.nodes) {
    const at::Tensor& in = value[static_cast<size_t>(node.inputs[0])];
    if (node.kind == LipschitzKind::kActivation) {
      value.push_back(lipschitz_value_at(node, in));
    } else if (node.kind == LipschitzKind::kAdd) {
      value.push_back(in + value[static_cast<size_t>(node.inputs[1])]);
    } else {
      const at::Tensor out = lipschitz_apply(node, in);
      value.push_back(node.bias.defined() ? out + node.bias : out);
    }
  }
  const int64_t points = length(x, 0), count = static_cast<int64_t>(outputs.size());
  std::vector<at::Tensor> gradient(value.size());
  gradient.back() = lipschitz_output_rows(network, outputs, x.options()).expand({points, count, network.output_size()});
  for (size_t i = network.nodes.size(); i-- > 0;) {
    const LipschitzNode& node = network.nodes[i];
    at::Tensor g = gradient[i + 1];
    if (!g.defined()) continue;
    if (node.kind == LipschitzKind::kActivation) {
      g = g * lipschitz_slope_at(node, value[static_cast<size_t>(node.inputs[0])]).unsqueeze(1);
    } else if (node.is_map()) {
      g = lipschitz_transpose(node, g);
    }
    for (const int64_t input : node.inputs) {
      at::Tensor& to = gradient[static_cast<size_t>(input)];
      to = to.defined() ? to + g : g;
    }
  }
  return gradient[0].defined() ? gradient[0].abs().sum(-1) : at::zeros({points, count}, x.options());
}

}  // namespace torch_ext::ops

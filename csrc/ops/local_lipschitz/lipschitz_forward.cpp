#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <utility>

#include "ops/local_lipschitz/lipschitz_bounds.h"
#include "ops/local_lipschitz/lipschitz_rows.h"

namespace torch_ext::ops {
namespace {

LipschitzInterval bounded(const LipschitzInterval& z) { return {lipschitz_lower(z.l), lipschitz_upper(z.u)}; }

LipschitzInterval meet(const LipschitzInterval& a, const LipschitzInterval& b) {
  return {at::maximum(a.l, b.l), at::minimum(a.u, b.u)};
}

class Forward {
 public:
  Forward(const LipschitzNetwork& network, const at::Tensor& lo, const at::Tensor& hi, const LipschitzMethod& method)
      : network_(network),
        method_(method),
        value_(static_cast<size_t>(network.values())),
        magnitude_(static_cast<size_t>(network.values())),
        inputs_(network.nodes.size()),
        lines_(network.nodes.size()) {
    value_[0] = {lo, hi};
    if (safe()) magnitude_[0] = largest(value_[0]).detach();
  }

  LipschitzIntervals run() {
    for (size_t i = 0; i < network_.nodes.size(); ++i) {
      const LipschitzNode& node = network_.nodes[i];
      if (node.kind == LipschitzKind::kActivation) {
        activation(i);
      } else if (node.kind == LipschitzKind::kAdd) {
        sum(i);
      } else {
        map(i);
      }
    }
    return std::move(inputs_);
  }

 private:
  bool safe() const { return method_.gamma > 0; }
  static size_t index(int64_t value) { return static_cast<size_t>(value); }

  void map(size_t i) {
    const LipschitzNode& node = network_.nodes[i];
    const size_t in = index(node.inputs[0]);
    const LipschitzInterval& x = value_[in];
    if (node.kind == LipschitzKind::kFlatten) {
      value_[i + 1] = x;
      magnitude_[i + 1] = magnitude_[in];
      return;
    }
    at::Tensor middle = lipschitz_apply(node, (x.l + x.u) * 0.5);
    if (node.bias.defined()) middle = middle + node.bias;
    const at::Tensor radius = lipschitz_apply(node, (x.u - x.l) * 0.5, /*magnitude=*/true);
    set(i, {middle - radius, middle + radius}, [&] {
      const at::Tensor magnitude = lipschitz_apply(node, largest(x), /*magnitude=*/true);
      return node.bias.defined() ? magnitude + node.bias.abs() : magnitude;
    });
  }

  void sum(size_t i) {
    const size_t a = index(network_.nodes[i].inputs[0]), b = index(network_.nodes[i].inputs[1]);
    set(i, {value_[a].l + value_[b].l, value_[a].u + value_[b].u},
        [&] { return largest(value_[a]) + largest(value_[b]); });
  }

  template <typename Magnitude>
  void set(size_t i, const LipschitzInterval& z, const Magnitude& magnitude) {
    value_[i + 1] = z;
    if (safe()) {
      magnitude_[i + 1] = magnitude().detach();
      value_[i + 1] = widened(z, magnitude_[i + 1] * method_.gamma);
    }
    value_[i + 1] = bounded(value_[i + 1]);
  }

  void activation(size_t i) {
    const LipschitzNode& node = network_.nodes[i];
    const size_t in = index(node.inputs[0]);
    LipschitzInterval& z = value_[in];
    // Behind a single linear map the interval is exact.
    if (method_.crown && (network_.after_activation[in] || network_.maps_before[in] > 1)) {
      z = meet(z, crown(node.inputs[0]));
    }
    inputs_[i] = z;
    if (method_.crown) lines_[i] = lines(i, z, {});
    LipschitzInterval h = lipschitz_values(node, z);
    if (safe()) {
      magnitude_[i + 1] = largest(h).detach();
      h = widened(h, magnitude_[i + 1] * method_.gamma);
    }
    value_[i + 1] = bounded(h);
  }

  at::Tensor lines(size_t i, const LipschitzInterval& z, const at::Tensor& alpha) const {
    const LipschitzNode& node = network_.nodes[i];
    const at::Tensor lines = lipschitz_value_lines(node, z, alpha);
    if (!safe()) return lines;
    const at::Tensor fixed = lines.detach();
    const at::Tensor slope = at::maximum(fixed[0].abs(), fixed[2].abs());
    const at::Tensor intercept = at::maximum(fixed[1].abs(), fixed[3].abs());
    const at::Tensor reach = at::maximum(magnitude_[index(node.inputs[0])], largest(z).detach());
    const at::Tensor slack = (intercept + 2 * slope * reach) * method_.gamma;
    return at::stack({lines[0], lines[1] + slack, lines[2], lines[3] - slack});
  }

  // Linear bounds of a value by the input; `activations` receives the nodes that were met.
  LipschitzInterval linear_bounds(int64_t value, const std::vector<at::Tensor>& lines,
                                  std::vector<size_t>* activations = nullptr) const {
    LipschitzRows rows(network_, length(value_[0].l, 0), value_[0].l.options(), safe());
    rows.start_identity(value);
    if (safe()) rows.add_constant(magnitude_[index(value)] * method_.gamma);
    for (int64_t v = value; v > 0; --v) {
      if (!rows.has(v)) continue;
      const LipschitzNode& node = network_.maker(v);
      if (node.kind == LipschitzKind::kActivation) {
        rows.relax(v, node.inputs[0], lines[index(v - 1)]);
        if (activations != nullptr) activations->push_back(index(v - 1));
      } else if (node.kind == LipschitzKind::kAdd) {
        for (const int64_t input : node.inputs) rows.copy(v, input);
      } else {
        rows.pull(node, v, node.inputs[0]);
      }
      rows.drop(v);
    }
    if (rows.has(0)) rows.concretize(0, value_[0]);
    return rows.result(method_.gamma);
  }

  LipschitzInterval crown(int64_t value) const {
    std::vector<size_t> met;
    const LipschitzInterval plain = linear_bounds(value, lines_, &met);
    if (method_.alpha_iters == 0) return plain;
    std::vector<size_t> chosen;
    for (const size_t i : met) {
      if (lipschitz_has_alpha(network_.nodes[i])) chosen.push_back(i);
    }
    if (chosen.empty()) return plain;
    return meet(plain, linear_bounds(value, with_alphas(chosen, optimized(value, chosen), /*detached=*/false)));
  }

  std::vector<at::Tensor> with_alphas(const std::vector<size_t>& chosen, const std::vector<at::Tensor>& alphas,
                                      bool detached) const {
    std::vector<at::Tensor> lines = lines_;
    if (detached) {
      for (at::Tensor& line : lines) line = line.defined() ? line.detach() : line;
    }
    for (size_t k = 0; k < chosen.size(); ++k) {
      const LipschitzInterval& z = inputs_[chosen[k]];
      lines[chosen[k]] =
          this->lines(chosen[k], detached ? LipschitzInterval{z.l.detach(), z.u.detach()} : z, alphas[k]);
    }
    return lines;
  }

  // Adam on the slopes below the open ReLUs, shared by the rows of the value, for the smallest sum of widths per box
  // (20 steps of 0.5 with a decay of 0.98 in the published code). The best slopes, without gradient.
  std::vector<at::Tensor> optimized(int64_t value, const std::vector<size_t>& chosen) const {
    TORCH_CHECK(!c10::InferenceMode::is_enabled(),
                "local_lipschitz: alpha_iters needs autograd: use torch.no_grad() instead of torch.inference_mode()");
    const at::AutoGradMode enabled(true);
    constexpr double kRate = 0.5, kDecay = 0.98, kBeta1 = 0.9, kBeta2 = 0.999, kEps = 1e-8;
    std::vector<at::Tensor> alphas, best, first, second;
    for (const size_t i : chosen) {
      best.push_back(lines_[i][2].detach().clone());
      first.push_back(at::zeros_like(best.back()));
      second.push_back(at::zeros_like(best.back()));
    }
    alphas = best;
    at::Tensor least;
    double rate = kRate, product1 = 1, product2 = 1;
    for (int64_t step = 0; step <= method_.alpha_iters; ++step) {
      for (at::Tensor& alpha : alphas) alpha = alpha.detach().set_requires_grad(true);
      const LipschitzInterval z = linear_bounds(value, with_alphas(chosen, alphas, /*detached=*/true));
      const at::Tensor width = (z.u - z.l).sum(1);
      const at::Tensor better = least.defined() ? width.detach().lt(least) : at::ones_like(width, at::kBool);
      least = least.defined() ? at::where(better, width.detach(), least) : width.detach();
      for (size_t k = 0; k < alphas.size(); ++k) {
        best[k] = at::where(better.unsqueeze(1), alphas[k].detach(), best[k]);
      }
      if (step == method_.alpha_iters) break;
      const auto grads = torch::autograd::grad({width.sum()}, alphas, {}, std::nullopt, false, /*allow_unused=*/true);
      product1 *= kBeta1;
      product2 *= kBeta2;
      for (size_t k = 0; k < alphas.size(); ++k) {
        if (!grads[k].defined()) continue;
        first[k] = first[k] * kBeta1 + grads[k] * (1 - kBeta1);
        second[k] = second[k] * kBeta2 + grads[k].square() * (1 - kBeta2);
        const at::Tensor scale = (second[k] / (1 - product2)).sqrt() + kEps;
        const double least_slope =
            network_.nodes[chosen[k]].activation == LipschitzActivation::kLeakyRelu ? network_.nodes[chosen[k]].a : 0;
        alphas[k] = (alphas[k].detach() - rate / (1 - product1) * first[k] / scale).clamp(least_slope, 1);
      }
      rate *= kDecay;
    }
    return best;
  }

  const LipschitzNetwork& network_;
  const LipschitzMethod& method_;
  std::vector<LipschitzInterval> value_;
  std::vector<at::Tensor> magnitude_;
  LipschitzIntervals inputs_;
  std::vector<at::Tensor> lines_;
};

}  // namespace

LipschitzIntervals lipschitz_forward(const LipschitzNetwork& network, const at::Tensor& lo, const at::Tensor& hi,
                                     const LipschitzMethod& method) {
  return Forward(network, lo, hi, method).run();
}

LipschitzIntervals lipschitz_all_slopes(const LipschitzNetwork& network, const LipschitzIntervals& inputs,
                                        const LipschitzMethod& method) {
  LipschitzIntervals slopes(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    const LipschitzNode& node = network.nodes[i];
    if (node.kind != LipschitzKind::kActivation) continue;
    slopes[i] = lipschitz_slopes(node, inputs[i]);
    if (method.gamma > 0 && !lipschitz_has_alpha(node)) {
      slopes[i] = {slopes[i].l - method.gamma, slopes[i].u + method.gamma};  // erf, exp and tanh round as well
    }
  }
  return slopes;
}

}  // namespace torch_ext::ops

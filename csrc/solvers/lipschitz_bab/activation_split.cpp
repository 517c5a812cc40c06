#include <ATen/ATen.h>

#include "ops/local_lipschitz/lipschitz_bounds.h"
#include "solvers/lipschitz_bab/lipschitz_search.h"

namespace torch_ext::solvers {
namespace {

// A part is a row of choices, one for each neuron of each activation: 0 open, 1 its largest slope, -1 its smallest.
class ActivationSplit final : public LipschitzSplit {
 public:
  explicit ActivationSplit(const LipschitzSearchProblem& search) : search_(search) {
    const auto& problem = search.problem;
    for (const ops::LipschitzNode& node : problem.network.nodes) {
      TORCH_CHECK_VALUE(node.kind != ops::LipschitzKind::kActivation || ops::lipschitz_has_alpha(node),
                        "lipschitz_bab: split=\"activation\" needs ReLU or LeakyReLU, layer '", node.name,
                        "' is smooth; use split=\"input\"");
    }
    const auto inputs = ops::lipschitz_forward(problem.network, problem.lo, problem.hi, search.method);
    slopes_ = ops::lipschitz_all_slopes(problem.network, inputs, search.method);
  }

  LipschitzPart root() const override {
    int64_t count = 0;
    for (const auto& slope : slopes_) count += slope.l.defined() ? slope.l.size(1) : 0;
    return {at::zeros({count}, search_.problem.lo.options().dtype(at::kChar)), {}};
  }

  std::vector<LipschitzPart> children(const LipschitzPart& part) const override {
    std::vector<LipschitzPart> result;
    for (const int choice : {1, -1}) {
      LipschitzPart child{part.first.clone(), {}};
      child.first.select(0, part.split).fill_(choice);
      result.push_back(child);
    }
    return result;
  }

  double evaluate(std::vector<LipschitzPart>& parts) const override {
    std::vector<at::Tensor> rows;
    for (const LipschitzPart& part : parts) rows.push_back(part.first);
    const at::Tensor chosen = at::stack(rows);
    const ops::LipschitzIntervals slopes = restricted(chosen);
    const auto& problem = search_.problem;
    const auto jacobian = ops::lipschitz_backward(problem.network, slopes, chosen.size(0), problem.lo.options(),
                                                  search_.outputs, search_.method, /*branching=*/true);
    const auto [largest, output] = jacobian.norm.max(1);
    set(parts, largest, scores(jacobian, slopes, output));
    const at::Tensor middle = problem.lo + (problem.hi - problem.lo) * 0.5;
    return ops::lipschitz_norm_at(problem.network, middle, search_.outputs).max().item<double>();
  }

 private:
  ops::LipschitzIntervals restricted(const at::Tensor& chosen) const {
    ops::LipschitzIntervals result(slopes_.size());
    int64_t at = 0;
    for (size_t i = 0; i < slopes_.size(); ++i) {
      if (!slopes_[i].l.defined()) continue;
      const at::Tensor choice = chosen.narrow(1, at, slopes_[i].l.size(1));
      at += slopes_[i].l.size(1);
      result[i] = {at::where(choice.gt(0), slopes_[i].u, slopes_[i].l),
                   at::where(choice.lt(0), slopes_[i].l, slopes_[i].u)};
    }
    return result;
  }

  // What the relaxation of each open neuron may cost in the row with the largest norm: the coefficient of its product
  // times the area between the lines, gu |gu| - gl |gl|, plus 1; negative where there is nothing to choose.
  at::Tensor scores(const ops::LipschitzJacobian& jacobian, const ops::LipschitzIntervals& slopes,
                    const at::Tensor& output) const {
    std::vector<at::Tensor> result;
    for (size_t i = 0; i < slopes.size(); ++i) {
      if (!slopes[i].l.defined()) continue;
      const auto& branching = jacobian.branching[i];
      const at::Tensor open = slopes[i].l.lt(slopes[i].u);
      at::Tensor score = at::ones_like(slopes[i].l);
      if (branching.coefficients.defined()) {  // it is not where the norm needs no row: behind every activation
        const at::Tensor index = output.view({-1, 1, 1}).expand({-1, 1, score.size(1)});
        const auto of_output = [&](const at::Tensor& x) { return x.gather(1, index).squeeze(1); };
        const at::Tensor l = of_output(branching.gradient.l), u = of_output(branching.gradient.u);
        score = score + of_output(branching.coefficients).abs() * (u * u.abs() - l * l.abs());
      }
      result.push_back(at::where(open, score.nan_to_num(1, 1e300, 1), at::full({}, -1.0, score.options())));
    }
    if (result.empty()) return at::full({output.size(0), 1}, -1.0, search_.problem.lo.options());
    return at::cat(result, 1);
  }

  static void set(std::vector<LipschitzPart>& parts, const at::Tensor& bounds, const at::Tensor& scores) {
    const auto [score, place] = scores.max(1);
    const at::Tensor bound = bounds.to(at::kDouble).cpu(), best = score.to(at::kDouble).cpu(), index = place.cpu();
    for (size_t i = 0; i < parts.size(); ++i) {
      parts[i].bound = bound.const_data_ptr<double>()[i];
      parts[i].split = best.const_data_ptr<double>()[i] < 0 ? -1 : index.const_data_ptr<int64_t>()[i];
    }
  }

  LipschitzSearchProblem search_;
  ops::LipschitzIntervals slopes_;
};

}  // namespace

std::unique_ptr<LipschitzSplit> lipschitz_activation_split(const LipschitzSearchProblem& search) {
  return std::make_unique<ActivationSplit>(search);
}

}  // namespace torch_ext::solvers

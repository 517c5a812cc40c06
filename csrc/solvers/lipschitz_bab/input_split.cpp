#include <ATen/ATen.h>

#include "ops/local_lipschitz/lipschitz_bounds.h"
#include "solvers/lipschitz_bab/lipschitz_search.h"

namespace torch_ext::solvers {
namespace {

class InputSplit final : public LipschitzSplit {
 public:
  explicit InputSplit(const LipschitzSearchProblem& search) : search_(search) {}

  LipschitzPart root() const override { return {search_.problem.lo.select(0, 0), search_.problem.hi.select(0, 0)}; }

  std::vector<LipschitzPart> children(const LipschitzPart& part) const override {
    LipschitzPart left{part.first, part.second.clone()}, right{part.first.clone(), part.second};
    const at::Tensor middle = centre(part.first, part.second).select(0, part.split);
    left.second.select(0, part.split).copy_(middle);
    right.first.select(0, part.split).copy_(middle);
    return {left, right};
  }

  double evaluate(std::vector<LipschitzPart>& parts) const override {
    std::vector<at::Tensor> los, his;
    for (const LipschitzPart& part : parts) {
      los.push_back(part.first);
      his.push_back(part.second);
    }
    const at::Tensor lo = at::stack(los), hi = at::stack(his), middle = centre(lo, hi);
    const auto jacobian = ops::lipschitz_jacobian(search_.problem.network, lo, hi, search_.outputs, search_.method);
    const at::Tensor reach = at::maximum(jacobian.lo.abs(), jacobian.hi.abs()).amax(1);
    // A box that is two neighbouring numbers wide cannot be halved.
    const at::Tensor divisible = middle.gt(lo).logical_and(middle.lt(hi));
    const at::Tensor width = at::where(divisible, hi - lo, at::zeros_like(lo));
    // Where no entry of J depends on anything, the widest feature is as good as any.
    const at::Tensor scaled = (width * reach).nan_to_num(0, 1e300, 0);
    const at::Tensor score = at::where(scaled.amax(1, true).gt(0), scaled, width);
    const at::Tensor bound = jacobian.norm.amax(1).to(at::kDouble).cpu();
    const at::Tensor split = at::where(score.amax(1).gt(0), score.argmax(1), at::full({}, -1, split_options(lo))).cpu();
    for (size_t i = 0; i < parts.size(); ++i) {
      parts[i].bound = bound.const_data_ptr<double>()[i];
      parts[i].split = split.const_data_ptr<int64_t>()[i];
    }
    return ops::lipschitz_norm_at(search_.problem.network, middle, search_.outputs).max().item<double>();
  }

 private:
  static at::Tensor centre(const at::Tensor& lo, const at::Tensor& hi) { return lo + (hi - lo) * 0.5; }
  static at::TensorOptions split_options(const at::Tensor& like) {
    return at::TensorOptions(at::kLong).device(like.device());
  }
  LipschitzSearchProblem search_;
};

}  // namespace

std::unique_ptr<LipschitzSplit> lipschitz_input_split(const LipschitzSearchProblem& search) {
  return std::make_unique<InputSplit>(search);
}

}  // namespace torch_ext::solvers

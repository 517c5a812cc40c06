#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch_ext/solvers/lipschitz_bab.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <queue>
#include <utility>

#include "core/library.h"
#include "solvers/lipschitz_bab/lipschitz_search.h"

namespace torch_ext::solvers {
namespace {

constexpr int64_t kBatch = 128;

struct Limits {
  int64_t max_nodes;
  std::optional<double> max_seconds;
  double tol;
};

class Search {
 public:
  Search(const LipschitzSplit& split, const Limits& limits) : split_(split), limits_(limits) {}

  LipschitzBabResult run() {
    std::vector<LipschitzPart> root{split_.root()};
    evaluate(root);
    while (!parts_.empty() && !finished()) {
      std::vector<LipschitzPart> children;
      const int64_t room = std::min((limits_.max_nodes - nodes_) / 2, kBatch);
      for (int64_t i = 0; i < room && !parts_.empty() && parts_.top().bound > target(); ++i) {
        const LipschitzPart part = parts_.top();
        parts_.pop();
        for (LipschitzPart& child : split_.children(part)) {
          child.bound = part.bound;
          children.push_back(std::move(child));
        }
      }
      evaluate(children);
    }
    return {upper(), lower_, nodes_};
  }

 private:
  struct Less {
    bool operator()(const LipschitzPart& a, const LipschitzPart& b) const { return a.bound < b.bound; }
  };

  // Children carry their parent's bound, which stays where their own is looser.
  void evaluate(std::vector<LipschitzPart>& parts) {
    std::vector<double> inherited;
    for (const LipschitzPart& part : parts) inherited.push_back(part.bound);
    lower_ = std::max(lower_, split_.evaluate(parts));
    const bool is_root = nodes_ == 0;
    nodes_ += static_cast<int64_t>(parts.size());
    for (size_t i = 0; i < parts.size(); ++i) {
      if (!is_root) parts[i].bound = std::min(parts[i].bound, inherited[i]);
      if (parts[i].split < 0) {
        settled_ = std::max(settled_, parts[i].bound);
      } else {
        parts_.push(parts[i]);
      }
    }
  }

  double upper() const { return std::max({lower_, settled_, parts_.empty() ? 0 : parts_.top().bound}); }
  // A part below this need not be looked at: the gap is closed without it.
  double target() const { return std::max(settled_, lower_ / (1 - std::min(limits_.tol, 0.5))); }

  bool finished() const {
    if (std::isfinite(upper()) && (upper() - lower_ <= limits_.tol * upper() || parts_.top().bound <= target()))
      return true;
    if (nodes_ + 2 > limits_.max_nodes) return true;
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start_;
    return limits_.max_seconds.has_value() && passed.count() >= *limits_.max_seconds;
  }

  const LipschitzSplit& split_;
  Limits limits_;
  std::priority_queue<LipschitzPart, std::vector<LipschitzPart>, Less> parts_;
  double lower_ = 0, settled_ = 0;
  int64_t nodes_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

std::tuple<double, double, int64_t> bab_op(at::TensorList tensors, at::IntArrayRef layers, at::ArrayRef<double> numbers,
                                           std::string_view names, const at::Tensor& lo, const at::Tensor& hi,
                                           std::optional<int64_t> output, std::string_view split, int64_t max_nodes,
                                           std::optional<double> max_seconds, double tol, bool safe) {
  TORCH_CHECK_VALUE(split == "input" || split == "activation",
                    "lipschitz_bab: split must be \"input\" or \"activation\", got \"", split, "\"");
  TORCH_CHECK_VALUE(max_nodes >= 1, "lipschitz_bab: max_nodes must be at least 1, got ", max_nodes);
  TORCH_CHECK_VALUE(!max_seconds.has_value() || *max_seconds >= 0, "lipschitz_bab: max_seconds must be >= 0, got ",
                    max_seconds.value_or(0));
  TORCH_CHECK_VALUE(std::isfinite(tol) && tol >= 0, "lipschitz_bab: tol must be a finite number >= 0, got ", tol);
  const at::NoGradGuard no_grad;
  const ops::LipschitzProblem problem("lipschitz_bab", tensors, layers, numbers, names, lo.unsqueeze(0),
                                      hi.unsqueeze(0));
  const auto method = ops::lipschitz_method(problem.network, lo.scalar_type(), "crown", "tight", 0, safe, false);
  at::OptionalIntArrayRef one;
  if (output.has_value()) one = at::IntArrayRef(*output);
  const LipschitzSearchProblem search{problem, method, ops::lipschitz_outputs(problem.network, one)};
  const auto by = split == "input" ? lipschitz_input_split(search) : lipschitz_activation_split(search);
  const LipschitzBabResult result = Search(*by, {max_nodes, max_seconds, tol}).run();
  return {result.upper, result.lower, result.nodes};
}

}  // namespace

LipschitzBabResult lipschitz_bab(const torch::nn::Module& model, const at::Tensor& lo, const at::Tensor& hi,
                                 const LipschitzBabOptions& options) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::lipschitz_bab", "").typed<decltype(bab_op)>();
  const ops::LipschitzLayers layers = ops::lipschitz_layers(model);
  const auto [upper, lower, nodes] =
      op.call(layers.tensors, layers.layers, layers.numbers, layers.names, lo, hi, options.output(), options.split(),
              options.max_nodes(), options.max_seconds(), options.tol(), options.safe());
  return {upper, lower, nodes};
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "lipschitz_bab(Tensor[] tensors, int[] layers, float[] numbers, str names, Tensor lo, Tensor hi, int? "
      "output=None, *, str split='input', int max_nodes=1000, float? max_seconds=None, float tol=1e-06, bool "
      "safe=False) -> (float upper, float lower, int nodes)",
      bab_op);
}

}  // namespace torch_ext::solvers

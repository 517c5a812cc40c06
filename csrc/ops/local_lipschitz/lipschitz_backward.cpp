#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "ops/local_lipschitz/lipschitz_bounds.h"
#include "ops/local_lipschitz/lipschitz_relax.h"
#include "ops/local_lipschitz/lipschitz_rows.h"

namespace torch_ext::ops {
namespace {

size_t index(int64_t value) { return static_cast<size_t>(value); }

// Gradients of the outputs by the values that no activation separates from them; [outputs, size] per value, the same
// for all boxes. magnitude: the same with |W|.
std::vector<at::Tensor> constant_gradients(const LipschitzNetwork& network, at::IntArrayRef outputs,
                                           const at::TensorOptions& options, bool magnitude) {
  const int64_t last = network.values() - 1, count = static_cast<int64_t>(outputs.size());
  std::vector<at::Tensor> gradients(index(network.values()));
  gradients[index(last)] = lipschitz_output_rows(network, outputs, options);
  for (int64_t v = last - 1; v >= 0; --v) {
    if (network.before_activation[index(v)]) continue;
    at::Tensor& g = gradients[index(v)];
    for (const int64_t reader : network.readers[index(v)]) {
      const at::Tensor part =
          lipschitz_transpose(network.nodes[index(reader)], gradients[index(reader + 1)], magnitude);
      g = g.defined() ? g + part : part;
    }
    if (!g.defined()) g = at::zeros({count, network.size_of(v)}, options);  // the output does not depend on it
  }
  return gradients;
}

// The Jacobian over some boxes and outputs: groups = boxes x outputs.
class Backward {
 public:
  Backward(const LipschitzNetwork& network, const LipschitzIntervals& slopes, const std::vector<at::Tensor>& constants,
           const std::vector<at::Tensor>& constant_magnitudes, int64_t boxes, int64_t outputs,
           const at::TensorOptions& options, const LipschitzMethod& method)
      : network_(network),
        method_(method),
        boxes_(boxes),
        outputs_(outputs),
        options_(options.requires_grad(false)),
        gradient_(index(network.values())),
        reach_(index(network.values())),
        slope_(network.nodes.size()),
        product_(network.nodes.size()),
        lines_(network.nodes.size()) {
    for (size_t i = 0; i < slopes.size(); ++i) {
      if (slopes[i].l.defined()) slope_[i] = {per_box(slopes[i].l), per_box(slopes[i].u)};
    }
    for (size_t v = 0; v < constants.size(); ++v) {
      if (!constants[v].defined()) continue;
      const at::Tensor g = per_output(constants[v]);
      if (safe()) reach_[v] = per_output(constant_magnitudes[v].detach());
      gradient_[v] = safe() ? widened({g, g}, reach_[v] * method.gamma) : LipschitzInterval{g, g};
    }
  }

  LipschitzJacobian run(bool branching) {
    for (int64_t v = network_.values() - 1; v >= 0; --v) {
      if (is_constant(v)) {
        if (v > 0 && is_activation(v - 1)) set_lines(index(v - 1));
        continue;
      }
      if (safe()) set_reach(v);
      if (method_.backward == LipschitzBackward::kIbp) {
        gradient_[index(v)] = interval(v);
        if (v > 0 && is_activation(v - 1)) set_product(index(v - 1));
      } else if (v == 0) {
        gradient_[0] = rows(0).result(method_.gamma);
      } else if (is_activation(v - 1)) {
        const at::AutoGradMode mode(at::GradMode::is_enabled() && !method_.detach_intermediate);
        gradient_[index(v)] = rows(v).result(method_.gamma);
        set_lines(index(v - 1));
      }
    }
    return norm(branching);
  }

 private:
  bool safe() const { return method_.gamma > 0; }
  bool is_constant(int64_t value) const { return !network_.before_activation[index(value)]; }
  bool is_activation(int64_t node) const { return network_.nodes[index(node)].kind == LipschitzKind::kActivation; }

  at::Tensor per_box(const at::Tensor& x) const {  // [boxes, size] -> [groups, size]
    return x.unsqueeze(1).expand({boxes_, outputs_, -1}).reshape({boxes_ * outputs_, length(x, 1)});
  }
  at::Tensor per_output(const at::Tensor& x) const {
    return x.unsqueeze(0).expand({boxes_, outputs_, -1}).reshape({boxes_ * outputs_, length(x, 1)});
  }

  // Bounds of the largest magnitude that sums of |W| |g| along any path reach: what roundoff is relative to.
  void set_reach(int64_t value) {
    at::Tensor& reach = reach_[index(value)];
    for (const int64_t reader : network_.readers[index(value)]) {
      const LipschitzNode& node = network_.nodes[index(reader)];
      const size_t out = index(reader + 1);
      const at::Tensor part = node.kind == LipschitzKind::kActivation
                                  ? largest(slope_[index(reader)]) * at::maximum(largest(gradient_[out]), reach_[out])
                                  : lipschitz_transpose(node, reach_[out], /*magnitude=*/true);
      reach = reach.defined() ? reach + part.detach() : part.detach();
    }
  }

  // The product of slope and gradient of an activation: lines, and where the gradient is a constant its interval.
  void set_lines(size_t node) {
    const LipschitzInterval &g = gradient_[node + 1], &s = slope_[node];
    lines_[node] = lipschitz_lines(g.l, g.u, s.l, s.u, method_.backward == LipschitzBackward::kRecurJac);
    if (safe()) {
      const at::Tensor fixed = lines_[node].detach();
      const at::Tensor reach = at::maximum(reach_[node + 1], largest(g).detach());
      const at::Tensor slack = (2 * largest(s).detach() * reach + at::maximum(fixed[1].abs(), fixed[3].abs()));
      const at::Tensor more = slack * (2 * method_.gamma);
      lines_[node] = at::stack({lines_[node][0], lines_[node][1] + more, lines_[node][2], lines_[node][3] - more});
    }
    if (is_constant(static_cast<int64_t>(node) + 1)) set_product(node);
  }

  void set_product(size_t node) {
    const LipschitzInterval &g = gradient_[node + 1], &s = slope_[node];
    // Where a bound of g has overflown, 0 * infinity is 0.
    const auto times = [](const at::Tensor& a, const at::Tensor& b) { return at::where(b.eq(0), b, a * b); };
    const at::Tensor ends[] = {times(g.l, s.l), times(g.l, s.u), times(g.u, s.l), times(g.u, s.u)};
    product_[node] = {at::minimum(at::minimum(ends[0], ends[1]), at::minimum(ends[2], ends[3])),
                      at::maximum(at::maximum(ends[0], ends[1]), at::maximum(ends[2], ends[3]))};
    if (safe()) {
      const at::Tensor reach = at::maximum(reach_[node + 1], largest(g).detach());
      product_[node] = widened(product_[node], largest(s).detach() * reach * (4 * method_.gamma));
    }
  }

  // Interval arithmetic: the bounds of a value's gradient from those of the values behind it.
  LipschitzInterval interval(int64_t value) const {
    LipschitzInterval sum;
    for (const int64_t reader : network_.readers[index(value)]) {
      const LipschitzNode& node = network_.nodes[index(reader)];
      LipschitzInterval part = gradient_[index(reader + 1)];
      if (node.kind == LipschitzKind::kActivation) part = product_[index(reader)];
      if (node.is_map() && node.kind != LipschitzKind::kFlatten) {
        const at::Tensor middle = lipschitz_transpose(node, (part.l + part.u) * 0.5);
        const at::Tensor radius = lipschitz_transpose(node, (part.u - part.l) * 0.5, /*magnitude=*/true);
        part = {middle - radius, middle + radius};
      }
      sum = sum.l.defined() ? LipschitzInterval{sum.l + part.l, sum.u + part.u} : part;
    }
    if (safe()) sum = widened(sum, reach_[index(value)] * method_.gamma);
    return {lipschitz_lower(sum.l), lipschitz_upper(sum.u)};
  }

  // All entries of the gradient of a value, as linear functions of what lies behind it.
  LipschitzRows rows(int64_t value) {
    LipschitzRows rows(network_, boxes_ * outputs_, options_, safe());
    rows.start_identity(value);
    if (safe()) rows.add_constant(reach_[index(value)] * method_.gamma);
    push(rows, value, nullptr);
    return rows;
  }

  void push(LipschitzRows& rows, int64_t from, std::vector<LipschitzJacobian::Branching>* branching) {
    for (int64_t v = from; v < network_.values(); ++v) {
      if (!rows.has(v)) continue;
      if (is_constant(v)) {
        rows.concretize(v, gradient_[index(v)]);
        continue;
      }
      for (const int64_t reader : network_.readers[index(v)]) {
        const LipschitzNode& node = network_.nodes[index(reader)];
        if (node.kind == LipschitzKind::kActivation) {
          if (branching != nullptr) branch(rows, v, index(reader), *branching);
          if (is_constant(reader + 1)) {
            rows.concretize(v, product_[index(reader)]);
          } else {
            rows.relax(v, reader + 1, lines_[index(reader)]);
          }
        } else if (node.kind == LipschitzKind::kAdd) {
          rows.copy(v, reader + 1);
        } else {
          rows.push(node, v, reader + 1);
        }
      }
      rows.drop(v);
    }
  }

  void branch(LipschitzRows& rows, int64_t value, size_t node, std::vector<LipschitzJacobian::Branching>& branching) {
    const auto shaped = [&](const at::Tensor& x) { return x.reshape({boxes_, outputs_, -1}); };
    const LipschitzInterval& g = gradient_[node + 1];
    branching[node] = {shaped(rows.at(value).a), {shaped(g.l), shaped(g.u)}};
  }

  // |t| <= slope t + intercept for t in [l, u], summed over the row and propagated as one row.
  LipschitzJacobian norm(bool branching) {
    const LipschitzInterval& t = gradient_[0];
    LipschitzJacobian result{{}, t.l, t.u, {}};
    if (branching) result.branching.resize(network_.nodes.size());
    if (is_constant(0) || method_.backward == LipschitzBackward::kIbp) {
      result.norm = largest(t).sum(1);
      if (safe()) result.norm = result.norm * (1 + 2 * method_.gamma);
    } else {
      LipschitzRows row(network_, boxes_ * outputs_, options_, safe());
      const bool detach = method_.detach_intermediate;
      start_norm(row, detach ? LipschitzInterval{t.l.detach(), t.u.detach()} : t);
      push(row, 0, branching ? &result.branching : nullptr);
      result.norm = row.upper(method_.gamma).squeeze(1);
    }
    for (at::Tensor* bound : {&result.lo, &result.hi}) *bound = bound->reshape({boxes_, outputs_, -1});
    result.norm = result.norm.reshape({boxes_, outputs_});
    return result;
  }

  void start_norm(LipschitzRows& row, const LipschitzInterval& t) const {
    const auto filled = [&](double value) { return at::full({}, value, options_); };
    const at::Tensor open = t.l.lt(0).logical_and(t.u.gt(0));
    const at::Tensor l = at::where(open, t.l, filled(-1)), u = at::where(open, t.u, filled(1));
    const at::Tensor chord = (u + l) / (u - l);
    const at::Tensor slope = at::where(open, chord, at::where(t.l.ge(0), filled(1), filled(-1)));
    const at::Tensor intercept = at::where(open, u - chord * u, filled(0));
    row.start(0, slope.unsqueeze(1));
    row.add_constant(intercept.sum(1, /*keepdim=*/true));
    if (!safe()) return;
    const at::Tensor slack = 4 * largest(t).detach() + 2 * reach_[0];
    row.add_constant((slack * method_.gamma).sum(1, /*keepdim=*/true));
  }

  const LipschitzNetwork& network_;
  const LipschitzMethod& method_;
  int64_t boxes_, outputs_;
  at::TensorOptions options_;
  std::vector<LipschitzInterval> gradient_;  // per value
  std::vector<at::Tensor> reach_;            // per value
  LipschitzIntervals slope_, product_;       // per node
  std::vector<at::Tensor> lines_;
};

// Elements of one matrix of coefficients per group. A value with one activation ahead needs none: interval arithmetic
// is exact for it.
int64_t coefficients_per_group(const LipschitzNetwork& network) {
  std::vector<int64_t> ahead(index(network.values()), 0);
  int64_t rows = 1, width = 1;
  for (int64_t v = network.values() - 1; v >= 0; --v) {
    width = std::max(width, network.size_of(v));
    for (const int64_t reader : network.readers[index(v)]) {
      const bool activation = network.nodes[index(reader)].kind == LipschitzKind::kActivation;
      ahead[index(v)] = std::max(ahead[index(v)], ahead[index(reader + 1)] + (activation ? 1 : 0));
    }
    const bool bounded = v == 0 || network.maker(v).kind == LipschitzKind::kActivation;
    if (bounded && ahead[index(v)] > 1) rows = std::max(rows, network.size_of(v));
  }
  return 2 * rows * width;
}

LipschitzInterval cut(const LipschitzInterval& x, int64_t begin, int64_t count) {
  return x.l.defined() ? LipschitzInterval{x.l.narrow(0, begin, count), x.u.narrow(0, begin, count)} : x;
}

at::Tensor cut(const at::Tensor& x, int64_t begin, int64_t count) {
  return x.defined() ? x.narrow(0, begin, count) : x;
}

template <typename List>
List cut_all(const List& list, int64_t begin, int64_t count) {
  List result;
  for (const auto& entry : list) result.push_back(cut(entry, begin, count));
  return result;
}

// Joins parts along the boxes (0) or the outputs (1).
LipschitzJacobian joined(const std::vector<LipschitzJacobian>& parts, int64_t dim) {
  if (parts.size() == 1) return parts[0];
  const auto join = [&](const auto& member) {
    std::vector<at::Tensor> tensors;
    for (const LipschitzJacobian& part : parts) tensors.push_back(member(part));
    return tensors[0].defined() ? at::cat(tensors, dim) : tensors[0];
  };
  LipschitzJacobian result{join([](const auto& p) { return p.norm; }),
                           join([](const auto& p) { return p.lo; }),
                           join([](const auto& p) { return p.hi; }),
                           {}};
  for (size_t i = 0; i < parts[0].branching.size(); ++i) {
    result.branching.push_back({join([&](const auto& p) { return p.branching[i].coefficients; }),
                                {join([&](const auto& p) { return p.branching[i].gradient.l; }),
                                 join([&](const auto& p) { return p.branching[i].gradient.u; })}});
  }
  return result;
}

}  // namespace

LipschitzJacobian lipschitz_backward(const LipschitzNetwork& network, const LipschitzIntervals& slopes, int64_t boxes,
                                     const at::TensorOptions& options, at::IntArrayRef outputs,
                                     const LipschitzMethod& method, bool branching) {
  const auto count = static_cast<int64_t>(outputs.size());
  const auto constants = constant_gradients(network, outputs, options.requires_grad(false), /*magnitude=*/false);
  std::vector<at::Tensor> magnitudes(constants.size());
  if (method.gamma > 0) {
    magnitudes = constant_gradients(network, outputs, options.requires_grad(false), /*magnitude=*/true);
  }
  // As many groups at a time as fit a cache (a CPU) or keep the device busy.
  const int64_t budget = options.device().is_cpu() ? int64_t{1} << 19 : int64_t{1} << 26;
  const int64_t groups = std::max<int64_t>(1, budget / coefficients_per_group(network));
  const int64_t at_once = std::max<int64_t>(1, groups / count), outputs_at_once = std::min(count, groups);
  std::vector<LipschitzJacobian> parts;
  for (int64_t box = 0; box < boxes; box += at_once) {
    const int64_t some = std::min(at_once, boxes - box);
    const LipschitzIntervals of_boxes = cut_all(slopes, box, some);
    std::vector<LipschitzJacobian> rows;
    for (int64_t out = 0; out < count; out += outputs_at_once) {
      const int64_t few = std::min(outputs_at_once, count - out);
      rows.push_back(Backward(network, of_boxes, cut_all(constants, out, few), cut_all(magnitudes, out, few), some, few,
                              options, method)
                         .run(branching));
    }
    parts.push_back(joined(rows, 1));
  }
  return joined(parts, 0);
}

}  // namespace torch_ext::ops

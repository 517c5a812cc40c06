#include "ops/local_lipschitz/lipschitz_rows.h"

#include <ATen/ATen.h>

#include <limits>
#include <utility>

#include "ops/local_lipschitz/lipschitz_relax.h"

namespace torch_ext::ops {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

at::Tensor replaced(const at::Tensor& bound, double value) {
  return at::where(bound.isnan(), at::full({}, value, bound.options().requires_grad(false)), bound);
}

}  // namespace

at::Tensor lipschitz_upper(const at::Tensor& bound) { return replaced(bound, kInfinity); }
at::Tensor lipschitz_lower(const at::Tensor& bound) { return replaced(bound, -kInfinity); }

double lipschitz_gamma(const LipschitzNetwork& network, at::ScalarType type) {
  double roundings = 64 + static_cast<double>(network.input_size);
  for (const LipschitzNode& node : network.nodes) {
    // The longer of the sums that a product with W and one with its transpose take, and those over the value.
    roundings += 16 + static_cast<double>(node.size);
    if (node.kind == LipschitzKind::kLinear) roundings += static_cast<double>(length(node.weight, 1));
    if (node.kind == LipschitzKind::kConv2d) {
      const auto places = static_cast<double>(length(node.weight, 2) * length(node.weight, 3));
      roundings += places * static_cast<double>(node.input_shape[0] + node.shape[0]);
    }
  }
  const double unit = type == at::kDouble ? 0x1p-53 : 0x1p-24;
  TORCH_CHECK_VALUE(roundings * unit < 0.25,
                    "local_lipschitz: the network is too large for safe bounds in this dtype; ", "use float64");
  return roundings * unit / (1 - roundings * unit);
}

LipschitzRows::LipschitzRows(const LipschitzNetwork& network, int64_t groups, const at::TensorOptions& options,
                             bool safe)
    : network_(network),
      groups_(groups),
      options_(options.requires_grad(false)),
      safe_(safe),
      coefficients_(static_cast<size_t>(network.values())) {}

void LipschitzRows::start_identity(int64_t value) {
  mirrored_ = true;
  rows_ = network_.size_of(value);
  coefficients_[static_cast<size_t>(value)] = {{}, true, true};
}

void LipschitzRows::start(int64_t value, at::Tensor a) {
  rows_ = length(a, 1);
  coefficients_[static_cast<size_t>(value)] = {std::move(a), false, true};
}

const LipschitzCoefficients& LipschitzRows::at(int64_t value) {
  LipschitzCoefficients& found = coefficients_[static_cast<size_t>(value)];
  if (!found.a.defined()) found.a = at::eye(network_.size_of(value), options_).unsqueeze(0);
  return found;
}

at::Tensor LipschitzRows::both(const at::Tensor& a) const {
  return at::cat({a, -a}, 1).expand({groups_, 2 * rows_, -1});
}

void LipschitzRows::add(int64_t value, at::Tensor a, bool shared) {
  LipschitzCoefficients& found = coefficients_[static_cast<size_t>(value)];
  if (!found.defined) {
    found = {std::move(a), shared, true};
    return;
  }
  this->at(value);
  if (found.shared != shared) (shared ? a : found.a) = both(shared ? a : found.a);
  found.a = found.a + a;
  found.shared = found.shared && shared;
}

void LipschitzRows::push(const LipschitzNode& node, int64_t from, int64_t to) {
  const LipschitzCoefficients& source = coefficients_[static_cast<size_t>(from)];
  if (!source.a.defined()) {
    return add(to, lipschitz_apply_identity(node, network_.size_of(from), options_), true);
  }
  add(to, lipschitz_apply(node, source.a), source.shared);
}

void LipschitzRows::pull(const LipschitzNode& node, int64_t from, int64_t to) {
  const bool identity = !coefficients_[static_cast<size_t>(from)].a.defined();
  if (identity && node.kind == LipschitzKind::kLinear) {
    if (node.bias.defined()) count(at::cat({node.bias, -node.bias}).expand({groups_, 2 * rows_}));
    return add(to, node.weight.unsqueeze(0), true);
  }
  const LipschitzCoefficients source = this->at(from);
  if (node.bias.defined()) {
    at::Tensor c = at::matmul(source.a, node.bias);
    if (source.shared) c = at::cat({c, -c}, 1).expand({groups_, 2 * rows_});
    count(c);
  }
  add(to, lipschitz_transpose(node, source.a), source.shared);
}

void LipschitzRows::copy(int64_t from, int64_t to) {
  const LipschitzCoefficients source = this->at(from);
  add(to, source.a, source.shared);
}

void LipschitzRows::relax(int64_t from, int64_t to, const at::Tensor& lines) {
  const LipschitzCoefficients& source = this->at(from);
  auto [a, c] = lipschitz_relax(source.a, lines, /*mirror=*/source.shared);
  count(c);
  add(to, std::move(a), false);
}

void LipschitzRows::concretize(int64_t from, const LipschitzInterval& interval) {
  const LipschitzCoefficients& source = this->at(from);
  if (!source.shared) {
    count(std::get<1>(lipschitz_relax(source.a, at::stack({interval.u, interval.l}), /*mirror=*/false)));
    return;
  }
  // The same matrix for all groups: two products instead of one pass a group.
  const at::Tensor a = source.a.squeeze(0);
  const at::Tensor middle = at::linear((interval.l + interval.u) * 0.5, a);
  const at::Tensor spread = at::linear((interval.u - interval.l) * 0.5, a.abs());
  count(at::cat({spread + middle, spread - middle}, 1));
}

void LipschitzRows::add_constant(const at::Tensor& c) { count(mirrored_ ? at::cat({c, c}, 1) : c); }

void LipschitzRows::count(const at::Tensor& c) {
  sum_ = sum_.defined() ? sum_ + c : c;
  if (!safe_) return;
  const at::Tensor magnitude = c.detach().abs();
  magnitude_ = magnitude_.defined() ? magnitude_ + magnitude : magnitude;
}

at::Tensor LipschitzRows::upper(double gamma) const {
  TORCH_INTERNAL_ASSERT(sum_.defined());
  return lipschitz_upper(gamma > 0 ? sum_ + magnitude_ * gamma : sum_);
}

LipschitzInterval LipschitzRows::result(double gamma) const {
  const at::Tensor all = upper(gamma);
  return {-all.narrow(1, rows_, rows_), all.narrow(1, 0, rows_)};
}

}  // namespace torch_ext::ops

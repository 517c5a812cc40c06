#include "ops/local_lipschitz/lipschitz_activation.h"

#include <ATen/ATen.h>

#include <cmath>
#include <vector>

namespace torch_ext::ops {

at::Tensor largest(const LipschitzInterval& z) { return at::maximum(z.l.abs(), z.u.abs()); }
LipschitzInterval widened(const LipschitzInterval& z, const at::Tensor& by) { return {z.l - by, z.u + by}; }

namespace {

using Activation = LipschitzActivation;

// A point between the ends where sigma or its derivative turns, and its value there, rounded outward.
struct Turn {
  double at, value;
  bool maximum;
};
constexpr double kSlack = 1e-15;

std::vector<Turn> slope_turns(Activation activation) {
  switch (activation) {
    case Activation::kTanh:
      return {{0, 1, true}};
    case Activation::kSigmoid:
      return {{0, 0.25, true}};
    case Activation::kGelu:  // sigma'' = phi(x) (2 - x^2)
      return {{1.4142135623730951, 1.128904145185155 + kSlack, true},
              {-1.4142135623730951, -0.12890414518515478 - kSlack, false}};
    case Activation::kSilu:  // x tanh(x / 2) = 2
      return {{2.399357280515468, 1.0998393201288668 + kSlack, true},
              {-2.399357280515468, -0.0998393201288669 - kSlack, false}};
    default:
      return {};
  }
}

std::vector<Turn> value_turns(Activation activation) {
  if (activation == Activation::kGelu) return {{-0.7517915246935645, -0.16997120747990369 - kSlack, false}};
  if (activation == Activation::kSilu) return {{-1.2784645427610738, -0.27846454276107385 - kSlack, false}};
  return {};
}

// The range of a function that is monotone between its turns, from its values at the ends.
LipschitzInterval range(const at::Tensor& at_l, const at::Tensor& at_u, const LipschitzInterval& z,
                        const std::vector<Turn>& turns) {
  LipschitzInterval result{at::minimum(at_l, at_u), at::maximum(at_l, at_u)};
  // A turn that rounding puts on the wrong side of an end is off by less than the slack.
  for (const Turn& turn : turns) {
    const at::Tensor inside = z.l.le(turn.at).logical_and(z.u.ge(turn.at));
    at::Tensor& bound = turn.maximum ? result.u : result.l;
    bound = at::where(inside, at::full({}, turn.value, bound.options()), bound);
  }
  return result;
}

at::Tensor derivative(const LipschitzNode& node, const at::Tensor& x) {
  constexpr double kInvRoot2 = 0.70710678118654752, kInvRoot2Pi = 0.39894228040143268;
  switch (node.activation) {
    case Activation::kTanh:
      return 1 - x.tanh().square();
    case Activation::kSigmoid: {
      const at::Tensor s = x.sigmoid();
      return s * (1 - s);
    }
    case Activation::kSoftplus:
      return at::where((x * node.a).gt(node.b), at::full({}, 1.0, x.options()), (x * node.a).sigmoid());
    case Activation::kGelu: {
      // Where phi underflows, x phi(x) must not become inf * 0.
      const at::Tensor near = x.clamp(-40, 40);
      return 0.5 * (1 + (x * kInvRoot2).erf()) + near * (-0.5 * near.square()).exp() * kInvRoot2Pi;
    }
    case Activation::kSilu: {
      const at::Tensor s = x.sigmoid();
      return s + x.clamp(-1e4, 1e4) * s * (1 - s);
    }
    default:
      TORCH_INTERNAL_ASSERT(false);
  }
}

// torch replaces log(1 + e^(a x)) / a by x where a x > b, and so jumps there by about e^-b / a.
LipschitzInterval widened_by_jump(const LipschitzNode& node, const LipschitzInterval& z, LipschitzInterval range) {
  if (node.activation != Activation::kSoftplus) return range;
  const at::Tensor across = (z.l * node.a).le(node.b).logical_and((z.u * node.a).gt(node.b));
  const at::Tensor jump = across.to(z.l.scalar_type()) * (std::log1p(std::exp(-node.b)) / node.a);
  return {range.l - jump, range.u + jump};
}

bool is_relu(const LipschitzNode& node) {
  return node.activation == Activation::kRelu || node.activation == Activation::kLeakyRelu;
}
double left_slope(const LipschitzNode& node) { return node.activation == Activation::kLeakyRelu ? node.a : 0; }

at::Tensor relu_lines(const LipschitzNode& node, const LipschitzInterval& z, const at::Tensor& alpha) {
  const double left = left_slope(node);
  const at::Tensor active = z.l.ge(0), open = z.l.lt(0).logical_and(z.u.gt(0));
  const auto filled = [&](double value) { return at::full({}, value, z.l.options()); };
  const at::Tensor stable = at::where(active, filled(1), filled(left));
  // Safe ends: a gradient of 0 / 0 in the branch that is not taken would be NaN.
  const at::Tensor l = at::where(open, z.l, filled(-1)), u = at::where(open, z.u, filled(1));
  const at::Tensor chord = (u - left * l) / (u - l);
  const at::Tensor au = at::where(open, chord, stable);
  const at::Tensor iu = at::where(open, u * (1 - chord), filled(0));
  const at::Tensor lower = alpha.defined() ? alpha : at::where(u.gt(-l), filled(1), filled(left));
  return at::stack({au, iu, at::where(open, lower, stable), at::zeros_like(au)});
}

at::Tensor smooth_lines(const LipschitzNode& node, const LipschitzInterval& z) {
  const LipschitzInterval slopes = lipschitz_slopes(node, z);
  const at::Tensor at_l = lipschitz_value_at(node, z.l), at_u = lipschitz_value_at(node, z.u);
  const at::Tensor width = z.u - z.l, rise = at_u - at_l;
  // Slope sl: above through (u, sigma(u)), below through (l, sigma(l)); slope su: the other way round.
  const at::Tensor flat = (rise - slopes.l * width).le(slopes.u * width - rise);
  const at::Tensor slope = at::where(flat, slopes.l, slopes.u);
  const at::Tensor through_l = at_l - slope * z.l, through_u = at_u - slope * z.u;
  const LipschitzInterval ends =
      widened_by_jump(node, z, {at::where(flat, through_l, through_u), at::where(flat, through_u, through_l)});
  return at::stack({slope, ends.u, slope, ends.l});
}

}  // namespace

bool lipschitz_has_alpha(const LipschitzNode& node) { return is_relu(node); }

at::Tensor lipschitz_value_at(const LipschitzNode& node, const at::Tensor& z) {
  switch (node.activation) {
    case Activation::kRelu:
      return z.relu();
    case Activation::kLeakyRelu:
      return at::leaky_relu(z, node.a);
    case Activation::kTanh:
      return z.tanh();
    case Activation::kSigmoid:
      return z.sigmoid();
    case Activation::kSoftplus:
      return at::softplus(z, node.a, node.b);
    case Activation::kGelu:
      return at::gelu(z);
    case Activation::kSilu:
      return at::silu(z);
  }
  TORCH_CHECK_VALUE(false, "local_lipschitz: no activation has the number ", static_cast<int64_t>(node.activation));
}

at::Tensor lipschitz_slope_at(const LipschitzNode& node, const at::Tensor& z) {
  if (!is_relu(node)) return derivative(node, z);
  const auto filled = [&](double value) { return at::full({}, value, z.options()); };
  return at::where(z.gt(0), filled(1), filled(left_slope(node)));
}

LipschitzInterval lipschitz_values(const LipschitzNode& node, const LipschitzInterval& z) {
  const at::Tensor at_l = lipschitz_value_at(node, z.l), at_u = lipschitz_value_at(node, z.u);
  return widened_by_jump(node, z, range(at_l, at_u, z, value_turns(node.activation)));
}

LipschitzInterval lipschitz_slopes(const LipschitzNode& node, const LipschitzInterval& z) {
  if (!is_relu(node)) {
    return range(derivative(node, z.l), derivative(node, z.u), z, slope_turns(node.activation));
  }
  const auto filled = [&](double value) { return at::full({}, value, z.l.options().requires_grad(false)); };
  return {at::where(z.l.gt(0), filled(1), filled(left_slope(node))),
          at::where(z.u.lt(0), filled(left_slope(node)), filled(1))};
}

at::Tensor lipschitz_value_lines(const LipschitzNode& node, const LipschitzInterval& z, const at::Tensor& alpha) {
  return is_relu(node) ? relu_lines(node, z, alpha) : smooth_lines(node, z);
}

}  // namespace torch_ext::ops

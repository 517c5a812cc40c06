// What the bounds need to know of an activation sigma on intervals [l, u].
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/local_lipschitz/lipschitz_network.h"

namespace torch_ext::ops {

struct LipschitzInterval {
  at::Tensor l, u;
};
at::Tensor largest(const LipschitzInterval& z);                               // magnitude
LipschitzInterval widened(const LipschitzInterval& z, const at::Tensor& by);  // on both sides

// The range of sigma, and of its derivative: for a ReLU [1, 1] if l > 0, [0, 0] if u < 0, else [0, 1], since at 0 every
// slope between belongs to Clarke's Jacobian.
LipschitzInterval lipschitz_values(const LipschitzNode& node, const LipschitzInterval& z);
LipschitzInterval lipschitz_slopes(const LipschitzNode& node, const LipschitzInterval& z);

// Lines au z + iu above sigma and al z + il below on [l, u], as [4, ...]. For ReLU the chord above, and below the line
// through 0 of slope `alpha` where the sign is open (undefined: the slope that leaves the smaller area). For smooth
// activations two parallel lines through the ends, whose slope is the smallest or the largest of sigma.
at::Tensor lipschitz_value_lines(const LipschitzNode& node, const LipschitzInterval& z, const at::Tensor& alpha);
// Whether `alpha` has a say, and its range [slope, 1].
bool lipschitz_has_alpha(const LipschitzNode& node);

// One element of Clarke's slopes at a point: 1 at a kink's right side, the other at its left and at the kink.
at::Tensor lipschitz_slope_at(const LipschitzNode& node, const at::Tensor& z);
at::Tensor lipschitz_value_at(const LipschitzNode& node, const at::Tensor& z);

}  // namespace torch_ext::ops

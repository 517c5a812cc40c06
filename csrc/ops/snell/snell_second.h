// The derivative of snell_linear_backward: for second-order methods, not for speed.
#pragma once

#include "ops/snell/snell_layer.h"

namespace torch_ext::ops {

struct SnellSecond {
  at::Tensor grad_y, x, a, b;
};

// Gradients of <v.x, dx> + <v.a, da> + <v.b, db> where dx, da, db are what snell_linear_backward returns for grad_y, x
// and the factors (in `v`, undefined means zero). x and grad_y [n, features], everything in the arithmetic type.
// "detached" differentiates the published gradient as it is, with its constants constant.
SnellSecond snell_second(const SnellLayer& layer, const at::Tensor& t, const at::Tensor& x, const at::Tensor& grad_y,
                         const SnellGradients& v, bool pulled);

}  // namespace torch_ext::ops

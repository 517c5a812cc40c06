#pragma once

#include <ATen/core/Tensor.h>

namespace torch_ext::moe {

// x [..., dim], weight [E, dim] -> [T, E] in float32 (float64 for a float64 weight), also under autocast: in a narrow
// type close experts would tie.
at::Tensor router_logits(const at::Tensor& x, const at::Tensor& weight);

}  // namespace torch_ext::moe

// The operators behind permute and combine: three multilinear maps whose derivatives are each other. Gates have the
// arithmetic type of the rows. slot_of and src_of are those of one plan.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace torch_ext::moe {

// y[s] = g[src_of[s]] x[src_of[s] / K], zeros where src_of is -1; g = 1 if not given.         [T, D] -> [S, D]
at::Tensor moe_permute(const at::Tensor& x, const std::optional<at::Tensor>& gates, const at::Tensor& slot_of,
                       const at::Tensor& src_of);
// o[t] = sum_k g[t, k] z[slot_of[t, k]]                                                       [S, D] -> [T, D]
at::Tensor moe_combine(const at::Tensor& z, const std::optional<at::Tensor>& gates, const at::Tensor& slot_of,
                       const at::Tensor& src_of);
// u[t, k] = <x[t], z[slot_of[t, k]]>                                                          -> [T, K]
at::Tensor moe_match(const at::Tensor& x, const at::Tensor& z, const at::Tensor& slot_of, const at::Tensor& src_of);

}  // namespace torch_ext::moe

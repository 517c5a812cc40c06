// The two operators that the bounds are made of besides ATen's products. Differentiable once.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <tuple>

namespace torch_ext::ops {

// gl, gu, sl, su of one shape [...] -> lines [4, ...]: au, iu, al, il with al g + il <= g s <= au g + iu for g in
// [gl, gu] and s in [sl, su]. constant: slopes of 0 where gl < 0 < gu.
TORCH_EXT_API at::Tensor lipschitz_lines(const at::Tensor& gl, const at::Tensor& gu, const at::Tensor& sl,
                                         const at::Tensor& su, bool constant);

// A [groups or 1, rows, width], lines [4, groups, width] -> coefficients out [groups, rows, width] (A au where A > 0,
// else A al) and sums c [groups, rows] of A times the intercepts, so that A p <= out g + c. mirror: the same for -A in
// further rows. Lines [2, groups, width] are intercepts alone (bounds of p): out is empty.
TORCH_EXT_API std::tuple<at::Tensor, at::Tensor> lipschitz_relax(const at::Tensor& A, const at::Tensor& lines,
                                                                 bool mirror);

using LipschitzLinesGrads = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
LipschitzLinesGrads lipschitz_lines_backward(const at::Tensor& grad, const at::Tensor& gl, const at::Tensor& gu,
                                             const at::Tensor& sl, const at::Tensor& su, bool constant);
std::tuple<at::Tensor, at::Tensor> lipschitz_relax_backward(const at::Tensor& grad_out, const at::Tensor& grad_c,
                                                            const at::Tensor& A, const at::Tensor& lines, bool mirror);

}  // namespace torch_ext::ops

#include "ops/snell/snell_layer.h"

#include <cmath>

#include "core/check.h"
#include "core/list_kernel.h"

namespace torch_ext::ops {
namespace {

using kernels::SnellRule;

SnellRule rule_of(const char* op, std::string_view name) {
  if (name == "code") return SnellRule::kCode;
  if (name == "paper") return SnellRule::kPaper;
  if (name == "hard") return SnellRule::kHard;
  if (name == "soft") return SnellRule::kSoft;
  TORCH_CHECK_VALUE(name == "none", op, ": sparsifier must be 'code', 'paper', 'hard', 'soft' or 'none', got '", name,
                    "'");
  return SnellRule::kNone;
}

bool exact_of(const char* op, std::string_view name) {
  TORCH_CHECK_VALUE(name == "detached" || name == "exact", op, ": grad must be 'detached' or 'exact', got '", name,
                    "'");
  return name == "exact";
}

void check_factor(const char* op, const char* name, const char* rows, const at::Tensor& factor) {
  core::dtype_of(factor, std::string(op) + ": " + name);
  TORCH_CHECK_VALUE(factor.dim() == 3 && factor.sym_size(0) == 2 && factor.sym_size(1) > 0 && factor.sym_size(2) > 0,
                    op, ": ", name, " must be [2, ", rows, ", rank / 2], got ", factor.sym_sizes());
}

void check_finite(const char* op, const char* name, const at::Tensor& factor, core::DType type) {
  TORCH_CHECK_VALUE(!kernels::has_nonfinite_cpu(factor.const_data_ptr(), type, 0, factor.numel()), op, ": ", name,
                    " holds a NaN or an infinity; the loss or the learning rate of an earlier step was too large");
}

}  // namespace

void check_snell(const char* op, const at::Tensor& a, const at::Tensor& b, double scale, double sparsity,
                 std::string_view sparsifier, std::string_view grad) {
  rule_of(op, sparsifier);
  exact_of(op, grad);
  check_factor(op, "A", "in_features", a);
  check_factor(op, "B", "out_features", b);
  TORCH_CHECK_VALUE(a.sym_size(2) == b.sym_size(2), op, ": A and B must have the same last dimension (rank / 2), got ",
                    a.sym_sizes(), " and ", b.sym_sizes());
  TORCH_CHECK_TYPE(a.scalar_type() == b.scalar_type(), op, ": A has dtype ", a.scalar_type(), ", B ", b.scalar_type());
  TORCH_CHECK_VALUE(a.device() == b.device(), op, ": A is on ", a.device(), ", B on ", b.device());
  TORCH_CHECK_VALUE(std::isfinite(scale), op, ": scale must be finite, got ", scale);
  TORCH_CHECK_VALUE(sparsity >= 0 && sparsity < 1, op, ": sparsity must be in [0, 1), got ", sparsity);
}

void check_snell_input(const char* op, const at::Tensor& x, const at::Tensor& a) {
  core::dtype_of(x, std::string(op) + ": x");
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.sym_size(-1) == a.sym_size(1), op,
                    ": x must be [..., in_features = ", a.sym_size(1), "], got ", x.sym_sizes());
  TORCH_CHECK_TYPE(core::arithmetic_type(x.scalar_type()) == core::arithmetic_type(a.scalar_type()), op,
                   ": x has dtype ", x.scalar_type(), ", A and B ", a.scalar_type(),
                   "; float64 goes with float64, every other type with float32");
  TORCH_CHECK_VALUE(x.device() == a.device(), op, ": x is on ", x.device(), ", A and B on ", a.device());
}

SnellLayer make_snell_layer(const char* op, const at::Tensor& a, const at::Tensor& b, double scale,
                            std::string_view sparsifier, std::string_view grad, bool values) {
  const at::ScalarType arithmetic = core::arithmetic_type(a.scalar_type());
  SnellLayer layer;
  layer.a = a.detach().to(arithmetic).contiguous();
  layer.b = b.detach().to(arithmetic).transpose(1, 2).contiguous().view({-1, b.size(1)});
  layer.type = core::dtype_of(layer.a, op);
  layer.exact = exact_of(op, grad);
  layer.weights = {layer.a.const_data_ptr(), layer.b.const_data_ptr(), a.size(1), b.size(1), a.size(2), scale,
                   rule_of(op, sparsifier)};
  if (values && !layer.on_cuda()) {
    check_finite(op, "A", layer.a, layer.type);
    check_finite(op, "B", layer.b, layer.type);
  }
  return layer;
}

}  // namespace torch_ext::ops

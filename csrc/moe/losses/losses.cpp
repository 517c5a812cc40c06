#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>
#include <torch_ext/moe/losses.h>

#include <cmath>
#include <string>

#include "core/check.h"

namespace torch_ext::moe {
namespace {

using Optional = std::optional<at::Tensor>;

at::Tensor checked(const char* op, const at::Tensor& logits, int64_t dim, double coef, const Optional& valid) {
  core::dtype_of(logits, std::string(op) + ": logits");
  TORCH_CHECK_VALUE(dim == 0 ? logits.dim() >= 1 : logits.dim() == dim, op,
                    ": logits have the wrong number of "
                    "dimensions, got ",
                    logits.sym_sizes());
  TORCH_CHECK_VALUE(std::isfinite(coef), op, ": the coefficient must be finite, got ", coef);
  if (valid) {
    TORCH_CHECK_TYPE(valid->scalar_type() == at::kBool, op, ": valid must be bool, got ", valid->scalar_type());
    TORCH_CHECK_VALUE(valid->sym_sizes() == logits.sym_sizes().slice(0, static_cast<size_t>(logits.dim() - 1)), op,
                      ": valid must have the shape of the logits without the last dimension, got ", valid->sym_sizes(),
                      " and ", logits.sym_sizes());
  }
  return logits.to(core::arithmetic_type(logits.scalar_type()));
}

at::Tensor score_of(const char* op, const at::Tensor& l, std::string_view score) {
  if (score == "sigmoid") return at::sigmoid(l);
  if (score == "softmax") return at::softmax(l, -1);
  TORCH_CHECK_VALUE(score == "sqrtsoftplus", op, ": score must be 'sigmoid', 'softmax' or 'sqrtsoftplus', got '", score,
                    "'");
  return at::sqrt(at::softplus(l));
}

// s_e / sum_j s_j with 0 in rows that are not valid; kept away from 0 / 0 as in moe.route.
at::Tensor shares(const char* op, const at::Tensor& l, std::string_view score, const Optional& valid) {
  const at::Tensor safe = valid ? at::where(valid->unsqueeze(-1), l, 0) : l;  // a NaN in padding stays there
  const at::Tensor s = score_of(op, safe, score);
  const at::Tensor share = s / (s.sum(-1, /*keepdim=*/true) + 1e-20);
  return valid ? share * valid->unsqueeze(-1) : share;
}

// Number of valid rows along a dimension, at least 1.
at::Tensor rows_of(const at::Tensor& l, const Optional& valid, int64_t dim) {
  const at::Tensor flags = valid ? *valid : at::ones_like(l.select(-1, 0), l.options().dtype(at::kBool));
  return flags.sum(dim).clamp_min(1);
}

at::Tensor balance_op(const at::Tensor& logits, const at::Tensor& counts, double coef, std::string_view score,
                      const Optional& valid) {
  constexpr const char* kName = "moe.balance_loss";
  const at::Tensor l = checked(kName, logits, 2, coef, valid);
  TORCH_CHECK_VALUE(counts.dim() == 1 && counts.sym_size(0) == l.sym_size(1) && counts.device() == l.device(), kName,
                    ": counts must be [E = ", l.sym_size(1), "] on ", l.device(), ", got ", counts.sym_sizes(), " on ",
                    counts.device());
  const at::Tensor wide = counts.detach().to(l.scalar_type());
  const at::Tensor f = wide / wide.sum().clamp_min(1);
  const at::Tensor p = shares(kName, l, score, valid).sum(0) / rows_of(l, valid, 0);
  return (f * p).sum() * l.sym_size(1) * coef;
}

at::Tensor sequence_op(const at::Tensor& logits, int64_t top_k, double alpha, std::string_view score,
                       const Optional& valid) {
  constexpr const char* kName = "moe.sequence_loss";
  const at::Tensor l = checked(kName, logits, 3, alpha, valid);
  TORCH_CHECK_VALUE(top_k >= 1 && top_k <= l.sym_size(2), kName, ": top_k must be in [1, E = ", l.sym_size(2),
                    "], got ", top_k);
  const at::Tensor share = shares(kName, l, score, valid), rows = rows_of(l, valid, 1).unsqueeze(-1);
  const at::Tensor best = std::get<1>(share.detach().topk(top_k, -1));
  at::Tensor picked = at::zeros_like(share, share.options().requires_grad(false)).scatter(-1, best, 1);
  if (valid) picked = picked * valid->unsqueeze(-1);
  const at::Tensor f = picked.sum(1) * l.sym_size(2) / (rows * top_k);
  const at::Tensor per_sequence = (f * (share.sum(1) / rows)).sum(-1);
  if (!valid) return per_sequence.mean() * alpha;
  const at::Tensor some = valid->any(1);
  return (per_sequence * some).sum() / some.sum().clamp_min(1) * alpha;
}

at::Tensor z_op(const at::Tensor& logits, double coef, const Optional& valid) {
  const at::Tensor l = checked("moe.z_loss", logits, 0, coef, valid);
  if (!valid) return l.logsumexp(-1).square().mean() * coef;
  const at::Tensor square = at::where(valid->unsqueeze(-1), l, 0).logsumexp(-1).square();
  return at::where(*valid, square, 0).sum() / valid->sum().clamp_min(1) * coef;
}

}  // namespace

at::Tensor balance_loss(const at::Tensor& logits, const at::Tensor& counts, double coef, std::string_view score,
                        const Optional& valid) {
  return balance_op(logits, counts, coef, score, valid);
}
at::Tensor sequence_loss(const at::Tensor& logits, int64_t top_k, double alpha, std::string_view score,
                         const Optional& valid) {
  return sequence_op(logits, top_k, alpha, score, valid);
}
at::Tensor z_loss(const at::Tensor& logits, double coef, const Optional& valid) { return z_op(logits, coef, valid); }

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "moe_balance_loss(Tensor logits, Tensor counts, float coef=1e-2, str score='softmax', Tensor? valid=None) -> "
      "Tensor",
      balance_op);
  m.def(
      "moe_sequence_loss(Tensor logits, int top_k, float alpha=1e-4, str score='sigmoid', Tensor? valid=None) -> "
      "Tensor",
      sequence_op);
  m.def("moe_z_loss(Tensor logits, float coef=1e-3, Tensor? valid=None) -> Tensor", z_op);
}

}  // namespace torch_ext::moe

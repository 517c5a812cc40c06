// Schemas of the window's operators, the shapes of what they return, and their typed calls.
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>

#include <utility>

#include "core/check.h"
#include "core/library.h"
#include "curvature/fisher_window/fisher_window_args.h"
#include "curvature/fisher_window/fisher_window_op.h"

namespace torch_ext::curvature {

namespace {

template <typename Signature>
auto typed(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Shapes and dtypes alone, for tensors without data.

void dots_meta(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
               const at::Tensor&, const c10::List<std::optional<at::Tensor>>& grads, at::TensorList params,
               at::ArrayRef<double> weight_decay, bool, const std::optional<at::Tensor>&, std::string_view format) {
  window_format(format);
  core::check_same_length("fisher_window_dots_", "grads", params.size(), grads.size());
  core::check_same_length("fisher_window_dots_", "weight_decay", params.size(), weight_decay.size());
}
void commit_meta(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double,
                 bool, int64_t, int64_t, const std::optional<at::Tensor>&) {}
at::Tensor by_slot_meta(const at::Tensor& like, c10::SymInt slots) {
  return at::empty_symint({std::move(slots)}, like.options().dtype(at::kDouble).requires_grad(false));
}
at::Tensor solve_meta(const at::Tensor& gram, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                      double) {
  return by_slot_meta(gram, gram.sym_size(0));
}
at::Tensor project_meta(const at::Tensor& rows, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        const at::Tensor&, std::string_view) {
  return by_slot_meta(rows, rows.sym_size(1));
}
at::Tensor flat_meta(const at::Tensor& rows, c10::SymInt numel, std::string_view format) {
  const auto type = window_arithmetic(window_format(format));
  return at::empty_symint({std::move(numel)}, rows.options().dtype(type).requires_grad(false));
}
at::Tensor combine_meta(const at::Tensor& rows, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        const at::Tensor&, c10::SymInt numel, std::string_view format) {
  return flat_meta(rows, std::move(numel), format);
}
at::Tensor residual_meta(const at::Tensor& rows, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                         const at::Tensor&, const at::Tensor& x, double, std::string_view format) {
  return flat_meta(rows, x.sym_numel(), format);
}
at::Tensor gram_meta(const at::Tensor& gram, const at::Tensor&, c10::SymInt count) {
  return at::empty_symint({count, std::move(count)}, gram.options().requires_grad(false));
}

}  // namespace

void fisher_window_dots_(const at::Tensor& rows, const at::Tensor& scales, const at::Tensor& indices,
                         const at::Tensor& error, const at::Tensor& dots, const at::Tensor& ring,
                         const c10::List<std::optional<at::Tensor>>& grads, at::TensorList params,
                         at::ArrayRef<double> weight_decay, bool negate, const std::optional<at::Tensor>& grad_scale,
                         std::string_view format) {
  static const auto op = typed<decltype(fisher_window_dots_)>("torch_ext::fisher_window_dots_");
  op.call(rows, scales, indices, error, dots, ring, grads, params, weight_decay, negate, grad_scale, format);
}

void fisher_window_commit_(const at::Tensor& gram, const at::Tensor& factor, const at::Tensor& ring,
                           const at::Tensor& coefficients, const at::Tensor& dots, double damping, bool warmup_scaling,
                           int64_t warmup_steps, int64_t refactor_every, const std::optional<at::Tensor>& nonfinite) {
  static const auto op = typed<decltype(fisher_window_commit_)>("torch_ext::fisher_window_commit_");
  op.call(gram, factor, ring, coefficients, dots, damping, warmup_scaling, warmup_steps, refactor_every, nonfinite);
}

at::Tensor fisher_window_combine(const at::Tensor& rows, const at::Tensor& scales, const at::Tensor& indices,
                                 const at::Tensor& coefficients, const at::Tensor& ring, int64_t numel,
                                 std::string_view format) {
  static const auto op = typed<decltype(fisher_window_combine)>("torch_ext::fisher_window_combine");
  return op.call(rows, scales, indices, coefficients, ring, numel, format);
}

at::Tensor fisher_window_project(const at::Tensor& rows, const at::Tensor& scales, const at::Tensor& indices,
                                 const at::Tensor& ring, const at::Tensor& x, std::string_view format) {
  static const auto op = typed<decltype(fisher_window_project)>("torch_ext::fisher_window_project");
  return op.call(rows, scales, indices, ring, x, format);
}

at::Tensor fisher_window_solve_(const at::Tensor& gram, const at::Tensor& factor, const at::Tensor& ring,
                                const std::optional<at::Tensor>& right_side, double damping) {
  static const auto op = typed<decltype(fisher_window_solve_)>("torch_ext::fisher_window_solve_");
  return op.call(gram, factor, ring, right_side, damping);
}

at::Tensor fisher_window_residual(const at::Tensor& rows, const at::Tensor& scales, const at::Tensor& indices,
                                  const at::Tensor& coefficients, const at::Tensor& ring, const at::Tensor& x,
                                  double damping, std::string_view format) {
  static const auto op = typed<decltype(fisher_window_residual)>("torch_ext::fisher_window_residual");
  return op.call(rows, scales, indices, coefficients, ring, x, damping, format);
}

at::Tensor fisher_window_gram(const at::Tensor& gram, const at::Tensor& ring, int64_t count) {
  static const auto op = typed<decltype(fisher_window_gram)>("torch_ext::fisher_window_gram");
  return op.call(gram, ring, count);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "fisher_window_dots_(Tensor(a!) rows, Tensor(b!) scales, Tensor(c!) indices, Tensor(d!) error, Tensor(e!) dots, "
      "Tensor ring, Tensor?[] grads, Tensor[] params, float[] weight_decay, bool negate, Tensor? grad_scale, str "
      "format) -> ()");
  m.def(
      "fisher_window_commit_(Tensor(a!) gram, Tensor(b!) factor, Tensor(c!) ring, Tensor(d!) coefficients, "
      "Tensor dots, float damping, bool warmup_scaling=False, int warmup_steps=0, int refactor_every=-1, Tensor? "
      "nonfinite=None) -> ()");
  m.def(
      "fisher_window_combine(Tensor rows, Tensor scales, Tensor indices, Tensor coefficients, Tensor ring, SymInt "
      "numel, "
      "str format) -> Tensor");
  m.def(
      "fisher_window_project(Tensor rows, Tensor scales, Tensor indices, Tensor ring, Tensor x, str format) -> Tensor");
  m.def(
      "fisher_window_solve_(Tensor gram, Tensor(a!) factor, Tensor(b!) ring, Tensor? right_side, float damping) -> "
      "Tensor");
  m.def(
      "fisher_window_residual(Tensor rows, Tensor scales, Tensor indices, Tensor coefficients, Tensor ring, Tensor x, "
      "float damping, str format) -> Tensor");
  m.def("fisher_window_gram(Tensor gram, Tensor ring, SymInt count) -> Tensor");
}

TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("fisher_window_dots_", dots_meta);
  m.impl("fisher_window_commit_", commit_meta);
  m.impl("fisher_window_solve_", solve_meta);
  m.impl("fisher_window_combine", combine_meta);
  m.impl("fisher_window_project", project_meta);
  m.impl("fisher_window_residual", residual_meta);
  m.impl("fisher_window_gram", gram_meta);
}
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  for (const char* name :
       {"fisher_window_dots_", "fisher_window_commit_", "fisher_window_solve_", "fisher_window_combine",
        "fisher_window_project", "fisher_window_residual", "fisher_window_gram"}) {
    m.impl(name, core::not_differentiable());
  }
}
TORCH_LIBRARY_IMPL(torch_ext, ADInplaceOrView, m) {
  for (const char* name : {"fisher_window_dots_", "fisher_window_commit_", "fisher_window_solve_"}) {
    m.impl(name, core::mutating());
  }
}

}  // namespace torch_ext::curvature

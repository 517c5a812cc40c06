// The window's operators for CPU and CUDA: checks, the loop over threads, scratch memory.
#include "curvature/fisher_window/fisher_window_op.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "core/check.h"
#include "core/library.h"
#include "curvature/fisher_window/fisher_window_args.h"

namespace torch_ext::curvature {
namespace {

using kernels::kTile;
using kernels::WindowView;

at::Tensor doubles(at::IntArrayRef shape, const at::Tensor& like) {
  return at::empty(shape, at::TensorOptions(like.device()).dtype(at::kDouble));
}

void check_doubles(const at::Tensor& tensor, int64_t numel, const at::Device& device, const char* op,
                   const char* name) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kDouble && tensor.numel() == numel && tensor.is_contiguous() &&
                        tensor.device() == device,
                    op, ": ", name, " must be a contiguous float64 tensor of ", numel, " elements on ", device,
                    ", got ", tensor.scalar_type(), " of shape ", tensor.sizes(), " on ", tensor.device());
}

int64_t bytes_of_tile(const at::Tensor& rows) { return rows.size(1) * rows.size(2) * rows.element_size(); }

#if TORCH_EXT_WITH_CUDA
at::Tensor partial_sums(const WindowView& view, const at::Tensor& rows) {
  const int64_t each = kernels::tiles_per_group(view.tiles);
  return doubles({(view.tiles + each - 1) / each, view.slots}, rows);
}
#endif

// body(group, partial[slots]) for each group of tiles, then the ordered sum into dots.
template <typename Body>
void sum_over_groups(const WindowView& view, const at::Tensor& rows, const at::Tensor& dots, const Body& body) {
  const int64_t each = kernels::tiles_per_group(view.tiles), groups = (view.tiles + each - 1) / each;
  const at::Tensor partial = at::zeros({groups, view.slots}, at::TensorOptions().dtype(at::kDouble));
  auto* sums = partial.data_ptr<double>();
  at::parallel_for(0, groups, window_grain(each * bytes_of_tile(rows)), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) body(g, sums + g * view.slots);
  });
  kernels::window_fold_cpu(sums, groups, view.slots, dots.data_ptr<double>());
}

void dots_impl(const at::Tensor& rows, const at::Tensor& scales, const at::Tensor& indices, const at::Tensor& error,
               const at::Tensor& dots, const at::Tensor& ring, const c10::List<std::optional<at::Tensor>>& grads,
               at::TensorList params, at::ArrayRef<double> weight_decay, bool negate,
               const std::optional<at::Tensor>& grad_scale, std::string_view format) {
  constexpr const char* kName = "fisher_window_dots_";
  const WindowView view = window_view(rows, scales, indices, error, ring, format);
  check_doubles(dots, std::max(view.slots, dots.numel()), rows.device(), kName, "dots");
  const RowSources sources(kName, grads, params, weight_decay, rows.device());
  TORCH_CHECK_VALUE(sources.numel() <= view.tiles * kTile && sources.numel() > (view.tiles - 1) * kTile, kName,
                    ": the row has ", sources.numel(), " elements, the window's rows between ",
                    (view.tiles - 1) * kTile + 1, " and ", view.tiles * kTile);
  const RowFactor factor(negate, grad_scale, rows.device());
  if (rows.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    const c10::DeviceGuard guard(rows.device());
    void* const stream = core::current_stream(rows.device());
    const auto type = window_arithmetic(view.format);
    const at::Tensor row = at::empty({view.tiles * kTile}, at::TensorOptions(rows.device()).dtype(type));
    dots.zero_();
    kernels::window_gather_cuda(sources.segments(), factor.sign(), factor.scale(), type == at::kDouble, row.numel(),
                                row.data_ptr(), stream);
    kernels::window_dots_cuda(view, row.const_data_ptr(), partial_sums(view, rows).data_ptr<double>(),
                              dots.data_ptr<double>(), stream);
#endif
    return;
  }
  sum_over_groups(view, rows, dots, [&](int64_t group, double* partial) {
    kernels::window_dots_cpu(view, sources.segments(), factor.value(), group, partial);
  });
  std::fill(dots.data_ptr<double>() + view.slots, dots.data_ptr<double>() + dots.numel(), 0.0);
}

kernels::CommitTensors commit_tensors(const at::Tensor& gram, const at::Tensor& factor, const at::Tensor& ring,
                                      kernels::CommitArgs* args, const char* op) {
  TORCH_CHECK_VALUE(gram.dim() == 2 && gram.size(0) == gram.size(1) && gram.size(0) >= 2, op,
                    ": gram must be a square matrix of num_grads + 1 rows, got shape ", gram.sizes());
  args->slots = gram.size(0);
  check_doubles(gram, args->slots * args->slots, gram.device(), op, "gram");
  TORCH_CHECK_VALUE(factor.dim() == 2 && factor.size(0) == factor.size(1) && factor.size(0) >= args->slots, op,
                    ": factor must be a square matrix of more than num_grads rows, got shape ", factor.sizes());
  args->leading = factor.size(0);
  check_doubles(factor, args->leading * args->leading, gram.device(), op, "factor");
  TORCH_CHECK_VALUE(ring.scalar_type() == at::kLong && ring.numel() == kernels::kRingSize && ring.is_contiguous() &&
                        ring.device() == gram.device(),
                    op, ": ring must be int64 [9] on the device of gram");
  TORCH_CHECK_VALUE(args->damping > 0 && args->damping < HUGE_VAL, op, ": damping must be positive and finite, got ",
                    args->damping);
  kernels::CommitTensors t{};
  t.gram = gram.data_ptr<double>();
  t.factor = factor.data_ptr<double>();
  t.ring = ring.data_ptr<int64_t>();
  return t;
}

void commit_impl(const at::Tensor& gram, const at::Tensor& factor, const at::Tensor& ring,
                 const at::Tensor& coefficients, const at::Tensor& dots, double damping, bool warmup_scaling,
                 int64_t warmup_steps, int64_t refactor_every, const std::optional<at::Tensor>& nonfinite) {
  constexpr const char* kName = "fisher_window_commit_";
  kernels::CommitArgs args{damping, 0, 0, warmup_steps, refactor_every, warmup_scaling};
  kernels::CommitTensors t = commit_tensors(gram, factor, ring, &args, kName);
  check_doubles(coefficients, args.slots, gram.device(), kName, "coefficients");
  check_doubles(dots, std::max(args.slots, dots.numel()), gram.device(), kName, "dots");
  t.coefficients = coefficients.data_ptr<double>();
  t.dots = dots.const_data_ptr<double>();
  at::Tensor flag;
  if (nonfinite.has_value()) {
    flag = nonfinite->to(gram.device(), at::kFloat, /*non_blocking=*/gram.is_cuda());
    t.nonfinite = flag.const_data_ptr<float>();
  }
  if (gram.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    const c10::DeviceGuard guard(gram.device());
    const at::Tensor scratch = doubles({kernels::kInverseScratch, args.slots}, gram);
    kernels::window_commit_cuda(t, args, scratch.data_ptr<double>(), core::current_stream(gram.device()));
#endif
    return;
  }
  kernels::window_commit_cpu(t, args);
}

at::Tensor solve_impl(const at::Tensor& gram, const at::Tensor& factor, const at::Tensor& ring,
                      const std::optional<at::Tensor>& right_side, double damping) {
  constexpr const char* kName = "fisher_window_solve_";
  kernels::CommitArgs args{damping, 0, 0, 0, -1, false};
  const kernels::CommitTensors t = commit_tensors(gram, factor, ring, &args, kName);
  if (right_side.has_value()) check_doubles(*right_side, args.slots, gram.device(), kName, "right_side");
  at::Tensor solution = doubles({args.slots}, gram);
  const double* right = right_side.has_value() ? right_side->const_data_ptr<double>() : nullptr;
  if (gram.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    const c10::DeviceGuard guard(gram.device());
    const at::Tensor scratch = doubles({kernels::kInverseScratch, args.slots}, gram);
    kernels::window_solve_cuda(t, args, right, solution.data_ptr<double>(), scratch.data_ptr<double>(),
                               core::current_stream(gram.device()));
#endif
    return solution;
  }
  kernels::window_solve_cpu(t, args, right, solution.data_ptr<double>());
  return solution;
}

at::Tensor combine_impl(const at::Tensor& rows, const at::Tensor& scales, const at::Tensor& indices,
                        const at::Tensor& coefficients, const at::Tensor& ring, int64_t numel,
                        std::string_view format) {
  constexpr const char* kName = "fisher_window_combine";
  const WindowView view = window_view(rows, scales, indices, {}, ring, format);
  check_doubles(coefficients, view.slots, rows.device(), kName, "coefficients");
  TORCH_CHECK_VALUE(numel >= 0 && numel <= view.tiles * kTile, kName, ": numel must be in [0, ", view.tiles * kTile,
                    "], got ", numel);
  const auto type = window_arithmetic(view.format);
  const at::Tensor padded = at::empty({view.tiles * kTile}, at::TensorOptions(rows.device()).dtype(type));
  if (rows.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    const c10::DeviceGuard guard(rows.device());
    kernels::window_combine_cuda(view, coefficients.const_data_ptr<double>(), padded.data_ptr(),
                                 core::current_stream(rows.device()));
#endif
  } else {
    const auto live = kernels::window_live(view.ring, coefficients.const_data_ptr<double>());
    auto* out = static_cast<char*>(padded.data_ptr());
    const int64_t stride = kTile * padded.element_size();
    at::parallel_for(0, view.tiles, window_grain(bytes_of_tile(rows)), [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) kernels::window_combine_cpu(view, live, tile, out + tile * stride);
    });
  }
  return numel == padded.numel() ? padded : padded.narrow(0, 0, numel).clone();
}

// A flat x as contiguous float or double on the window's device.
at::Tensor flat(const at::Tensor& x, const WindowView& view, const at::Tensor& rows, const char* op) {
  TORCH_CHECK(x.layout() == at::kStrided, op, ": x is sparse; use .to_dense()");
  core::dtype_of(x, std::string(op) + ": x");
  TORCH_CHECK_VALUE(x.dim() == 1 && x.numel() <= view.tiles * kTile, op, ": x must be one-dimensional with at most ",
                    view.tiles * kTile, " elements, got shape ", x.sizes());
  return x.detach().to(rows.device(), x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
}

at::Tensor project_impl(const at::Tensor& rows, const at::Tensor& scales, const at::Tensor& indices,
                        const at::Tensor& ring, const at::Tensor& x, std::string_view format) {
  const WindowView view = window_view(rows, scales, indices, {}, ring, format);
  const at::Tensor from = flat(x, view, rows, "fisher_window_project");
  at::Tensor dots = doubles({view.slots}, rows);
  const bool wide = from.scalar_type() == at::kDouble;
  if (rows.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    const c10::DeviceGuard guard(rows.device());
    kernels::window_project_cuda(view, from.const_data_ptr(), wide, from.numel(),
                                 partial_sums(view, rows).data_ptr<double>(), dots.data_ptr<double>(),
                                 core::current_stream(rows.device()));
#endif
  } else {
    sum_over_groups(view, rows, dots, [&](int64_t group, double* partial) {
      kernels::window_project_cpu(view, from.const_data_ptr(), wide, from.numel(), group, partial);
    });
  }
  return dots;
}

at::Tensor residual_impl(const at::Tensor& rows, const at::Tensor& scales, const at::Tensor& indices,
                         const at::Tensor& coefficients, const at::Tensor& ring, const at::Tensor& x, double damping,
                         std::string_view format) {
  constexpr const char* kName = "fisher_window_residual";
  const WindowView view = window_view(rows, scales, indices, {}, ring, format);
  check_doubles(coefficients, view.slots, rows.device(), kName, "coefficients");
  const at::Tensor from = flat(x, view, rows, kName).to(at::kDouble);
  const int64_t numel = from.numel();
  at::Tensor out = at::empty({numel}, at::TensorOptions(rows.device()).dtype(window_arithmetic(view.format)));
  if (rows.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    const c10::DeviceGuard guard(rows.device());
    kernels::window_residual_cuda(view, coefficients.const_data_ptr<double>(), from.const_data_ptr<double>(), numel,
                                  damping, out.data_ptr(), core::current_stream(rows.device()));
#endif
    return out;
  }
  const auto live = kernels::window_live(view.ring, coefficients.const_data_ptr<double>());
  at::parallel_for(0, (numel + kTile - 1) / kTile, window_grain(bytes_of_tile(rows)), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t size = std::min(kTile, numel - tile * kTile);
      kernels::window_residual_cpu(view, live, tile, from.const_data_ptr<double>() + tile * kTile, size, damping,
                                   static_cast<char*>(out.data_ptr()) + tile * kTile * out.element_size());
    }
  });
  return out;
}

at::Tensor gram_impl(const at::Tensor& gram, const at::Tensor& ring, int64_t count) {
  TORCH_CHECK_VALUE(gram.dim() == 2 && count >= 0 && count < gram.size(0),
                    "fisher_window_gram: count must be in [0, num_grads], got ", count);
  const int64_t slots = gram.size(0);
  const at::Tensor ages = at::arange(count, ring.options());
  const at::Tensor slot = (ages + ring[kernels::kRingNext] - count).remainder(slots);
  return gram.index_select(0, slot).index_select(1, slot);
}

void register_kernels(torch::Library& m) {
  m.impl("fisher_window_dots_", dots_impl);
  m.impl("fisher_window_commit_", commit_impl);
  m.impl("fisher_window_solve_", solve_impl);
  m.impl("fisher_window_combine", combine_impl);
  m.impl("fisher_window_project", project_impl);
  m.impl("fisher_window_residual", residual_impl);
  m.impl("fisher_window_gram", gram_impl);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { register_kernels(m); }
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { register_kernels(m); }
#endif

}  // namespace torch_ext::curvature

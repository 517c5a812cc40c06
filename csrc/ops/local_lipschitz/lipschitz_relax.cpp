#include "ops/local_lipschitz/lipschitz_relax.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>

#include <algorithm>

#include "core/check.h"
#include "core/library.h"
#include "ops/local_lipschitz/local_lipschitz_kernel.h"

namespace torch_ext::ops {
namespace {

constexpr int64_t kGrain = 16384;  // elements: below that a second thread costs more than it saves

core::DType wide_type(const at::Tensor& tensor, const char* what) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, what,
                   " must be float32 or float64, got ", tensor.scalar_type());
  return tensor.scalar_type() == at::kDouble ? core::DType::kDouble : core::DType::kFloat;
}

void check_like(const char* op, const at::Tensor& tensor, const at::Tensor& like) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == like.scalar_type() && tensor.device() == like.device(), op,
                    ": all tensors must have one dtype and device, got ", tensor.toString(), " beside ",
                    like.toString());
}

core::DType check_ends(const at::Tensor& gl, const at::Tensor& gu, const at::Tensor& sl, const at::Tensor& su) {
  for (const at::Tensor* tensor : {&gu, &sl, &su}) {
    check_like("lipschitz_lines", *tensor, gl);
    TORCH_CHECK_VALUE(tensor->sym_sizes() == gl.sym_sizes(), "lipschitz_lines: gl, gu, sl and su must have one shape, ",
                      "got ", gl.sym_sizes(), " and ", tensor->sym_sizes());
  }
  return wide_type(gl, "lipschitz_lines: gl");
}

core::DType check_relax(const at::Tensor& a, const at::Tensor& lines) {
  check_like("lipschitz_relax", lines, a);
  TORCH_CHECK_VALUE(a.dim() == 3 && lines.dim() == 3 && (lines.sym_size(0) == 4 || lines.sym_size(0) == 2) &&
                        lines.sym_size(2) == a.sym_size(2) &&
                        (a.sym_size(0) == 1 || a.sym_size(0) == lines.sym_size(1)),
                    "lipschitz_relax: A must be [groups or 1, rows, width] and lines [4 or 2, groups, width], got ",
                    a.sym_sizes(), " and ", lines.sym_sizes());
  return wide_type(a, "lipschitz_relax: A");
}

// Elements or rows, each `cost` elements, on the CPU's threads or the current stream.
template <typename Work, typename Cpu, typename Cuda>
void run(const at::Tensor& like, const Work& work, core::DType type, int64_t count, int64_t cost, const Cpu& cpu,
         [[maybe_unused]] const Cuda& cuda) {
  if (like.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    const c10::DeviceGuard guard(like.device());
    cuda(work, type, core::current_stream(like.device()));
#endif
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { cpu(work, type, begin, end); });
}
#if TORCH_EXT_WITH_CUDA
#define TX_ON_CUDA(function) kernels::function
#else
#define TX_ON_CUDA(function) nullptr
#endif

std::vector<c10::SymInt> with_front(int64_t front, const at::Tensor& tensor) {
  std::vector<c10::SymInt> sizes{front};
  for (const auto& size : tensor.sym_sizes()) sizes.push_back(size);
  return sizes;
}

at::Tensor lines_meta(const at::Tensor& gl, const at::Tensor& gu, const at::Tensor& sl, const at::Tensor& su, bool) {
  check_ends(gl, gu, sl, su);
  return at::empty_symint(with_front(4, gl), gl.options().requires_grad(false));
}

at::Tensor lines_impl(const at::Tensor& gl, const at::Tensor& gu, const at::Tensor& sl, const at::Tensor& su,
                      bool constant) {
  const core::DType type = check_ends(gl, gu, sl, su);
  const at::Tensor ends[] = {gl.contiguous(), gu.contiguous(), sl.contiguous(), su.contiguous()};
  const at::Tensor lines = lines_meta(gl, gu, sl, su, constant);
  const kernels::LipschitzLinesWork work{ends[0].const_data_ptr(),
                                         ends[1].const_data_ptr(),
                                         ends[2].const_data_ptr(),
                                         ends[3].const_data_ptr(),
                                         gl.numel(),
                                         constant,
                                         lines.mutable_data_ptr(),
                                         nullptr,
                                         nullptr,
                                         nullptr,
                                         nullptr,
                                         nullptr};
  run(gl, work, type, gl.numel(), 1, kernels::lipschitz_lines_cpu, TX_ON_CUDA(lipschitz_lines_cuda));
  return lines;
}

LipschitzLinesGrads lines_backward_meta(const at::Tensor&, const at::Tensor& gl, const at::Tensor& gu,
                                        const at::Tensor& sl, const at::Tensor& su, bool) {
  check_ends(gl, gu, sl, su);
  const auto like = [](const at::Tensor& tensor) {
    return at::empty_symint(tensor.sym_sizes(), tensor.options().requires_grad(false));
  };
  return {like(gl), like(gu), like(sl), like(su)};
}

LipschitzLinesGrads lines_backward_impl(const at::Tensor& grad, const at::Tensor& gl, const at::Tensor& gu,
                                        const at::Tensor& sl, const at::Tensor& su, bool constant) {
  const core::DType type = check_ends(gl, gu, sl, su);
  const at::Tensor ends[] = {gl.contiguous(), gu.contiguous(), sl.contiguous(), su.contiguous()};
  const at::Tensor from = grad.contiguous();
  auto to = lines_backward_meta(grad, gl, gu, sl, su, constant);
  const kernels::LipschitzLinesWork work{ends[0].const_data_ptr(),
                                         ends[1].const_data_ptr(),
                                         ends[2].const_data_ptr(),
                                         ends[3].const_data_ptr(),
                                         gl.numel(),
                                         constant,
                                         nullptr,
                                         from.const_data_ptr(),
                                         std::get<0>(to).mutable_data_ptr(),
                                         std::get<1>(to).mutable_data_ptr(),
                                         std::get<2>(to).mutable_data_ptr(),
                                         std::get<3>(to).mutable_data_ptr()};
  run(gl, work, type, gl.numel(), 1, kernels::lipschitz_lines_gradient_cpu, TX_ON_CUDA(lipschitz_lines_gradient_cuda));
  return to;
}

std::tuple<at::Tensor, at::Tensor> relax_meta(const at::Tensor& a, const at::Tensor& lines, bool mirror) {
  check_relax(a, lines);
  const auto options = a.options().requires_grad(false);
  const c10::SymInt rows = a.sym_size(1) * (mirror ? 2 : 1);
  const bool slopes = lines.sym_size(0) == 4;
  return {slopes ? at::empty_symint({lines.sym_size(1), rows, a.sym_size(2)}, options) : at::empty({0}, options),
          at::empty_symint({lines.sym_size(1), rows}, options)};
}

kernels::LipschitzRelaxWork relax_work(const at::Tensor& a, const at::Tensor& lines, bool mirror) {
  kernels::LipschitzRelaxWork work{};
  work.a = a.const_data_ptr();
  work.lines = lines.const_data_ptr();
  work.groups = lines.size(1);
  work.rows = a.size(1);
  work.width = a.size(2);
  work.shared = a.size(0) == 1;
  work.mirror = mirror;
  work.slopes = lines.size(0) == 4;
  return work;
}

std::tuple<at::Tensor, at::Tensor> relax_impl(const at::Tensor& a, const at::Tensor& lines, bool mirror) {
  const core::DType type = check_relax(a, lines);
  const at::Tensor from = a.contiguous(), by = lines.contiguous();
  auto to = relax_meta(a, lines, mirror);
  kernels::LipschitzRelaxWork work = relax_work(from, by, mirror);
  work.out = std::get<0>(to).mutable_data_ptr();
  work.sums = std::get<1>(to).mutable_data_ptr();
  run(a, work, type, work.groups * work.rows, work.width, kernels::lipschitz_relax_cpu,
      TX_ON_CUDA(lipschitz_relax_cuda));
  return to;
}

std::tuple<at::Tensor, at::Tensor> relax_backward_meta(const at::Tensor&, const at::Tensor&, const at::Tensor& a,
                                                       const at::Tensor& lines, bool) {
  check_relax(a, lines);
  return {at::empty_symint(a.sym_sizes(), a.options().requires_grad(false)),
          at::empty_symint(lines.sym_sizes(), lines.options().requires_grad(false))};
}

std::tuple<at::Tensor, at::Tensor> relax_backward_impl(const at::Tensor& grad_out, const at::Tensor& grad_c,
                                                       const at::Tensor& a, const at::Tensor& lines, bool mirror) {
  const core::DType type = check_relax(a, lines);
  const at::Tensor from = a.contiguous(), by = lines.contiguous();
  const at::Tensor out = grad_out.contiguous(), c = grad_c.contiguous();
  kernels::LipschitzRelaxWork work = relax_work(from, by, mirror);
  const at::Tensor grad_a = at::empty({work.groups, work.rows, work.width}, from.options());
  // A group without rows leaves its lines alone.
  const at::Tensor grad_lines = work.rows == 0 ? at::zeros_like(by) : at::empty_like(by);
  work.grad_out = out.const_data_ptr();
  work.grad_sums = c.const_data_ptr();
  work.grad_a = grad_a.mutable_data_ptr();
  work.grad_lines = grad_lines.mutable_data_ptr();
  run(a, work, type, work.groups, work.rows * work.width, kernels::lipschitz_relax_gradient_cpu,
      TX_ON_CUDA(lipschitz_relax_gradient_cuda));
  return {work.shared && work.groups != 1 ? grad_a.sum({0}, /*keepdim=*/true) : grad_a, grad_lines};
}

}  // namespace

at::Tensor lipschitz_lines(const at::Tensor& gl, const at::Tensor& gu, const at::Tensor& sl, const at::Tensor& su,
                           bool constant) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::lipschitz_lines", "")
                             .typed<decltype(lipschitz_lines)>();
  return op.call(gl, gu, sl, su, constant);
}

LipschitzLinesGrads lipschitz_lines_backward(const at::Tensor& grad, const at::Tensor& gl, const at::Tensor& gu,
                                             const at::Tensor& sl, const at::Tensor& su, bool constant) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::lipschitz_lines_backward", "")
                             .typed<decltype(lipschitz_lines_backward)>();
  return op.call(grad, gl, gu, sl, su, constant);
}

std::tuple<at::Tensor, at::Tensor> lipschitz_relax(const at::Tensor& A, const at::Tensor& lines, bool mirror) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::lipschitz_relax", "")
                             .typed<decltype(lipschitz_relax)>();
  return op.call(A, lines, mirror);
}

std::tuple<at::Tensor, at::Tensor> lipschitz_relax_backward(const at::Tensor& grad_out, const at::Tensor& grad_c,
                                                            const at::Tensor& A, const at::Tensor& lines, bool mirror) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::lipschitz_relax_backward", "")
                             .typed<decltype(lipschitz_relax_backward)>();
  return op.call(grad_out, grad_c, A, lines, mirror);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def("lipschitz_lines(Tensor gl, Tensor gu, Tensor sl, Tensor su, bool constant=False) -> Tensor");
  m.def(
      "lipschitz_lines_backward(Tensor grad, Tensor gl, Tensor gu, Tensor sl, Tensor su, bool constant) -> (Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def("lipschitz_relax(Tensor A, Tensor lines, bool mirror=False) -> (Tensor out, Tensor c)");
  m.def(
      "lipschitz_relax_backward(Tensor grad_out, Tensor grad_c, Tensor A, Tensor lines, bool mirror) -> (Tensor, "
      "Tensor)");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("lipschitz_lines", lines_impl);
  m.impl("lipschitz_lines_backward", lines_backward_impl);
  m.impl("lipschitz_relax", relax_impl);
  m.impl("lipschitz_relax_backward", relax_backward_impl);
}
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("lipschitz_lines", lines_impl);
  m.impl("lipschitz_lines_backward", lines_backward_impl);
  m.impl("lipschitz_relax", relax_impl);
  m.impl("lipschitz_relax_backward", relax_backward_impl);
}
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("lipschitz_lines", lines_meta);
  m.impl("lipschitz_lines_backward", lines_backward_meta);
  m.impl("lipschitz_relax", relax_meta);
  m.impl("lipschitz_relax_backward", relax_backward_meta);
}

}  // namespace torch_ext::ops

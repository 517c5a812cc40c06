#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch_ext/moe/dispatch_plan.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "core/check.h"
#include "core/library.h"
#include "moe/dispatch_plan/dispatch_plan_kernel.h"
#include "moe/dispatch_plan/dispatch_plan_op.h"

namespace torch_ext::moe {
namespace {

constexpr const char* kName = "moe.dispatch_plan";
using Optional = std::optional<at::Tensor>;
using PlanTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

void check_plan(const at::Tensor& ids, int64_t experts, std::optional<int64_t> capacity, const Optional& gates,
                int64_t align) {
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kInt || ids.scalar_type() == at::kLong, kName,
                   ": ids must be int32 or int64, got ", ids.scalar_type());
  TORCH_CHECK_VALUE(ids.dim() == 2 && ids.sym_size(1) >= 1, kName, ": ids must be [T, K] with K >= 1, got ",
                    ids.sym_sizes());
  TORCH_CHECK_VALUE(experts >= 1, kName, ": num_experts must be positive, got ", experts);
  TORCH_CHECK_VALUE(!ids.is_cuda() || experts <= kernels::kPlanMaxExpertsCuda, kName, ": on CUDA at most ",
                    kernels::kPlanMaxExpertsCuda, " experts, got ", experts);
  TORCH_CHECK_VALUE(align >= 1, kName, ": align must be at least 1, got ", align);
  TORCH_CHECK_VALUE(!capacity || *capacity >= 1, kName, ": capacity must be at least 1, got ", capacity.value_or(0));
  if (!gates) return;
  core::dtype_of(*gates, "moe.dispatch_plan: gates");
  TORCH_CHECK_VALUE(gates->sym_sizes() == ids.sym_sizes() && gates->device() == ids.device(), kName,
                    ": gates must have ids' shape and device, ", ids.sym_sizes(), " on ", ids.device(), "; got ",
                    gates->sym_sizes(), " on ", gates->device());
}

// Known from shapes alone, so that no device is waited for.
c10::SymInt rows_of(const at::Tensor& ids, int64_t experts, std::optional<int64_t> capacity, int64_t align) {
  c10::SymInt rows = ids.sym_size(0) * ids.sym_size(1);
  if (capacity && *capacity <= INT32_MAX / experts) rows = rows.min(experts * *capacity);
  const int64_t padding = align - 1 <= INT32_MAX / experts ? experts * (align - 1) : int64_t{INT32_MAX} + 1;
  TORCH_CHECK_VALUE(ids.sym_size(0) * ids.sym_size(1) + padding <= INT32_MAX, kName, ": ids of shape ", ids.sym_sizes(),
                    " with align ", align,
                    " need more rows than 32-bit indices reach; dispatch in "
                    "parts");
  return rows + padding;
}

PlanTensors outputs(const at::Tensor& ids, int64_t experts, std::optional<int64_t> capacity, int64_t align) {
  const auto options = ids.options().dtype(at::kInt);
  return {at::empty_symint({experts + 1}, options), at::empty_symint(ids.sym_sizes(), options),
          at::empty_symint({rows_of(ids, experts, capacity, align)}, options)};
}

void check_range(const kernels::Plan& plan, int64_t entry, int64_t top_k) {
  TORCH_CHECK_VALUE(entry < 0, kName, ": ids[", entry / top_k, ", ", entry % top_k, "] is ", plan.ids[entry],
                    "; an id must be in [0, num_experts = ", plan.experts, "), or -1 for none");
}

// The kept of each expert by gate, from the entries of each in order.
void keep_by_gate(const kernels::Plan& plan, const std::vector<int32_t>& total, std::vector<int32_t> next) {
  std::vector<int32_t> start(total.size()), sorted(static_cast<size_t>(plan.entries));
  for (size_t e = 1; e < total.size(); ++e) start[e] = start[e - 1] + total[e - 1];
  next = start;
  for (int64_t i = 0; i < plan.entries; ++i) {
    plan.slot_of[i] = -1;
    if (plan.ids[i] >= 0)
      sorted[static_cast<size_t>(next[static_cast<size_t>(plan.ids[i])]++)] = static_cast<int32_t>(i);
  }
  at::parallel_for(0, plan.experts, 1, [&](int64_t begin, int64_t end) {
    for (auto e = static_cast<size_t>(begin); e < static_cast<size_t>(end); ++e) {
      kernels::plan_keep_cpu(sorted.data() + start[e], total[e], plan.gates, plan.gate_type, plan.capacity,
                             plan.offsets[e], plan.slot_of, plan.src_of);
    }
  });
}

// A counting sort over as many parts as there are threads. It is stable, so the result does not depend on the parts.
void plan_cpu(const kernels::Plan& plan, int64_t top_k) {
  constexpr int64_t kPerPart = 32768;
  const auto experts = static_cast<size_t>(plan.experts);
  const int64_t parts = std::clamp<int64_t>(plan.entries / kPerPart, 1, at::get_num_threads());
  const int64_t size = (plan.entries + parts - 1) / parts;
  std::vector<std::vector<int32_t>> counts(static_cast<size_t>(parts), std::vector<int32_t>(experts));
  std::vector<int64_t> foreign(static_cast<size_t>(parts), -1);
  const auto for_parts = [&](const auto& work) {
    at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) {
        work(static_cast<size_t>(p), std::min(plan.entries, p * size), std::min(plan.entries, (p + 1) * size));
      }
    });
  };
  for_parts([&](size_t p, int64_t begin, int64_t end) {
    foreign[p] = kernels::plan_count_cpu(plan.ids, begin, end, plan.experts, counts[p].data());
  });
  for (const int64_t entry : foreign) check_range(plan, entry, top_k);

  std::vector<int32_t> total(experts), limit(experts);
  int64_t at = 0;
  for (size_t e = 0; e < experts; ++e) {
    plan.offsets[e] = static_cast<int32_t>(at);
    int32_t next = plan.offsets[e];
    for (auto& part : counts) {
      const int32_t count = part[e];
      part[e] = next;  // where this part's first entry goes
      next += count;
    }
    total[e] = next - plan.offsets[e];
    const int64_t kept = kernels::plan_kept(total[e], plan.capacity);
    limit[e] = static_cast<int32_t>(at + kept);
    at += kernels::plan_padded(kept, plan.align);
    std::fill(plan.src_of + limit[e], plan.src_of + at, -1);
  }
  plan.offsets[experts] = static_cast<int32_t>(at);
  std::fill(plan.src_of + at, plan.src_of + plan.rows, -1);
  if (plan.capacity >= 0 && plan.gates != nullptr) return keep_by_gate(plan, total, limit);
  for_parts([&](size_t p, int64_t begin, int64_t end) {
    kernels::plan_place_cpu(plan.ids, begin, end, counts[p].data(), limit.data(), plan.slot_of, plan.src_of);
  });
}

PlanTensors plan_impl(const at::Tensor& ids_, int64_t experts, std::optional<int64_t> capacity, const Optional& gates_,
                      int64_t align) {
  check_plan(ids_, experts, capacity, gates_, align);
  const c10::OptionalDeviceGuard guard(device_of(ids_));
  const at::Tensor ids =
      (ids_.scalar_type() == at::kInt ? ids_ : at::clamp(ids_, -2, INT32_MAX).to(at::kInt)).contiguous();
  const Optional gates = gates_ ? Optional(gates_->contiguous()) : std::nullopt;
  PlanTensors out = outputs(ids, experts, capacity, align);
  const auto& [offsets, slot_of, src_of] = out;
  const kernels::Plan plan{ids.const_data_ptr<int32_t>(),
                           ids.numel(),
                           experts,
                           src_of.numel(),
                           align,
                           capacity ? std::min<int64_t>(*capacity, INT32_MAX) : -1,
                           gates ? gates->const_data_ptr() : nullptr,
                           gates ? core::dtype_of(*gates, "gates") : core::DType::kFloat,
                           offsets.mutable_data_ptr<int32_t>(),
                           slot_of.mutable_data_ptr<int32_t>(),
                           src_of.mutable_data_ptr<int32_t>()};
#if TORCH_EXT_WITH_CUDA
  if (ids.is_cuda()) {
    const at::Tensor scratch = at::empty({kernels::plan_scratch_cuda(plan)}, ids.options());
    kernels::plan_cuda(plan, scratch.mutable_data_ptr<int32_t>(), core::current_stream(ids.device()));
    return out;
  }
#endif
  plan_cpu(plan, ids.size(1));
  return out;
}

PlanTensors plan_meta(const at::Tensor& ids, int64_t experts, std::optional<int64_t> capacity, const Optional& gates,
                      int64_t align) {
  check_plan(ids, experts, capacity, gates, align);
  return outputs(ids, experts, capacity, align);
}

// Composite, so that it is differentiable in the gates.
std::tuple<at::Tensor, at::Tensor> dense_op(const at::Tensor& gates, const at::Tensor& ids, int64_t experts) {
  TORCH_CHECK_VALUE(ids.dim() == 2 && gates.sym_sizes() == ids.sym_sizes(),
                    "moe.to_dense: gates and ids must be [T, K], got ", gates.sym_sizes(), " and ", ids.sym_sizes());
  TORCH_CHECK_VALUE(experts >= 1, "moe.to_dense: num_experts must be positive, got ", experts);
  const at::Tensor real = ids.ge(0), index = ids.clamp_min(0).to(at::kLong);
  const std::vector<c10::SymInt> sizes{ids.sym_size(0), experts};
  const auto options = gates.options().requires_grad(false);
  return {at::zeros_symint(sizes, options).scatter_add(1, index, gates.mul(real)),
          at::zeros_symint(sizes, options.dtype(at::kInt)).scatter_add(1, index, real.to(at::kInt)).gt(0)};
}

}  // namespace

DispatchPlan dispatch_plan(const at::Tensor& ids, int64_t num_experts, std::optional<int64_t> capacity,
                           const Optional& gates, int64_t align) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::moe_dispatch_plan", "").typed<decltype(plan_impl)>();
  auto [offsets, slot_of, src_of] = op.call(ids, num_experts, capacity, gates, align);
  return {offsets, slot_of, src_of};
}

at::Tensor permute(const at::Tensor& x, const DispatchPlan& plan) {
  return moe_permute(x, std::nullopt, plan.slot_of, plan.src_of);
}

at::Tensor combine(const at::Tensor& z, const Optional& gates, const DispatchPlan& plan) {
  return moe_combine(z, gates, plan.slot_of, plan.src_of);
}

std::tuple<at::Tensor, at::Tensor> to_dense(const at::Tensor& gates, const at::Tensor& ids, int64_t num_experts) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::moe_to_dense", "").typed<decltype(dense_op)>();
  return op.call(gates, ids, num_experts);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "moe_dispatch_plan(Tensor ids, int num_experts, *, int? capacity=None, Tensor? gates=None, int align=1) -> "
      "(Tensor offsets, Tensor slot_of, Tensor src_of)");
  m.def("moe_to_dense(Tensor gates, Tensor ids, int num_experts) -> (Tensor, Tensor)", dense_op);
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { m.impl("moe_dispatch_plan", plan_impl); }
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { m.impl("moe_dispatch_plan", plan_impl); }
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) { m.impl("moe_dispatch_plan", plan_meta); }
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) { m.impl("moe_dispatch_plan", core::not_differentiable()); }

}  // namespace torch_ext::moe

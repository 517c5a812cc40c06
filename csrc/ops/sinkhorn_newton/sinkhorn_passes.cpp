#include "ops/sinkhorn_newton/sinkhorn_passes.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <numeric>
#include <vector>

#include "core/check.h"

namespace torch_ext::ops {
namespace {

using kernels::SinkhornCost;
using kernels::SinkhornPoint;
using kernels::SparsePlan;

constexpr int64_t kEntriesPerThread = 32768;  // below this a second thread costs more than it saves

int64_t grain(int64_t entries_per_item) {
  return std::max<int64_t>(1, kEntriesPerThread / std::max<int64_t>(1, entries_per_item));
}

template <typename Body>
void for_rows(const SinkhornCost& cost, const Body& body) {
  at::parallel_for(0, cost.n, grain(cost.m), body);
}

class CpuPasses final : public kernels::SinkhornPasses {
 public:
  explicit CpuPasses(const SinkhornCost& cost) : cost_(cost) {}

  void rows(const double* g, double inv_eps, double* out) override {
    for_rows(cost_,
             [&](int64_t begin, int64_t end) { kernels::sinkhorn_rows_cpu(cost_, g, inv_eps, out, begin, end); });
  }

  void columns(const double* f, double inv_eps, double* out) override {
    for_tiles([&](int64_t begin, int64_t end) { kernels::sinkhorn_columns_cpu(cost_, f, inv_eps, out, begin, end); });
  }

  void apply_rows(const SinkhornPoint& at, const double* w, double* out) override {
    for_rows(cost_,
             [&](int64_t begin, int64_t end) { kernels::sinkhorn_apply_rows_cpu(cost_, at, w, out, begin, end); });
  }

  void apply_columns(const SinkhornPoint& at, const double* w, double* out) override {
    for_tiles([&](int64_t begin, int64_t end) { kernels::sinkhorn_apply_columns_cpu(cost_, at, w, out, begin, end); });
  }

  bool compact(const SinkhornPoint& at, const double* log_row, const double* log_column, int64_t limit,
               SparsePlan& plan) override {
    const int64_t per_block = grain(cost_.m);
    const int64_t blocks = (cost_.n + per_block - 1) / per_block;
    parts_.resize(static_cast<size_t>(blocks));
    std::vector<int64_t> count(static_cast<size_t>(cost_.n));
    std::atomic<int64_t> total{0};
    at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last && total <= limit; ++b) {
        SparsePlan& part = parts_[static_cast<size_t>(b)];
        part.column.clear();
        part.value.clear();
        kernels::sinkhorn_compact_cpu(cost_, at, log_row, log_column, b * per_block,
                                      std::min(cost_.n, (b + 1) * per_block), part.column, part.value, count.data());
        total += static_cast<int64_t>(part.value.size());
      }
    });
    if (total > limit) {
      parts_.clear();  // gives the memory back
      return false;
    }
    plan.start.assign(1, 0);
    for (const int64_t c : count) plan.start.push_back(plan.start.back() + c);
    plan.column.clear();
    plan.value.clear();
    for (const SparsePlan& part : parts_) {
      plan.column.insert(plan.column.end(), part.column.begin(), part.column.end());
      plan.value.insert(plan.value.end(), part.value.begin(), part.value.end());
    }
    return true;
  }

 private:
  // Whole tiles of columns.
  template <typename Body>
  void for_tiles(const Body& body) const {
    constexpr int64_t kTile = kernels::kColumnTile;
    at::parallel_for(0, (cost_.m + kTile - 1) / kTile, grain(cost_.n * kTile),
                     [&](int64_t begin, int64_t end) { body(begin * kTile, std::min(cost_.m, end * kTile)); });
  }

  SinkhornCost cost_;
  std::vector<SparsePlan> parts_;
};

#if TORCH_EXT_WITH_CUDA
at::Tensor host(const void* data, int64_t size, at::ScalarType type = at::kDouble) {
  return at::from_blob(const_cast<void*>(data), {size}, at::TensorOptions(type));
}

// Potentials travel to the device and sums back: O(n + m) bytes for O(n m) work, one synchronisation a pass.
class CudaPasses final : public kernels::SinkhornPasses {
 public:
  CudaPasses(const SinkhornCost& cost, const at::Device& device)
      : cost_(cost),
        device_(device),
        f_(doubles(cost.n)),
        g_(doubles(cost.m)),
        row_(doubles(cost.n)),
        column_(doubles(cost.m)),
        scratch_(doubles(2 * cost.m * ((cost.n + kernels::kColumnSegment - 1) / kernels::kColumnSegment))) {}

  void rows(const double* g, double inv_eps, double* out) override {
    g_.copy_(host(g, cost_.m));
    kernels::sinkhorn_rows_cuda(cost_, g_.const_data_ptr<double>(), inv_eps, row_.mutable_data_ptr<double>(), stream());
    host(out, cost_.n).copy_(row_);
  }

  void columns(const double* f, double inv_eps, double* out) override {
    f_.copy_(host(f, cost_.n));
    kernels::sinkhorn_columns_cuda(cost_, f_.const_data_ptr<double>(), inv_eps, scratch_.mutable_data_ptr<double>(),
                                   column_.mutable_data_ptr<double>(), stream());
    host(out, cost_.m).copy_(column_);
  }

  void apply_rows(const SinkhornPoint& at, const double* w, double* out) override {
    const SinkhornPoint there = upload(at);
    column_.copy_(host(w, cost_.m));
    kernels::sinkhorn_apply_rows_cuda(cost_, there, column_.const_data_ptr<double>(), row_.mutable_data_ptr<double>(),
                                      stream());
    host(out, cost_.n).copy_(row_);
  }

  void apply_columns(const SinkhornPoint& at, const double* w, double* out) override {
    const SinkhornPoint there = upload(at);
    row_.copy_(host(w, cost_.n));
    kernels::sinkhorn_apply_columns_cuda(cost_, there, row_.const_data_ptr<double>(),
                                         scratch_.mutable_data_ptr<double>(), column_.mutable_data_ptr<double>(),
                                         stream());
    host(out, cost_.m).copy_(column_);
  }

  bool compact(const SinkhornPoint& at, const double* log_row, const double* log_column, int64_t limit,
               SparsePlan& plan) override {
    const SinkhornPoint there = upload(at);
    row_.copy_(host(log_row, cost_.n));
    column_.copy_(host(log_column, cost_.m));
    const auto* rows = row_.const_data_ptr<double>();
    const auto* columns = column_.const_data_ptr<double>();
    at::Tensor count = at::empty({cost_.n + 1}, f_.options().dtype(at::kLong));
    kernels::sinkhorn_count_cuda(cost_, there, rows, columns, count.mutable_data_ptr<int64_t>(), stream());
    plan.start.resize(static_cast<size_t>(cost_.n) + 1);
    host(plan.start.data() + 1, cost_.n, at::kLong).copy_(count.narrow(0, 0, cost_.n));
    plan.start[0] = 0;
    std::partial_sum(plan.start.begin(), plan.start.end(), plan.start.begin());
    const int64_t total = plan.start.back();
    if (total > limit) return false;
    count.copy_(host(plan.start.data(), cost_.n + 1, at::kLong));
    at::Tensor index = at::empty({total}, f_.options().dtype(at::kInt)), value = doubles(total);
    kernels::sinkhorn_fill_cuda(cost_, there, rows, columns, count.const_data_ptr<int64_t>(),
                                index.mutable_data_ptr<int32_t>(), value.mutable_data_ptr<double>(), stream());
    plan.column.resize(static_cast<size_t>(total));
    plan.value.resize(static_cast<size_t>(total));
    host(plan.column.data(), total, at::kInt).copy_(index);
    host(plan.value.data(), total).copy_(value);
    return true;
  }

  SinkhornPoint upload(const SinkhornPoint& at) {
    f_.copy_(host(at.f, cost_.n));
    g_.copy_(host(at.g, cost_.m));
    return {f_.const_data_ptr<double>(), g_.const_data_ptr<double>(), at.inv_eps};
  }
  void* stream() const { return core::current_stream(device_); }
  at::Tensor doubles(int64_t size) const { return at::empty({size}, at::TensorOptions(at::kDouble).device(device_)); }

 private:
  SinkhornCost cost_;
  at::Device device_;
  at::Tensor f_, g_, row_, column_, scratch_;
};
#endif

}  // namespace

std::unique_ptr<kernels::SinkhornPasses> make_passes(const SinkhornCost& cost, const at::Device& device) {
#if TORCH_EXT_WITH_CUDA
  if (device.is_cuda()) return std::make_unique<CudaPasses>(cost, device);
#endif
  (void)device;
  return std::make_unique<CpuPasses>(cost);
}

kernels::CostRange cost_range(const SinkhornCost& cost, const at::Device& device) {
#if TORCH_EXT_WITH_CUDA
  if (device.is_cuda()) {
    at::Tensor rows = at::empty({cost.n, 3}, at::TensorOptions(at::kDouble).device(device));
    kernels::sinkhorn_range_cuda(cost, rows.mutable_data_ptr<double>(), core::current_stream(device));
    rows = rows.cpu();
    kernels::CostRange range{HUGE_VAL, -HUGE_VAL, false};
    const auto* r = rows.const_data_ptr<double>();
    for (int64_t i = 0; i < cost.n; ++i, r += 3) {
      range = {std::min(range.min, r[0]), std::max(range.max, r[1]), range.invalid || r[2] != 0};
    }
    return range;
  }
#endif
  (void)device;
  kernels::CostRange range{HUGE_VAL, -HUGE_VAL, false};
  std::mutex mutex;
  for_rows(cost, [&](int64_t begin, int64_t end) {
    const kernels::CostRange part = kernels::sinkhorn_range_cpu(cost, begin, end);
    const std::lock_guard<std::mutex> guard(mutex);
    range = {std::min(range.min, part.min), std::max(range.max, part.max), range.invalid || part.invalid};
  });
  return range;
}

void write_plan(const SinkhornCost& cost, const SinkhornPoint& at, double mass, const at::Tensor& plan) {
  const core::DType type = core::dtype_of(plan, "sinkhorn_newton: the plan");
  void* out = plan.mutable_data_ptr();
#if TORCH_EXT_WITH_CUDA
  if (plan.is_cuda()) {
    CudaPasses passes(cost, plan.device());
    kernels::sinkhorn_plan_cuda(cost, passes.upload(at), mass, out, type, passes.stream());
    return;
  }
#endif
  for_rows(cost,
           [&](int64_t begin, int64_t end) { kernels::sinkhorn_plan_cpu(cost, at, mass, out, type, begin, end); });
}

at::Tensor displacement(const SinkhornCost& cost, const SinkhornPoint& at, const at::Device& device) {
  at::Tensor out = at::empty({cost.n, cost.d}, at::TensorOptions(at::kDouble).device(device));
#if TORCH_EXT_WITH_CUDA
  if (device.is_cuda()) {
    CudaPasses passes(cost, device);
    kernels::sinkhorn_displacement_cuda(cost, passes.upload(at), out.mutable_data_ptr<double>(), passes.stream());
    return out;
  }
#endif
  for_rows(cost, [&](int64_t begin, int64_t end) {
    kernels::sinkhorn_displacement_cpu(cost, at, out.mutable_data_ptr<double>(), begin, end);
  });
  return out;
}

}  // namespace torch_ext::ops

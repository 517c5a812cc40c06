// The weighted sum of the population's noise.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch_ext/ops/eggroll.h>

#include <cmath>
#include <utility>

#include "core/check.h"
#include "core/library.h"
#include "core/noise_kernel.h"
#include "ops/eggroll/eggroll_op.h"

namespace torch_ext::ops {
namespace {

using core::PhiloxTag;

constexpr const char* kUpdate = "eggroll_update";
constexpr int64_t kWorkspace = int64_t{1} << 23;  // bytes of factors at a time

// --- update --------------------------------------------------------------------------------------------------------

void check_update(const at::Tensor& coeff, at::IntArrayRef shape, std::string_view kind, int64_t ordinal, int64_t epoch,
                  int64_t pair_begin, int64_t rank, std::string_view law, at::ScalarType dtype, int64_t row_begin,
                  int64_t row_end, int64_t chunk_pairs) {
  TORCH_CHECK_TYPE(coeff.scalar_type() == at::kFloat || coeff.scalar_type() == at::kDouble, kUpdate,
                   ": coeff must be float32 or float64, got ", coeff.scalar_type());
  TORCH_CHECK_VALUE(coeff.dim() == 1, kUpdate, ": coeff must be [pairs], got ", coeff.sym_sizes());
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf, kUpdate,
                   ": dtype is that of the parameter: float32, float64, bfloat16 or float16; got ", dtype);
  noise_law(kUpdate, law);
  check_own_ordinal(kUpdate, ordinal);
  check_counter(kUpdate, "epoch", epoch);
  check_counter(kUpdate, "pair_begin", pair_begin);
  TORCH_CHECK_VALUE(chunk_pairs >= 0, kUpdate, ": chunk_pairs must not be negative, got ", chunk_pairs);
  const auto [rows, columns] = as_matrix(shape);
  TORCH_CHECK_VALUE(row_begin >= 0 && row_begin <= row_end && row_end <= rows, kUpdate, ": rows [", row_begin, ", ",
                    row_end, ") are not among the ", rows, " of shape ", shape);
  if (is_vector(kUpdate, kind)) return check_elements(kUpdate, rows * columns);
  TORCH_CHECK_VALUE(shape.size() >= 2, kUpdate, ": a parameter of shape ", shape,
                    " is no matrix; use kind='vector' for it");
  check_rank(kUpdate, rank, rows, columns, /*cuda=*/false);
  check_elements(kUpdate, std::max(rows, columns) * rank);
}

std::vector<int64_t> rows_of(at::IntArrayRef shape, int64_t row_begin, int64_t row_end) {
  std::vector<int64_t> sizes = shape.vec();
  if (!sizes.empty()) sizes[0] = row_end - row_begin;
  return sizes;
}

int64_t last_row(at::IntArrayRef shape, int64_t row_end) { return row_end == -1 ? as_matrix(shape).first : row_end; }

// Factors of some pairs as the rows of a matrix [pairs rank, rows].
at::Tensor factors(const at::Tensor& buffer, const kernels::EggrollFactors& work, core::DType type) {
  kernels::EggrollFactors filled = work;
  at::Tensor out = buffer.narrow(0, 0, work.pairs * work.rank);
  filled.out = out.mutable_data_ptr();
  if (out.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    kernels::eggroll_factors_cuda(filled, type, core::current_stream(out.device()));
#endif
    return out;
  }
  for_tasks(work.pairs, out.numel(),
            [&](int64_t begin, int64_t end) { kernels::eggroll_factors_cpu(filled, type, begin, end); });
  return out;
}

// S = scale / sqrt(rank) (c o A)^T B over chunks of pairs: one product per chunk, added up in S.
at::Tensor matrix_update(const at::Tensor& coeff, at::IntArrayRef shape, int64_t seed, int64_t ordinal, int64_t epoch,
                         int64_t pair_begin, int64_t rank, core::NoiseLaw law, double scale, at::ScalarType dtype,
                         int64_t row_begin, int64_t row_end, int64_t chunk_pairs, const at::Tensor& sum) {
  const int64_t rows = row_end - row_begin, columns = as_matrix(shape).second, pairs = coeff.size(0);
  const int64_t bytes = (rows + columns) * rank * sum.element_size();
  const int64_t most = chunk_pairs > 0 ? chunk_pairs : std::max<int64_t>(1, kWorkspace / bytes);
  const int64_t step = std::min(most, pairs);
  const at::Tensor a = at::empty({step * rank, rows}, sum.options());
  const at::Tensor b = at::empty({step * rank, columns}, sum.options());
  const core::DType type = core::dtype_of(at::empty({0}, at::device(at::kCPU).dtype(dtype)), kUpdate);
  at::Tensor s = sum.view({rows, columns});
  for (int64_t first = 0; first < pairs; first += step) {
    const int64_t count = std::min(step, pairs - first);
    const auto side = [&](const at::Tensor& buffer, PhiloxTag tag, const void* weights, int64_t begin, int64_t size) {
      const auto stream = core::philox_stream(seed, pair_begin + first, ordinal, tag, epoch);
      return factors(buffer, {law, stream, weights, count, begin, size, rank, nullptr}, type);
    };
    const auto* weights = static_cast<const char*>(coeff.const_data_ptr()) + first * coeff.element_size();
    const at::Tensor left = side(a, PhiloxTag::kEsFactorA, weights, row_begin, rows);
    const at::Tensor right = side(b, PhiloxTag::kEsFactorB, nullptr, 0, columns);
    if (first == 0) {
      at::mm_out(s, left.t(), right);
    } else {
      at::addmm_out(s, s, left.t(), right);
    }
  }
  const double factor = scale / std::sqrt(static_cast<double>(rank));
  return factor == 1 ? sum : sum.mul_(factor);
}

at::Tensor update_impl(const at::Tensor& coeff, at::IntArrayRef shape, std::string_view kind, int64_t seed,
                       int64_t ordinal, int64_t epoch, int64_t pair_begin, int64_t rank, std::string_view law,
                       double scale, at::ScalarType dtype, int64_t row_begin, int64_t row_end, int64_t chunk_pairs) {
  row_end = last_row(shape, row_end);
  check_update(coeff, shape, kind, ordinal, epoch, pair_begin, rank, law, dtype, row_begin, row_end, chunk_pairs);
  check_counter(kUpdate, "the last pair", pair_begin + coeff.size(0));
  const c10::OptionalDeviceGuard guard(device_of(coeff));
  const at::ScalarType arithmetic = core::arithmetic_type(dtype);
  const at::Tensor weights = coeff.to(arithmetic).contiguous();
  const auto options = coeff.options().dtype(arithmetic);
  const std::vector<int64_t> sizes = rows_of(shape, row_begin, row_end);
  if (coeff.numel() == 0) return at::zeros(sizes, options);
  at::Tensor sum = at::empty(sizes, options);
  if (sum.numel() == 0) return sum;
  if (!is_vector(kUpdate, kind)) {
    return matrix_update(weights, shape, seed, ordinal, epoch, pair_begin, rank, noise_law(kUpdate, law), scale, dtype,
                         row_begin, row_end, chunk_pairs, sum);
  }
  const core::DType type = core::dtype_of(at::empty({0}, at::device(at::kCPU).dtype(dtype)), kUpdate);
  add_noise({noise_law(kUpdate, law), type, core::philox_stream(seed, pair_begin, ordinal, PhiloxTag::kEsVector, epoch),
             weights.const_data_ptr(), weights.size(0), scale, /*add=*/false, sum.mutable_data_ptr(),
             row_begin * as_matrix(shape).second, sum.numel()},
            sum);
  return sum;
}

at::Tensor update_meta(const at::Tensor& coeff, at::IntArrayRef shape, std::string_view kind, int64_t, int64_t ordinal,
                       int64_t epoch, int64_t pair_begin, int64_t rank, std::string_view law, double,
                       at::ScalarType dtype, int64_t row_begin, int64_t row_end, int64_t chunk_pairs) {
  row_end = last_row(shape, row_end);
  check_update(coeff, shape, kind, ordinal, epoch, pair_begin, rank, law, dtype, row_begin, row_end, chunk_pairs);
  return at::empty(rows_of(shape, row_begin, row_end), coeff.options().dtype(core::arithmetic_type(dtype)));
}

using UpdateOp = decltype(update_impl);

}  // namespace

at::Tensor eggroll_update(const at::Tensor& coeff, at::IntArrayRef shape, const EggrollUpdateOptions& o) {
  static const auto op = eggroll_operator<UpdateOp>("torch_ext::eggroll_update");
  return op.call(coeff, shape, o.kind, o.seed, o.ordinal, o.epoch, o.pair_begin, o.rank, o.law, o.scale, o.dtype,
                 o.row_begin, o.row_end, o.chunk_pairs);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "eggroll_update(Tensor coeff, int[] shape, *, str kind='matrix', int seed, int ordinal, int epoch=0, "
      "int pair_begin=0, int rank=1, str law='gaussian', float scale=1.0, ScalarType dtype, int row_begin=0, "
      "int row_end=-1, int chunk_pairs=0) -> Tensor");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { m.impl("eggroll_update", update_impl); }
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { m.impl("eggroll_update", update_impl); }
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) { m.impl("eggroll_update", update_meta); }
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) { m.impl("eggroll_update", core::not_differentiable()); }

}  // namespace torch_ext::ops

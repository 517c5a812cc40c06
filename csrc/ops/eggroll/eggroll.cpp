// The layers: y = x (W + s sigma E)^T + bias + s sigma eps for all members, embedding rows and vectors.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch_ext/ops/eggroll.h>

#include <utility>

#include "core/check.h"
#include "core/library.h"
#include "ops/eggroll/eggroll_op.h"

namespace torch_ext::ops {
namespace {

constexpr const char* kLinear = "eggroll_linear";
constexpr const char* kEmbedding = "eggroll_embedding";
constexpr const char* kVector = "eggroll_vector";

const at::Tensor& or_undefined(const std::optional<at::Tensor>& tensor) {
  static const at::Tensor undefined;
  return tensor.has_value() ? *tensor : undefined;
}

// --- linear --------------------------------------------------------------------------------------------------------

// Sizes of y; checks what meta tensors have too.
std::vector<c10::SymInt> linear_sizes(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                      double sigma, int64_t rank, std::string_view law, int64_t ordinal,
                                      int64_t bias_ordinal, bool transposed) {
  check_scale(kLinear, sigma, rank, law);
  check_ordinal(kLinear, "ordinal", ordinal);
  check_ordinal(kLinear, "bias_ordinal", bias_ordinal);
  core::dtype_of(x, "eggroll_linear: x");
  check_alike(kLinear, "weight", weight, "x", x);
  TORCH_CHECK_VALUE(weight.dim() == 2, kLinear, ": weight must have two dimensions, got ", weight.sym_sizes());
  const int64_t side = transposed ? 0 : 1;
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.sym_size(-1) == weight.sym_size(side), kLinear, ": x must be [members, ..., ",
                    weight.sym_size(side), "] beside a weight of ", weight.sym_sizes(),
                    transposed ? " (transposed)" : "", ", got ", x.sym_sizes());
  if (ordinal >= 0) check_rank(kLinear, rank, weight.sym_size(0), weight.sym_size(1), x.is_cuda());
  if (bias.defined()) {
    check_alike(kLinear, "bias", bias, "x", x);
    TORCH_CHECK_VALUE(bias.dim() == 1 && bias.sym_size(0) == weight.sym_size(1 - side), kLinear, ": bias must be [",
                      weight.sym_size(1 - side), "], got ", bias.sym_sizes());
  } else {
    TORCH_CHECK_VALUE(bias_ordinal == -1, kLinear, ": bias_ordinal is ", bias_ordinal, ", but there is no bias");
  }
  std::vector<c10::SymInt> sizes = x.sym_sizes().vec();
  sizes.back() = weight.sym_size(1 - side);
  return sizes;
}

void fill(const kernels::EggrollLayer& layer, const at::Tensor& like, core::DType type) {
  if (like.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    kernels::eggroll_layer_cuda(layer, type, core::current_stream(like.device()));
#endif
    return;
  }
  for_tasks(layer.tasks(), layer.members.count * layer.rows * (layer.in + layer.out),
            [&](int64_t begin, int64_t end) { kernels::eggroll_layer_cpu(layer, type, begin, end); });
}

// What noise and bias add is written first, where a plain layer copies its bias; the product over all members is then
// added to it.
at::Tensor linear_impl(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& maybe_bias,
                       int64_t seed, int64_t epoch, int64_t member_begin, bool antithetic, double sigma, int64_t rank,
                       std::string_view law, int64_t ordinal, int64_t bias_ordinal, bool transposed) {
  const at::Tensor& bias = or_undefined(maybe_bias);
  const auto sizes = linear_sizes(x, weight, bias, sigma, rank, law, ordinal, bias_ordinal, transposed);
  const auto members =
      eggroll_members(kLinear, {seed, epoch, member_begin, antithetic, sigma, rank, std::string(law)}, x.size(0));
  const c10::OptionalDeviceGuard guard(device_of(x));
  const at::Tensor matrix = transposed ? weight : weight.t();
  if (ordinal < 0 && bias_ordinal < 0) return at::linear(x, matrix.t(), maybe_bias);
  const at::Tensor rows = x.contiguous();
  const at::Tensor bias_row = bias.defined() ? bias.contiguous() : bias;
  at::Tensor y = at::empty(C10_AS_INTARRAYREF_SLOW(c10::SymIntArrayRef(sizes)), x.options());
  if (y.numel() == 0) return y;
  const int64_t in = matrix.size(0), out = matrix.size(1), count = y.numel() / out;
  check_elements(kLinear, std::max(in, out) * rank);
  using core::PhiloxTag;
  fill({members, noise_law(kLinear, law), rank, sigma, ordinal, bias_ordinal,
        transposed ? PhiloxTag::kEsFactorA : PhiloxTag::kEsFactorB,
        transposed ? PhiloxTag::kEsFactorB : PhiloxTag::kEsFactorA, count / members.count, rows.const_data_ptr(), in,
        bias.defined() ? bias_row.const_data_ptr() : nullptr, y.mutable_data_ptr(), out},
       x, core::dtype_of(x, kLinear));
  at::Tensor to = y.view({count, out});
  at::addmm_out(to, to, rows.view({count, in}), matrix);
  return y;
}

at::Tensor linear_meta(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       c10::SymInt, c10::SymInt, c10::SymInt, bool, double sigma, int64_t rank, std::string_view law,
                       int64_t ordinal, int64_t bias_ordinal, bool transposed) {
  return at::empty_symint(
      linear_sizes(x, weight, or_undefined(bias), sigma, rank, law, ordinal, bias_ordinal, transposed),
      x.options().requires_grad(false));
}

// --- embedding -----------------------------------------------------------------------------------------------------

std::vector<c10::SymInt> embedding_sizes(const at::Tensor& ids, const at::Tensor& weight, double sigma, int64_t rank,
                                         std::string_view law, int64_t ordinal) {
  check_scale(kEmbedding, sigma, rank, law);
  check_ordinal(kEmbedding, "ordinal", ordinal);
  core::dtype_of(weight, "eggroll_embedding: weight");
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, kEmbedding,
                   ": ids must be int64 or int32, got ", ids.scalar_type());
  TORCH_CHECK_VALUE(ids.device() == weight.device(), kEmbedding, ": ids are on ", ids.device(), ", weight on ",
                    weight.device());
  TORCH_CHECK_VALUE(weight.dim() == 2, kEmbedding, ": weight must have two dimensions, got ", weight.sym_sizes());
  TORCH_CHECK_VALUE(ids.dim() >= 1, kEmbedding, ": ids must be [members, ...], got a scalar");
  if (ordinal >= 0) check_rank(kEmbedding, rank, weight.sym_size(0), weight.sym_size(1), weight.is_cuda());
  std::vector<c10::SymInt> sizes = ids.sym_sizes().vec();
  sizes.push_back(weight.sym_size(1));
  return sizes;
}

void check_ids(const at::Tensor& ids, int64_t entries) {
  if (ids.is_cuda()) return;  // the kernel traps
  const auto* id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < entries, kEmbedding, ": id ", id[i], " is outside [0, ", entries, ")");
  }
}

at::Tensor embedding_impl(const at::Tensor& ids, const at::Tensor& weight, int64_t seed, int64_t epoch,
                          int64_t member_begin, bool antithetic, double sigma, int64_t rank, std::string_view law,
                          int64_t ordinal) {
  const auto sizes = embedding_sizes(ids, weight, sigma, rank, law, ordinal);
  const auto members =
      eggroll_members(kEmbedding, {seed, epoch, member_begin, antithetic, sigma, rank, std::string(law)}, ids.size(0));
  const c10::OptionalDeviceGuard guard(device_of(weight));
  const at::Tensor rows = ids.to(at::kLong).contiguous(), table = weight.contiguous();
  check_ids(rows, weight.size(0));
  if (ordinal < 0)
    return table.index_select(0, rows.view({-1})).view(C10_AS_INTARRAYREF_SLOW(c10::SymIntArrayRef(sizes)));
  at::Tensor out = at::empty(C10_AS_INTARRAYREF_SLOW(c10::SymIntArrayRef(sizes)), weight.options());
  if (out.numel() == 0) return out;
  check_elements(kEmbedding, std::max(weight.size(0), weight.size(1)) * rank);
  const kernels::EggrollRowsOf work{members,
                                    noise_law(kEmbedding, law),
                                    rank,
                                    sigma,
                                    ordinal,
                                    rows.numel() / members.count,
                                    rows.const_data_ptr<int64_t>(),
                                    table.const_data_ptr(),
                                    table.size(0),
                                    table.size(1),
                                    out.mutable_data_ptr()};
  const core::DType type = core::dtype_of(weight, kEmbedding);
  if (out.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    kernels::eggroll_rows_cuda(work, type, core::current_stream(out.device()));
#endif
    return out;
  }
  for_tasks(work.tasks(), out.numel(),
            [&](int64_t begin, int64_t end) { kernels::eggroll_rows_cpu(work, type, begin, end); });
  return out;
}

at::Tensor embedding_meta(const at::Tensor& ids, const at::Tensor& weight, c10::SymInt, c10::SymInt, c10::SymInt, bool,
                          double sigma, int64_t rank, std::string_view law, int64_t ordinal) {
  return at::empty_symint(embedding_sizes(ids, weight, sigma, rank, law, ordinal),
                          weight.options().requires_grad(false));
}

// --- vector --------------------------------------------------------------------------------------------------------

std::vector<c10::SymInt> vector_sizes(const at::Tensor& theta, const c10::SymInt& members, double sigma, int64_t rank,
                                      std::string_view law, int64_t ordinal) {
  check_scale(kVector, sigma, rank, law);
  check_ordinal(kVector, "ordinal", ordinal);
  core::dtype_of(theta, "eggroll_vector: theta");
  TORCH_CHECK_VALUE(members >= 0, kVector, ": members must not be negative, got ", members);
  std::vector<c10::SymInt> sizes = theta.sym_sizes().vec();
  sizes.insert(sizes.begin(), members);
  return sizes;
}

at::Tensor vector_impl(const at::Tensor& theta, int64_t count, int64_t seed, int64_t epoch, int64_t member_begin,
                       bool antithetic, double sigma, int64_t rank, std::string_view law, int64_t ordinal) {
  const auto sizes = vector_sizes(theta, count, sigma, rank, law, ordinal);
  const auto members =
      eggroll_members(kVector, {seed, epoch, member_begin, antithetic, sigma, rank, std::string(law)}, count);
  const c10::OptionalDeviceGuard guard(device_of(theta));
  const auto shape = C10_AS_INTARRAYREF_SLOW(c10::SymIntArrayRef(sizes));
  if (ordinal < 0) return theta.expand(shape).contiguous();
  const at::Tensor from = theta.contiguous();
  at::Tensor out = at::empty(shape, theta.options());
  if (out.numel() == 0) return out;
  check_elements(kVector, theta.numel());
  const kernels::EggrollVector work{members,      noise_law(kVector, law), sigma, ordinal, from.const_data_ptr(),
                                    from.numel(), out.mutable_data_ptr()};
  const core::DType type = core::dtype_of(theta, kVector);
  if (out.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    kernels::eggroll_vector_cuda(work, type, core::current_stream(out.device()));
#endif
    return out;
  }
  for_tasks(work.tasks(), out.numel(),
            [&](int64_t begin, int64_t end) { kernels::eggroll_vector_cpu(work, type, begin, end); });
  return out;
}

at::Tensor vector_meta(const at::Tensor& theta, c10::SymInt members, c10::SymInt, c10::SymInt, c10::SymInt, bool,
                       double sigma, int64_t rank, std::string_view law, int64_t ordinal) {
  return at::empty_symint(vector_sizes(theta, members, sigma, rank, law, ordinal),
                          theta.options().requires_grad(false));
}

}  // namespace

at::Tensor eggroll_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                          const EggrollNoise& noise, int64_t ordinal, int64_t bias_ordinal, bool transposed) {
  static const auto op = eggroll_operator<EggrollLinearOp>("torch_ext::eggroll_linear");
  return op.call(x, weight, bias.has_value() && bias->defined() ? bias : std::nullopt, noise.seed, noise.epoch,
                 noise.member_begin, noise.antithetic, noise.sigma, noise.rank, noise.law, ordinal, bias_ordinal,
                 transposed);
}

at::Tensor eggroll_embedding(const at::Tensor& ids, const at::Tensor& weight, const EggrollNoise& noise,
                             int64_t ordinal) {
  static const auto op = eggroll_operator<EggrollEmbeddingOp>("torch_ext::eggroll_embedding");
  return op.call(ids, weight, noise.seed, noise.epoch, noise.member_begin, noise.antithetic, noise.sigma, noise.rank,
                 noise.law, ordinal);
}

at::Tensor eggroll_vector(const at::Tensor& theta, int64_t members, const EggrollNoise& noise, int64_t ordinal) {
  static const auto op = eggroll_operator<EggrollVectorOp>("torch_ext::eggroll_vector");
  return op.call(theta, members, noise.seed, noise.epoch, noise.member_begin, noise.antithetic, noise.sigma, noise.rank,
                 noise.law, ordinal);
}

#define TORCH_EXT_EGGROLL_NOISE \
  "SymInt seed, SymInt epoch, SymInt member_begin, bool antithetic, float sigma, int rank, str law"

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def("eggroll_linear(Tensor x, Tensor weight, Tensor? bias, *, " TORCH_EXT_EGGROLL_NOISE
        ", int ordinal, int bias_ordinal=-1, bool transposed=False) -> Tensor");
  m.def("eggroll_embedding(Tensor ids, Tensor weight, *, " TORCH_EXT_EGGROLL_NOISE ", int ordinal) -> Tensor");
  m.def("eggroll_vector(Tensor theta, SymInt members, *, " TORCH_EXT_EGGROLL_NOISE ", int ordinal) -> Tensor");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("eggroll_linear", linear_impl);
  m.impl("eggroll_embedding", embedding_impl);
  m.impl("eggroll_vector", vector_impl);
}
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("eggroll_linear", linear_impl);
  m.impl("eggroll_embedding", embedding_impl);
  m.impl("eggroll_vector", vector_impl);
}
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("eggroll_linear", linear_meta);
  m.impl("eggroll_embedding", embedding_meta);
  m.impl("eggroll_vector", vector_meta);
}

}  // namespace torch_ext::ops

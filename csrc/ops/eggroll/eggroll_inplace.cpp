// Perturbations in place, and the noise itself.
#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <torch_ext/ops/eggroll.h>

#include <utility>

#include "core/check.h"
#include "core/library.h"
#include "core/noise_kernel.h"
#include "ops/eggroll/eggroll_op.h"

namespace torch_ext::ops {
namespace {

using core::PhiloxTag;

constexpr const char* kPerturb = "eggroll_perturb_";
constexpr const char* kSeeded = "seeded_noise_add_";
constexpr const char* kNoise = "eggroll_noise_";

void check_perturb(at::TensorList tensors, at::IntArrayRef ordinals, const c10::List<std::string>& kinds,
                   const EggrollNoise& noise) {
  check_eggroll_noise(kPerturb, noise);
  core::check_same_length(kPerturb, "ordinals", tensors.size(), ordinals.size());
  core::check_same_length(kPerturb, "kinds", tensors.size(), kinds.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    const std::string name = "eggroll_perturb_: tensor " + std::to_string(i);
    core::dtype_of(tensor, name);
    check_ordinal(kPerturb, "ordinal", ordinals[i]);
    if (is_vector(kPerturb, kinds.get(i)) || ordinals[i] < 0) continue;
    TORCH_CHECK_VALUE(tensor.dim() >= 2, name, " of shape ", tensor.sym_sizes(),
                      " is no matrix; use kind 'vector' for it");
    c10::SymInt columns = 1;
    for (int64_t d = 1; d < tensor.dim(); ++d) columns = columns * tensor.sym_size(d);
    check_rank(name.c_str(), noise.rank, tensor.sym_size(0), columns, tensor.is_cuda());
  }
}

void perturb_matrix(void* data, const at::Tensor& like, core::DType type, const kernels::EggrollMembers& member,
                    int64_t ordinal, const EggrollNoise& noise) {
  const auto [rows, columns] = as_matrix(like.sizes());
  check_elements(kPerturb, std::max(rows, columns) * noise.rank);
  const kernels::EggrollRowsOf work{
      member, noise_law(kPerturb, noise.law), noise.rank, noise.sigma, ordinal, rows, nullptr, data, rows, columns,
      data};
  if (like.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    kernels::eggroll_rows_cuda(work, type, core::current_stream(like.device()));
#endif
    return;
  }
  for_tasks(work.tasks(), like.numel(),
            [&](int64_t begin, int64_t end) { kernels::eggroll_rows_cpu(work, type, begin, end); });
}

// tensor += weight eps of one stream.
void perturb_vector(void* data, const at::Tensor& like, core::DType type, const core::PhiloxStream& stream,
                    core::NoiseLaw law, double weight) {
  check_elements("seeded noise", like.numel());
  add_noise({law, type, stream, nullptr, 1, weight, /*add=*/true, data, 0, like.numel()}, like);
}

void perturb_impl(at::TensorList tensors, at::IntArrayRef ordinals, c10::List<std::string> kinds, int64_t seed,
                  int64_t epoch, int64_t member, bool antithetic, double sigma, int64_t rank, std::string_view law) {
  const EggrollNoise noise{seed, epoch, member, antithetic, sigma, rank, std::string(law)};
  check_perturb(tensors, ordinals, kinds, noise);
  const kernels::EggrollMembers one{seed, epoch, member, 1, antithetic};
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    if (ordinals[i] < 0 || tensor.numel() == 0) continue;
    const c10::OptionalDeviceGuard guard(device_of(tensor));
    const core::DType type = core::dtype_of(tensor, kPerturb);
    const core::Staged staged(tensor, core::walking_strides(tensor, false, "eggroll_perturb_: tensor", i));
    if (kinds.get(i) == "vector") {
      perturb_vector(staged.data(), tensor, type, one.stream(one.first_pair(), ordinals[i], PhiloxTag::kEsVector),
                     noise_law(kPerturb, law), one.sign(0) * sigma);
    } else {
      perturb_matrix(staged.data(), tensor, type, one, ordinals[i], noise);
    }
    staged.finish();
  }
}

void perturb_meta(at::TensorList tensors, at::IntArrayRef ordinals, c10::List<std::string> kinds, c10::SymInt,
                  c10::SymInt, c10::SymInt, bool, double sigma, int64_t rank, std::string_view law) {
  check_perturb(tensors, ordinals, kinds, {0, 0, 0, true, sigma, rank, std::string(law)});
}

void seeded_meta(at::TensorList tensors, at::ArrayRef<double> scales, int64_t, at::IntArrayRef ordinals, int64_t stream,
                 int64_t epoch, std::string_view law) {
  core::check_same_length(kSeeded, "scales", tensors.size(), scales.size());
  core::check_same_length(kSeeded, "ordinals", tensors.size(), ordinals.size());
  noise_law(kSeeded, law);
  check_counter(kSeeded, "stream", stream);
  check_counter(kSeeded, "epoch", epoch);
  for (size_t i = 0; i < tensors.size(); ++i) {
    core::dtype_of(tensors[i], "seeded_noise_add_: tensor " + std::to_string(i));
    check_own_ordinal(kSeeded, ordinals[i]);
  }
}

void seeded_impl(at::TensorList tensors, at::ArrayRef<double> scales, int64_t seed, at::IntArrayRef ordinals,
                 int64_t stream, int64_t epoch, std::string_view law) {
  seeded_meta(tensors, scales, seed, ordinals, stream, epoch, law);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    if (tensor.numel() == 0) continue;
    const c10::OptionalDeviceGuard guard(device_of(tensor));
    const core::Staged staged(tensor, core::walking_strides(tensor, false, "seeded_noise_add_: tensor", i));
    perturb_vector(staged.data(), tensor, core::dtype_of(tensor, kSeeded),
                   core::philox_stream(seed, stream, ordinals[i], PhiloxTag::kEsVector, epoch), noise_law(kSeeded, law),
                   scales[i]);
    staged.finish();
  }
}

// --- noise ---------------------------------------------------------------------------------------------------------

void noise_meta(const at::Tensor& out, int64_t, int64_t ordinal, int64_t tag, int64_t pair_begin, int64_t epoch,
                std::string_view law, int64_t row_begin) {
  const core::NoiseLaw which = noise_law(kNoise, law);
  const bool units = out.scalar_type() == at::kChar;
  if (!units) core::dtype_of(out, "eggroll_noise_: out");
  TORCH_CHECK_VALUE(!units || which != core::NoiseLaw::kGaussian, kNoise,
                    ": the gaussian law has no int8 form; use another dtype or law");
  TORCH_CHECK_VALUE(out.dim() == 3, kNoise, ": out must be [pairs, rows, rank], got ", out.sym_sizes());
  TORCH_CHECK_VALUE(tag >= 0 && tag <= 2, kNoise, ": tag must be 0 (A), 1 (B) or 2 (vector), got ", tag);
  check_own_ordinal(kNoise, ordinal);
  check_counter(kNoise, "pair_begin", pair_begin);
  check_counter(kNoise, "epoch", epoch);
  TORCH_CHECK_VALUE(row_begin >= 0, kNoise, ": row_begin must not be negative, got ", row_begin);
}

void noise_impl(const at::Tensor& out, int64_t seed, int64_t ordinal, int64_t tag, int64_t pair_begin, int64_t epoch,
                std::string_view law, int64_t row_begin) {
  noise_meta(out, seed, ordinal, tag, pair_begin, epoch, law, row_begin);
  TORCH_CHECK_VALUE(out.is_contiguous(), kNoise, ": out must be contiguous");
  check_counter(kNoise, "the last pair", pair_begin + out.size(0));
  check_elements(kNoise, (row_begin + out.size(1)) * out.size(2));
  if (out.numel() == 0) return;
  const bool units = out.scalar_type() == at::kChar;
  const kernels::NoiseFill fill{noise_law(kNoise, law),
                                units ? core::DType::kFloat : core::dtype_of(out, kNoise),
                                units,
                                core::philox_stream(seed, pair_begin, ordinal, static_cast<PhiloxTag>(tag), epoch),
                                row_begin * out.size(2),
                                out.size(1) * out.size(2),
                                out.size(0),
                                out.mutable_data_ptr()};
  if (out.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    const c10::DeviceGuard guard(out.device());
    kernels::noise_fill_cuda(fill, core::current_stream(out.device()));
#endif
    return;
  }
  constexpr int64_t kChunk = 16384;
  const int64_t chunks = (fill.elements + kChunk - 1) / kChunk;
  for_tasks(fill.streams * chunks, out.numel(), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t from = task % chunks * kChunk;
      kernels::noise_fill_cpu(fill, task / chunks, from, std::min(fill.elements, from + kChunk));
    }
  });
}

using PerturbOp = void(at::TensorList, at::IntArrayRef, c10::List<std::string>, c10::SymInt, c10::SymInt, c10::SymInt,
                       bool, double, int64_t, std::string_view);

}  // namespace

void eggroll_perturb_(at::TensorList tensors, at::IntArrayRef ordinals, const std::vector<std::string>& kinds,
                      const EggrollNoise& noise) {
  static const auto op = eggroll_operator<PerturbOp>("torch_ext::eggroll_perturb_");
  op.call(tensors, ordinals, c10::List<std::string>(kinds), noise.seed, noise.epoch, noise.member_begin,
          noise.antithetic, noise.sigma, noise.rank, noise.law);
}

void seeded_noise_add_(at::TensorList tensors, at::ArrayRef<double> scales, int64_t seed, at::IntArrayRef ordinals,
                       int64_t stream, int64_t epoch, std::string_view law) {
  static const auto op = eggroll_operator<decltype(seeded_impl)>("torch_ext::seeded_noise_add_");
  op.call(tensors, scales, seed, ordinals, stream, epoch, law);
}

void eggroll_noise_(const at::Tensor& out, int64_t seed, int64_t ordinal, int64_t tag, int64_t pair_begin,
                    int64_t epoch, std::string_view law, int64_t row_begin) {
  static const auto op = eggroll_operator<decltype(noise_impl)>("torch_ext::eggroll_noise_");
  op.call(out, seed, ordinal, tag, pair_begin, epoch, law, row_begin);
}

at::Tensor eggroll_noise(int64_t rows, int64_t rank, int64_t seed, int64_t ordinal, int64_t tag, int64_t pair_begin,
                         int64_t pair_end, int64_t epoch, std::string_view law, at::TensorOptions options) {
  TORCH_CHECK_VALUE(rows >= 0 && rank >= 0 && pair_end >= pair_begin, "eggroll_noise: rows = ", rows, ", rank = ", rank,
                    " and pairs [", pair_begin, ", ", pair_end, ") must not be negative");
  at::Tensor out = at::empty({pair_end - pair_begin, rows, rank}, options);
  eggroll_noise_(out, seed, ordinal, tag, pair_begin, epoch, law);
  return out;
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "eggroll_perturb_(Tensor(a!)[] tensors, int[] ordinals, str[] kinds, *, SymInt seed, SymInt epoch, "
      "SymInt member_begin, bool antithetic, float sigma, int rank, str law) -> ()");
  m.def(
      "seeded_noise_add_(Tensor(a!)[] tensors, float[] scales, int seed, int[] ordinals, int stream, int epoch=0, "
      "str law='gaussian') -> ()");
  m.def(
      "eggroll_noise_(Tensor(a!) out, int seed, int ordinal, int tag, int pair_begin, int epoch=0, "
      "str law='gaussian', int row_begin=0) -> ()");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("eggroll_perturb_", perturb_impl);
  m.impl("seeded_noise_add_", seeded_impl);
  m.impl("eggroll_noise_", noise_impl);
}
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("eggroll_perturb_", perturb_impl);
  m.impl("seeded_noise_add_", seeded_impl);
  m.impl("eggroll_noise_", noise_impl);
}
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("eggroll_perturb_", perturb_meta);
  m.impl("seeded_noise_add_", seeded_meta);
  m.impl("eggroll_noise_", noise_meta);
}
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("eggroll_perturb_", core::not_differentiable());
  m.impl("seeded_noise_add_", core::not_differentiable());
  m.impl("eggroll_noise_", core::not_differentiable());
}
TORCH_LIBRARY_IMPL(torch_ext, ADInplaceOrView, m) {
  m.impl("eggroll_perturb_", core::mutating());
  m.impl("seeded_noise_add_", core::mutating());
  m.impl("eggroll_noise_", core::mutating());
}

}  // namespace torch_ext::ops

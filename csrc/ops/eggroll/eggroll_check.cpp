#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>

#include <cmath>

#include "core/check.h"
#include "ops/eggroll/eggroll_op.h"

namespace torch_ext::ops {
namespace {

constexpr int64_t kWord = int64_t{1} << 32;

}  // namespace

core::NoiseLaw noise_law(const char* who, std::string_view name) {
  if (name == "gaussian") return core::NoiseLaw::kGaussian;
  if (name == "binomial16") return core::NoiseLaw::kBinomial16;
  if (name == "binomial64") return core::NoiseLaw::kBinomial64;
  TORCH_CHECK_VALUE(name == "rademacher", who,
                    ": law must be 'gaussian', 'binomial16', 'binomial64' or 'rademacher', got '", name, "'");
  return core::NoiseLaw::kRademacher;
}

void check_ordinal(const char* who, const char* what, int64_t ordinal) {
  TORCH_CHECK_VALUE(ordinal >= -1 && ordinal < kWord >> 8, who, ": ", what,
                    " must be in [0, 2^24), or -1 for a parameter that is not perturbed; got ", ordinal);
}

bool is_vector(const char* who, std::string_view kind) {
  TORCH_CHECK_VALUE(kind == "matrix" || kind == "embedding" || kind == "vector", who,
                    ": kind must be 'matrix', 'embedding' or 'vector', got '", kind, "'");
  return kind == "vector";
}

void check_counter(const char* who, const char* name, int64_t value) {
  TORCH_CHECK_VALUE(value >= 0 && value < kWord, who, ": ", name, " must be in [0, 2^32), got ", value);
}

void check_own_ordinal(const char* who, int64_t ordinal) {
  TORCH_CHECK_VALUE(ordinal >= 0 && ordinal < kWord >> 8, who, ": ordinal must be in [0, 2^24), got ", ordinal);
}

std::pair<int64_t, int64_t> as_matrix(at::IntArrayRef shape) {
  int64_t columns = 1;
  for (size_t d = 1; d < shape.size(); ++d) columns *= shape[d];
  return {shape.empty() ? 1 : shape[0], columns};
}

void add_noise(const kernels::NoiseSum& sum, const at::Tensor& like) {
  if (like.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    kernels::noise_sum_cuda(sum, core::current_stream(like.device()));
#endif
    return;
  }
  const int64_t chunks = (sum.numel + kernels::kNoiseSumChunk - 1) / kernels::kNoiseSumChunk;
  for_tasks(chunks, sum.numel * std::max<int64_t>(1, sum.count), [&](int64_t begin, int64_t end) {
    kernels::noise_sum_cpu(sum, sum.origin + begin * kernels::kNoiseSumChunk,
                           sum.origin + std::min(sum.numel, end * kernels::kNoiseSumChunk));
  });
}

void check_scale(const char* who, double sigma, int64_t rank, std::string_view law) {
  TORCH_CHECK_VALUE(sigma > 0 && std::isfinite(sigma), who, ": sigma must be positive and finite, got ", sigma);
  TORCH_CHECK_VALUE(rank >= 1, who, ": rank must be at least 1, got ", rank);
  noise_law(who, law);
}

void check_rank(const char* who, int64_t rank, const c10::SymInt& m, const c10::SymInt& n, bool cuda) {
  TORCH_CHECK_VALUE(rank >= 1 && m >= rank && n >= rank, who, ": rank must be in [1, ", m < n ? m : n,
                    "], the smaller side of a [", m, ", ", n, "] matrix; got ", rank);
  TORCH_CHECK_VALUE(!cuda || rank <= kernels::kEggrollCudaRank, who, ": on CUDA rank must be at most ",
                    kernels::kEggrollCudaRank, ", got ", rank);
}

void check_alike(const char* who, const char* name, const at::Tensor& other, const char* like_name,
                 const at::Tensor& like) {
  TORCH_CHECK_TYPE(other.scalar_type() == like.scalar_type(), who, ": ", name, " has dtype ", other.scalar_type(), ", ",
                   like_name, ' ', like.scalar_type());
  TORCH_CHECK_VALUE(other.device() == like.device(), who, ": ", name, " is on ", other.device(), ", ", like_name,
                    " on ", like.device());
}

void check_elements(const char* who, int64_t elements) {
  TORCH_CHECK_VALUE(elements <= 2 * kWord, who, ": one parameter's noise can have 2^33 elements, got ", elements);
}

void check_eggroll_noise(const char* who, const EggrollNoise& noise) {
  check_scale(who, noise.sigma, noise.rank, noise.law);
  TORCH_CHECK_VALUE(noise.epoch >= 0 && noise.epoch < kWord, who, ": epoch must be in [0, 2^32), got ", noise.epoch);
  TORCH_CHECK_VALUE(noise.member_begin >= 0 && noise.member_begin < kWord, who,
                    ": member_begin must be in [0, 2^32), got ", noise.member_begin);
}

kernels::EggrollMembers eggroll_members(const char* who, const EggrollNoise& noise, int64_t count) {
  check_eggroll_noise(who, noise);
  TORCH_CHECK_VALUE(noise.member_begin + count <= kWord, who, ": members must be below 2^32, got ",
                    noise.member_begin + count);
  return {noise.seed, noise.epoch, noise.member_begin, count, noise.antithetic};
}

}  // namespace torch_ext::ops

// What the operators of ops/eggroll share: their signatures, checks, and the bridge to the kernels.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch_ext/ops/eggroll.h>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/noise_kernel.h"
#include "ops/eggroll/eggroll_kernel.h"

namespace torch_ext::ops {

// Counters are symbolic, so that one compiled forward pass serves every epoch.
using EggrollLinearOp = at::Tensor(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                   c10::SymInt seed, c10::SymInt epoch, c10::SymInt member_begin, bool antithetic,
                                   double sigma, int64_t rank, std::string_view law, int64_t ordinal,
                                   int64_t bias_ordinal, bool transposed);
using EggrollEmbeddingOp = at::Tensor(const at::Tensor& ids, const at::Tensor& weight, c10::SymInt seed,
                                      c10::SymInt epoch, c10::SymInt member_begin, bool antithetic, double sigma,
                                      int64_t rank, std::string_view law, int64_t ordinal);
using EggrollVectorOp = at::Tensor(const at::Tensor& theta, c10::SymInt members, c10::SymInt seed, c10::SymInt epoch,
                                   c10::SymInt member_begin, bool antithetic, double sigma, int64_t rank,
                                   std::string_view law, int64_t ordinal);

// The operator's typed handle, for a function-local static.
template <typename Signature>
c10::TypedOperatorHandle<Signature> eggroll_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

core::NoiseLaw noise_law(const char* who, std::string_view name);
void check_ordinal(const char* who, const char* what, int64_t ordinal);
// Without the -1.
void check_own_ordinal(const char* who, int64_t ordinal);
void check_counter(const char* who, const char* name, int64_t value);
// Whether a kind is "vector"; ValueError for an unknown one.
bool is_vector(const char* who, std::string_view kind);
// A parameter as [rows, columns]; a scalar is one row.
std::pair<int64_t, int64_t> as_matrix(at::IntArrayRef shape);
// Runs a sum of noise on the device of `like`.
void add_noise(const kernels::NoiseSum& sum, const at::Tensor& like);
// Fields of the noise that are never symbolic.
void check_scale(const char* who, double sigma, int64_t rank, std::string_view law);
// rank in [1, min(m, n)], and what CUDA can hold.
void check_rank(const char* who, int64_t rank, const c10::SymInt& m, const c10::SymInt& n, bool cuda);
// `other` has the device and the dtype of `like`.
void check_alike(const char* who, const char* name, const at::Tensor& other, const char* like_name,
                 const at::Tensor& like);
// A stream's elements need fewer than 2^32 Philox blocks.
void check_elements(const char* who, int64_t elements);

// The first `count` members from noise.member_begin on; checks the counters.
kernels::EggrollMembers eggroll_members(const char* who, const EggrollNoise& noise, int64_t count);

// body(first, last) over [0, tasks), which together work on about `elements` numbers.
template <typename Body>
void for_tasks(int64_t tasks, int64_t elements, const Body& body) {
  constexpr int64_t kMinPerThread = 8192;  // below this a second thread costs more than it saves
  const int64_t grain = std::max<int64_t>(1, tasks * kMinPerThread / std::max<int64_t>(1, elements));
  at::parallel_for(0, tasks, grain, body);
}

}  // namespace torch_ext::ops

// EGGROLL (Sarkar et al., "Evolution Strategies at the Hyperscale", arXiv:2511.16652): layers whose weights every
// member of a population perturbs with low-rank noise of its own. No perturbation is ever stored or formed.
//
//   member i = 0, 1, ...:  pair p = i / 2, sign s = +1 for even i, -1 for odd i     (antithetic; else p = i, s = +1)
//   matrix   W [m, n]:     E_p = A_p B_p^T / sqrt(rank),  A_p [m, rank], B_p [n, rank]
//   vector   theta:        E_p = eps_p, of theta's shape
//   member i uses W + s sigma E_p
//
// Elements of A, B and eps are independent with mean 0 and variance 1, symmetric, and functions of (seed, epoch, p,
// ordinal, tag, element) alone: Philox4x32-10 with key = seed, counter = (block, p, ordinal << 8 | tag, epoch), tag 0
// for A, 1 for B, 2 for eps. Element q of a factor is row * rank + column. Laws, q-th element, 32-bit words w of a
// block, least significant bit first:
//
//   law           elements of a block   value
//   "gaussian"    4                     word q % 4: sign = bit 31, otherwise T[c] + f (T[c + 1] - T[c]) with c = bits
//                                       21-30, f = bits 0-20 / 2^21; T[c] = quantile of N(0, 1) at 1/2 + c / 2048
//   "binomial16"  8                     (ones among 16 bits - 8) / 2, low half of a word first
//   "binomial64"  2                     (ones among 64 bits - 32) / 4
//   "rademacher"  128                   +1 for a set bit, -1 for a clear one
//
// The same bits come out on CPU and CUDA, in the layers and in the update. With bfloat16 or float16 weights they are
// rounded to that type (nearest even) in both.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace torch_ext::ops {

// Which noise a group of members sees. `member_begin` is the number of the first one: row i of a layer's input belongs
// to member member_begin + i. Ranges, checked by every function: seed any 64 bits; epoch, pair in [0, 2^32);
// sigma > 0 and finite; rank in [1, min(m, n)].
struct EggrollNoise {
  int64_t seed = 0;
  int64_t epoch = 0;
  int64_t member_begin = 0;
  bool antithetic = true;
  double sigma = 1e-2;
  int64_t rank = 1;
  std::string law = "gaussian";
};

// In all functions `ordinal` is the running number of the parameter, in [0, 2^24): it keeps the noise of parameters
// apart. -1: this parameter is not perturbed.
// Errors, beside the ranges: ValueError for shapes that do not fit, devices and unknown words; TypeError for dtypes.

// y_i = x_i (W + s sigma E)^T + bias + s sigma eps, of x [members, ..., n], weight [m, n], bias [m] or undefined.
// transposed = true: y_i = x_i (W + s sigma E) with x [members, ..., m] and bias [n]. One product serves all members.
// Differentiable, any number of times, in x, weight and bias, for which the noise counts as a constant.
TORCH_EXT_API at::Tensor eggroll_linear(const at::Tensor& x, const at::Tensor& weight,
                                        const std::optional<at::Tensor>& bias, const EggrollNoise& noise,
                                        int64_t ordinal, int64_t bias_ordinal = -1, bool transposed = false);

// Rows weight[id] + s sigma E[id] of weight [entries, n] for ids [members, ...] (int64 or int32) -> [members, ..., n].
// An id outside [0, entries) is an IndexError on the CPU and traps on CUDA, as in torch. Differentiable in weight.
TORCH_EXT_API at::Tensor eggroll_embedding(const at::Tensor& ids, const at::Tensor& weight, const EggrollNoise& noise,
                                           int64_t ordinal);

// theta + s sigma eps for `members` members: [members, *theta.shape]. Differentiable in theta.
TORCH_EXT_API at::Tensor eggroll_vector(const at::Tensor& theta, int64_t members, const EggrollNoise& noise,
                                        int64_t ordinal);

// Convolution of x [members, channels, height, width] or [members, batch, channels, height, width] with weight [out,
// channels, kh, kw], which counts as the matrix [out, channels kh kw] of the unfolded input; `padding` zeros on both
// sides. -> [members, (batch,) out, height', width']. Differentiable as eggroll_linear. Beside its result it allocates
// the unfolded input of a bounded number of members at a time.
TORCH_EXT_API at::Tensor eggroll_conv2d(const at::Tensor& x, const at::Tensor& weight,
                                        const std::optional<at::Tensor>& bias, const EggrollNoise& noise,
                                        int64_t ordinal, int64_t bias_ordinal = -1, at::IntArrayRef stride = {1, 1},
                                        at::IntArrayRef padding = {0, 0}, at::IntArrayRef dilation = {1, 1});

// What an update needs beside the coefficients.
struct EggrollUpdateOptions {
  std::string kind = "matrix";  // "matrix" and "embedding" (the same), or "vector"
  int64_t seed = 0;
  int64_t ordinal = 0;
  int64_t epoch = 0;
  int64_t pair_begin = 0;  // coeff[k] belongs to pair pair_begin + k
  int64_t rank = 1;
  std::string law = "gaussian";
  double scale = 1;                     // multiplies the sum, once, at the end
  at::ScalarType dtype = at::kFloat;    // of the weights: noise is rounded to it; S has its arithmetic type
  int64_t row_begin = 0, row_end = -1;  // rows of the first dimension that are computed; -1: to the last
  int64_t chunk_pairs = 0;              // pairs whose factors exist at a time; 0: as many as fit 8 MiB
};

// S = scale sum_k coeff[k] E_{pair_begin + k} of a parameter of `shape`, rows [row_begin, row_end): float32, or float64
// for dtype float64, on coeff's device. A matrix of more than two dimensions counts as [shape[0], rest]. `coeff` is
// float32 or float64 [pairs]: s cancels when it is the difference of the two members' weights. Sums are float32
// (float64); they are exact, so equal for every chunk, thread count and device, when coefficients are small integers
// and the law is not gaussian. Not differentiable.
TORCH_EXT_API at::Tensor eggroll_update(const at::Tensor& coeff, at::IntArrayRef shape,
                                        const EggrollUpdateOptions& options);

// tensors[i] += s sigma E_i in place, rounded once to the tensor's type, for the single member noise.member_begin.
// kinds[i]: "matrix", "embedding" or "vector"; ordinals[i] = -1 leaves the tensor as it is. Any layout and device.
// Every element is theta + (c A_j0) B_k0 + (c A_j1) B_k1 + ..., c = s sigma / sqrt(rank), added from the left in the
// arithmetic type: the same bits on CPU and CUDA, and the rows that eggroll_embedding returns.
TORCH_EXT_API void eggroll_perturb_(at::TensorList tensors, at::IntArrayRef ordinals,
                                    const std::vector<std::string>& kinds, const EggrollNoise& noise);

// tensors[i] += scales[i] eps_i in place with eps_i (tag 2) of pair `stream`: seed replay without storage.
TORCH_EXT_API void seeded_noise_add_(at::TensorList tensors, at::ArrayRef<double> scales, int64_t seed,
                                     at::IntArrayRef ordinals, int64_t stream, int64_t epoch = 0,
                                     std::string_view law = "gaussian");

// The noise itself: fills `out` [pairs, rows, rank] (contiguous) with rows row_begin, row_begin + 1, ... of pairs
// pair_begin, pair_begin + 1, ...; tag 0 A, 1 B, 2 eps. out: float32, float64, bfloat16, float16, or int8 for the laws
// whose values are integers after scaling: ones - 8, ones - 32, +-1.
TORCH_EXT_API void eggroll_noise_(const at::Tensor& out, int64_t seed, int64_t ordinal, int64_t tag, int64_t pair_begin,
                                  int64_t epoch = 0, std::string_view law = "gaussian", int64_t row_begin = 0);
TORCH_EXT_API at::Tensor eggroll_noise(int64_t rows, int64_t rank, int64_t seed, int64_t ordinal, int64_t tag,
                                       int64_t pair_begin, int64_t pair_end, int64_t epoch = 0,
                                       std::string_view law = "gaussian", at::TensorOptions options = at::kFloat);

// The checks of the fields of EggrollNoise alone, for who keeps one: ValueError naming the field.
TORCH_EXT_API void check_eggroll_noise(const char* who, const EggrollNoise& noise);

}  // namespace torch_ext::ops

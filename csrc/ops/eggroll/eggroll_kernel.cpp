#include "ops/eggroll/eggroll_kernel.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/block_reduce.h"
#include "core/dtype_dispatch.h"
#include "core/noise_kernel.h"
#include "core/noise_words_kernel.h"

namespace torch_ext::kernels {
namespace {

using core::opmath_t;
using core::PhiloxTag;

constexpr int64_t kStretch = 256;  // columns of a row that stay in registers and L1

// x . b in the shape of core/block_reduce.h, in the arithmetic type.
template <typename S>
TX_CLONES opmath_t<S> dot(const S* __restrict x, const opmath_t<S>* __restrict b, int64_t size) {
  opmath_t<S> lane[core::kLanes] = {};
  int64_t i = 0;
  for (; i + core::kLanes <= size; i += core::kLanes) {
    for (int64_t l = 0; l < core::kLanes; ++l) lane[l] += core::load(x[i + l]) * b[i + l];
  }
  for (int64_t l = 0; i + l < size; ++l) lane[l] += core::load(x[i + l]) * b[i + l];
  return core::fold_lanes(lane);
}

// y = (base + eps_weight * eps) + weight * factor: the whole row of a layer of rank 1 in one pass.
template <typename S, typename Base, bool kEps>
TX_CLONES void add_rank_one(const Base* base, const opmath_t<S>* __restrict eps, opmath_t<S> eps_weight,
                            const opmath_t<S>* __restrict factor, opmath_t<S> weight, int64_t size, S* y) {
  for (int64_t j = 0; j < size; ++j) {
    opmath_t<S> value = core::load(base[j]);
    if (kEps) value = perturbed(value, eps_weight, eps[j]);
    core::store(y[j], perturbed(value, weight, factor[j]));
  }
}

// The same with any number of terms, weight[k] * factor[k * stride + j].
template <typename S, typename Base, bool kEps>
TX_CLONES void add_terms(const Base* base, const opmath_t<S>* __restrict eps, opmath_t<S> eps_weight,
                         const opmath_t<S>* __restrict factor, int64_t stride, const opmath_t<S>* __restrict weight,
                         int64_t terms, int64_t size, S* y) {
  for (int64_t at = 0; at < size; at += kStretch) {
    opmath_t<S> value[kStretch];
    const int64_t count = std::min(kStretch, size - at);
    for (int64_t j = 0; j < count; ++j) {
      value[j] = core::load(base[at + j]);
      if (kEps) value[j] = perturbed(value[j], eps_weight, eps[at + j]);
    }
    for (int64_t k = 0; k < terms; ++k) {
      const opmath_t<S>* __restrict column = factor + k * stride + at;
      for (int64_t j = 0; j < count; ++j) value[j] = perturbed(value[j], weight[k], column[j]);
    }
    for (int64_t j = 0; j < count; ++j) core::store(y[at + j], value[j]);
  }
}

template <typename S, typename Base>
void write_row(const Base* base, const opmath_t<S>* eps, opmath_t<S> eps_weight, const opmath_t<S>* factor,
               const opmath_t<S>* weight, int64_t terms, int64_t size, S* y) {
  if (terms == 1) {
    auto* body = eps == nullptr ? add_rank_one<S, Base, false> : add_rank_one<S, Base, true>;
    body(base, eps, eps_weight, factor, weight[0], size, y);
  } else {
    auto* body = eps == nullptr ? add_terms<S, Base, false> : add_terms<S, Base, true>;
    body(base, eps, eps_weight, factor, size, weight, terms, size, y);
  }
}

// Asks for rows of x while their noise is made. A row is often a page of its own, and the hardware's own prefetching
// ends with the page.
template <typename S>
void prefetch(const S* rows, int64_t size) {
  constexpr int64_t kLine = 64, kMost = 16384;  // bytes
  const auto* at = reinterpret_cast<const char*>(rows);
  const int64_t bytes = std::min<int64_t>(kMost, size * static_cast<int64_t>(sizeof(S)));
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(at + i, 0, 2);
}

template <typename T>
T factor_scale(double sigma, int64_t rank) {
  return static_cast<T>(sigma / std::sqrt(static_cast<double>(rank)));
}

template <typename S>
void layer(const EggrollLayer& a, core::DType type, int64_t begin, int64_t end) {
  using T = opmath_t<S>;
  const bool low_rank = a.ordinal >= 0, noisy_bias = a.bias_ordinal >= 0;
  const int64_t terms = low_rank ? a.rank : 0;
  std::vector<T> in(static_cast<size_t>(terms * a.in)), out(static_cast<size_t>(terms * a.out));
  std::vector<T> bias(static_cast<size_t>(a.out)), eps(static_cast<size_t>(noisy_bias ? a.out : 0));
  std::vector<T> weight(static_cast<size_t>(terms));
  if (a.bias != nullptr) {
    const auto* from = static_cast<const S*>(a.bias);
    std::transform(from, from + a.out, bias.begin(), [](S stored) { return core::load(stored); });
  }
  const T scale = factor_scale<T>(a.sigma, a.rank);
  const auto* x = static_cast<const S*>(a.x);
  auto* y = static_cast<S*>(a.y);
  int64_t made = -1;  // pair whose noise the buffers hold
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = a.members.first_pair() + task / a.blocks(), row_begin = task % a.blocks() * kEggrollRows;
    const int64_t row_end = std::min(a.rows, row_begin + kEggrollRows);
    if (low_rank) {
      const int64_t first = a.members.first(pair) * a.rows + row_begin;
      prefetch(x + first * a.in, (a.members.last(pair) * a.rows - first) * a.in);
    }
    if (pair != made) {
      const auto make = [&](int64_t ordinal, PhiloxTag tag, int64_t rows, int64_t rank, std::vector<T>& to) {
        noise_factor_cpu({a.law, type, a.members.stream(pair, ordinal, tag), 0, rows, rank}, to.data(), rows, 1);
      };
      if (low_rank) make(a.ordinal, a.in_tag, a.in, a.rank, in);
      if (low_rank) make(a.ordinal, a.out_tag, a.out, a.rank, out);
      if (noisy_bias) make(a.bias_ordinal, PhiloxTag::kEsVector, a.out, 1, eps);
      made = pair;
    }
    for (int64_t i = a.members.first(pair); i < a.members.last(pair); ++i) {
      const T sign = static_cast<T>(a.members.sign(i));
      for (int64_t row = i * a.rows + row_begin; row < i * a.rows + row_end; ++row) {
        for (int64_t k = 0; k < terms; ++k) {
          weight[static_cast<size_t>(k)] = sign * scale * dot(x + row * a.in, in.data() + k * a.in, a.in);
        }
        write_row<S, T>(bias.data(), noisy_bias ? eps.data() : nullptr, sign * static_cast<T>(a.sigma), out.data(),
                        weight.data(), terms, a.out, y + row * a.out);
      }
    }
  }
}

template <typename S>
void rows_of(const EggrollRowsOf& a, core::DType type, int64_t begin, int64_t end) {
  using T = opmath_t<S>;
  std::vector<T> b(static_cast<size_t>(a.rank * a.n)), weight(static_cast<size_t>(a.rank));
  const T scale = factor_scale<T>(a.sigma, a.rank);
  const auto* from = static_cast<const S*>(a.weight);
  auto* out = static_cast<S*>(a.out);
  int64_t made = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = a.members.first_pair() + task / a.blocks(), row_begin = task % a.blocks() * kEggrollRows;
    const int64_t row_end = std::min(a.rows, row_begin + kEggrollRows);
    const core::PhiloxStream stream = a.members.stream(pair, a.ordinal, PhiloxTag::kEsFactorA);
    if (pair != made) {
      noise_factor_cpu({a.law, type, a.members.stream(pair, a.ordinal, PhiloxTag::kEsFactorB), 0, a.n, a.rank},
                       b.data(), a.n, 1);
      made = pair;
    }
    for (int64_t i = a.members.first(pair); i < a.members.last(pair); ++i) {
      const T sign = static_cast<T>(a.members.sign(i));
      for (int64_t row = row_begin; row < row_end; ++row) {
        const int64_t at = i * a.rows + row, id = a.ids == nullptr ? row : a.ids[at];
        core::dispatch_noise(a.law, [&](auto law) {
          for (int64_t k = 0; k < a.rank; ++k) {
            const float z = core::noise_at<law()>(stream, id * a.rank + k, gaussian_cells_cpu());
            weight[static_cast<size_t>(k)] = sign * scale * core::noise_as<S>(z);
          }
        });
        write_row<S, S>(from + id * a.n, nullptr, T(0), b.data(), weight.data(), a.rank, a.n, out + at * a.n);
      }
    }
  }
}

template <typename S>
void vector(const EggrollVector& a, core::DType type, int64_t begin, int64_t end) {
  using T = opmath_t<S>;
  std::vector<T> eps(static_cast<size_t>(std::min(a.numel, kEggrollColumns)));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = a.members.first_pair() + task / a.blocks(), from = task % a.blocks() * kEggrollColumns;
    const int64_t count = std::min(kEggrollColumns, a.numel - from);
    noise_factor_cpu({a.law, type, a.members.stream(pair, a.ordinal, PhiloxTag::kEsVector), from, count, 1}, eps.data(),
                     count, 1);
    for (int64_t i = a.members.first(pair); i < a.members.last(pair); ++i) {
      const T weight = static_cast<T>(a.members.sign(i)) * static_cast<T>(a.sigma);
      write_row<S, S>(static_cast<const S*>(a.theta) + from, nullptr, T(0), eps.data(), &weight, 1, count,
                      static_cast<S*>(a.out) + i * a.numel + from);
    }
  }
}

}  // namespace

void eggroll_layer_cpu(const EggrollLayer& a, core::DType type, int64_t begin, int64_t end) {
  core::dispatch_dtype(type, [&](auto storage) { layer<decltype(storage)>(a, type, begin, end); });
}

void eggroll_rows_cpu(const EggrollRowsOf& a, core::DType type, int64_t begin, int64_t end) {
  core::dispatch_dtype(type, [&](auto storage) { rows_of<decltype(storage)>(a, type, begin, end); });
}

void eggroll_vector_cpu(const EggrollVector& a, core::DType type, int64_t begin, int64_t end) {
  core::dispatch_dtype(type, [&](auto storage) { vector<decltype(storage)>(a, type, begin, end); });
}

void eggroll_factors_cpu(const EggrollFactors& a, core::DType type, int64_t begin, int64_t end) {
  core::dispatch_dtype(type, [&](auto storage) {
    using T = opmath_t<decltype(storage)>;
    for (int64_t k = begin; k < end; ++k) {
      core::PhiloxStream stream = a.stream;
      stream.stream += static_cast<uint32_t>(k);
      const T scale = a.coeff == nullptr ? T(1) : static_cast<const T*>(a.coeff)[k];
      noise_factor_cpu({a.law, type, stream, a.row_begin, a.rows, a.rank}, static_cast<T*>(a.out) + k * a.rank * a.rows,
                       a.rows, static_cast<double>(scale));
    }
  });
}

}  // namespace torch_ext::kernels

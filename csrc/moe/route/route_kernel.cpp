#include "moe/route/route_kernel.h"

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "core/dtype_dispatch.h"

namespace torch_ext::kernels {
namespace {

constexpr int64_t kLane =
    32;  // rows are padded to it; also the shape of a softmax's sum and of the search for a maximum
constexpr int64_t kRows = 4;  // tokens that are selected side by side: one alone would wait for its own maxima

int64_t padded(int64_t experts) { return (experts + kLane - 1) / kLane * kLane; }

template <typename S, typename T>
TX_CLONES void load_row(const S* __restrict from, int64_t count, T* __restrict to) {
  for (int64_t e = 0; e < count; ++e) to[e] = core::load(from[e]);
}

// --- scores of a padded row whose padding is -infinity --------------------------------------------------------------
template <typename T, RouteScore F>
TX_CLONES void score_alone(const T* __restrict x, int64_t width, T* __restrict s) {
  for (int64_t e = 0; e < width; ++e) s[e] = route_score<F>(x[e]);
}

template <typename T>
TX_CLONES T row_maximum(const T* __restrict x, int64_t width) {
  T lane[kLane];  // a NaN is no maximum; it meets its own element below
  for (int64_t l = 0; l < kLane; ++l) lane[l] = -HUGE_VALF;
  for (int64_t e = 0; e < width; e += kLane) {
    for (int64_t l = 0; l < kLane; ++l) lane[l] = x[e + l] > lane[l] ? x[e + l] : lane[l];
  }
  T max = -HUGE_VALF;
  for (int64_t l = 0; l < kLane; ++l) max = lane[l] > max ? lane[l] : max;
  return max;
}

// Writes exp(x - max), returns their sum: 32 lanes, folded as a tree.
template <typename T>
TX_CLONES T exponentials(const T* __restrict x, int64_t width, T max, T* __restrict s) {
  T lane[kLane] = {};
  for (int64_t e = 0; e < width; e += kLane) {
    for (int64_t l = 0; l < kLane; ++l) {
      s[e + l] = route_exp(x[e + l] - max);
      lane[l] += s[e + l];
    }
  }
  for (int64_t l = 0; l < 16; ++l) lane[l] += lane[l + 16];
  for (int64_t l = 0; l < 8; ++l) lane[l] += lane[l + 8];
  for (int64_t l = 0; l < 4; ++l) lane[l] += lane[l + 4];
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

template <typename T>
TX_CLONES void divide(T* __restrict s, int64_t width, T by) {
  for (int64_t e = 0; e < width; ++e) s[e] = s[e] / by;
}

template <typename T, RouteScore F>
void score_row(const T* x, int64_t width, T* s, T* norm) {
  if constexpr (F == RouteScore::kSoftmax) {
    norm[0] = row_maximum(x, width);
    norm[1] = exponentials(x, width, norm[0], s);
    divide(s, width, norm[1]);
  } else {
    score_alone<T, F>(x, width, s);
  }
}

// --- selection ------------------------------------------------------------------------------------------------------
constexpr int64_t kAhead = 4;  // rows whose logits are fetched while one is worked on

template <typename S>
void fetch(const S* row, int64_t count) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(S));
  for (int64_t e = 0; e < count; e += kLine) __builtin_prefetch(row + e);
}

// Codes of the keys; true if a score is NaN.
template <typename T>
TX_CLONES bool code_row(const T* __restrict s, const T* __restrict bias, int64_t count,
                        route_code_t<T>* __restrict codes) {
  int bad = 0;
  for (int64_t e = 0; e < count; ++e) {
    codes[e] = route_code(s[e] + bias[e]);
    bad |= s[e] != s[e];
  }
  return bad != 0;
}

template <typename Code>
TX_CLONES void block_maxima(const Code* __restrict codes, int64_t blocks, Code* __restrict top) {
  for (int64_t b = 0; b < blocks; ++b) {
    Code max = codes[b * kLane];
    for (int64_t l = 1; l < kLane; ++l) max = codes[b * kLane + l] > max ? codes[b * kLane + l] : max;
    top[b] = max;
  }
}

// ids[j][0 ... rounds - 1]: the largest codes of kRows rows, each taken out as it is found. The maxima of the blocks of
// 32 lead to it: a round reads one block instead of the row.
template <typename Code>
TX_CLONES void select(Code* __restrict codes, Code* __restrict top, int64_t blocks, int64_t rounds, Code out,
                      int32_t* __restrict ids) {
  for (int64_t k = 0; k < rounds; ++k) {
    for (int64_t j = 0; j < kRows; ++j) {
      Code* __restrict row_top = top + j * blocks;
      int64_t block = 0;
      Code max = row_top[0];
      for (int64_t b = 1; b < blocks; ++b) {  // the first of equal ones
        block = row_top[b] > max ? b : block;
        max = row_top[b] > max ? row_top[b] : max;
      }
      Code* __restrict at = codes + (j * blocks + block) * kLane;
      Code lane = static_cast<Code>(kLane);
      for (int64_t l = 0; l < kLane; ++l) {
        const Code candidate = at[l] == max ? static_cast<Code>(l) : static_cast<Code>(kLane);
        lane = candidate < lane ? candidate : lane;
      }
      Code next = out;
      for (int64_t l = 0; l < kLane; ++l) {
        const Code left = static_cast<Code>(l) == lane ? out : at[l];
        at[l] = left;
        next = left > next ? left : next;
      }
      row_top[block] = next;
      ids[j * rounds + k] = static_cast<int32_t>(block * kLane + lane);
    }
  }
}

// Keeps the experts of the top_groups groups with the largest sum of their m largest keys, added from the largest on.
template <typename T>
void mask_groups(const RouteProblem& p, route_code_t<T>* codes, std::vector<route_code_t<T>>& largest,
                 std::vector<route_code_t<T>>& sums) {
  using Code = route_code_t<T>;
  const int64_t size = p.experts / p.num_groups, m = p.group_score_k;
  for (int64_t g = 0; g < p.num_groups; ++g) {
    Code* best = largest.data();
    std::fill_n(best, m, RouteCode<T>::kOut);
    for (int64_t e = g * size; e < (g + 1) * size; ++e) {
      if (codes[e] <= best[m - 1]) continue;
      int64_t at = m - 1;
      for (; at > 0 && best[at - 1] < codes[e]; --at) best[at] = best[at - 1];
      best[at] = codes[e];
    }
    T sum = 0;
    for (int64_t i = 0; i < m; ++i) sum += route_key(best[i]);
    sums[static_cast<size_t>(g)] = route_code(sum);
  }
  std::vector<bool> keep(static_cast<size_t>(p.num_groups));
  for (int64_t n = 0; n < p.top_groups; ++n) {
    const auto best = std::max_element(sums.begin(), sums.end());
    *best = RouteCode<T>::kOut;
    keep[static_cast<size_t>(best - sums.begin())] = true;
  }
  for (int64_t e = 0; e < p.experts; ++e) {
    codes[e] = keep[static_cast<size_t>(e / size)] ? codes[e] : RouteCode<T>::kOut;
  }
}

template <typename T>
RouteRow<T> row_of(RouteScore score, RouteGate gate, double scale, bool zero_nan, int64_t k) {
  return {score, gate, static_cast<T>(scale), zero_nan, k};
}

// Memory of one range of tokens, in whole cache lines. Arrays that are walked together stand apart by no multiple of
// 4096 bytes, at which a load would wait for a store to another of them.
class Scratch {
 public:
  template <typename V>
  static int64_t lines(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(V)) + kLine - 1) / kLine + kApart;
  }
  explicit Scratch(int64_t lines) : memory_(static_cast<size_t>(lines)) {}
  template <typename V>
  V* take(int64_t count, V value) {
    V* from = reinterpret_cast<V*>(memory_.data() + used_);
    used_ += lines<V>(count);
    std::fill_n(from, count, value);
    return from;
  }

 private:
  static constexpr int64_t kLine = 64, kApart = 20;
  struct alignas(kLine) Line {
    unsigned char bytes[kLine];
  };
  std::vector<Line> memory_;
  int64_t used_ = 0;
};

// --- one range of tokens --------------------------------------------------------------------------------------------
template <typename S, RouteScore F>
class Forward {
 public:
  using T = core::opmath_t<S>;
  using Code = route_code_t<T>;

  Forward(const RouteProblem& problem, int32_t* counts)
      : p_(problem),
        row_(row_of<T>(p_.score, p_.gate, p_.scale, p_.zero_nan, p_.top_k)),
        counts_(counts),
        width_(padded(p_.experts)),
        rounds_(p_.top_k + (p_.cutoff != nullptr ? 1 : 0)),
        scratch_(4 * Scratch::lines<T>(kRows * width_) + Scratch::lines<T>(width_)),
        x_(scratch_.take<T>(kRows * width_, -HUGE_VALF)),
        s_(scratch_.take<T>(kRows * width_, 0)),
        bias_(scratch_.take<T>(width_, 0)),
        codes_(scratch_.take<Code>(kRows * width_, RouteCode<T>::kOut)),
        top_(scratch_.take<Code>(kRows * width_ / kLane, RouteCode<T>::kOut)),
        ids_(size(kRows * rounds_)),
        largest_(size(p_.group_score_k)),
        sums_(size(p_.num_groups)) {
    if (p_.bias != nullptr) std::copy_n(p_.bias, p_.experts, bias_);
  }

  void run(int64_t begin, int64_t end) {
    int64_t rows[kRows];
    int64_t used = 0;
    for (int64_t t = begin; t < end; ++t) {
      if (p_.valid != nullptr && !p_.valid[t]) {
        skip(t);
        continue;
      }
      rows[used] = t;
      prepare(t, used++);
      if (used == kRows) finish(rows, std::exchange(used, 0));
    }
    if (used > 0) finish(rows, used);
  }

 private:
  static size_t size(int64_t n) { return static_cast<size_t>(n); }
  template <typename V>
  static auto out(void* to) {
    return static_cast<V*>(to);
  }

  void skip(int64_t t) {
    for (int64_t k = t * p_.top_k; k < (t + 1) * p_.top_k; ++k) {
      p_.ids[k] = -1;
      out<T>(p_.gates)[k] = out<T>(p_.a)[k] = 0;
    }
    if (p_.cutoff != nullptr) out<T>(p_.cutoff)[t] = -HUGE_VALF;
    if (p_.norm != nullptr) out<T>(p_.norm)[2 * t] = 0, out<T>(p_.norm)[2 * t + 1] = 1;
  }

  void prepare(int64_t t, int64_t j) {
    T *x = x_ + j * width_, *s = s_ + j * width_;
    Code* codes = codes_ + j * width_;
    const S* logits = static_cast<const S*>(p_.logits) + t * p_.experts;
    if (t + kAhead < p_.tokens) fetch(logits + kAhead * p_.experts, p_.experts);
    load_row(logits, p_.experts, x);
    T norm[2] = {0, 1};
    score_row<T, F>(x, width_, s, norm);
    if (p_.norm != nullptr) std::copy_n(norm, 2, out<T>(p_.norm) + 2 * t);
    nan_[j] = code_row(s, bias_, p_.experts, codes);
    if (p_.num_groups > 1) mask_groups<T>(p_, codes, largest_, sums_);
    block_maxima(codes, width_ / kLane, top_ + j * (width_ / kLane));
  }

  void finish(const int64_t* rows, int64_t used) {
    select(codes_, top_, width_ / kLane, rounds_, RouteCode<T>::kOut, ids_.data());
    for (int64_t j = 0; j < used; ++j) {
      const int64_t to = rows[j] * p_.top_k;
      const int32_t* ids = ids_.data() + j * rounds_;
      const T* from = (p_.gate == RouteGate::kSoftmax ? x_ : s_) + j * width_;
      T* a = out<T>(p_.a) + to;
      for (int64_t k = 0; k < p_.top_k; ++k) {
        p_.ids[to + k] = ids[k];
        a[k] = from[ids[k]];
        ++counts_[ids[k]];
      }
      route_gates(row_, nan_[j], a, out<T>(p_.gates) + to);
      if (p_.cutoff == nullptr) continue;
      const int64_t last = ids[p_.top_k];
      out<T>(p_.cutoff)[rows[j]] = route_key(route_code(s_[j * width_ + last] + bias_[last]));
    }
  }

  const RouteProblem& p_;
  const RouteRow<T> row_;
  int32_t* counts_;
  int64_t width_, rounds_;
  Scratch scratch_;
  T *x_, *s_, *bias_;
  Code *codes_, *top_;
  std::vector<int32_t> ids_;
  std::vector<Code> largest_, sums_;
  bool nan_[kRows] = {};
};

template <typename T>
TX_CLONES void scale_row(const T* __restrict x, int64_t count, T max, T sum, T factor, T* __restrict out) {
  for (int64_t e = 0; e < count; ++e) out[e] = route_softmax(x[e], max, sum) * factor;
}

// Softmax without normalize: dl = s (g - sum g s), g = scale w + v at the selected experts, else 0.
template <typename S>
class DenseBackward {
 public:
  using T = core::opmath_t<S>;
  explicit DenseBackward(const RouteGradient& g)
      : g_(g), x_(static_cast<size_t>(g.experts)), out_(static_cast<size_t>(g.experts)) {}

  void run(int64_t t) {
    const int64_t at = t * g_.top_k;
    const auto* a = static_cast<const T*>(g_.a) + at;
    const auto* norm = static_cast<const T*>(g_.norm) + 2 * t;
    T mixed = 0;
    for (int64_t k = 0; k < g_.top_k; ++k) mixed += upstream(at + k) * a[k];
    load_row(static_cast<const S*>(g_.logits) + t * g_.experts, g_.experts, x_.data());
    scale_row(x_.data(), g_.experts, norm[0], norm[1], -mixed, out_.data());
    for (int64_t k = 0; k < g_.top_k; ++k) {
      const auto id = static_cast<size_t>(g_.ids[at + k]);
      out_[id] = route_softmax(x_[id], norm[0], norm[1]) * (upstream(at + k) - mixed);
    }
    if (g_.zero_nan && a[0] != a[0]) std::fill(out_.begin(), out_.end(), T(0));
    auto* to = static_cast<S*>(g_.grad_logits) + t * g_.experts;
    for (size_t e = 0; e < out_.size(); ++e) core::store(to[e], out_[e]);
  }

 private:
  T upstream(int64_t at) const {
    const T w = static_cast<T>(g_.scale) * static_cast<const T*>(g_.grad)[at];
    return g_.grad_a == nullptr ? w : w + static_cast<const T*>(g_.grad_a)[at];
  }
  const RouteGradient& g_;
  std::vector<T> x_, out_;
};

template <typename S>
void sparse_backward(const RouteGradient& g, int64_t begin, int64_t end) {
  using T = core::opmath_t<S>;
  const auto row = row_of<T>(g.score, g.gate, g.scale, g.zero_nan, g.top_k);
  std::vector<T> values(static_cast<size_t>(g.top_k));
  for (int64_t t = begin; t < end; ++t) {
    const int64_t at = t * g.top_k;
    S* to = static_cast<S*>(g.grad_logits) + t * g.experts;
    std::fill_n(reinterpret_cast<unsigned char*>(to), static_cast<size_t>(g.experts) * sizeof(S), 0);
    if (g.ids[at] < 0) continue;
    const T* v = g.grad_a == nullptr ? nullptr : static_cast<const T*>(g.grad_a) + at;
    route_gradient(row, static_cast<const T*>(g.grad) + at, v, static_cast<const T*>(g.a) + at, values.data());
    for (int64_t k = 0; k < g.top_k; ++k) core::store(to[g.ids[at + k]], values[static_cast<size_t>(k)]);
  }
}

template <typename S, RouteScore F>
void histogram(const RouteBins& b, int64_t begin, int64_t end, int32_t* counts) {
  using T = core::opmath_t<S>;
  const int64_t width = padded(b.experts);
  std::vector<T> x(static_cast<size_t>(width), -HUGE_VALF), s(static_cast<size_t>(width));
  const T low = b.bounds[0], per_unit = static_cast<T>(b.bins) / (static_cast<T>(b.bounds[1]) - low);
  for (int64_t t = begin; t < end; ++t) {
    if (b.valid != nullptr && !b.valid[t]) continue;
    T norm[2] = {0, 1};
    load_row(static_cast<const S*>(b.logits) + t * b.experts, b.experts, x.data());
    score_row<T, F>(x.data(), width, s.data(), norm);
    const T cutoff = static_cast<const T*>(b.cutoff)[t];
    for (int64_t e = 0; e < b.experts; ++e) {
      const int64_t bin = route_bin(cutoff, s[static_cast<size_t>(e)], low, per_unit, b.bins);
      if (bin >= 0) ++counts[e * b.bins + bin];
    }
  }
}

}  // namespace

void route_forward_cpu(const RouteProblem& problem, core::DType type, int64_t begin, int64_t end, int32_t* counts) {
  core::dispatch_dtype(type, [&](auto storage) {
    dispatch_route_score(problem.score, [&](auto score) {
      Forward<decltype(storage), decltype(score)::value>(problem, counts).run(begin, end);
    });
  });
}

void route_backward_cpu(const RouteGradient& gradient, core::DType type, int64_t begin, int64_t end) {
  core::dispatch_dtype(type, [&](auto storage) {
    using S = decltype(storage);
    if (gradient.logits == nullptr) return sparse_backward<S>(gradient, begin, end);
    DenseBackward<S> dense(gradient);
    for (int64_t t = begin; t < end; ++t) {
      if (gradient.ids[t * gradient.top_k] >= 0) {
        dense.run(t);
      } else {
        auto* to = static_cast<unsigned char*>(gradient.grad_logits);
        const auto row = static_cast<size_t>(gradient.experts) * sizeof(S);
        std::fill_n(to + static_cast<size_t>(t) * row, row, 0);
      }
    }
  });
}

void route_histogram_cpu(const RouteBins& bins, core::DType type, int64_t begin, int64_t end, int32_t* counts) {
  core::dispatch_dtype(type, [&](auto storage) {
    dispatch_route_score(bins.score, [&](auto score) {
      histogram<decltype(storage), decltype(score)::value>(bins, begin, end, counts);
    });
  });
}

void load_add_cpu(int64_t* total, const int32_t* counts, int64_t size) {
  for (int64_t i = 0; i < size; ++i) total[i] += counts[i];
}

}  // namespace torch_ext::kernels

// Routing of one token (arXiv:2408.15664): scores, the order of keys, gates and their derivatives, the same on host and
// device. Only + - * / and sqrt, so that ids are the same everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/dtype.h"
#include "core/macros.h"
#include "core/math.h"

namespace torch_ext::kernels {

enum class RouteScore : uint8_t { kSigmoid, kSoftmax, kSqrtSoftplus, kIdentity };
// How gates come from the selected: a itself, a / sum a, the softmax of the selected logits.
enum class RouteGate : uint8_t { kPlain, kNormalized, kSoftmax };

// Below it exp(x) counts as 0: the last normal number.
TX_HD float route_floor(float) { return -87.0f; }
TX_HD double route_floor(double) { return -708.0; }
template <typename T>
TX_HD T route_exp(T x) {  // x <= 0
  return core::exponential_below(x, route_floor(x));
}

// 1 / (1 + exp(-l)), with full relative precision for l << 0.
template <typename T>
TX_HD T route_sigmoid(T l) {
  const T e = route_exp(-core::absolute(l));
  return (l < 0 ? e : T(1)) / (T(1) + e);
}

TX_HD constexpr int route_log1p_terms(float) { return 15; }
TX_HD constexpr int route_log1p_terms(double) { return 33; }

// sqrt(log(1 + exp l)). log(1 + e) = 2 atanh(e / (2 + e)), whose argument is at most 1/3.
template <typename T>
TX_HD T route_sqrt_softplus(T l) {
  const T e = route_exp(-core::absolute(l));
  const T s = e / (T(2) + e), s2 = s * s;
  T series = 0;
  for (int k = route_log1p_terms(l); k >= 3; k -= 2) series = (series + T(1) / static_cast<T>(k)) * s2;
  return core::square_root((l > 0 ? l : T(0)) + (T(2) * s + T(2) * s * series));
}

// Scores of one expert alone. A softmax needs its row: exp(l - max) / sum, see route_softmax.
template <RouteScore F, typename T>
TX_HD T route_score(T l) {
  return F == RouteScore::kSigmoid ? route_sigmoid(l) : F == RouteScore::kSqrtSoftplus ? route_sqrt_softplus(l) : l;
}
template <typename T>
TX_HD T route_softmax(T l, T max, T sum) {
  return route_exp(l - max) / sum;
}

// d s / d l as a function of the score a. sqrtsoftplus: sigmoid(l) / (2 a) with sigmoid(l) = 1 - exp(-a^2), written so
// that a = 0 gives 0 and a small a keeps its precision.
template <typename T>
TX_HD T route_slope(RouteScore score, T a) {
  if (score == RouteScore::kSigmoid) return a * (T(1) - a);
  if (score == RouteScore::kIdentity) return T(1);
  const T x = a * a;
  T series = 1;  // (1 - exp(-x)) / x
  for (int k = 16; k >= 2; --k) series = T(1) - series * x / static_cast<T>(k);
  const T ratio = x < T(0.5) ? series : (T(1) - route_exp(-x)) / x;
  return T(0.5) * a * ratio;
}

// --- order of keys ---------------------------------------------------------------------------------------------------
// An integer that orders as the key does; NaN counts as minus infinity, -0 as 0. kRouteOut of it is below every key:
// experts that are taken already or outside the token's groups.
template <typename T>
struct RouteCode;
template <>
struct RouteCode<float> {
  using type = int32_t;
  static constexpr type kOut = INT32_MIN;
};
template <>
struct RouteCode<double> {
  using type = int64_t;
  static constexpr type kOut = INT64_MIN;
};
template <typename T>
using route_code_t = typename RouteCode<T>::type;

TX_HD int32_t route_code(float key) {
  key = key + 0.0f;
  key = key != key ? -HUGE_VALF : key;
  int32_t bits;
  memcpy(&bits, &key, sizeof(bits));
  return bits ^ ((bits >> 31) & INT32_MAX);
}
TX_HD int64_t route_code(double key) {
  key = key + 0.0;
  key = key != key ? -HUGE_VAL : key;
  int64_t bits;
  memcpy(&bits, &key, sizeof(bits));
  return bits ^ ((bits >> 63) & INT64_MAX);
}
TX_HD float route_key(int32_t code) {
  const int32_t bits = code ^ ((code >> 31) & INT32_MAX);
  float key;
  memcpy(&key, &bits, sizeof(key));
  return key;
}
TX_HD double route_key(int64_t code) {
  const int64_t bits = code ^ ((code >> 63) & INT64_MAX);
  double key;
  memcpy(&key, &bits, sizeof(key));
  return key;
}

template <typename T>
TX_HD bool route_is_finite(T x) {
  return x - x == 0;
}

// --- gates of one token ----------------------------------------------------------------------------------------------
constexpr double kRouteTiny = 1e-20;  // added to a sum of scores, so that scores that are all 0 give gates 0

template <typename T>
struct RouteRow {
  RouteScore score;
  RouteGate gate;
  T scale;
  bool zero_nan;  // a row with a NaN has gates 0 instead of NaN
  int64_t k;
};

// In: value[i] = score of the i-th selected expert, for kSoftmax its logit; nan: some score of the row is NaN. Out: a,
// gates.
template <typename T>
TX_HD void route_gates(const RouteRow<T>& row, bool nan, T* value, T* gates) {
  T sum = 0, max = -HUGE_VALF;
  bool bad = nan;
  if (row.gate == RouteGate::kSoftmax) {
    for (int64_t i = 0; i < row.k; ++i) max = value[i] > max ? value[i] : max;
    bad = bad || !route_is_finite(max);
    for (int64_t i = 0; i < row.k; ++i) {
      value[i] = route_exp(value[i] - max);
      sum += value[i];
    }
    for (int64_t i = 0; i < row.k; ++i) value[i] = value[i] / sum;
  } else {
    for (int64_t i = 0; i < row.k; ++i) {
      bad = bad || !route_is_finite(value[i]);
      sum += value[i];
    }
  }
  const T total = sum + static_cast<T>(kRouteTiny);
  for (int64_t i = 0; i < row.k; ++i) {
    const T gate = row.scale * (row.gate == RouteGate::kNormalized ? value[i] / total : value[i]);
    value[i] = bad ? static_cast<T>(NAN) : value[i];
    gates[i] = bad ? (row.zero_nan ? T(0) : static_cast<T>(NAN)) : gate;
  }
}

// Gradients of the K selected logits, from those of gates (w) and of a (v, may be null); softmax without normalize is
// dense and done elsewhere. a is NaN in bad rows.
template <typename T>
TX_HD void route_gradient(const RouteRow<T>& row, const T* w, const T* v, const T* a, T* grad) {
  T sum = 0, mixed = 0;
  for (int64_t i = 0; i < row.k; ++i) sum += a[i];
  if (sum != sum) {
    for (int64_t i = 0; i < row.k; ++i) grad[i] = row.zero_nan ? T(0) : static_cast<T>(NAN);
    return;
  }
  if (row.gate == RouteGate::kSoftmax) {
    for (int64_t i = 0; i < row.k; ++i) mixed += (row.scale * w[i] + (v != nullptr ? v[i] : T(0))) * a[i];
    for (int64_t i = 0; i < row.k; ++i) {
      grad[i] = a[i] * (row.scale * w[i] + (v != nullptr ? v[i] : T(0)) - mixed);
    }
    return;
  }
  const T total = sum + static_cast<T>(kRouteTiny);
  for (int64_t i = 0; i < row.k; ++i) mixed += w[i] * (a[i] / total);
  for (int64_t i = 0; i < row.k; ++i) {
    const T slope = route_slope(row.score, a[i]);
    // slope / total first: it is bounded where both vanish
    const T by_gate =
        row.gate == RouteGate::kNormalized ? row.scale * (w[i] - mixed) * (slope / total) : row.scale * w[i] * slope;
    grad[i] = by_gate + (v != nullptr ? v[i] * slope : T(0));
  }
}

// --- quantile rule ---------------------------------------------------------------------------------------------------
// Bin of cutoff - score among `bins` equal ones from `low`, per_unit of them a unit; -1 if it is NaN.
template <typename T>
TX_HD int64_t route_bin(T cutoff, T score, T low, T per_unit, int64_t bins) {
  const T at = (cutoff - score - low) * per_unit;
  if (at != at) return -1;
  return at < 0 ? 0 : at >= static_cast<T>(bins) ? bins - 1 : static_cast<int64_t>(at);
}

}  // namespace torch_ext::kernels

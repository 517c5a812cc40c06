// The m x m part on the CPU: K = m lambda I + G G^T is kept as its Cholesky factor, lower, column-major, by age. Rows
// leave in the order in which they came, so leaving removes the first row and column of K, and
//   L22 L22^T + l21 l21^T
// remains: an update by rotations, never a downdate. A row that comes appends one to the factor. Both take m^2 steps.
#include <algorithm>
#include <cmath>
#include <vector>

#include "curvature/fisher_window/fisher_window_kernel.h"

namespace torch_ext::kernels {
namespace {

constexpr int64_t kProbeEvery = 64;
constexpr int64_t kRefactorAfter = 16;  // times m

// --- one column ---

// Rotation of a column of L with x, and elimination of the right side b with the result.
TX_CLONES void rotate_and_eliminate(double* __restrict column, double* __restrict x, double* __restrict b, int64_t size,
                                    double c, double s, double solved) {
  for (int64_t i = 0; i < size; ++i) {
    const double old = column[i];
    const double now = c * old + s * x[i];
    column[i] = now;
    x[i] = c * x[i] - s * old;
    b[i] -= solved * now;
  }
}
TX_CLONES void eliminate(const double* __restrict column, double* __restrict b, int64_t size, double solved) {
  for (int64_t i = 0; i < size; ++i) b[i] -= solved * column[i];
}
TX_CLONES double product(const double* __restrict a, const double* __restrict b, int64_t size) {
  return core::sum_block(size, [=](int64_t i) { return a[i] * b[i]; });
}

// --- the factor ---

struct Factor {
  double* data;
  int64_t leading, size;
  double* column(int64_t k) const { return data + k * leading; }
  double& at(int64_t i, int64_t k) const { return data[k * leading + i]; }
};

Factor factor_of(const CommitTensors& t, const CommitArgs& a) {
  const int64_t offset = t.ring[kRingOffset];
  return {t.factor + offset * (a.leading + 1), a.leading, t.ring[kRingCount]};
}

// b <- L^-1 b.
void solve_lower(const Factor& l, double* b) {
  for (int64_t k = 0; k < l.size; ++k) {
    b[k] /= l.at(k, k);
    eliminate(l.column(k) + k + 1, b + k + 1, l.size - k - 1, b[k]);
  }
}
// b <- L^-T b.
void solve_upper(const Factor& l, double* b) {
  for (int64_t k = l.size - 1; k >= 0; --k) {
    const double above = product(l.column(k) + k + 1, b + k + 1, l.size - k - 1);
    b[k] = (b[k] - above) / l.at(k, k);
  }
}

// Takes the oldest row out of L (whose first column x is consumed) and replaces b by (new L)^-1 b on the way: one pass.
Factor drop_and_solve(const Factor& old, double* b) {
  const Factor l{old.data + old.leading + 1, old.leading, old.size - 1};
  double* x = old.data + 1;
  for (int64_t k = 0; k < l.size; ++k) {
    double& diagonal = l.at(k, k);
    const double r = core::square_root(diagonal * diagonal + x[k] * x[k]);
    const double c = diagonal / r, s = x[k] / r;
    diagonal = r;
    b[k] /= r;
    rotate_and_eliminate(l.column(k) + k + 1, x + k + 1, b + k + 1, l.size - k - 1, c, s, b[k]);
  }
  return l;
}

// Columns [k, k + 4) of finished columns leave column j: the inner loop of the factorization.
TX_CLONES void eliminate_four(const double* __restrict a, const double* __restrict b, const double* __restrict c,
                              const double* __restrict d, double* __restrict column, int64_t size, double x, double y,
                              double z, double w) {
  for (int64_t i = 0; i < size; ++i) {
    double value = column[i];
    value -= x * a[i];
    value -= y * b[i];
    value -= z * c[i];
    value -= w * d[i];
    column[i] = value;
  }
}

// Every pivot of K is at least m lambda, its smallest eigenvalue; rounding may say otherwise.
double pivot(double value, double shift) { return core::square_root(value > shift ? value : shift); }

// L from the Gram matrix, by age, at offset 0.
void make_factor(const CommitTensors& t, const CommitArgs& a) {
  t.ring[kRingOffset] = 0;
  t.ring[kRingForm] = kFormCholesky;
  t.ring[kRingSince] = 0;
  ++t.ring[kRingRefactors];
  const Factor l = factor_of(t, a);
  const int64_t next = t.ring[kRingNext];
  const double shift = static_cast<double>(a.slots - 1) * a.damping;
  std::vector<int64_t> slot(static_cast<size_t>(l.size));
  for (int64_t i = 0; i < l.size; ++i) slot[static_cast<size_t>(i)] = slot_of_age(i, l.size, next, a.slots);
  for (int64_t k = 0; k < l.size; ++k) {
    const double* gram = t.gram + slot[static_cast<size_t>(k)] * a.slots;
    for (int64_t i = k; i < l.size; ++i) l.at(i, k) = gram[slot[static_cast<size_t>(i)]] + (i == k ? shift : 0.0);
  }
  for (int64_t j = 0; j < l.size; ++j) {
    double* column = l.column(j) + j;
    const int64_t size = l.size - j;
    const auto at = [&](int64_t k) { return l.column(k) + j; };
    int64_t k = 0;
    for (; k + 4 <= j; k += 4) {
      eliminate_four(at(k), at(k + 1), at(k + 2), at(k + 3), column, size, *at(k), *at(k + 1), *at(k + 2), *at(k + 3));
    }
    for (; k < j; ++k) eliminate(at(k), column, size, *at(k));
    const double root = pivot(column[0], shift);
    column[0] = root;
    for (int64_t i = 1; i < size; ++i) column[i] /= root;
  }
}

// Room for one more row behind the last one: moves the factor to the front if there is none.
void make_room(const CommitTensors& t, const CommitArgs& a) {
  const int64_t offset = t.ring[kRingOffset], count = t.ring[kRingCount];
  if (offset + count + 1 <= a.leading) return;
  const Factor from = factor_of(t, a);
  for (int64_t k = 0; k < count; ++k) {
    std::copy(from.column(k) + k, from.column(k) + count, t.factor + k * (a.leading + 1));
  }
  t.ring[kRingOffset] = 0;
}

// --- the step ---

bool all_finite(const double* dots, int64_t slots) {
  for (int64_t s = 0; s < slots; ++s) {
    if (!(dots[s] - dots[s] == 0)) return false;
  }
  return true;
}

// The new row's products go into its row and column of the Gram matrix; its slot was the spare one.
void store_products(const CommitTensors& t, const CommitArgs& a) {
  const int64_t next = t.ring[kRingNext];
  for (int64_t s = 0; s < a.slots; ++s) t.gram[next * a.slots + s] = t.gram[s * a.slots + next] = t.dots[s];
}

// Advances L: the oldest row goes if the window is full, the new one comes. False if the factor has lost too much.
bool append(const CommitTensors& t, const CommitArgs& a, int64_t* offset) {
  const int64_t next = t.ring[kRingNext], count = t.ring[kRingCount], m = a.slots - 1;
  const bool full = count == m;
  make_room(t, a);
  Factor l = factor_of(t, a);
  std::vector<double> b;
  for (int64_t age = full ? 1 : 0; age < count; ++age) b.push_back(t.dots[slot_of_age(age, count, next, a.slots)]);
  if (full) {
    l = drop_and_solve(l, b.data());
  } else {
    solve_lower(l, b.data());
  }
  *offset = t.ring[kRingOffset] + (full ? 1 : 0);
  const double shift = static_cast<double>(m) * a.damping;
  const double rest = t.dots[next] + shift - product(b.data(), b.data(), l.size);
  for (int64_t k = 0; k < l.size; ++k) l.at(l.size, k) = b[static_cast<size_t>(k)];
  l.at(l.size, l.size) = pivot(rest, shift);
  return rest >= 0.5 * shift;
}

// solution = K^-1 e_newest, by age.
void solve_newest(const Factor& l, double* solution) {
  std::fill(solution, solution + l.size, 0.0);
  solution[l.size - 1] = 1 / l.at(l.size - 1, l.size - 1);
  solve_upper(l, solution);
}

// |K p - e_newest|_inf with the Gram matrix; p by slot.
double residual(const CommitTensors& t, const CommitArgs& a, const double* p) {
  const int64_t count = t.ring[kRingCount], next = t.ring[kRingNext];
  const double shift = static_cast<double>(a.slots - 1) * a.damping;
  double worst = 0;
  for (int64_t age = 0; age < count; ++age) {
    const int64_t slot = slot_of_age(age, count, next, a.slots);
    const double right = age == count - 1 ? 1.0 : 0.0;
    const double r = core::absolute(product(t.gram + slot * a.slots, p, a.slots) + shift * p[slot] - right);
    worst = !(r <= worst) ? r : worst;
  }
  return worst;
}

void to_slots(const CommitTensors& t, const CommitArgs& a, const std::vector<double>& by_age, double factor,
              double* by_slot) {
  std::fill(by_slot, by_slot + a.slots, 0.0);
  const auto count = static_cast<int64_t>(by_age.size());
  for (int64_t age = 0; age < count; ++age) {
    by_slot[slot_of_age(age, count, t.ring[kRingNext], a.slots)] = factor * by_age[static_cast<size_t>(age)];
  }
}

// K^-1 e_newest by slot.
void newest_by_slot(const CommitTensors& t, const CommitArgs& a, double* by_slot) {
  const Factor l = factor_of(t, a);
  std::vector<double> solution(static_cast<size_t>(l.size));
  solve_newest(l, solution.data());
  to_slots(t, a, solution, 1.0, by_slot);
}

// Makes the factor anew where its time has come or the probe of its solution (in coefficients) fails.
void keep_accurate(const CommitTensors& t, const CommitArgs& a, double* solution) {
  if (a.refactor_every == 0) return;
  const int64_t m = a.slots - 1, since = t.ring[kRingSince];
  const int64_t every = a.refactor_every > 0 ? a.refactor_every : kRefactorAfter * m;
  const bool due = since >= every;
  const bool wrong = !due && since > 0 && since % kProbeEvery == 0 && !(residual(t, a, solution) <= kResidualBound);
  if (!due && !wrong) return;
  make_factor(t, a);
  newest_by_slot(t, a, solution);
}

}  // namespace

void window_commit_cpu(const CommitTensors& t, const CommitArgs& a) {
  const int64_t m = a.slots - 1, next = t.ring[kRingNext];
  const double kappa = t.dots[next];
  const bool rejected = (t.nonfinite != nullptr && *t.nonfinite != 0) || !all_finite(t.dots, a.slots);
  t.ring[kRingAccepted] = rejected ? 0 : 1;
  if (rejected) {
    ++t.ring[kRingRejected];
    std::fill(t.coefficients, t.coefficients + a.slots, 0.0);
    return;
  }
  store_products(t, a);
  const bool had_factor = t.ring[kRingForm] == kFormCholesky;
  int64_t offset = 0;
  const bool sound = had_factor && append(t, a, &offset);
  t.ring[kRingCount] = std::min(m, t.ring[kRingCount] + 1);
  t.ring[kRingNext] = (next + 1) % a.slots;
  t.ring[kRingOffset] = offset;
  ++t.ring[kRingSince];
  ++t.ring[kRingTotal];
  if (!sound) make_factor(t, a);
  newest_by_slot(t, a, t.coefficients);
  keep_accurate(t, a, t.coefficients);
  if (t.ring[kRingTotal] <= a.warmup_steps) {
    std::fill(t.coefficients, t.coefficients + a.slots, 0.0);
    t.coefficients[next] = 1 / (static_cast<double>(m) * a.damping + kappa);
  }
  const double factor = static_cast<double>(a.warmup_scaling ? t.ring[kRingCount] : m);  // m t/m = t
  for (int64_t s = 0; s < a.slots; ++s) t.coefficients[s] *= factor;
}

void window_solve_cpu(const CommitTensors& t, const CommitArgs& a, const double* right_side, double* solution) {
  std::fill(solution, solution + a.slots, 0.0);
  const int64_t count = t.ring[kRingCount], next = t.ring[kRingNext];
  if (count == 0) return;
  if (t.ring[kRingForm] != kFormCholesky) make_factor(t, a);
  if (right_side == nullptr) {
    newest_by_slot(t, a, solution);
    for (int64_t s = 0; s < a.slots; ++s) solution[s] *= static_cast<double>(a.slots - 1);
    return;
  }
  std::vector<double> b;
  for (int64_t age = 0; age < count; ++age) b.push_back(right_side[slot_of_age(age, count, next, a.slots)]);
  const Factor l = factor_of(t, a);
  solve_lower(l, b.data());
  solve_upper(l, b.data());
  to_slots(t, a, b, 1.0, solution);
}

}  // namespace torch_ext::kernels

// The m x m part for devices, where an update of a Cholesky factor (sequential in m) is too slow: P = K^-1 is kept, by
// slot, full and symmetric, with zeros where no row lives. Dropping the oldest row o and appending k, kappa:
//   P' = P - P_o P_o^T / P_oo,  v = P' k,  s2 = kappa + m lambda - k . v
//   P  = [[P' + v v^T / s2, -v / s2], [-v^T / s2, 1 / s2]]
// and p = P e_new, improved once: p += P (e - K p). Alone the update would lose digits like cond(K)^2; with the
// improvement it equals a fresh factorization while cond(K) is below some 3e4, and where |K p - e|_inf still exceeds
// 1e-8 P is made anew in the same launch (sweeps over the pivots), without the host.
//
// Written once over an executor: one warp per row on CUDA, a plain loop on the CPU for tests. Both give the same bits.
//   rows(n, f)            f(i) for each i in [0, n), by one worker (on CUDA all lanes of a warp)
//   columns(n, f)         inside a row, or by every worker for itself: f(j) for each j, shared out to the worker's
//   lanes dot(n, f)             sum of f(0) ... f(n - 1) in the shape of core::sum_block, known to all lanes of a
//   worker any(n, f), most(n, f) whether one f(i) holds; the largest (NaN counts as infinity) lead() true for one lane
//   of a worker; first() for one lane of all workers sync()                everything before it is visible to everyone
//   after it
#pragma once

#include <cstdint>

#include "curvature/fisher_window/fisher_window_kernel.h"

#if defined(__CUDACC__)
#define TX_PHASE __device__
#else
#define TX_PHASE inline
#endif

namespace torch_ext::kernels {

template <typename Exec>
struct InverseWindow {
  Exec exec;
  CommitTensors t;
  CommitArgs a;
  double* scratch;
  // The ring after this call; everyone has a copy, and one lane stores it at the end.
  int64_t count, next, since, refactors;

  TX_PHASE InverseWindow(const Exec& executor, const CommitTensors& tensors, const CommitArgs& args, double* memory)
      : exec(executor),
        t(tensors),
        a(args),
        scratch(memory),
        count(tensors.ring[kRingCount]),
        next(tensors.ring[kRingNext]),
        since(tensors.ring[kRingSince]),
        refactors(tensors.ring[kRingRefactors]) {}

  TX_PHASE double shift() const { return static_cast<double>(a.slots - 1) * a.damping; }
  TX_PHASE double& inverse(int64_t i, int64_t j) const { return t.factor[i * a.leading + j]; }
  TX_PHASE double* vector(int64_t k) const { return scratch + k * a.slots; }
  TX_PHASE bool lives(int64_t slot) const {
    const int64_t back = next - 1 - slot;
    return (back < 0 ? back + a.slots : back) < count;
  }
  TX_PHASE int64_t newest() const { return next == 0 ? a.slots - 1 : next - 1; }
  TX_PHASE double k_matrix(int64_t i, int64_t j) const { return t.gram[i * a.slots + j] + (i == j ? shift() : 0.0); }

  // P = K^-1: sweeps over the pivots turn K into -K^-1. One synchronisation each, because the next pivot's row is
  // copied out while it is made.
  TX_PHASE void rebuild() {
    ++refactors;
    since = 0;
    exec.rows(a.slots, [&](int64_t i) {
      const bool row = lives(i);
      exec.columns(a.slots, [&](int64_t j) {
        const double value = row && lives(j) ? k_matrix(i, j) : i == j ? 1.0 : 0.0;
        inverse(i, j) = value;
        if (i == 0) vector(0)[j] = value;
      });
    });
    exec.sync();
    for (int64_t k = 0; k < a.slots; ++k) {
      const double* pivot = vector(k % 2);
      double* following = vector((k + 1) % 2);
      const double diagonal = pivot[k] > shift() || !lives(k) ? pivot[k] : shift();
      exec.rows(a.slots, [&](int64_t i) {
        const double scaled = pivot[i] / diagonal;
        exec.columns(a.slots, [&](int64_t j) {
          double value = inverse(i, j) - scaled * pivot[j];
          if (i == k || j == k) value = i == j ? -1 / diagonal : pivot[i == k ? j : i] / diagonal;
          inverse(i, j) = value;
          if (i == k + 1) following[j] = value;
        });
      });
      exec.sync();
    }
    exec.rows(a.slots, [&](int64_t i) {
      const bool row = lives(i);
      exec.columns(a.slots, [&](int64_t j) { inverse(i, j) = row && lives(j) ? -inverse(i, j) : 0.0; });
    });
    exec.sync();
  }

  // y (vector 2) <- P b, then y += P (b - K y), b by slot and zero where no row lives.
  template <typename Right>
  TX_PHASE void solve(const Right& b) {
    double *y = vector(2), *r = vector(3);
    exec.rows(a.slots, [&](int64_t i) {
      const double sum = exec.dot(a.slots, [&](int64_t j) { return inverse(i, j) * b(j); });
      if (exec.lead()) y[i] = sum;
    });
    exec.sync();
    residual(b, y, r);
    exec.rows(a.slots, [&](int64_t i) {
      const double sum = exec.dot(a.slots, [&](int64_t j) { return inverse(i, j) * r[j]; });
      if (exec.lead()) y[i] += sum;
    });
    exec.sync();
  }
  // to <- b - K y on live slots, 0 elsewhere.
  template <typename Right>
  TX_PHASE void residual(const Right& b, const double* y, double* to) {
    exec.rows(a.slots, [&](int64_t i) {
      const double sum = exec.dot(a.slots, [&](int64_t j) { return t.gram[i * a.slots + j] * y[j]; });
      if (exec.lead()) to[i] = lives(i) ? b(i) - (sum + shift() * y[i]) : 0.0;
    });
    exec.sync();
  }
  // y (vector 2) <- K^-1 e_newest; true if the residual is small.
  TX_PHASE bool solve_newest() {
    const int64_t last = newest();
    const auto e = [=](int64_t i) { return i == last ? 1.0 : 0.0; };
    solve(e);
    residual(e, vector(2), vector(3));
    const double* r = vector(3);
    return exec.most(a.slots, [&](int64_t i) { return core::absolute(r[i]); }) <= kResidualBound;
  }

  // Takes out the oldest row of a full window and appends the new one; false if P has lost too much.
  TX_PHASE bool append() {
    const bool full = count == a.slots - 1;
    const int64_t oldest = next + 1 == a.slots ? 0 : next + 1, spare = next;
    const auto old = [&](int64_t i) { return i != spare && lives(i) && !(full && i == oldest); };
    double *y = vector(0), *dropped = vector(1);
    exec.rows(a.slots, [&](int64_t i) {
      const double sum = exec.dot(a.slots, [&](int64_t j) { return old(j) ? inverse(i, j) * t.dots[j] : 0.0; });
      if (exec.lead()) {
        y[i] = sum;
        dropped[i] = full ? inverse(oldest, i) : 0.0;
      }
    });
    exec.sync();
    const double corner = full ? dropped[oldest] : 1.0, moved = full ? y[oldest] / corner : 0.0;
    const auto v = [&](int64_t i) { return old(i) ? y[i] - dropped[i] * moved : 0.0; };
    const double rest =
        t.dots[spare] + shift() - exec.dot(a.slots, [&](int64_t i) { return old(i) ? t.dots[i] * v(i) : 0.0; });
    const double s2 = rest > shift() ? rest : shift();
    exec.rows(a.slots, [&](int64_t i) {
      const bool row = old(i);
      const double vi = v(i), scaled = vi / s2, out = dropped[i] / corner;
      exec.columns(a.slots, [&](int64_t j) {
        double value = 0;
        if (row && old(j)) value = (inverse(i, j) - out * dropped[j]) + scaled * v(j);
        if (row && j == spare) value = -scaled;
        if (i == spare && old(j)) value = -v(j) / s2;
        if (i == spare && j == spare) value = 1 / s2;
        inverse(i, j) = value;
      });
    });
    return rest >= 0.5 * shift();
  }

  TX_PHASE void store_ring(bool accepted) {
    if (!exec.first()) return;
    t.ring[kRingAccepted] = accepted ? 1 : 0;
    if (!accepted) {
      ++t.ring[kRingRejected];
      return;
    }
    t.ring[kRingCount] = count;
    t.ring[kRingNext] = next;
    t.ring[kRingOffset] = 0;
    t.ring[kRingSince] = since;
    t.ring[kRingForm] = kFormInverse;
    t.ring[kRingRefactors] = refactors;
    ++t.ring[kRingTotal];
  }

  TX_PHASE void commit() {
    const int64_t m = a.slots - 1, spare = next, total = t.ring[kRingTotal] + 1;
    const bool flagged = t.nonfinite != nullptr && *t.nonfinite != 0;
    const bool rejected = flagged || exec.any(a.slots, [&](int64_t s) { return !(t.dots[s] - t.dots[s] == 0); });
    const bool had_inverse = t.ring[kRingForm] == kFormInverse;
    exec.sync();  // all have read the ring
    if (rejected) {
      write_coefficients([](int64_t) { return 0.0; });
      return store_ring(false);
    }
    exec.rows(a.slots, [&](int64_t s) {
      if (exec.lead()) t.gram[spare * a.slots + s] = t.gram[s * a.slots + spare] = t.dots[s];
    });
    const bool sound = had_inverse && append();
    count = count < m ? count + 1 : m;
    next = next + 1 == a.slots ? 0 : next + 1;
    ++since;
    exec.sync();
    const int64_t every = a.refactor_every > 0 ? a.refactor_every : m;
    bool again = !sound || (a.refactor_every != 0 && since >= every);
    if (!again) again = !solve_newest() && a.refactor_every != 0;
    if (again) {
      rebuild();
      solve_newest();
    }
    const double* p = vector(2);
    const bool warm = total > a.warmup_steps;
    const double one_row = 1 / (t.dots[spare] + shift());
    const auto scale = static_cast<double>(a.warmup_scaling ? count : m);  // m t/m = t
    write_coefficients([&](int64_t i) { return (warm ? p[i] : i == spare ? one_row : 0.0) * scale; });
    store_ring(true);
  }

  template <typename Value>
  TX_PHASE void write_coefficients(const Value& value) {
    exec.rows(a.slots, [&](int64_t i) {
      if (exec.lead()) t.coefficients[i] = value(i);
    });
  }

  // solution = K^-1 right_side, or m K^-1 e_newest where it is null.
  TX_PHASE void solve_any(const double* right_side, double* solution) {
    const bool missing = t.ring[kRingForm] != kFormInverse && count > 0;
    exec.sync();
    if (missing) rebuild();
    const auto b = [&](int64_t i) {
      if (count == 0 || !lives(i)) return 0.0;
      return right_side != nullptr ? right_side[i] : i == newest() ? 1.0 : 0.0;
    };
    solve(b);
    const double factor = right_side != nullptr ? 1.0 : static_cast<double>(a.slots - 1);
    const double* y = vector(2);
    exec.rows(a.slots, [&](int64_t i) {
      if (exec.lead()) solution[i] = count == 0 ? 0.0 : factor * y[i];
    });
    if (missing && exec.first()) {
      t.ring[kRingForm] = kFormInverse;
      t.ring[kRingSince] = since;
      t.ring[kRingRefactors] = refactors;
    }
  }
};

}  // namespace torch_ext::kernels

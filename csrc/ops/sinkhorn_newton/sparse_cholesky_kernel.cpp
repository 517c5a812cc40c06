// Sparse Cholesky of A = diag(d) - S diag(w) S^T. At small eps the kept entries are few and nearly a forest, so that
// minimum degree has almost no fill where conjugate gradients need thousands of iterations.
#include <algorithm>
#include <cmath>

#include "ops/sinkhorn_newton/sparse_newton_kernel.h"

namespace torch_ext::kernels {
namespace {

using Indices = std::vector<int32_t>;

// Rows of the matrix, all columns, ascending; the diagonal apart.
struct Symmetric {
  std::vector<Indices> column;
  std::vector<std::vector<double>> value;
  std::vector<double> diagonal;
};

SparsePlan transposed(const SparsePlan& plan, int64_t m) {
  SparsePlan t;
  t.start.assign(static_cast<size_t>(m) + 1, 0);
  for (const int32_t j : plan.column) ++t.start[static_cast<size_t>(j) + 1];
  for (size_t j = 1; j < t.start.size(); ++j) t.start[j] += t.start[j - 1];
  t.column.resize(plan.column.size());
  t.value.resize(plan.value.size());
  std::vector<int64_t> next(t.start.begin(), t.start.end() - 1);
  for (size_t i = 0; i + 1 < plan.start.size(); ++i) {
    for (auto k = static_cast<size_t>(plan.start[i]); k < static_cast<size_t>(plan.start[i + 1]); ++k) {
      const auto to = static_cast<size_t>(next[static_cast<size_t>(plan.column[k])]++);
      t.column[to] = static_cast<int32_t>(i);
      t.value[to] = plan.value[k];
    }
  }
  return t;
}

bool assemble(const NormalSystem& system, double& work, Symmetric& a) {
  const SparsePlan& plan = *system.plan;
  const SparsePlan by_column = transposed(plan, system.m);
  const auto n = static_cast<size_t>(system.n);
  a.column.resize(n);
  a.value.resize(n);
  a.diagonal.assign(system.diagonal, system.diagonal + n);
  std::vector<double> row(n, 0.0);
  std::vector<uint8_t> seen(n, 0);
  for (size_t i = 0; i < n; ++i) {
    Indices& columns = a.column[i];
    for (auto k = static_cast<size_t>(plan.start[i]); k < static_cast<size_t>(plan.start[i + 1]); ++k) {
      const auto j = static_cast<size_t>(plan.column[k]);
      const double scale = plan.value[k] * system.weight[j];
      const auto begin = static_cast<size_t>(by_column.start[j]), end = static_cast<size_t>(by_column.start[j + 1]);
      if ((work -= static_cast<double>(end - begin)) < 0) return false;
      for (size_t t = begin; t < end; ++t) {
        const auto other = static_cast<size_t>(by_column.column[t]);
        if (seen[other] == 0) {
          seen[other] = 1;
          columns.push_back(static_cast<int32_t>(other));
        }
        row[other] -= scale * by_column.value[t];
      }
    }
    a.diagonal[i] += row[i];
    std::sort(columns.begin(), columns.end());
    Indices kept;
    for (const int32_t other : columns) {
      if (static_cast<size_t>(other) != i) {
        kept.push_back(other);
        a.value[i].push_back(row[static_cast<size_t>(other)]);
      }
      row[static_cast<size_t>(other)] = 0;
      seen[static_cast<size_t>(other)] = 0;
    }
    columns = std::move(kept);
  }
  return true;
}

// Elimination order and, per eliminated vertex, its neighbours then: the pattern of its column of the factor.
struct Elimination {
  Indices order;
  std::vector<Indices> pattern;
};

bool minimum_degree(std::vector<Indices> graph, double& work, Elimination& result) {
  const size_t n = graph.size();
  std::vector<uint8_t> gone(n, 0);
  std::vector<std::vector<int32_t>> by_degree(n + 1);  // with stale entries, checked when taken
  for (size_t v = n; v-- > 0;) by_degree[graph[v].size()].push_back(static_cast<int32_t>(v));
  result.pattern.resize(n);
  Indices merged;
  for (size_t degree = 0; result.order.size() < n;) {
    while (by_degree[degree].empty()) ++degree;
    const int32_t vertex = by_degree[degree].back();
    by_degree[degree].pop_back();
    const auto v = static_cast<size_t>(vertex);
    if (gone[v] != 0 || graph[v].size() != degree) continue;
    gone[v] = 1;
    result.order.push_back(vertex);
    Indices& neighbours = result.pattern[v] = std::move(graph[v]);
    const auto count = static_cast<double>(neighbours.size());
    if ((work -= count * count) < 0) return false;
    for (const int32_t u : neighbours) {
      Indices& mine = graph[static_cast<size_t>(u)];
      merged.clear();
      std::set_union(mine.begin(), mine.end(), neighbours.begin(), neighbours.end(), std::back_inserter(merged));
      merged.erase(std::remove_if(merged.begin(), merged.end(), [&](int32_t w) { return w == u || w == vertex; }),
                   merged.end());
      work -= static_cast<double>(merged.size());
      mine = merged;
      by_degree[mine.size()].push_back(u);
      degree = std::min(degree, mine.size());
    }
  }
  return work >= 0;
}

// Left-looking factor; column k in the order of elimination, rows as positions in that order.
struct Factor {
  std::vector<int64_t> start;
  Indices row;
  std::vector<double> value, pivot;
};

Factor empty_factor(const Elimination& elimination, const Indices& position) {
  Factor factor;
  factor.start.push_back(0);
  for (const int32_t vertex : elimination.order) {
    const auto first = static_cast<int64_t>(factor.row.size());
    for (const int32_t u : elimination.pattern[static_cast<size_t>(vertex)]) {
      factor.row.push_back(position[static_cast<size_t>(u)]);
    }
    std::sort(factor.row.begin() + first, factor.row.end());
    factor.start.push_back(static_cast<int64_t>(factor.row.size()));
  }
  factor.value.resize(factor.row.size());
  factor.pivot.resize(elimination.order.size());
  return factor;
}

bool factorise(const Symmetric& a, const Elimination& elimination, const Indices& position, Factor& factor) {
  const size_t n = elimination.order.size();
  std::vector<double> column(n, 0.0);
  std::vector<Indices> updates(n);  // columns whose next row is this one
  std::vector<int64_t> next(factor.start.begin(), factor.start.end() - 1);
  for (size_t k = 0; k < n; ++k) {
    const auto v = static_cast<size_t>(elimination.order[k]);
    column[k] = a.diagonal[v];
    for (size_t t = 0; t < a.column[v].size(); ++t) {
      const auto row = static_cast<size_t>(position[static_cast<size_t>(a.column[v][t])]);
      if (row > k) column[row] = a.value[v][t];
    }
    for (const int32_t earlier : updates[k]) {
      const auto j = static_cast<size_t>(earlier);
      const auto from = static_cast<size_t>(next[j]), end = static_cast<size_t>(factor.start[j + 1]);
      const double l = factor.value[from];
      for (size_t t = from; t < end; ++t) column[static_cast<size_t>(factor.row[t])] -= factor.value[t] * l;
      if (++next[j] < factor.start[j + 1]) updates[static_cast<size_t>(factor.row[from + 1])].push_back(earlier);
    }
    if (!(column[k] > 0)) return false;
    factor.pivot[k] = std::sqrt(column[k]);
    column[k] = 0;
    const auto begin = static_cast<size_t>(factor.start[k]), end = static_cast<size_t>(factor.start[k + 1]);
    for (size_t t = begin; t < end; ++t) {
      const auto row = static_cast<size_t>(factor.row[t]);
      factor.value[t] = column[row] / factor.pivot[k];
      column[row] = 0;
    }
    if (begin < end) updates[static_cast<size_t>(factor.row[begin])].push_back(static_cast<int32_t>(k));
  }
  return true;
}

void substitute(const Factor& factor, std::vector<double>& y) {
  const size_t n = y.size();
  for (size_t k = 0; k < n; ++k) {
    y[k] /= factor.pivot[k];
    for (auto t = static_cast<size_t>(factor.start[k]); t < static_cast<size_t>(factor.start[k + 1]); ++t) {
      y[static_cast<size_t>(factor.row[t])] -= factor.value[t] * y[k];
    }
  }
  for (size_t k = n; k-- > 0;) {
    for (auto t = static_cast<size_t>(factor.start[k]); t < static_cast<size_t>(factor.start[k + 1]); ++t) {
      y[k] -= factor.value[t] * y[static_cast<size_t>(factor.row[t])];
    }
    y[k] /= factor.pivot[k];
  }
}

}  // namespace

bool sparse_cholesky_solve(const NormalSystem& system, const double* r, double work, double* x) {
  Symmetric a;
  Elimination elimination;
  if (!assemble(system, work, a) || !minimum_degree(a.column, work, elimination)) return false;
  const auto n = static_cast<size_t>(system.n);
  Indices position(n);
  for (size_t k = 0; k < n; ++k) position[static_cast<size_t>(elimination.order[k])] = static_cast<int32_t>(k);
  Factor factor = empty_factor(elimination, position);
  if (!factorise(a, elimination, position, factor)) return false;
  std::vector<double> y(n);
  for (size_t k = 0; k < n; ++k) y[k] = r[elimination.order[k]];
  substitute(factor, y);
  for (size_t k = 0; k < n; ++k) x[elimination.order[k]] = y[k];
  return true;
}

}  // namespace torch_ext::kernels

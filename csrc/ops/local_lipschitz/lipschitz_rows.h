// Linear bounds on their way through a network: coefficients of the values (or of the gradients) that a row has been
// expressed by so far, and what has become constant.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "ops/local_lipschitz/lipschitz_activation.h"
#include "ops/local_lipschitz/lipschitz_network.h"

namespace torch_ext::ops {

// Rows [groups, rows, size], or [1, rows, size] while they are the same for all groups. The rows of a matrix A and of
// -A are bounded from above together: once they depend on the group, the second half of the rows belongs to -A.
struct LipschitzCoefficients {
  at::Tensor a;  // undefined: the identity
  bool shared = false;
  bool defined = false;
};

class LipschitzRows {
 public:
  // safe: result() is asked for with gamma > 0.
  LipschitzRows(const LipschitzNetwork& network, int64_t groups, const at::TensorOptions& options, bool safe);
  void start_identity(int64_t value);       // A and -A are bounded, A the identity on the value
  void start(int64_t value, at::Tensor a);  // A [groups, rows, size] alone

  bool has(int64_t value) const { return coefficients_[static_cast<size_t>(value)].defined; }
  // The coefficients, as a tensor also where they are the identity.
  const LipschitzCoefficients& at(int64_t value);
  void drop(int64_t value) { coefficients_[static_cast<size_t>(value)] = {}; }

  // g_in = g_out W: from coefficients of the node's input (a gradient) to those of its output.
  void push(const LipschitzNode& node, int64_t from, int64_t to);
  // out = W in + b: from coefficients of the node's output (a value) to those of its input.
  void pull(const LipschitzNode& node, int64_t from, int64_t to);
  void copy(int64_t from, int64_t to);
  // Replaces the value at `from` by its lines [4, groups, size], coefficients of `to`.
  void relax(int64_t from, int64_t to, const at::Tensor& lines);
  // Replaces it by its interval, and ends there.
  void concretize(int64_t from, const LipschitzInterval& interval);
  void add_constant(const at::Tensor& c);  // [groups, rows of A]

  // Upper bounds of A and lower bounds (those of -A, negated) [groups, rows]; sums of roundoff are enlarged by `gamma`.
  LipschitzInterval result(double gamma) const;
  at::Tensor upper(double gamma) const;

 private:
  void add(int64_t value, at::Tensor a, bool shared);
  at::Tensor both(const at::Tensor& a) const;  // [1, rows, size] -> [groups, 2 rows, size]
  void count(const at::Tensor& c);             // [groups, rows or 2 rows]

  const LipschitzNetwork& network_;
  int64_t groups_, rows_ = 0;
  at::TensorOptions options_;
  bool safe_;
  bool mirrored_ = false;  // A and -A
  std::vector<LipschitzCoefficients> coefficients_;
  at::Tensor sum_, magnitude_;
};

// NaN, from bounds that have overflown, becomes no bound.
at::Tensor lipschitz_upper(const at::Tensor& bound);
at::Tensor lipschitz_lower(const at::Tensor& bound);
// gamma_k = k u / (1 - k u) with k above the number of roundings on any path through the network.
double lipschitz_gamma(const LipschitzNetwork& network, at::ScalarType type);

}  // namespace torch_ext::ops

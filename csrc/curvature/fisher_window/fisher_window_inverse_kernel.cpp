// The device form of the m x m part on one CPU thread: what its tests run. Windows on the CPU use the Cholesky factor.
#include <cmath>
#include <vector>

#include "curvature/fisher_window/fisher_window_inverse.h"

namespace torch_ext::kernels {
namespace {

struct OneThread {
  template <typename Body>
  void rows(int64_t n, const Body& body) const {
    for (int64_t i = 0; i < n; ++i) body(i);
  }
  template <typename Body>
  void columns(int64_t n, const Body& body) const {
    for (int64_t j = 0; j < n; ++j) body(j);
  }
  template <typename Value>
  double dot(int64_t n, const Value& value) const {
    return core::sum_block(n, value);
  }
  template <typename Test>
  bool any(int64_t n, const Test& test) const {
    bool found = false;
    for (int64_t i = 0; i < n; ++i) found = found || test(i);
    return found;
  }
  template <typename Value>
  double most(int64_t n, const Value& value) const {
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = value(i) <= largest ? largest : value(i) >= 0 ? value(i) : HUGE_VAL;
    return largest;
  }
  static bool lead() { return true; }
  static bool first() { return true; }
  void sync() const {}
};

}  // namespace

void window_commit_inverse_cpu(const CommitTensors& t, const CommitArgs& args) {
  std::vector<double> scratch(static_cast<size_t>(kInverseScratch * args.slots));
  InverseWindow<OneThread>(OneThread(), t, args, scratch.data()).commit();
}

void window_solve_inverse_cpu(const CommitTensors& t, const CommitArgs& args, const double* right_side,
                              double* solution) {
  std::vector<double> scratch(static_cast<size_t>(kInverseScratch * args.slots));
  InverseWindow<OneThread>(OneThread(), t, args, scratch.data()).solve_any(right_side, solution);
}

}  // namespace torch_ext::kernels

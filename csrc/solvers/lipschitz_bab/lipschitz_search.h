// Best-first search over subproblems, whatever they are split by.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "ops/local_lipschitz/lipschitz_op.h"

namespace torch_ext::solvers {

// A part of the problem: a box, or a choice of slopes.
struct LipschitzPart {
  at::Tensor first, second;  // input split: ends of the box [input]; activation split: chosen slopes [activations]
  int64_t split = -1;        // what to split it by next; -1: nothing is left to split
  double bound = 0;
};

class LipschitzSplit {
 public:
  virtual ~LipschitzSplit() = default;
  virtual LipschitzPart root() const = 0;
  virtual std::vector<LipschitzPart> children(const LipschitzPart& part) const = 0;
  // Sets bound and split of all; returns a lower bound of the constant.
  virtual double evaluate(std::vector<LipschitzPart>& parts) const = 0;
};

struct LipschitzSearchProblem {
  const ops::LipschitzProblem& problem;
  const ops::LipschitzMethod& method;
  std::vector<int64_t> outputs;
};
std::unique_ptr<LipschitzSplit> lipschitz_input_split(const LipschitzSearchProblem& search);
std::unique_ptr<LipschitzSplit> lipschitz_activation_split(const LipschitzSearchProblem& search);

}  // namespace torch_ext::solvers

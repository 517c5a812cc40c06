// Helpers for registering operators of the torch_ext namespace.
#pragma once

#include <torch/library.h>

namespace torch_ext::core {

// ADInplaceOrView kernel of every op that mutates its arguments: runs the op below it and bumps the version counter of
// each tensor that the schema marks as written, so that autograd notices stale tensors.
void bump_mutated(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);

// Autograd kernel of every op that is no function of its inputs' values or only works in place: what it returns needs
// no gradient. (Without one, torch marks the outputs as differentiable and fails in backward.)
inline torch::CppFunction not_differentiable() { return torch::CppFunction::makeFallthrough(); }

inline torch::CppFunction mutating() { return torch::CppFunction::makeFromBoxedFunction<&bump_mutated>(); }

}  // namespace torch_ext::core

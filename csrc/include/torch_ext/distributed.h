// Data-parallel training over c10d: the one header of the pack that includes it.
//
//   c10::intrusive_ptr<c10d::ProcessGroup> group = ...;  // or a c10d::Backend, such as ProcessGroupNCCL
//   optimizer.set_reduce(torch_ext::mean_over(group));   // every rank then runs the raw module on its own share
//
// The pip packages of torch hold Gloo but not the headers that its ProcessGroupGloo.hpp includes: a C++ program that
// makes the group itself takes those from gloo's sources, or uses NCCL's.
#pragma once

#include <torch_ext/export.h>
#include <torch_ext/optim/base.h>

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace torch_ext {

// Replaces tensors by their mean over the processes, in place in the list. One all-reduce per device and dtype; half-
// precision tensors are summed and returned in float32. Every process must pass tensors of the same shapes.
TORCH_EXT_API optim::ReduceFn mean_over(c10::intrusive_ptr<c10d::ProcessGroup> group);
TORCH_EXT_API optim::ReduceFn mean_over(c10::intrusive_ptr<c10d::Backend> backend);

// Replaces integer tensors by their sum over the processes. One all-reduce per device and dtype; the same bits as one
// process that counted everything. For ALFLB::set_reduce.
TORCH_EXT_API optim::ReduceFn sum_over(c10::intrusive_ptr<c10d::ProcessGroup> group);
TORCH_EXT_API optim::ReduceFn sum_over(c10::intrusive_ptr<c10d::Backend> backend);

// Splits a vector over the processes; for optimizers that keep a slice of their state on each (MFAC::set_shards).
TORCH_EXT_API optim::ColumnShards shards_over(c10::intrusive_ptr<c10d::ProcessGroup> group);
TORCH_EXT_API optim::ColumnShards shards_over(c10::intrusive_ptr<c10d::Backend> backend);

}  // namespace torch_ext

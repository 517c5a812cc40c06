// Data-parallel training over c10d: the one header of the pack that includes it.
//
//   auto store = c10::make_intrusive<c10d::FileStore>("/shared/file", world_size);
//   auto group = c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, world_size, options);
//   optimizer.set_reduce(torch_ext::mean_over(group));   // every rank then runs the raw module on its own share
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

}  // namespace torch_ext

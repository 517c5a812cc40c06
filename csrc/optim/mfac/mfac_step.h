// One step of M-FAC over ready blocks; both languages call it.
#pragma once

#include <optional>
#include <vector>

#include "optim/mfac/mfac_state.h"

namespace torch_ext::optim {

// What a step takes besides gradients, state and options.
struct MFACInputs {
  std::optional<at::Tensor> grad_scale;  // a GradScaler's: gradients are divided by it
  std::optional<at::Tensor> found_inf;   // a GradScaler's: nonzero skips the step
  at::Tensor skipped;                    // int64 counter of skipped steps
  ColumnShards shards;
};

// Rows into the windows, windows' steps into the parameters. A row of any window that is not finite rejects those of
// all. No host synchronisation on CUDA.
TORCH_EXT_API void mfac_step(const std::vector<MFACBlock>& blocks, const MFACInputs& inputs);

// F^-1 x by the block's window, x = block.grads; the result has one tensor per parameter, undefined where x is.
// ValueError for an x of another shape.
TORCH_EXT_API std::vector<at::Tensor> mfac_precondition(const MFACBlock& block, const ColumnShards& shards);
// ValueError unless precondition() was given a tensor or nothing for each of the optimizer's parameters.
TORCH_EXT_API void mfac_check_vectors(const std::vector<at::Tensor>& params, const std::vector<at::Tensor>& x);

}  // namespace torch_ext::optim

// State of M-FAC: the window that the parameters of a block share, and what each parameter has of its own.
#pragma once

#include <torch_ext/optim/base.h>

#include <string>
#include <vector>

#include "curvature/fisher_window/fisher_window_op.h"

namespace torch_ext::optim {

inline constexpr const char* kMFAC = "MFAC";  // in messages

// One window and the parameters whose elements are its columns, in order. The window is in the first one's state.
struct MFACBlock {
  const Options* shared = nullptr;      // the options that all groups have in common
  std::vector<at::Tensor> params;       // of floating point; others have no columns
  std::vector<int64_t> ordinals;        // their running numbers over all groups
  std::vector<at::Tensor> grads;        // undefined where a parameter has none; of precondition() the vectors
  std::vector<const Options*> options;  // of each parameter's group
  std::vector<StateTensors> states;     // of each parameter, a copy
  std::vector<char> changed;            // nonzero where the optimizer must take over that copy
};

// True for state that belongs to a block.
TORCH_EXT_API bool mfac_is_window(const std::string& name);
// Whether a parameter has columns in a window.
TORCH_EXT_API bool mfac_has_columns(const at::Tensor& param);
// d of the window of these parameters.
TORCH_EXT_API int64_t mfac_columns(const std::vector<at::Tensor>& params);
// The window of one of `shards` processes that share so many columns.
TORCH_EXT_API curvature::FisherWindowLayout mfac_layout(const Options& options, int64_t columns, int64_t shards);
// Bytes of the blocks' windows: of those that exist, else of those that the next step makes.
TORCH_EXT_API int64_t mfac_memory_bytes(const std::vector<MFACBlock>& blocks, int64_t shards);
// Rows in the fullest window.
TORCH_EXT_API int64_t mfac_window_count(const std::vector<MFACBlock>& blocks);
// Its tensors; rows is undefined if there is none.
curvature::FisherWindowState mfac_window(const StateTensors& state);

// Makes the block's window in its first state, or brings the one there to its device and fits it to the columns:
// parameters that joined get columns of zeros, the window of one process is cut for several. Changes nothing in place
// but to ask for a new factor. ValueError if a window does not fit the memory, the process or the parameters.
TORCH_EXT_API void mfac_ready_window(MFACBlock& block, const ColumnShards& shards);
// The same for all that a step will write.
TORCH_EXT_API void mfac_prepare(MFACBlock& block, const ColumnShards& shards);
// True if some parameter has a gradient.
TORCH_EXT_API bool mfac_has_gradients(const MFACBlock& block);

// ValueError unless the columns of the block's window, if it has one, are those of its first few parameters or of all
// (parameters may have joined since), and no other parameter of the block has a window.
TORCH_EXT_API void mfac_check_columns(const MFACBlock& block);

// Loaded state against its parameter and options; ValueError.
TORCH_EXT_API void mfac_check_state(const at::Tensor& param, const Options& options, const StateTensors& state);

}  // namespace torch_ext::optim

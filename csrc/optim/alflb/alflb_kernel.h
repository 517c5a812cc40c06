// Entry points of the bias update over raw pointers.
#pragma once

#include <cstdint>
#include <vector>

#include "optim/alflb/alflb_functor.h"

namespace torch_ext::kernels {

// One layer.
struct AlflbLayer {
  float* bias;         // [E]
  int64_t* load;       // [E], read and cleared
  int64_t* last_load;  // [E], the loads that the last update used
  float* step;         // updates, as torch counts them
  int64_t* updates;    // n
  float* momentum;     // [E], or null but for the momentum rule
  int64_t* histogram;  // [E, bins], or null but for the quantile rule; read and cleared
  float* bounds;       // [2], or null: range of the histogram's bins, set anew around the new biases
  int64_t numel;       // E
  int64_t top_k, bins;
};

// The update of one layer. A layer whose loads are all zero stays as it is.
void alflb_update_cpu(const AlflbLayer& layer, const AlflbArgs& args);
void alflb_update_cuda(const std::vector<AlflbLayer>& layers, const AlflbArgs& args, void* stream);

}  // namespace torch_ext::kernels

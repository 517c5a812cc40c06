// Entry points of MeZO's kernels over raw pointers; the same descriptors serve CPU and CUDA. Chunks are those of
// core/multi_tensor.h: 65536 elements, so that a chunk begins with a word of the mask.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "core/philox.h"
#include "optim/mezo/mezo_functor.h"

namespace torch_ext::kernels {

// One parameter that is perturbed in place.
struct MezoTensor {
  void* param;
  core::PhiloxStream noise;
  double scale;      // p + scale z
  uint32_t* mask;    // bit e % 32 of word e / 32: element e is kept
  int32_t* counts;   // kept elements of each chunk
  int64_t* offsets;  // where those of a chunk begin among all kept ones; after the counts
  void* kept;        // of the parameter's type
  int64_t numel;
};

// Elements that replaying the noise would not restore: fills mask and counts, changes no parameter.
void mezo_mark_cpu(const MezoTensor& tensor, core::DType type, int64_t begin, int64_t end);
// Keeps those and perturbs all.
void mezo_shift_cpu(const MezoTensor& tensor, core::DType type, int64_t begin, int64_t end);
// Takes it back.
void mezo_restore_cpu(const MezoTensor& tensor, core::DType type, int64_t begin, int64_t end);

void mezo_mark_cuda(const std::vector<MezoTensor>& tensors, core::DType type, void* stream);
void mezo_shift_cuda(const std::vector<MezoTensor>& tensors, core::DType type, void* stream);
void mezo_restore_cuda(const std::vector<MezoTensor>& tensors, core::DType type, void* stream);

// The update of one parameter.
struct MezoUpdate {
  void* param;
  float* step;  // accepted steps
  core::PhiloxStream noise;
  double lr, weight_decay;
  const double* slope;  // on the parameter's device; infinite or NaN leaves everything as it is
  int64_t numel;
};
void mezo_update_cpu(const MezoUpdate& tensor, core::DType type, int64_t begin, int64_t end);  // without its step
void mezo_update_cuda(const std::vector<MezoUpdate>& tensors, core::DType type, void* stream);

}  // namespace torch_ext::kernels

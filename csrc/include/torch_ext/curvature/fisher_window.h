// The damped empirical Fisher matrix of the last m gradients, and products with its inverse.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <map>
#include <string>

namespace torch_ext::curvature {

// A sliding window of gradients for M-FAC (Frantar, Kurtic, Alistarh, arXiv:2107.03356). With the rows q_1 ... q_t it
// holds, oldest first (t <= m), G = [q_1; ...; q_t] and lambda the damping:
//
//   F = lambda I + (1/m) G^T G           always 1/m, also while fewer than m rows have come
//   K = m lambda I + G G^T               [t, t], float64
//   F^-1 q_t = m G^T K^-1 e_t            the newest row: neither a subtraction nor a division by lambda
//   F^-1 x   = (x - G^T K^-1 G x) / lambda    any x: loses about |x| / (lambda |F^-1 x|) times the rounding error
//
// No d x d matrix is formed; a row that comes costs one pass over the window (2 m d flops) and m^2, because K's factor
// is updated, not made anew; a product costs one or two passes.
//
// window_format says how rows are stored. Everything is computed from what was stored, because the part of a row that
// the window does not hold would be multiplied by 1/lambda:
//   "float32", "float64"   as they are; 4 or 8 bytes an element
//   "bfloat16"             rounded; 2 bytes
//   "int8"                 rint(x / scale), scale = max |x| / 127 per 256 elements; 1 byte
//   "topk"                 of each 1024 elements the ceil(topk * 1024) largest in magnitude, as bfloat16 with their
//                          places: 4 topk bytes, and 8 for what is left over and joins the next row (error feedback)
//
// A row with an infinite or NaN element (or whose square overflows) is rejected: the rows held stay as they are, bit
// for bit, and rejected() grows. The state is plain tensors (see state()); the same window on the same machine gives
// the same bits for any number of threads.
class TORCH_EXT_API FisherWindow {
 public:
  struct Extra {
    double topk = 0.01;           // in (0, 1]
    bool error_feedback = false;  // for bfloat16 and int8; always on for topk
    at::Device device = at::kCPU;
  };

  // num_grads = m >= 1, dim = d >= 1, damping = lambda > 0. ValueError for values out of range and for a window that
  // does not fit into the device's free memory, with the bytes and the formats that would fit.
  FisherWindow(int64_t num_grads, int64_t dim, double damping, const std::string& window_format, const Extra& extra);
  FisherWindow(int64_t num_grads, int64_t dim, double damping, const std::string& window_format = "float32");

  // Adds row [d] (any floating dtype, any device), dropping the oldest of a full window. ValueError for another shape,
  // TypeError for another dtype, RuntimeError for a sparse or complex row.
  void push(const at::Tensor& row);
  // F^-1 q for the newest row q as it was stored: [d], float64 for format float64, else float32. ValueError without a
  // row.
  at::Tensor solve_newest();
  // F^-1 x for x [d]; dtype as above. x / lambda without a row.
  at::Tensor ihvp(const at::Tensor& x);
  // G G^T without damping, [t, t] float64, oldest first.
  at::Tensor gram() const;
  // Rows held (t), rows rejected so far. On CUDA these two, and what needs them (gram, solve_newest), wait for the
  // device.
  int64_t count() const;
  int64_t rejected() const;

  int64_t num_grads() const { return num_grads_; }
  int64_t dim() const { return dim_; }
  double damping() const { return damping_; }
  const std::string& window_format() const { return format_; }
  // Bytes of all tensors.
  int64_t memory_bytes() const;

  // The tensors by name, not copied, and "about": damping and dim. load_state copies, from any device; ValueError if
  // they are of another num_grads, dim or format. The factor of another damping is made anew.
  std::map<std::string, at::Tensor> state() const;
  void load_state(const std::map<std::string, at::Tensor>& state);
  // Moves the window. Between CPU and CUDA the factor of K is made anew with the next call.
  void to(const at::Device& device);

 private:
  const at::Tensor& tensor(const char* name) const { return state_.at(name); }

  int64_t num_grads_, dim_;
  double damping_;
  std::string format_;
  double topk_;
  bool error_feedback_;
  std::map<std::string, at::Tensor> state_;
};

}  // namespace torch_ext::curvature

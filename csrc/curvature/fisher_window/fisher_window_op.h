// The tensors of a Fisher window and the operators on them; the public face is <torch_ext/curvature/fisher_window.h>.
//
// With m = num_grads, rows q_1 ... q_t (oldest first, t <= m) and G = [q_1; ...; q_t]: F = lambda I + (1/m) G^T G,
// K = m lambda I + G G^T, and F^-1 q_t = m G^T K^-1 e_t, which needs neither a subtraction nor a division by lambda
// (Frantar et al., arXiv:2107.03356, through the push-through identity). One step is dots_ (first pass over the
// window), commit_ (m x m), and combine or optim's mfac_update_ (second pass). No operator waits for the device: what
// depends on data is read from `ring` by the kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace torch_ext::curvature {

// What shapes a window's tensors.
struct FisherWindowLayout {
  int64_t num_grads;  // m
  int64_t dim;        // d, cut into tiles of 1024 columns, the last one padded with zeros
  std::string format = "float32";
  double topk = 0.01;           // share of a tile that the format topk keeps
  bool error_feedback = false;  // always on for topk
};

// Plain tensors on one device. Slots are numbered 0 ... m: one is spare, so that encoding a row which is then rejected
// destroys none.
struct FisherWindowState {
  at::Tensor rows;     // [tiles, m + 1, 1024] in the format's type; topk: bfloat16 [tiles, m + 1, kept]
  at::Tensor scales;   // int8: float32 [tiles, m + 1, 4], one per 256 columns; else [0]
  at::Tensor indices;  // topk: int16 [tiles, m + 1, kept], columns inside the tile, ascending; else [0]
  at::Tensor error;    // error feedback: float32 [2, tiles * 1024], the half (accepted rows) % 2 holds; else [0]
  at::Tensor gram;     // float64 [m + 1, m + 1]: q_i . q_j without damping, by slot; zero where unused
  at::Tensor factor;   // float64 [m + pad, m + pad]: Cholesky factor of K (CPU) or K^-1 (CUDA), see ring[6]
  at::Tensor ring;     // int64 [9], see RingField in fisher_window_kernel.h
};

// The names of the tensors, in order, and where they are.
TORCH_EXT_API const std::vector<std::pair<std::string, at::Tensor FisherWindowState::*>>& fisher_window_tensors();

// ValueError for num_grads < 1, dim < 1, a damping that is not positive and finite, an unknown format, topk outside
// (0, 1], or error feedback with a format that loses nothing.
TORCH_EXT_API void fisher_window_check(const FisherWindowLayout& layout, double damping);
// Bytes of the tensors of fisher_window_state.
TORCH_EXT_API int64_t fisher_window_bytes(const FisherWindowLayout& layout);
// ValueError with the bytes, what is free on `device`, and the formats that would fit.
TORCH_EXT_API void fisher_window_check_memory(const FisherWindowLayout& layout, const at::Device& device);
// An empty window; checks the memory first.
TORCH_EXT_API FisherWindowState fisher_window_state(const FisherWindowLayout& layout, const at::Device& device);
// ValueError naming the first tensor whose dtype or shape does not fit the layout (a checkpoint of another num_grads,
// format or size); `who` opens the message.
TORCH_EXT_API void fisher_window_check_state(const FisherWindowLayout& layout, const FisherWindowState& state,
                                             const std::string& who);

// What the tensors of a window do not say of it: float64 [2] on the CPU, the damping of its factor and dim. Saved with
// them under the name "about".
TORCH_EXT_API at::Tensor fisher_window_about(double damping, int64_t dim);
// Copies a saved window ("about" among its tensors) into `state`; the factor of another damping is made anew with the
// next call. ValueError, and nothing changes, if it is of another num_grads, dim or format.
TORCH_EXT_API void fisher_window_load(const FisherWindowLayout& layout, double damping, const FisherWindowState& state,
                                      const std::map<std::string, at::Tensor>& saved);

// What `push` and `ihvp` take: a dense real floating tensor [dim]; `what` names it in the message.
TORCH_EXT_API void fisher_window_check_row(const at::Tensor& row, int64_t dim, const char* what);

// The typed operators. `format` is the layout's.

// Pass 1. The row is, over all (grad, param) pairs in order and row-major inside each: +-g + weight_decay p, a missing
// gradient giving zeros (`negate` for the sign; g is divided by the 0-dim float32 grad_scale where there is one). It is
// encoded into the spare slot (with what earlier rows lost if there is error feedback), and dots [m + 1 or more]
// float64 becomes its products with every live row, by slot; at the spare slot its product with itself; the rest 0. One
// element that is not finite makes the latter not finite, in every format. Gradients may sit on another device than the
// window and have any floating dtype.
TORCH_EXT_API void fisher_window_dots_(const at::Tensor& rows, const at::Tensor& scales, const at::Tensor& indices,
                                       const at::Tensor& error, const at::Tensor& dots, const at::Tensor& ring,
                                       const c10::List<std::optional<at::Tensor>>& grads, at::TensorList params,
                                       at::ArrayRef<double> weight_decay, bool negate,
                                       const std::optional<at::Tensor>& grad_scale, std::string_view format);
// The m x m part. Accepts the row in the spare slot unless a product is not finite or `nonfinite`
// (0-dim float32) is not zero (then only ring's counters change
// and coefficients are 0). coefficients [m + 1] float64, by slot, become those of F^-1 q_new = G^T coefficients:
// m K^-1 e_new; while no more than warmup_steps rows have been accepted, m / (m lambda + |q_new|^2) e_new. With
// warmup_scaling times t/m. refactor_every: -1 after 16 m accepted rows (CPU) or m (CUDA) and when a probe of the
// residual asks for it; 0 never.
TORCH_EXT_API void fisher_window_commit_(const at::Tensor& gram, const at::Tensor& factor, const at::Tensor& ring,
                                         const at::Tensor& coefficients, const at::Tensor& dots, double damping,
                                         bool warmup_scaling, int64_t warmup_steps, int64_t refactor_every,
                                         const std::optional<at::Tensor>& nonfinite);
// Pass 2: G^T coefficients, [numel] in float64 for format float64, else float32.
TORCH_EXT_API at::Tensor fisher_window_combine(const at::Tensor& rows, const at::Tensor& scales,
                                               const at::Tensor& indices, const at::Tensor& coefficients,
                                               const at::Tensor& ring, int64_t numel, std::string_view format);
// G x by slot, float64 [m + 1], zero where no row lives. x: flat, at most tiles * 1024 elements.
TORCH_EXT_API at::Tensor fisher_window_project(const at::Tensor& rows, const at::Tensor& scales,
                                               const at::Tensor& indices, const at::Tensor& ring, const at::Tensor& x,
                                               std::string_view format);
// K^-1 right_side by slot, float64 [m + 1]; without a right side m K^-1 e_newest, what commit_ gives after the warm-up.
// Writes only to rebuild a factor that is missing, of another device, or of another damping (after ring[6] = 0).
TORCH_EXT_API at::Tensor fisher_window_solve_(const at::Tensor& gram, const at::Tensor& factor, const at::Tensor& ring,
                                              const std::optional<at::Tensor>& right_side, double damping);
// (x - G^T coefficients) / damping for a flat x: with coefficients = K^-1 G x this is F^-1 x. It loses about
// |x| / (lambda |F^-1 x|) times the rounding error, so products are in float64; dtype as combine's.
TORCH_EXT_API at::Tensor fisher_window_residual(const at::Tensor& rows, const at::Tensor& scales,
                                                const at::Tensor& indices, const at::Tensor& coefficients,
                                                const at::Tensor& ring, const at::Tensor& x, double damping,
                                                std::string_view format);
// The undamped Gram matrix of the `count` newest rows, oldest first, float64 [count, count].
TORCH_EXT_API at::Tensor fisher_window_gram(const at::Tensor& gram, const at::Tensor& ring, int64_t count);

}  // namespace torch_ext::curvature

// What shapes a window: its tensors, their size, and whether they fit.
#include <ATen/ops/zeros.h>
#include <c10/core/Allocator.h>

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <limits>
#include <sstream>
#include <vector>

#include "curvature/fisher_window/fisher_window_args.h"
#include "curvature/fisher_window/fisher_window_memory.h"
#include "curvature/fisher_window/fisher_window_op.h"

namespace torch_ext::curvature {
namespace {

using kernels::kTile;
using kernels::WindowFormat;

struct TensorSpec {
  const char* name;
  at::Tensor FisherWindowState::*tensor;
  at::ScalarType dtype;
  std::vector<int64_t> shape;
};

// Free places behind the factor, so that it need not move to the front at each step.
int64_t factor_size(int64_t num_grads) { return num_grads + std::min<int64_t>(64, num_grads + 7); }

std::vector<TensorSpec> specs(const FisherWindowLayout& layout) {
  const WindowFormat format = window_format(layout.format);
  const int64_t m = layout.num_grads, tiles = (layout.dim + kTile - 1) / kTile;
  const bool sparse = format == WindowFormat::kTopK;
  const int64_t kept = std::max<int64_t>(1, static_cast<int64_t>(std::ceil(layout.topk * static_cast<double>(kTile))));
  const std::vector<int64_t> none{0};
  const auto only = [&](bool used, const std::vector<int64_t>& shape) { return used ? shape : none; };
  using S = FisherWindowState;
  return {
      {"rows", &S::rows, window_dtype(format), {tiles, m + 1, sparse ? kept : kTile}},
      {"scales", &S::scales, at::kFloat, only(format == WindowFormat::kInt8, {tiles, m + 1, kernels::kScales})},
      {"indices", &S::indices, at::kShort, only(sparse, {tiles, m + 1, kept})},
      {"error", &S::error, at::kFloat, only(sparse || layout.error_feedback, {2, tiles * kTile})},
      {"gram", &S::gram, at::kDouble, {m + 1, m + 1}},
      {"factor", &S::factor, at::kDouble, {factor_size(m), factor_size(m)}},
      {"ring", &S::ring, at::kLong, {kernels::kRingSize}},
  };
}

std::string gigabytes(int64_t bytes) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(bytes < 10'000'000 ? 6 : 3) << static_cast<double>(bytes) * 1e-9 << " GB";
  return text.str();
}

// "window_format='bfloat16' takes 0.3 GB": the formats that take less than is free, largest first.
std::string formats_that_fit(const FisherWindowLayout& layout, int64_t available) {
  std::string text;
  for (const char* format : {"float32", "bfloat16", "int8", "topk"}) {
    FisherWindowLayout other = layout;
    other.format = format;
    other.error_feedback = layout.error_feedback && other.format != "float32";
    const int64_t bytes = fisher_window_bytes(other);
    if (bytes > available || bytes >= fisher_window_bytes(layout)) continue;
    text += (text.empty() ? "" : ", ") + std::string("window_format='") + format + "' takes " + gigabytes(bytes);
  }
  return text.empty() ? "no window_format fits: take fewer num_grads" : text;
}

}  // namespace

const std::vector<std::pair<std::string, at::Tensor FisherWindowState::*>>& fisher_window_tensors() {
  static const auto names = [] {
    std::vector<std::pair<std::string, at::Tensor FisherWindowState::*>> result;
    for (const TensorSpec& spec : specs({1, 1})) result.emplace_back(spec.name, spec.tensor);
    return result;
  }();
  return names;
}

void fisher_window_check(const FisherWindowLayout& layout, double damping) {
  TORCH_CHECK_VALUE(layout.num_grads >= 1, "num_grads must be at least 1, got ", layout.num_grads);
  TORCH_CHECK_VALUE(layout.dim >= 1, "dim must be at least 1, got ", layout.dim);
  TORCH_CHECK_VALUE(damping > 0 && damping < HUGE_VAL, "damping must be positive and finite, got ", damping);
  const WindowFormat format = window_format(layout.format);
  TORCH_CHECK_VALUE(layout.topk > 0 && layout.topk <= 1, "topk must be in (0, 1], got ", layout.topk);
  TORCH_CHECK_VALUE(!layout.error_feedback || (format != WindowFormat::kFloat && format != WindowFormat::kDouble),
                    "error_feedback is for window_format 'bfloat16', 'int8' and 'topk', which lose something; got '",
                    layout.format, "'");
}

int64_t fisher_window_bytes(const FisherWindowLayout& layout) {
  double bytes = 0;  // exact up to 2^53, and no overflow however large the numbers
  for (const TensorSpec& spec : specs(layout)) {
    double product = static_cast<double>(c10::elementSize(spec.dtype));
    for (const int64_t size : spec.shape) product *= static_cast<double>(size);
    bytes += product;
  }
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  return bytes < static_cast<double>(kMost) ? static_cast<int64_t>(bytes) : kMost;
}

void fisher_window_check_memory(const FisherWindowLayout& layout, const at::Device& device) {
  const std::optional<int64_t> available = available_memory(device);
  const int64_t bytes = fisher_window_bytes(layout);
  TORCH_CHECK_VALUE(!available.has_value() || bytes <= *available, "a window of ", layout.num_grads, " gradients of ",
                    layout.dim, " elements in window_format='", layout.format, "' takes ", bytes, " bytes (",
                    gigabytes(bytes), "), ", device, " has ", gigabytes(*available), " free; ",
                    formats_that_fit(layout, *available));
}

FisherWindowState fisher_window_state(const FisherWindowLayout& layout, const at::Device& device) {
  fisher_window_check_memory(layout, device);
  FisherWindowState state;
  for (const TensorSpec& spec : specs(layout)) {
    state.*spec.tensor = at::zeros(spec.shape, at::TensorOptions(device).dtype(spec.dtype));
  }
  return state;
}

void fisher_window_check_state(const FisherWindowLayout& layout, const FisherWindowState& state,
                               const std::string& who) {
  for (const TensorSpec& spec : specs(layout)) {
    const at::Tensor& tensor = state.*spec.tensor;
    TORCH_CHECK_VALUE(tensor.defined(), who, ": the loaded window lacks ", spec.name);
    TORCH_CHECK_VALUE(tensor.scalar_type() == spec.dtype && tensor.sizes() == spec.shape, who, ": the loaded window's ",
                      spec.name, " is ", tensor.scalar_type(), " of shape ", tensor.sizes(),
                      ", num_grads=", layout.num_grads, " and window_format='", layout.format, "' for ", layout.dim,
                      " elements need ", spec.dtype, " of shape ", at::IntArrayRef(spec.shape),
                      ": it was saved with another num_grads, window_format, topk or error_feedback, or for other "
                      "parameters");
  }
}

}  // namespace torch_ext::curvature

// Convolution as a linear layer on the unfolded input, some members at a time. Made of differentiable operators.
#include <ATen/ops/empty.h>
#include <ATen/ops/im2col.h>
#include <torch/library.h>
#include <torch_ext/ops/eggroll.h>

#include <algorithm>
#include <utility>

#include "ops/eggroll/eggroll_op.h"

namespace torch_ext::ops {
namespace {

constexpr const char* kConv = "eggroll_conv2d";
constexpr int64_t kUnfolded = int64_t{1} << 22;  // numbers of unfolded input at a time, unless one pair has more

using EggrollConvOp = at::Tensor(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                 c10::SymInt seed, c10::SymInt epoch, c10::SymInt member_begin, bool antithetic,
                                 double sigma, int64_t rank, std::string_view law, int64_t ordinal,
                                 int64_t bias_ordinal, at::IntArrayRef stride, at::IntArrayRef padding,
                                 at::IntArrayRef dilation);

struct Geometry {
  int64_t members, batch, height, width;  // of the result

  Geometry(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
           at::IntArrayRef dilation)
      : members(x.size(0)), batch(x.dim() == 5 ? x.size(1) : 1) {
    TORCH_CHECK_VALUE(weight.dim() == 4, kConv, ": weight must be [out, channels, kh, kw], got ", weight.sizes());
    TORCH_CHECK_VALUE((x.dim() == 4 || x.dim() == 5) && x.size(-3) == weight.size(1), kConv, ": x must be [members, ",
                      weight.size(1), ", height, width] or [members, batch, ", weight.size(1),
                      ", height, width] beside a weight of ", weight.sizes(), ", got ", x.sizes());
    int64_t size[2];
    for (size_t d = 0; d < 2; ++d) {
      TORCH_CHECK_VALUE(stride[d] > 0 && dilation[d] > 0 && padding[d] >= 0, kConv,
                        ": stride and dilation must be positive and padding not negative, got ", stride, ", ", dilation,
                        " and ", padding);
      const auto axis = static_cast<int64_t>(d);
      const int64_t span = dilation[d] * (weight.size(2 + axis) - 1) + 1;
      const int64_t room = x.size(axis - 2) + 2 * padding[d] - span;
      TORCH_CHECK_VALUE(room >= 0, kConv, ": the kernel spans ", span, " pixels, the padded input has ", room + span);
      size[d] = room / stride[d] + 1;
    }
    height = size[0];
    width = size[1];
  }
};

at::Tensor conv_impl(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                     c10::SymInt seed, c10::SymInt epoch, c10::SymInt member_begin, bool antithetic, double sigma,
                     int64_t rank, std::string_view law, int64_t ordinal, int64_t bias_ordinal, at::IntArrayRef stride,
                     at::IntArrayRef padding, at::IntArrayRef dilation) {
  static const auto linear = eggroll_operator<EggrollLinearOp>("torch_ext::eggroll_linear");
  const Geometry to(x, weight, stride, padding, dilation);
  const int64_t out = weight.size(0), columns = weight.numel() / std::max<int64_t>(1, out);
  const int64_t pixels = to.height * to.width;
  const at::Tensor matrix = weight.reshape({out, columns});
  const int64_t pairs = kUnfolded / std::max<int64_t>(1, 2 * to.batch * columns * pixels);
  const int64_t step = std::max<int64_t>(2, 2 * pairs);
  at::Tensor y = at::empty({to.members, to.batch, out, to.height, to.width}, x.options());
  for (int64_t first = 0; first < to.members; first += step) {
    const int64_t count = std::min(step, to.members - first);
    const at::Tensor images = x.narrow(0, first, count).reshape({count * to.batch, x.size(-3), x.size(-2), x.size(-1)});
    const at::Tensor unfolded = at::im2col(images, weight.sizes().slice(2), dilation, padding, stride);
    const at::Tensor rows = unfolded.view({count, to.batch, columns, pixels}).transpose(2, 3);
    const at::Tensor part = linear.call(rows, matrix, bias, seed, epoch, member_begin + first, antithetic, sigma, rank,
                                        law, ordinal, bias_ordinal, false);
    y.narrow(0, first, count).view({count, to.batch, out, pixels}).copy_(part.transpose(2, 3));
  }
  return x.dim() == 5 ? y : y.squeeze(1);
}

}  // namespace

at::Tensor eggroll_conv2d(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                          const EggrollNoise& noise, int64_t ordinal, int64_t bias_ordinal, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation) {
  static const auto op = eggroll_operator<EggrollConvOp>("torch_ext::eggroll_conv2d");
  return op.call(x, weight, bias.has_value() && bias->defined() ? bias : std::nullopt, noise.seed, noise.epoch,
                 noise.member_begin, noise.antithetic, noise.sigma, noise.rank, noise.law, ordinal, bias_ordinal,
                 stride, padding, dilation);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "eggroll_conv2d(Tensor x, Tensor weight, Tensor? bias, *, SymInt seed, SymInt epoch, SymInt member_begin, "
      "bool antithetic, float sigma, int rank, str law, int ordinal, int bias_ordinal=-1, int[2] stride=1, "
      "int[2] padding=0, int[2] dilation=1) -> Tensor");
}
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) { m.impl("eggroll_conv2d", conv_impl); }

}  // namespace torch_ext::ops

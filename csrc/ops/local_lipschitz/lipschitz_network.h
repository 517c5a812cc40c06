// The network that the bounds walk: a graph of linear maps, activations and sums over flat rows of values.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "ops/local_lipschitz/lipschitz_layers.h"

namespace torch_ext::ops {

// Node i makes value i + 1 from its inputs; value 0 is the network's input. Values are rows [..., size].
struct LipschitzNode {
  LipschitzKind kind = LipschitzKind::kFlatten;  // kFlatten: passes its input on
  std::vector<int64_t> inputs;
  std::string name;
  std::vector<int64_t> shape;  // of the value, without the batch
  int64_t size = 0;            // its product

  // Linear maps: weight (linear [out, in], convolution [out, in / groups, h, w], batch norm [size]), its magnitude, and
  // the flat bias [size], undefined if there is none.
  at::Tensor weight, magnitude, bias;
  std::vector<int64_t> input_shape, stride, padding, dilation;
  int64_t groups = 1;

  LipschitzActivation activation = LipschitzActivation::kRelu;
  double a = 0, b = 0;

  bool is_map() const { return kind != LipschitzKind::kActivation && kind != LipschitzKind::kAdd; }
};

struct LipschitzNetwork {
  std::vector<LipschitzNode> nodes;
  int64_t input_size = 0;
  std::vector<bool> after_activation;         // per value: an activation lies between the input and it
  std::vector<bool> before_activation;        // per value: an activation lies between it and the output
  std::vector<int64_t> maps_before;           // per value: linear maps (and sums, as two) between the input and it
  std::vector<std::vector<int64_t>> readers;  // per value: the nodes that read it, twice where twice

  int64_t values() const { return static_cast<int64_t>(nodes.size()) + 1; }
  int64_t size_of(int64_t value) const { return value == 0 ? input_size : nodes[static_cast<size_t>(value - 1)].size; }
  int64_t output_size() const { return size_of(values() - 1); }
  const LipschitzNode& maker(int64_t value) const { return nodes[static_cast<size_t>(value - 1)]; }
};

// Shapes are checked (ValueError naming the layer); a batch norm behind a linear map is folded into it.
LipschitzNetwork make_lipschitz_network(const std::vector<at::Tensor>& tensors, at::IntArrayRef layers,
                                        at::ArrayRef<double> numbers, const std::string& names,
                                        const at::Tensor& input);

// x [..., in] -> x W^T without bias; with |W| if `magnitude`.
at::Tensor lipschitz_apply(const LipschitzNode& node, const at::Tensor& x, bool magnitude = false);
// The same for the identity [1, in, in].
at::Tensor lipschitz_apply_identity(const LipschitzNode& node, int64_t size, const at::TensorOptions& options);
// g [..., out] -> g W.
at::Tensor lipschitz_transpose(const LipschitzNode& node, const at::Tensor& g, bool magnitude = false);

// Unit vectors of the chosen outputs, [outputs, output size]: what the rows of the Jacobian start from.
at::Tensor lipschitz_output_rows(const LipschitzNetwork& network, at::IntArrayRef outputs,
                                 const at::TensorOptions& options);

// Sizes as plain integers, also while a graph with symbolic shapes is traced.
int64_t length(const at::Tensor& tensor, int64_t dim);

}  // namespace torch_ext::ops

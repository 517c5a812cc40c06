#include "ops/local_lipschitz/lipschitz_network.h"

#include <ATen/ATen.h>

#include <functional>
#include <numeric>
#include <sstream>
#include <utility>

namespace torch_ext::ops {
namespace {

int64_t product(const std::vector<int64_t>& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
}

std::vector<int64_t> sizes_of(const at::Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(length(tensor, i));
  return sizes;
}

// Reads the four lists that LipschitzLayers wrote, one layer after the other.
class Reader {
 public:
  Reader(const std::vector<at::Tensor>& tensors, at::IntArrayRef layers, at::ArrayRef<double> numbers,
         const std::string& names, const at::Tensor& input)
      : tensors_(tensors), layers_(layers), numbers_(numbers), names_(names), input_(input) {
    shapes_.push_back(sizes_of(input));
    shapes_[0].erase(shapes_[0].begin());
  }

  LipschitzNetwork read() {
    LipschitzNetwork network;
    network.input_size = product(shapes_[0]);
    while (field_ < layers_.size()) {
      LipschitzNode node;
      std::getline(names_, node.name);
      node.kind = static_cast<LipschitzKind>(next());
      node.inputs.push_back(input());
      read_fields(node);
      node.size = product(node.shape);
      shapes_.push_back(node.shape);
      network.nodes.push_back(std::move(node));
    }
    TORCH_CHECK_VALUE(!network.nodes.empty(), "local_lipschitz: the model has no layer");
    TORCH_CHECK_VALUE(tensor_ == tensors_.size() && number_ == numbers_.size(),
                      "local_lipschitz: tensors or numbers are left over behind the last layer");
    return network;
  }

 private:
  int64_t next() {
    TORCH_CHECK_VALUE(field_ < layers_.size(), "local_lipschitz: the list of layers ends within a layer");
    return layers_[field_++];
  }
  int64_t input() {
    const int64_t value = next();
    TORCH_CHECK_VALUE(value >= 0 && value < static_cast<int64_t>(shapes_.size()),
                      "local_lipschitz: a layer reads value ", value, " before it is made");
    return value;
  }
  double number() {
    TORCH_CHECK_VALUE(number_ < numbers_.size(), "local_lipschitz: the list of numbers is too short");
    return numbers_[number_++];
  }
  at::Tensor tensor(const LipschitzNode& node) {
    TORCH_CHECK_VALUE(tensor_ < tensors_.size(), "local_lipschitz: the list of tensors is too short");
    const at::Tensor& tensor = tensors_[tensor_++];
    TORCH_CHECK_VALUE(tensor.scalar_type() == input_.scalar_type() && tensor.device() == input_.device(),
                      "local_lipschitz: layer '", node.name, "' is ", tensor.toString(), " on ", tensor.device(),
                      ", the input ", input_.toString(), " on ", input_.device(), "; bring both together with .to()");
    return tensor;
  }
  const std::vector<int64_t>& shape(int64_t value) const { return shapes_[static_cast<size_t>(value)]; }

  void read_fields(LipschitzNode& node) {
    const std::vector<int64_t>& from = shape(node.inputs[0]);
    node.input_shape = from;
    node.shape = from;
    switch (node.kind) {
      case LipschitzKind::kLinear:
        return read_linear(node);
      case LipschitzKind::kConv2d:
        return read_conv(node);
      case LipschitzKind::kBatchNorm:
        return read_norm(node);
      case LipschitzKind::kActivation:
        node.activation = static_cast<LipschitzActivation>(next());
        node.a = number();
        node.b = number();
        return;
      case LipschitzKind::kAdd:
        node.inputs.push_back(input());
        TORCH_CHECK_VALUE(shape(node.inputs[1]) == from, "local_lipschitz: '", node.name, "' adds values of shape ",
                          at::IntArrayRef(from), " and ", at::IntArrayRef(shape(node.inputs[1])));
        return;
      case LipschitzKind::kFlatten:
        node.shape = {product(from)};
        return;
    }
    TORCH_CHECK_VALUE(false, "local_lipschitz: no layer has the number ", static_cast<int64_t>(node.kind));
  }

  void read_linear(LipschitzNode& node) {
    const bool has_bias = next() != 0;
    node.weight = tensor(node);
    if (has_bias) node.bias = tensor(node);
    TORCH_CHECK_VALUE(node.input_shape.size() == 1 && node.input_shape[0] == length(node.weight, 1),
                      "local_lipschitz: layer '", node.name, "' (Linear) takes ", length(node.weight, 1),
                      " features, got a value of shape ", at::IntArrayRef(node.input_shape),
                      node.input_shape.size() == 1 ? "" : "; flatten it first");
    node.shape = {length(node.weight, 0)};
    node.magnitude = node.weight.abs();
  }

  void read_conv(LipschitzNode& node) {
    const bool has_bias = next() != 0;
    for (auto* list : {&node.stride, &node.padding, &node.dilation}) {
      for (int i = 0; i < 2; ++i) list->push_back(next());
    }
    node.groups = next();
    node.weight = tensor(node);
    const at::Tensor bias = has_bias ? tensor(node) : at::Tensor();
    TORCH_CHECK_VALUE(node.input_shape.size() == 3 && node.input_shape[0] == length(node.weight, 1) * node.groups,
                      "local_lipschitz: layer '", node.name, "' (Conv2d) takes ", length(node.weight, 1) * node.groups,
                      " channels of an image, got a value of shape ", at::IntArrayRef(node.input_shape));
    node.shape = {length(node.weight, 0)};
    for (size_t i = 0; i < 2; ++i) {
      const int64_t reach = node.dilation[i] * (length(node.weight, 2 + static_cast<int64_t>(i)) - 1);
      const int64_t room = node.input_shape[i + 1] + 2 * node.padding[i] - reach - 1;
      TORCH_CHECK_VALUE(room >= 0, "local_lipschitz: layer '", node.name, "' (Conv2d) has a kernel larger than its ",
                        "input ", at::IntArrayRef(node.input_shape));
      node.shape.push_back(room / node.stride[i] + 1);
    }
    if (has_bias) node.bias = spread(bias, node.shape);
    node.magnitude = node.weight.abs();
  }

  void read_norm(LipschitzNode& node) {
    const bool has_weight = next() != 0, has_bias = next() != 0;
    const double eps = number();
    const at::Tensor mean = tensor(node), var = tensor(node);
    at::Tensor scale = (var + eps).rsqrt();
    if (has_weight) scale = tensor(node) * scale;
    const at::Tensor shift = has_bias ? tensor(node) - mean * scale : -mean * scale;
    TORCH_CHECK_VALUE(!node.input_shape.empty() && node.input_shape[0] == length(mean, 0), "local_lipschitz: layer '",
                      node.name, "' (BatchNorm) takes ", length(mean, 0), " channels, got a value of shape ",
                      at::IntArrayRef(node.input_shape));
    node.weight = spread(scale, node.shape);
    node.bias = spread(shift, node.shape);
    node.magnitude = node.weight.abs();
  }

  // One number a channel -> a flat row.
  static at::Tensor spread(const at::Tensor& channels, const std::vector<int64_t>& shape) {
    const int64_t places = product(shape) / shape[0];
    return channels.unsqueeze(1).expand({shape[0], places}).reshape({product(shape)});
  }

  const std::vector<at::Tensor>& tensors_;
  at::IntArrayRef layers_;
  at::ArrayRef<double> numbers_;
  std::istringstream names_;
  const at::Tensor& input_;
  std::vector<std::vector<int64_t>> shapes_;
  size_t field_ = 0, tensor_ = 0, number_ = 0;
};

// A batch norm whose input is a linear map that nobody else reads: the map takes it over.
void fold_norms(LipschitzNetwork& network) {
  std::vector<int64_t> readers(static_cast<size_t>(network.values()), 0);
  for (const LipschitzNode& node : network.nodes) {
    for (const int64_t value : node.inputs) ++readers[static_cast<size_t>(value)];
  }
  for (LipschitzNode& norm : network.nodes) {
    if (norm.kind != LipschitzKind::kBatchNorm || norm.inputs[0] == 0) continue;
    LipschitzNode& map = network.nodes[static_cast<size_t>(norm.inputs[0] - 1)];
    const bool linear = map.kind == LipschitzKind::kLinear, conv = map.kind == LipschitzKind::kConv2d;
    if (!(linear || conv) || readers[static_cast<size_t>(norm.inputs[0])] != 1) continue;
    const int64_t channels = map.shape[0];
    const at::Tensor scale = norm.weight.view({channels, -1}).select(1, 0);
    map.weight = map.weight * (linear ? scale.unsqueeze(1) : scale.view({channels, 1, 1, 1}));
    map.bias = map.bias.defined() ? at::addcmul(norm.bias, map.bias, norm.weight) : norm.bias;
    map.magnitude = map.weight.abs();
    norm.kind = LipschitzKind::kFlatten;
    norm.weight = norm.magnitude = norm.bias = at::Tensor();
  }
}

void find_positions(LipschitzNetwork& network) {
  const auto count = static_cast<size_t>(network.values());
  network.after_activation.assign(count, false);
  network.before_activation.assign(count, false);
  network.maps_before.assign(count, 0);
  network.readers.assign(count, {});
  for (size_t i = 0; i < network.nodes.size(); ++i) {
    const LipschitzNode& node = network.nodes[i];
    int64_t maps = node.kind == LipschitzKind::kAdd ? 2 : node.kind == LipschitzKind::kFlatten ? 0 : 1;
    for (const int64_t value : node.inputs) {
      const auto from = static_cast<size_t>(value);
      network.readers[from].push_back(static_cast<int64_t>(i));
      if (network.after_activation[from]) network.after_activation[i + 1] = true;
      maps += network.maps_before[from];
    }
    if (node.kind == LipschitzKind::kActivation) network.after_activation[i + 1] = true;
    network.maps_before[i + 1] = maps;
  }
  for (size_t i = network.nodes.size(); i-- > 0;) {
    const LipschitzNode& node = network.nodes[i];
    const bool before = network.before_activation[i + 1] || node.kind == LipschitzKind::kActivation;
    for (const int64_t value : node.inputs) {
      if (before) network.before_activation[static_cast<size_t>(value)] = true;
    }
  }
}

std::vector<int64_t> with_rows(const std::vector<int64_t>& shape) {
  std::vector<int64_t> sizes{-1};
  sizes.insert(sizes.end(), shape.begin(), shape.end());
  return sizes;
}

at::Tensor like_rows(const at::Tensor& rows, const at::Tensor& of, int64_t size) {
  std::vector<int64_t> sizes = sizes_of(of);
  sizes.back() = size;
  return rows.reshape(sizes);
}

}  // namespace

int64_t length(const at::Tensor& tensor, int64_t dim) { return tensor.sym_size(dim).guard_int(__FILE__, __LINE__); }

at::Tensor lipschitz_output_rows(const LipschitzNetwork& network, at::IntArrayRef outputs,
                                 const at::TensorOptions& options) {
  // By selection, not by an index: a tensor of indices has no data while a graph is traced.
  const at::Tensor all = at::eye(network.output_size(), options.requires_grad(false));
  std::vector<at::Tensor> rows;
  for (const int64_t output : outputs) rows.push_back(all.select(0, output));
  return at::stack(rows);
}

LipschitzNetwork make_lipschitz_network(const std::vector<at::Tensor>& tensors, at::IntArrayRef layers,
                                        at::ArrayRef<double> numbers, const std::string& names,
                                        const at::Tensor& input) {
  LipschitzNetwork network = Reader(tensors, layers, numbers, names, input).read();
  fold_norms(network);
  find_positions(network);
  return network;
}

at::Tensor lipschitz_apply(const LipschitzNode& node, const at::Tensor& x, bool magnitude) {
  const at::Tensor& weight = magnitude ? node.magnitude : node.weight;
  switch (node.kind) {
    case LipschitzKind::kLinear:
      return at::linear(x, weight);
    case LipschitzKind::kConv2d:
      return like_rows(at::conv2d(x.reshape(with_rows(node.input_shape)), weight, {}, node.stride, node.padding,
                                  node.dilation, node.groups),
                       x, node.size);
    case LipschitzKind::kBatchNorm:
      return x * weight;
    default:
      return x;
  }
}

at::Tensor lipschitz_apply_identity(const LipschitzNode& node, int64_t size, const at::TensorOptions& options) {
  if (node.kind == LipschitzKind::kLinear) return node.weight.t().unsqueeze(0);
  if (node.kind == LipschitzKind::kBatchNorm) return at::diag(node.weight).unsqueeze(0);
  return lipschitz_apply(node, at::eye(size, options).unsqueeze(0));
}

at::Tensor lipschitz_transpose(const LipschitzNode& node, const at::Tensor& g, bool magnitude) {
  const at::Tensor& weight = magnitude ? node.magnitude : node.weight;
  switch (node.kind) {
    case LipschitzKind::kLinear:
      return at::matmul(g, weight);
    case LipschitzKind::kConv2d: {
      std::vector<int64_t> beyond;  // rows and columns that the last position of the kernel does not reach
      for (size_t i = 0; i < 2; ++i) {
        const int64_t reach = node.dilation[i] * (length(weight, 2 + static_cast<int64_t>(i)) - 1) + 1;
        beyond.push_back(node.input_shape[i + 1] -
                         ((node.shape[i + 1] - 1) * node.stride[i] - 2 * node.padding[i] + reach));
      }
      int64_t size = product(node.input_shape);
      return like_rows(at::conv_transpose2d(g.reshape(with_rows(node.shape)), weight, {}, node.stride, node.padding,
                                            beyond, node.groups, node.dilation),
                       g, size);
    }
    case LipschitzKind::kBatchNorm:
      return g * weight;
    default:
      return g;
  }
}

}  // namespace torch_ext::ops

#include "ops/snell/snell_second.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace torch_ext::ops {
namespace {

using kernels::SnellRule;
using Tensors = std::vector<at::Tensor>;

constexpr int64_t kSecondTile = 256;  // a tile's graph holds some twenty tensors of its size

// What one tile depends on; the last two only where the threshold counts.
struct Leaves {
  at::Tensor grad_y, x, a, b, holder_a, holder_b;

  Tensors all() const {
    return holder_a.defined() ? Tensors{grad_y, x, a, b, holder_a, holder_b} : Tensors{grad_y, x, a, b};
  }
};

// The path of the entry that holds the threshold.
struct Holder {
  int64_t row = -1, column = -1;
};

at::Tensor leaf(const at::Tensor& value) { return value.detach().clone().set_requires_grad(true); }

at::Tensor distance(const at::Tensor& a, const at::Tensor& b) {  // [n, q], [m, q]
  at::Tensor square = at::zeros({a.size(0), b.size(0)}, a.options());
  for (int64_t k = 0; k < a.size(1); ++k) {
    square = square + (a.select(1, k).unsqueeze(1) - b.select(1, k).unsqueeze(0)).square();
  }
  const at::Tensor positive = square > 0;
  return at::where(positive, at::where(positive, square, at::ones_like(square)).sqrt(), at::zeros_like(square));
}

at::Tensor weight(const SnellLayer& layer, const at::Tensor& a, const at::Tensor& b) {  // [2, n, q], [2, m, q]
  return (distance(a[0], b[0]) - distance(a[1], b[1])) * layer.weights.scale;
}

// |W| of a block with the kernel's bits, so that the mask is that of the forward pass.
at::Tensor magnitude(const SnellLayer& layer, const kernels::SnellBlock& block) {
  SnellLayer plain = layer;
  plain.a = layer.a.narrow(1, block.row, block.rows).contiguous();
  plain.b = layer.b.narrow(1, block.column, block.columns).contiguous();
  plain.weights.a = plain.a.const_data_ptr();
  plain.weights.b = plain.b.const_data_ptr();
  plain.weights.rows = block.rows;
  plain.weights.columns = block.columns;
  plain.weights.rule = SnellRule::kNone;
  const at::Tensor out = at::empty({block.rows, block.columns}, layer.a.options());
  snell_fill(plain, at::zeros({}, layer.a.options()), out);
  return out.abs_();
}

template <typename Body>
void for_each_tile(const SnellLayer& layer, const Body& body) {
  for (int64_t i = 0; i < layer.weights.rows; i += kSecondTile) {
    for (int64_t j = 0; j < layer.weights.columns; j += kSecondTile) {
      body(kernels::SnellBlock{i, std::min(kSecondTile, layer.weights.rows - i), j,
                               std::min(kSecondTile, layer.weights.columns - j)});
    }
  }
}

Holder find_holder(const SnellLayer& layer, const at::Tensor& t) {
  int64_t least = layer.entries();
  for_each_tile(layer, [&](const kernels::SnellBlock& block) {
    const at::Tensor at = magnitude(layer, block).eq(t).nonzero();
    if (at.size(0) == 0) return;
    const at::Tensor index = (at.select(1, 0) + block.row) * layer.weights.columns + at.select(1, 1) + block.column;
    least = std::min(least, index.min().item<int64_t>());
  });
  if (least == layer.entries()) return {};
  return {least / layer.weights.columns, least % layer.weights.columns};
}

at::Tensor sparsified(const SnellLayer& layer, const at::Tensor& w, const at::Tensor& t, const at::Tensor& above) {
  const at::Tensor size = layer.exact ? w.abs() : w.abs().detach();
  at::Tensor kept;
  switch (layer.weights.rule) {
    case SnellRule::kCode:
      kept = w * size;
      break;
    case SnellRule::kPaper:
      kept = w * (size - t);
      break;
    case SnellRule::kSoft:
      kept = w - w.sign().detach() * t;
      break;
    case SnellRule::kHard:
      kept = w;
      break;
    case SnellRule::kNone:
      return w;
  }
  return at::where(above, kept, at::zeros_like(kept));
}

// The graph of one tile, differentiated twice: gradients of <v, gradient of sum(grad_y * x phi(W))>.
Tensors differentiate(const SnellLayer& layer, const at::Tensor& t, const Leaves& leaves, const at::Tensor& above,
                      const Tensors& v) {
  const at::AutoGradMode enabled(true);
  at::Tensor threshold = t;
  if (leaves.holder_a.defined()) {
    threshold = weight(layer, leaves.holder_a.unsqueeze(1), leaves.holder_b.unsqueeze(1)).abs().squeeze();
  }
  const at::Tensor phi = sparsified(layer, weight(layer, leaves.a, leaves.b), threshold, above);
  const at::Tensor value = (leaves.x.matmul(phi) * leaves.grad_y).sum();
  const Tensors all = leaves.all();
  const Tensors first = torch::autograd::grad({value}, Tensors(all.begin() + 1, all.end()), {}, /*retain_graph=*/true,
                                              /*create_graph=*/true, /*allow_unused=*/true);
  Tensors products;
  for (size_t i = 0; i < first.size(); ++i) {
    if (first[i].defined() && v[i].defined()) products.push_back((first[i] * v[i]).sum());
  }
  if (products.empty()) return Tensors(all.size());
  const at::Tensor total = at::stack(products).sum();
  if (!total.requires_grad()) return Tensors(all.size());
  return torch::autograd::grad({total}, all, {}, /*retain_graph=*/false, /*create_graph=*/false,
                               /*allow_unused=*/true);
}

void accumulate(at::Tensor to, const at::Tensor& part) {
  if (part.defined()) to.add_(part);
}

}  // namespace

SnellSecond snell_second(const SnellLayer& layer, const at::Tensor& t, const at::Tensor& x, const at::Tensor& grad_y,
                         const SnellGradients& v, bool pulled) {
  const at::AutoGradMode disabled(false);
  const SnellRule rule = layer.weights.rule;
  Holder holder;
  if (pulled && layer.exact && (rule == SnellRule::kPaper || rule == SnellRule::kSoft)) holder = find_holder(layer, t);
  const at::Tensor b = layer.b.view({2, layer.weights.q, -1}).transpose(1, 2);  // [2, columns, q]
  SnellSecond result{at::zeros_like(grad_y), at::zeros_like(x), at::zeros_like(layer.a),
                     at::zeros({2, layer.weights.columns, layer.weights.q}, layer.a.options())};
  const auto part = [](const at::Tensor& from, int64_t dim, int64_t begin, int64_t size) {
    return from.defined() ? from.narrow(dim, begin, size) : from;
  };
  for_each_tile(layer, [&](const kernels::SnellBlock& block) {
    const auto rows = [&](const at::Tensor& from, int64_t dim) { return part(from, dim, block.row, block.rows); };
    const auto columns = [&](const at::Tensor& from, int64_t dim) {
      return part(from, dim, block.column, block.columns);
    };
    Leaves leaves{leaf(columns(grad_y, 1)), leaf(rows(x, 1)), leaf(rows(layer.a, 1)), leaf(columns(b, 1)), {}, {}};
    Tensors cotangents{rows(v.x, 1), rows(v.a, 1), columns(v.b, 1)};
    if (holder.row >= 0) {
      leaves.holder_a = leaf(layer.a.select(1, holder.row));
      leaves.holder_b = leaf(b.select(1, holder.column));
      cotangents.push_back(v.a.defined() ? v.a.select(1, holder.row) : v.a);
      cotangents.push_back(v.b.defined() ? v.b.select(1, holder.column) : v.b);
    }
    const Tensors grads = differentiate(layer, t, leaves, magnitude(layer, block) > t, cotangents);
    accumulate(columns(result.grad_y, 1), grads[0]);
    accumulate(rows(result.x, 1), grads[1]);
    accumulate(rows(result.a, 1), grads[2]);
    accumulate(columns(result.b, 1), grads[3]);
    if (holder.row < 0) return;
    accumulate(result.a.select(1, holder.row), grads[4]);
    accumulate(result.b.select(1, holder.column), grads[5]);
  });
  return result;
}

}  // namespace torch_ext::ops

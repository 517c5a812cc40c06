#include "core/pickle_writer.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <string_view>
#include <utility>

#include "core/format_error.h"
#include "core/pickle_format.h"
#include "core/value_tree.h"

namespace torch_ext::core {
namespace {

const DTypeName& dtype_name(c10::ScalarType dtype) {
  const auto* found = std::find_if(std::begin(kDTypeNames), std::end(kDTypeNames),
                                   [&](const DTypeName& entry) { return entry.dtype == dtype; });
  require(found != std::end(kDTypeNames), "holds a tensor of dtype ", c10::toString(dtype),
          ", which the checkpoint format does not have");
  return *found;
}

void check_tensor(const at::Tensor& tensor) {
  require(tensor.defined(), "holds an undefined tensor; leave it out or store None");
  require(!tensor.unsafeGetTensorImpl()->is_python_dispatch(),
          "holds a tensor of a Python subclass; store a plain tensor (DTensor: its full or local tensor)");
  require(
      tensor.layout() == c10::Layout::Strided && !tensor.is_quantized() && tensor.has_storage() && !tensor.is_meta(),
      "holds a tensor without plain memory (layout ", tensor.layout(), ", dtype ", tensor.scalar_type(), ", device ",
      tensor.device(), "); only strided tensors with data can be stored");
  require(!tensor.is_conj() && !tensor.is_neg(),
          "holds a lazily conjugated or negated tensor; store resolve_conj() and resolve_neg() of it");
}

// One past the last element of a non-empty tensor, counted from the start of its storage.
int64_t end_of(const at::Tensor& tensor) {
  int64_t last = tensor.storage_offset();
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  return last + 1;
}

// Which part of each storage is written. Keyed by dtype too, because a file gives each storage one dtype: memory viewed
// as two dtypes is written twice, with the right values, and no longer shared.
class StoragePlan {
 public:
  struct Span {
    size_t record = 0;
    int64_t begin = std::numeric_limits<int64_t>::max();
    int64_t end = 0;
    int64_t size() const { return std::max<int64_t>(end - begin, 0); }
  };

  explicit StoragePlan(const c10::IValue& value) { collect(value); }

  const Span& span_of(const at::Tensor& tensor) const { return spans_.at(key_of(tensor)); }

  std::vector<at::Tensor> storages() const {
    std::vector<at::Tensor> storages(spans_.size());
    for (const auto& entry : spans_) {
      const Span& span = entry.second;
      const at::Tensor& tensor = tensors_[span.record];
      const int64_t begin = span.size() == 0 ? 0 : span.begin;
      storages[span.record] =
          at::empty({0}, tensor.options().requires_grad(false)).set_(tensor.storage(), begin, {span.size()}, {1});
    }
    return storages;
  }

 private:
  using Key = std::pair<const c10::StorageImpl*, c10::ScalarType>;

  static Key key_of(const at::Tensor& tensor) {
    return {tensor.storage().unsafeGetStorageImpl(), tensor.scalar_type()};
  }

  void collect(const c10::IValue& value) {
    if (value.isTensor()) {
      add(value.toTensor());
    } else if (!is_leaf(value)) {
      for_each_child(value, [this](const c10::IValue& child) { collect(child); });
    }
  }

  void add(const at::Tensor& tensor) {
    check_tensor(tensor);
    const auto [entry, is_new] = spans_.try_emplace(key_of(tensor));
    Span& span = entry->second;
    if (is_new) {
      span.record = tensors_.size();
      tensors_.push_back(tensor);
    }
    if (tensor.numel() > 0) {
      span.begin = std::min(span.begin, tensor.storage_offset());
      span.end = std::max(span.end, end_of(tensor));
    }
  }

  std::map<Key, Span> spans_;
  std::vector<at::Tensor> tensors_;  // the first tensor of each record, in the order of first use
};

class PickleWriter {
 public:
  explicit PickleWriter(const StoragePlan& plan) : plan_(plan) {}

  std::string write(const c10::IValue& value) {
    put(PickleOp::kProto);
    put_bytes(kPickleProtocol, 1);
    put_value(value);
    put(PickleOp::kStop);
    return std::move(out_);
  }

 private:
  void put_value(const c10::IValue& value) {
    if (value.isTensor()) {
      put_tensor(value.toTensor());
    } else if (value.isInt()) {
      put_int(value.toInt());
    } else if (value.isDouble()) {
      put_double(value.toDouble());
    } else if (value.isBool()) {
      put(value.toBool() ? PickleOp::kTrue : PickleOp::kFalse);
    } else if (value.isString()) {
      put_string(value.toStringRef());
    } else if (value.isNone()) {
      put(PickleOp::kNone);
    } else {
      put_container(value);
    }
  }

  void put_container(const c10::IValue& value) {
    if (value.isGenericDict()) {
      put(PickleOp::kEmptyDict);
      put_children(value, PickleOp::kSetItems);
    } else if (value.isList()) {
      put(PickleOp::kEmptyList);
      put_children(value, PickleOp::kAppends);
    } else {
      put_children(value, PickleOp::kTuple);
    }
  }

  void put_children(const c10::IValue& container, PickleOp last) {
    put(PickleOp::kMark);
    for_each_child(container, [this](const c10::IValue& child) { put_value(child); });
    put(last);
  }

  // The call torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks).
  void put_tensor(const at::Tensor& tensor) {
    const DTypeName& dtype = dtype_name(tensor.scalar_type());
    const StoragePlan::Span& span = plan_.span_of(tensor);
    put_global("torch._utils", dtype.storage.empty() ? "_rebuild_tensor_v3" : "_rebuild_tensor_v2");
    put(PickleOp::kMark);
    put_storage(tensor, dtype, span);
    put_int(tensor.numel() == 0 ? 0 : tensor.storage_offset() - span.begin);
    put_int_tuple(tensor.sizes());
    put_int_tuple(tensor.strides());
    put(tensor.requires_grad() ? PickleOp::kTrue : PickleOp::kFalse);
    put_global("collections", "OrderedDict");  // no backward hooks
    put(PickleOp::kEmptyTuple);
    put(PickleOp::kReduce);
    if (dtype.storage.empty()) {
      put_global("torch", dtype.name);
    }
    put(PickleOp::kTuple);
    put(PickleOp::kReduce);
  }

  // The persistent id ("storage", class, record, device, number of elements).
  void put_storage(const at::Tensor& tensor, const DTypeName& dtype, const StoragePlan::Span& span) {
    put(PickleOp::kMark);
    put_string("storage");
    if (dtype.storage.empty()) {
      put_global("torch.storage", "UntypedStorage");
    } else {
      put_global("torch", dtype.storage);
    }
    put_string(std::to_string(span.record));
    put_string(tensor.device().str());
    put_int(dtype.storage.empty() ? span.size() * static_cast<int64_t>(tensor.element_size()) : span.size());
    put(PickleOp::kTuple);
    put(PickleOp::kPersistentId);
  }

  void put_int_tuple(at::IntArrayRef values) {
    put(PickleOp::kMark);
    for (const int64_t value : values) {
      put_int(value);
    }
    put(PickleOp::kTuple);
  }

  void put_int(int64_t value) {
    if (value >= std::numeric_limits<int32_t>::min() && value <= std::numeric_limits<int32_t>::max()) {
      put(PickleOp::kInt32);
      put_bytes(static_cast<uint64_t>(value), 4);
    } else {
      put(PickleOp::kLong);
      put_bytes(8, 1);
      put_bytes(static_cast<uint64_t>(value), 8);
    }
  }

  void put_double(double value) {
    uint64_t bits = 0;
    static_assert(sizeof(bits) == sizeof(value));
    std::memcpy(&bits, &value, sizeof(bits));
    put(PickleOp::kFloat);
    for (int shift = 56; shift >= 0; shift -= 8) {  // the one big-endian field of the format
      out_.push_back(static_cast<char>(bits >> shift));
    }
  }

  void put_string(std::string_view text) {
    require(text.size() <= std::numeric_limits<uint32_t>::max(), "holds a string of more than 4 GiB");
    put(PickleOp::kUnicode);
    put_bytes(text.size(), 4);
    out_.append(text);
  }

  void put_global(std::string_view module, std::string_view name) {
    put(PickleOp::kGlobal);
    out_.append(module).append("\n").append(name).append("\n");
  }

  void put(PickleOp op) { out_.push_back(static_cast<char>(op)); }

  void put_bytes(uint64_t value, int count) {  // little-endian
    for (int i = 0; i < count; ++i) {
      out_.push_back(static_cast<char>(value >> (8 * i)));
    }
  }

  const StoragePlan& plan_;
  std::string out_;
};

}  // namespace

PickledValue pickle_value(const c10::IValue& value) {
  check_value_tree(value, [](const c10::IValue& other) { return "a value of kind " + other.tagKind(); });
  const StoragePlan plan(value);
  return {PickleWriter(plan).write(value), plan.storages()};
}

}  // namespace torch_ext::core

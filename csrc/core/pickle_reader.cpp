#include "core/pickle_reader.h"

#include <ATen/ops/empty.h>
#include <c10/util/safe_numerics.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "core/format_error.h"
#include "core/pickle_format.h"
#include "core/value_tree.h"

namespace torch_ext::core {
namespace {

template <typename... Args>
void check(bool ok, const Args&... what) {
  require(ok, "is damaged: its pickle ", what...);
}

// What a pickle can put on its stack that is not a value: a named class or function, or a storage. They travel inside
// IValues as capsules, and none may be left in the result.
struct Global : torch::CustomClassHolder {
  explicit Global(std::string name) : name(std::move(name)) {}
  const std::string name;  // "module.name"
};

struct StorageHandle : torch::CustomClassHolder {
  StorageHandle(c10::Storage storage, std::optional<c10::ScalarType> dtype)
      : storage(std::move(storage)), dtype(dtype) {}
  const c10::Storage storage;
  const std::optional<c10::ScalarType> dtype;  // nullopt: UntypedStorage, the rebuild call names the dtype
};

template <typename T>
const T* capsule_as(const c10::IValue& value) {
  return value.isCapsule() ? dynamic_cast<const T*>(value.toCapsule().get()) : nullptr;
}

std::string describe(const c10::IValue& value) {
  if (const auto* global = capsule_as<Global>(value)) {
    return "the Python object " + global->name;
  }
  return capsule_as<StorageHandle>(value) != nullptr ? "a torch storage" : "a value of kind " + value.tagKind();
}

constexpr std::string_view kOrderedDict = "collections.OrderedDict";
constexpr std::string_view kSize = "torch.Size";
constexpr std::string_view kRebuildV2 = "torch._utils._rebuild_tensor_v2";
constexpr std::string_view kRebuildV3 = "torch._utils._rebuild_tensor_v3";
constexpr std::string_view kRebuildParameter = "torch._utils._rebuild_parameter";
constexpr std::string_view kUntypedStorage = "torch.storage.UntypedStorage";
constexpr std::string_view kTorch = "torch.";

const DTypeName* find_dtype(std::string_view global, std::string_view DTypeName::*field) {
  if (global.substr(0, kTorch.size()) != kTorch || global.size() == kTorch.size()) {
    return nullptr;
  }
  const std::string_view name = global.substr(kTorch.size());
  const auto* found = std::find_if(std::begin(kDTypeNames), std::end(kDTypeNames),
                                   [&](const DTypeName& entry) { return entry.*field == name; });
  return found == std::end(kDTypeNames) ? nullptr : found;
}

bool is_known_global(std::string_view name) {
  return name == kOrderedDict || name == kSize || name == kRebuildV2 || name == kRebuildV3 ||
         name == kRebuildParameter || name == kUntypedStorage || find_dtype(name, &DTypeName::name) != nullptr ||
         find_dtype(name, &DTypeName::storage) != nullptr;
}

// Throws unless the strided view lies inside `numel` elements. All arithmetic is checked: the numbers come from a file.
void check_view(int64_t offset, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t numel) {
  check(sizes.size() == strides.size() && offset >= 0, "describes a tensor with bad strides");
  bool overflow = false;
  int64_t elements = 1;
  int64_t last = offset;
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    check(sizes[dim] >= 0 && strides[dim] >= 0, "describes a tensor with a negative size or stride");
    int64_t step = 0;
    overflow |= c10::mul_overflows(elements, sizes[dim], &elements);
    overflow |= c10::mul_overflows(std::max<int64_t>(sizes[dim] - 1, 0), strides[dim], &step);
    overflow |= c10::add_overflows(last, step, &last);
  }
  check(!overflow, "describes a tensor that is too large");
  check(elements == 0 ? offset <= numel : last < numel, "describes a tensor that is larger than its storage");
}

std::vector<c10::IValue> to_elements(const c10::IValue& tuple) {
  check(tuple.isTuple(), "has no tuple where one is expected");
  const auto& elements = tuple.toTupleRef().elements();
  return std::vector<c10::IValue>(elements.begin(), elements.end());
}

std::vector<int64_t> to_ints(const c10::IValue& tuple) {
  std::vector<int64_t> ints;
  for (const c10::IValue& element : to_elements(tuple)) {
    check(element.isInt(), "has a shape that is not made of ints");
    ints.push_back(element.toInt());
  }
  return ints;
}

class PickleReader {
 public:
  PickleReader(std::string_view pickle, const StorageLoader& load_storage)
      : rest_(pickle), load_storage_(load_storage) {}
  PickleReader(const PickleReader&) = delete;
  PickleReader& operator=(const PickleReader&) = delete;

  // Whatever is not part of the result may be cyclic (a leak) or nested a million levels deep (destructors recurse):
  // the containers are emptied first and released from the newest on, so each release is one level deep.
  ~PickleReader() {
    stack_.clear();
    memo_.clear();
    for (c10::IValue& container : containers_) {
      if (kept_.count(container.internalToPointer()) == 0) {
        clear_container(container);
      }
    }
    while (!containers_.empty()) {
      containers_.pop_back();
    }
  }

  c10::IValue read() {
    check(take_op() == PickleOp::kProto, "does not start with a protocol number");
    const uint64_t protocol = take_uint(1);
    require(protocol <= kPickleProtocol, "was saved with pickle protocol ", protocol,
            "; save it again with torch.save's default pickle_protocol=2");
    for (PickleOp op = take_op(); op != PickleOp::kStop; op = take_op()) {
      run(op);
    }
    check(stack_.size() == 1 && marks_.empty() && rest_.empty(), "does not end after one value");
    kept_ = check_value_tree(stack_.back(), describe);
    return stack_.back();
  }

 private:
  void run(PickleOp op) {
    switch (op) {
      case PickleOp::kMark:
        return marks_.push_back(stack_.size());
      case PickleOp::kNone:
        return push(c10::IValue());
      case PickleOp::kTrue:
        return push(true);
      case PickleOp::kFalse:
        return push(false);
      case PickleOp::kInt32:
        return push(take_int(4));
      case PickleOp::kUInt8:
        return push(static_cast<int64_t>(take_uint(1)));
      case PickleOp::kUInt16:
        return push(static_cast<int64_t>(take_uint(2)));
      case PickleOp::kLong:
        return push(take_int(take_uint(1)));
      case PickleOp::kFloat:
        return push(take_double());
      case PickleOp::kUnicode:
        return push(std::string(take(take_uint(4))));
      case PickleOp::kGet8:
        return get(take_uint(1));
      case PickleOp::kGet32:
        return get(take_uint(4));
      case PickleOp::kPut8:
        return put(take_uint(1));
      case PickleOp::kPut32:
        return put(take_uint(4));
      default:
        return run_container(op);
    }
  }

  void run_container(PickleOp op) {
    switch (op) {
      case PickleOp::kEmptyDict:
        return push_container(c10::impl::GenericDict(c10::AnyType::get(), c10::AnyType::get()));
      case PickleOp::kEmptyList:
        return push_container(c10::impl::GenericList(c10::AnyType::get()));
      case PickleOp::kEmptyTuple:
        return push_tuple({});
      case PickleOp::kTuple:
        return push_tuple(pop_to_mark());
      case PickleOp::kTuple1:
        return push_tuple(pop_last(1));
      case PickleOp::kTuple2:
        return push_tuple(pop_last(2));
      case PickleOp::kTuple3:
        return push_tuple(pop_last(3));
      case PickleOp::kAppend:
        return append(pop_last(1));
      case PickleOp::kAppends:
        return append(pop_to_mark());
      case PickleOp::kSetItem:
        return set_items(pop_last(2));
      case PickleOp::kSetItems:
        return set_items(pop_to_mark());
      default:
        return run_object(op);
    }
  }

  void run_object(PickleOp op) {
    switch (op) {
      case PickleOp::kGlobal:
        return push_global();
      case PickleOp::kPersistentId:
        return push_storage();
      case PickleOp::kReduce:
        return reduce();
      case PickleOp::kBuild:
        return build();
      default:
        require(false, "has the pickle opcode ", static_cast<int>(op),
                ", which torch.save does not write for dicts, lists, tuples, numbers and tensors");
    }
  }

  // Bytes.
  std::string_view take(uint64_t count) {
    check(count <= rest_.size(), "ends early");
    const std::string_view taken = rest_.substr(0, count);
    rest_.remove_prefix(count);
    return taken;
  }

  PickleOp take_op() { return static_cast<PickleOp>(take_uint(1)); }

  uint64_t take_uint(uint64_t count) {  // little-endian
    require(count <= 8, "holds an integer of more than 64 bits");
    uint64_t value = 0;
    int shift = 0;
    for (const char byte : take(count)) {
      value |= uint64_t{static_cast<uint8_t>(byte)} << shift;
      shift += 8;
    }
    return value;
  }

  int64_t take_int(uint64_t count) {  // two's complement
    const uint64_t value = take_uint(count);
    const uint64_t sign = count == 0 ? 0 : uint64_t{1} << (8 * count - 1);
    return static_cast<int64_t>((value ^ sign) - sign);
  }

  double take_double() {  // big-endian
    uint64_t bits = 0;
    for (const char byte : take(8)) {
      bits = (bits << 8) | static_cast<uint8_t>(byte);
    }
    double value = 0;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

  std::string_view take_line() {
    const size_t length = rest_.find('\n');
    check(length != std::string_view::npos, "ends early");
    const std::string_view line = take(length);
    take(1);
    return line;
  }

  // Stack and memo.
  void push(c10::IValue value) { stack_.push_back(std::move(value)); }

  void push_container(c10::IValue container) {
    containers_.push_back(container);
    push(std::move(container));
  }

  void push_tuple(std::vector<c10::IValue> elements) {
    push_container(c10::ivalue::Tuple::create(std::move(elements)));
  }

  std::vector<c10::IValue> pop_last(size_t count) {
    const size_t floor = marks_.empty() ? 0 : marks_.back();
    check(stack_.size() >= floor + count, "uses values that it never made");
    std::vector<c10::IValue> values(stack_.end() - static_cast<ptrdiff_t>(count), stack_.end());
    stack_.resize(stack_.size() - count);
    return values;
  }

  std::vector<c10::IValue> pop_to_mark() {
    check(!marks_.empty(), "ends a group that it never began");
    std::vector<c10::IValue> values = pop_last(stack_.size() - marks_.back());
    marks_.pop_back();
    return values;
  }

  c10::IValue& top() {
    check(stack_.size() > (marks_.empty() ? 0 : marks_.back()), "uses values that it never made");
    return stack_.back();
  }

  void get(uint64_t index) {
    const auto found = memo_.find(index);
    check(found != memo_.end(), "refers to a value that it never stored");
    push(found->second);
  }

  void put(uint64_t index) { memo_[index] = top(); }

  // Containers.
  void append(const std::vector<c10::IValue>& values) {
    check(top().isList(), "appends to something that is not a list");
    auto list = top().toList();
    for (const c10::IValue& value : values) {
      list.push_back(value);
    }
  }

  void set_items(const std::vector<c10::IValue>& items) {
    check(top().isGenericDict() && items.size() % 2 == 0, "sets items of something that is not a dict");
    auto dict = top().toGenericDict();
    for (size_t i = 0; i < items.size(); i += 2) {
      require(items[i].isInt() || items[i].isString() || items[i].isBool() || items[i].isDouble(),
              "holds a dict with a key that is not an int, str, bool or float");
      dict.insert_or_assign(items[i], items[i + 1]);
    }
  }

  static void clear_container(const c10::IValue& container) {
    if (container.isGenericDict()) {
      container.toGenericDict().clear();
    } else if (container.isList()) {
      container.toList().clear();
    }
  }

  // Classes and functions.
  void push_global() {
    const std::string_view module = take_line();
    std::string name = c10::str(module, ".", take_line());
    require(is_known_global(name), "holds a Python object that needs ", name,
            "; only dicts, lists, tuples, strings, numbers, bools, None and tensors can be read: save those");
    push(c10::IValue::make_capsule(c10::make_intrusive<Global>(std::move(name))));
  }

  // Pops a persistent id ("storage", class, record, device, number of elements). The device is where it was saved from.
  void push_storage() {
    const std::vector<c10::IValue> field = to_elements(pop_last(1)[0]);
    check(field.size() == 5, "has a bad reference to a record");
    const auto* type = capsule_as<Global>(field[1]);
    check(type != nullptr && field[2].isString() && field[4].isInt() && field[4].toInt() >= 0,
          "has a bad reference to a record");
    std::optional<c10::ScalarType> dtype;
    if (type->name != kUntypedStorage) {
      const DTypeName* entry = find_dtype(type->name, &DTypeName::storage);
      check(entry != nullptr, "has a storage of unknown type");
      dtype = entry->dtype;
    }
    uint64_t nbytes = 0;
    const uint64_t element_size = dtype ? c10::elementSize(*dtype) : 1;
    check(!c10::mul_overflows(static_cast<uint64_t>(field[4].toInt()), element_size, &nbytes), "has a huge storage");
    c10::Storage storage = load_storage_(field[2].toStringRef(), nbytes);
    push(c10::IValue::make_capsule(c10::make_intrusive<StorageHandle>(std::move(storage), dtype)));
  }

  void reduce() {
    const std::vector<c10::IValue> call = pop_last(2);
    const auto* function = capsule_as<Global>(call[0]);
    check(function != nullptr, "calls something that is not a function");
    const std::vector<c10::IValue> args = to_elements(call[1]);
    if (function->name == kOrderedDict && args.empty()) {
      push_container(c10::impl::GenericDict(c10::AnyType::get(), c10::AnyType::get()));
    } else if (function->name == kSize && args.size() == 1 && args[0].isTuple()) {
      push(args[0]);
    } else if (function->name == kRebuildV2) {
      rebuild_tensor(args, /*dtype_argument=*/false);
    } else if (function->name == kRebuildV3) {
      rebuild_tensor(args, /*dtype_argument=*/true);
    } else if (function->name == kRebuildParameter) {
      rebuild_parameter(args);
    } else {
      check(false, "calls ", function->name, " in an unknown way");
    }
  }

  // storage, offset, size, stride, requires_grad, backward_hooks [, dtype] [, metadata]
  void rebuild_tensor(const std::vector<c10::IValue>& args, bool dtype_argument) {
    const size_t count = dtype_argument ? 7 : 6;
    check(args.size() == count || args.size() == count + 1, "rebuilds a tensor in an unknown way");
    const auto* handle = capsule_as<StorageHandle>(args[0]);
    check(handle != nullptr && args[1].isInt() && args[4].isBool(), "rebuilds a tensor in an unknown way");
    require(args.size() == count || args[count].isNone(),
            "holds a lazily conjugated or negated tensor; save resolve_conj() and resolve_neg() of it");
    const c10::ScalarType dtype = dtype_argument ? dtype_of(args[6]) : dtype_of(*handle);
    const int64_t offset = args[1].toInt();
    const std::vector<int64_t> sizes = to_ints(args[2]);
    const std::vector<int64_t> strides = to_ints(args[3]);
    check_view(offset, sizes, strides, static_cast<int64_t>(handle->storage.nbytes() / c10::elementSize(dtype)));
    const auto options = at::TensorOptions(handle->storage.device()).dtype(dtype);
    at::Tensor tensor = at::empty({0}, options).set_(handle->storage, offset, sizes, strides);
    push(with_requires_grad(tensor, args[4].toBool()));
  }

  static c10::ScalarType dtype_of(const StorageHandle& handle) {
    check(handle.dtype.has_value(), "rebuilds a tensor without a dtype");
    return *handle.dtype;
  }

  static c10::ScalarType dtype_of(const c10::IValue& value) {
    const auto* global = capsule_as<Global>(value);
    const DTypeName* entry = global == nullptr ? nullptr : find_dtype(global->name, &DTypeName::name);
    check(entry != nullptr, "rebuilds a tensor with an unknown dtype");
    return entry->dtype;
  }

  // data, requires_grad, backward_hooks: C++ has no Parameter class, a parameter is a tensor that requires grad.
  void rebuild_parameter(const std::vector<c10::IValue>& args) {
    check(args.size() == 3 && args[0].isTensor() && args[1].isBool(), "rebuilds a parameter in an unknown way");
    push(with_requires_grad(args[0].toTensor().detach(), args[1].toBool()));
  }

  static at::Tensor with_requires_grad(const at::Tensor& tensor, bool requires_grad) {
    check(!requires_grad || tensor.is_floating_point() || tensor.is_complex(),
          "has an integer tensor that requires grad");
    return tensor.set_requires_grad(requires_grad);
  }

  // Attributes of an OrderedDict: module.state_dict() carries a _metadata dict, which no reader of the values needs.
  void build() {
    const c10::IValue attributes = pop_last(1)[0];
    check(attributes.isGenericDict() && top().isGenericDict(), "sets attributes of something that has none");
  }

  std::string_view rest_;
  const StorageLoader& load_storage_;
  std::vector<c10::IValue> stack_;
  std::vector<size_t> marks_;  // heights of the stack
  std::unordered_map<uint64_t, c10::IValue> memo_;
  std::vector<c10::IValue> containers_;   // every container made, in order
  std::unordered_set<const void*> kept_;  // those that are part of the result
};

}  // namespace

c10::IValue unpickle_value(std::string_view pickle, const StorageLoader& load_storage) {
  return PickleReader(pickle, load_storage).read();
}

}  // namespace torch_ext::core

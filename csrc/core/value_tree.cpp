#include "core/value_tree.h"

#include <algorithm>
#include <unordered_map>

#include "core/format_error.h"

namespace torch_ext::core {
namespace {

// Measures each container once, however often it is shared.
class TreeChecker {
 public:
  explicit TreeChecker(const std::function<std::string(const c10::IValue&)>& describe) : describe_(describe) {}

  void check(const c10::IValue& root) { measure(root, 0); }

  std::unordered_set<const void*> containers() const {
    std::unordered_set<const void*> seen;
    for (const auto& entry : extents_) {
      seen.insert(entry.first);
    }
    return seen;
  }

 private:
  // Number of values when written out as a tree, and levels below this one.
  struct Extent {
    uint64_t values = 1;
    int height = 0;
  };

  Extent measure(const c10::IValue& value, int depth) {
    if (is_leaf(value)) {
      return {};
    }
    require(value.isGenericDict() || value.isList() || value.isTuple(), "holds ", describe_(value),
            "; only dicts, lists, tuples, strings, numbers, bools, None and tensors can be stored");
    const void* address = value.internalToPointer();
    const auto [found, is_new] = extents_.try_emplace(address);
    if (!is_new) {
      require(found->second.values != kOpen, "holds a container that contains itself");
      check_limits(found->second, depth);
      return found->second;
    }
    found->second.values = kOpen;
    const Extent extent = measure_children(value, depth);
    extents_[address] = extent;
    return extent;
  }

  Extent measure_children(const c10::IValue& container, int depth) {
    if (container.isGenericDict()) {
      check_keys(container);
    }
    Extent extent;
    check_limits(extent, depth);
    for_each_child(container, [&](const c10::IValue& child) {
      const Extent below = measure(child, depth + 1);
      extent.values += below.values;
      extent.height = std::max(extent.height, below.height + 1);
      check_limits(extent, depth);
    });
    return extent;
  }

  static void check_limits(const Extent& extent, int depth) {
    require(depth + extent.height <= kMaxDepth, "is nested deeper than ", kMaxDepth, " levels");
    require(extent.values <= kMaxValues, "holds more than ", kMaxValues, " values");
  }

  void check_keys(const c10::IValue& dict) {
    for (const auto& entry : dict.toGenericDict()) {
      const c10::IValue& key = entry.key();
      require(key.isInt() || key.isString() || key.isBool() || key.isDouble(), "holds a dict with a key of kind ",
              key.tagKind(), "; keys must be int, str, bool or float");
    }
  }

  static constexpr uint64_t kOpen = 0;  // marks a container whose children are being measured
  const std::function<std::string(const c10::IValue&)>& describe_;
  std::unordered_map<const void*, Extent> extents_;
};

}  // namespace

bool is_leaf(const c10::IValue& value) {
  return value.isTensor() || value.isInt() || value.isDouble() || value.isBool() || value.isString() || value.isNone();
}

void for_each_child(const c10::IValue& container, const std::function<void(const c10::IValue&)>& visit) {
  if (container.isGenericDict()) {
    for (const auto& entry : container.toGenericDict()) {
      visit(entry.key());
      visit(entry.value());
    }
  } else if (container.isList()) {
    // Not toListRef: lists of numbers created as List<int64_t> must work as well.
    for (const c10::IValue& element : container.toList().vec()) {
      visit(element);
    }
  } else if (container.isTuple()) {
    for (const c10::IValue& element : container.toTupleRef().elements()) {
      visit(element);
    }
  }
}

std::unordered_set<const void*> check_value_tree(const c10::IValue& root,
                                                 const std::function<std::string(const c10::IValue&)>& describe) {
  TreeChecker checker(describe);
  checker.check(root);
  return checker.containers();
}

}  // namespace torch_ext::core

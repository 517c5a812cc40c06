// The values a checkpoint may hold: what read_state_dict accepts is exactly what write_state_dict accepts.
#pragma once

#include <ATen/core/ivalue.h>

#include <cstdint>
#include <functional>
#include <string>
#include <unordered_set>

namespace torch_ext::core {

// Limits far above any real checkpoint. They bound the recursion over a hostile file, and the work on one that names
// the same list again and again (2^n values in n steps).
constexpr int kMaxDepth = 100;
constexpr uint64_t kMaxValues = uint64_t{1} << 24;

// True for values without children: None, bool, int, double, string, tensor.
bool is_leaf(const c10::IValue& value);

// Calls `visit` on every child of a dict (key, value, key, ...), list or tuple.
void for_each_child(const c10::IValue& container, const std::function<void(const c10::IValue&)>& visit);

// Throws FormatError unless `root` is an allowed tree within the limits and without cycles; `describe` names a value of
// any other kind in the message. Returns the addresses (IValue::internalToPointer) of all containers in the tree.
std::unordered_set<const void*> check_value_tree(const c10::IValue& root,
                                                 const std::function<std::string(const c10::IValue&)>& describe);

}  // namespace torch_ext::core

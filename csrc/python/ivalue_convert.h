// Python objects <-> c10::IValue for options and state dicts: dict, list, tuple, str, bool, int, float, None, Tensor.
// Not torch::jit::toTypeInferredIValue: it gives a container one element type and refuses mixed ones.
#pragma once

#include <ATen/core/ivalue.h>
#include <pybind11/pybind11.h>

namespace torch_ext::python {

// Subclasses (OrderedDict, namedtuple, torch.Size) become plain containers, which are all untyped (AnyType). Raises
// TypeError naming the place, such as ['param_groups'][0]['lr'], of anything else; OverflowError for ints beyond 64
// bits; RecursionError for a container that contains itself.
c10::IValue to_ivalue(pybind11::handle object);

// Any dict, list or tuple comes back as that builtin type. Raises TypeError for other kinds of IValue.
pybind11::object to_python(const c10::IValue& value);

}  // namespace torch_ext::python

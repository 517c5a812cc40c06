#include "python/ivalue_convert.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <utility>
#include <vector>

namespace torch_ext::python {
namespace {

namespace py = pybind11;

// The way from the outermost object to a value: a list on the stack, rendered only for an error message.
struct Place {
  const Place* parent;
  py::object key;
};

std::string where(const Place* place) {
  return place == nullptr ? "value" : where(place->parent) + "[" + py::repr(place->key).cast<std::string>() + "]";
}

[[noreturn]] void refuse(py::handle object, const Place* place, const char* expected) {
  const std::string type = py::str(py::type::handle_of(object).attr("__name__"));
  throw py::type_error(where(place) + " is of type " + type + "; expected " + expected);
}

// A cyclic or very deep container ends in RecursionError, not in a stack overflow.
class RecursionGuard {
 public:
  RecursionGuard() {
    if (Py_EnterRecursiveCall(" while converting a value to C++") != 0) {
      throw py::error_already_set();
    }
  }
  RecursionGuard(const RecursionGuard&) = delete;
  RecursionGuard& operator=(const RecursionGuard&) = delete;
  ~RecursionGuard() { Py_LeaveRecursiveCall(); }
};

c10::IValue convert(py::handle object, const Place* place);

c10::IValue convert_int(py::handle object, const Place* place) {
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
  if (overflow != 0) {
    PyErr_SetString(PyExc_OverflowError, (where(place) + " is an int of more than 64 bits").c_str());
  }
  if (PyErr_Occurred() != nullptr) {
    throw py::error_already_set();
  }
  return static_cast<int64_t>(value);
}

c10::IValue convert_dict(const py::dict& object, const Place* place) {
  c10::impl::GenericDict dict(c10::AnyType::get(), c10::AnyType::get());
  for (const auto& [key, value] : object) {
    if (!PyUnicode_Check(key.ptr()) && !PyLong_Check(key.ptr()) && !PyFloat_Check(key.ptr())) {
      refuse(key, place, "a str, int, bool or float as key of a dict");
    }
    const Place below{place, py::reinterpret_borrow<py::object>(key)};
    dict.insert_or_assign(convert(key, place), convert(value, &below));
  }
  return dict;
}

std::vector<c10::IValue> convert_elements(const py::sequence& object, const Place* place) {
  std::vector<c10::IValue> elements;
  for (size_t i = 0; i < object.size(); ++i) {
    const py::object element = object[i];
    const Place below{place, py::int_(i)};
    elements.push_back(convert(element, &below));
  }
  return elements;
}

c10::IValue convert_list(const py::sequence& object, const Place* place) {
  c10::impl::GenericList list(c10::AnyType::get());
  for (c10::IValue& element : convert_elements(object, place)) {
    list.push_back(std::move(element));
  }
  return list;
}

c10::IValue convert(py::handle object, const Place* place) {
  const RecursionGuard guard;
  PyObject* pointer = object.ptr();
  if (pointer == Py_None) {
    return {};
  }
  if (THPVariable_Check(pointer)) {
    return THPVariable_Unpack(pointer);
  }
  if (PyBool_Check(pointer)) {  // before int: bool is a subclass
    return pointer == Py_True;
  }
  if (PyLong_Check(pointer)) {
    return convert_int(object, place);
  }
  if (PyFloat_Check(pointer)) {
    return PyFloat_AS_DOUBLE(pointer);
  }
  if (PyUnicode_Check(pointer)) {
    return object.cast<std::string>();
  }
  if (PyDict_Check(pointer)) {
    return convert_dict(py::reinterpret_borrow<py::dict>(object), place);
  }
  if (PyList_Check(pointer)) {
    return convert_list(py::reinterpret_borrow<py::sequence>(object), place);
  }
  if (PyTuple_Check(pointer)) {
    return c10::ivalue::Tuple::create(convert_elements(py::reinterpret_borrow<py::sequence>(object), place));
  }
  refuse(object, place, "dict, list, tuple, str, bool, int, float, None or Tensor");
}

py::object dict_to_python(const c10::IValue& value) {
  py::dict dict;
  for (const auto& entry : value.toGenericDict()) {
    dict[to_python(entry.key())] = to_python(entry.value());
  }
  return dict;
}

py::object list_to_python(const c10::IValue& value) {
  py::list list;
  for (const c10::IValue& element : value.toList().vec()) {
    list.append(to_python(element));
  }
  return list;
}

py::object tuple_to_python(const c10::IValue& value) {
  const auto& elements = value.toTupleRef().elements();
  py::tuple tuple(elements.size());
  for (size_t i = 0; i < elements.size(); ++i) {
    tuple[i] = to_python(elements[i]);
  }
  return tuple;
}

}  // namespace

c10::IValue to_ivalue(py::handle object) { return convert(object, nullptr); }

py::object to_python(const c10::IValue& value) {
  if (value.isNone()) {
    return py::none();
  }
  if (value.isTensor()) {
    return py::cast(value.toTensor());
  }
  if (value.isBool()) {
    return py::bool_(value.toBool());
  }
  if (value.isInt()) {
    return py::int_(value.toInt());
  }
  if (value.isDouble()) {
    return py::float_(value.toDouble());
  }
  if (value.isString()) {
    return py::str(value.toStringRef());
  }
  if (value.isGenericDict()) {
    return dict_to_python(value);
  }
  if (value.isList()) {
    return list_to_python(value);
  }
  if (value.isTuple()) {
    return tuple_to_python(value);
  }
  throw py::type_error("no Python type for a C++ value of kind " + value.tagKind());
}

}  // namespace torch_ext::python

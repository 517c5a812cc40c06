#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <filesystem>
#include <optional>
#include <string>

#include "core/state_dict_file.h"
#include "python/ivalue_convert.h"
#include "python/registry.h"

namespace torch_ext::python {
namespace {

namespace py = pybind11;

void write(py::handle value, const std::filesystem::path& path) {
  const c10::IValue converted = to_ivalue(value);
  const py::gil_scoped_release released;
  core::write_state_dict(converted, path.string());
}

// Like torch.load, takes a torch.device or its name.
std::optional<c10::Device> to_device(const py::object& device) {
  if (device.is_none()) {
    return std::nullopt;
  }
  return py::isinstance<py::str>(device) ? c10::Device(device.cast<std::string>()) : device.cast<c10::Device>();
}

py::object read(const std::filesystem::path& path, const py::object& map_location) {
  const std::optional<c10::Device> device = to_device(map_location);
  c10::IValue value;
  {
    const py::gil_scoped_release released;
    value = core::read_state_dict(path.string(), device);
  }
  return to_python(value);
}

void bind_state_dict_file(py::module_& module) {
  module.def("write_state_dict", &write, py::arg("value"), py::arg("path"),
             "Write dicts, lists, tuples, tensors and plain values to a file for torch.load(weights_only=True).");
  module.def("read_state_dict", &read, py::arg("path"), py::arg("map_location") = py::none(),
             "Read a file of write_state_dict or torch.save; tensors come back on the CPU unless told otherwise.");
}

const Binding binding(bind_state_dict_file);

}  // namespace
}  // namespace torch_ext::python

#include <ATen/core/grad_mode.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch_ext/distributed.h>
#include <torch_ext/optim/eggroll.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "optim/eggroll/eggroll_tell.h"
#include "optim/eggroll/eggroll_trits.h"
#include "python/closure.h"
#include "python/optimizers.h"
#include "python/registry.h"

namespace torch_ext::python {
namespace {

namespace py = pybind11;
using ProcessGroup = std::optional<c10::intrusive_ptr<c10d::ProcessGroup>>;
using optim::Population;

optim::ColumnShards shards_of(const ProcessGroup& group) {
  return group.has_value() ? shards_over(*group) : optim::ColumnShards();
}

std::unique_ptr<optim::Options> shared_options(const py::dict& group) { return options_from("Eggroll", group); }

// The perturbed parameters of groups, each with its group's options.
struct Gathered {
  std::vector<std::unique_ptr<optim::Options>> options;
  std::vector<optim::PopulationParam> params;
  std::vector<size_t> groups;  // of each parameter
};

Gathered gather(const py::list& groups) {
  Gathered result;
  int64_t ordinal = 0;
  for (const py::handle& item : groups) {
    const auto group = item.cast<py::dict>();
    const optim::Options& options = *result.options.emplace_back(options_from("Eggroll", group));
    options.check();
    for (const py::handle& entry : group["params"]) {
      auto param = entry.cast<at::Tensor>();
      if (param.requires_grad()) {
        optim::eggroll_check_param(param, ordinal, options);
        if (param.numel() > 0) {
          const std::string kind = optim::eggroll_kind(param, options);
          result.params.push_back({std::move(param), ordinal, kind});
          result.groups.push_back(result.options.size() - 1);
        }
      }
      ++ordinal;
    }
  }
  return result;
}

Population population(const py::list& groups, int64_t updates, int64_t begin, int64_t end) {
  Gathered gathered = gather(groups);
  const optim::Options& shared = *gathered.options.at(0);
  const int64_t n = shared.get("population").toInt();
  TORCH_CHECK_VALUE(begin >= 0 && end <= n && begin < end, "Eggroll: ask(", begin, ", ", end, ") of a population of ",
                    n);
  return Population(optim::eggroll_noise_of(shared, updates, begin), end - begin, std::move(gathered.params),
                    optim::eggroll_baseline(shared));
}

// True if a population that is asked for now would be made of the same noise and the same parameters.
bool same_population(const Population& asked, const Population& now) {
  const auto &a = asked.noise(), &b = now.noise();
  bool same = a.seed == b.seed && a.epoch == b.epoch && a.antithetic == b.antithetic && a.sigma == b.sigma &&
              a.rank == b.rank && a.law == b.law && asked.params().size() == now.params().size();
  for (size_t i = 0; same && i < now.params().size(); ++i) {
    const auto &p = asked.params()[i], &q = now.params()[i];
    same = p.param.is_same(q.param) && p.ordinal == q.ordinal && p.kind == q.kind;
  }
  return same;
}

py::tuple shaped(const py::dict& group, const at::Tensor& values, const ProcessGroup& process_group) {
  const auto options = shared_options(group);
  const auto result = without_gil([&] { return optim::eggroll_shaped(*options, values, shards_of(process_group)); });
  return py::make_tuple(result.coefficients, result.mean, result.nonfinite);
}

void complete_state(py::dict& state, const at::Tensor& param, const optim::Options& options) {
  optim::StateTensors tensors;
  for (const auto& [name, value] : state) {
    if (THPVariable_Check(value.ptr())) tensors[name.cast<std::string>()] = THPVariable_Unpack(value.ptr());
  }
  optim::eggroll_init_state(param, options, tensors);
  for (const auto& [name, tensor] : tensors) state[py::str(name)] = tensor;
}

// `state_of` gives a parameter's state dict; not called with update = false.
void update(const py::list& groups, const Population& asked, const py::object& state_of, const at::Tensor& coefficients,
            const at::Tensor& nonfinite, const at::Tensor& skipped, bool update, const ProcessGroup& process_group,
            bool sharded) {
  const Gathered gathered = gather(groups);
  std::vector<optim::EggrollTarget> targets;
  for (size_t i = 0; i < gathered.params.size(); ++i) {
    const auto& p = gathered.params[i];
    const optim::Options& options = *gathered.options[gathered.groups[i]];
    optim::EggrollTarget target{p.param, p.ordinal, &options, {}, {}};
    if (update) {
      auto state = state_of(p.param).cast<py::dict>();
      complete_state(state, p.param, options);
      target.step = state["step"].cast<at::Tensor>();
      if (state.contains("momentum_buffer")) target.momentum_buffer = state["momentum_buffer"].cast<at::Tensor>();
    }
    targets.push_back(std::move(target));
  }
  without_gil([&] {
    optim::eggroll_update(targets, asked.noise(), {coefficients, at::Tensor(), nonfinite}, skipped, update,
                          shards_of(process_group), sharded);
    return 0;
  });
}

std::pair<int64_t, int64_t> place(const ProcessGroup& group) {
  return group.has_value() ? std::pair<int64_t, int64_t>((*group)->getRank(), (*group)->getSize())
                           : std::pair<int64_t, int64_t>(0, 1);
}

optim::Eggroll::PopulationClosure wrap_population_closure(const py::object& callable) {
  const std::shared_ptr<py::object> held(new py::object(callable), [](py::object* object) {
    const py::gil_scoped_acquire gil;
    delete object;
  });
  return [held](const Population& population) -> at::Tensor {
    const py::gil_scoped_acquire gil;
    const py::object result = (*held)(py::cast(population));
    return THPVariable_Check(result.ptr()) ? THPVariable_Unpack(result.ptr()) : at::Tensor();
  };
}

// step(closure) of the C++ class: a closure of a population, or with per_member=True one without arguments.
at::Tensor step(optim::Eggroll& optimizer, const py::object& closure, const py::kwargs& inputs) {
  const bool per_member = inputs.contains("per_member") && inputs["per_member"].cast<bool>();
  if (closure.is_none() || per_member) {
    const auto wrapped = wrap_closure(closure);
    return without_gil([&] { return optimizer.step(wrapped); });
  }
  const auto wrapped = wrap_population_closure(closure);
  return without_gil([&] { return optimizer.step(wrapped); });
}

py::object call(optim::Eggroll& optimizer, const std::string& method, const py::args& arguments) {
  if (method == "ask") {
    if (arguments.empty()) return py::cast(optimizer.ask());
    return py::cast(optimizer.ask(arguments[0].cast<int64_t>(), arguments[1].cast<std::optional<int64_t>>()));
  }
  if (method == "tell") {
    const auto values = arguments[0].cast<at::Tensor>();
    const bool update = arguments.size() < 2 || arguments[1].cast<bool>();
    return py::cast(without_gil([&] { return optimizer.tell(values, update); }));
  }
  if (method == "set_sigma") {
    optimizer.set_sigma(arguments[0].cast<double>());
    return py::none();
  }
  if (method == "updates") return py::int_(optimizer.updates());
  throw py::attribute_error("Eggroll has no method '" + method + "'");
}

const OptimizerBinding::Registrar registrar(bind_optimizer<optim::Eggroll, optim::EggrollOptions>(step, call));

const Binding binding([](py::module_& module) {
  py::class_<Population>(module, "Population")
      .def(py::init(&population))
      .def_property_readonly("begin", &Population::begin)
      .def_property_readonly("baseline", &Population::baseline)
      .def("__len__", &Population::size)
      .def("noise",
           [](const Population& self) {
             const auto& n = self.noise();
             return py::make_tuple(n.seed, n.epoch, n.member_begin, n.antithetic, n.sigma, n.rank, n.law);
           })
      .def("params",
           [](const Population& self) {
             py::list result;
             for (const auto& p : self.params()) result.append(py::make_tuple(p.param, p.ordinal, p.kind));
             return result;
           })
      .def("unperturbed_rows", &Population::unperturbed_rows)
      .def("same_as", &same_population)
      .def("perturb", [](const Population& self, int64_t i) { return without_gil([&] { return self.perturb(i); }); })
      .def("restore", [](const Population& self, const std::vector<at::Tensor>& saved) {
        without_gil([&] {
          self.restore(saved);
          return 0;
        });
      });
  module.def("eggroll_members", [](const py::dict& group, const ProcessGroup& process_group) {
    const auto [rank, count] = place(process_group);
    return optim::eggroll_members(*shared_options(group), rank, count);
  });
  module.def("eggroll_chunks", [](const py::dict& group, const ProcessGroup& process_group) {
    const auto [rank, count] = place(process_group);
    return optim::eggroll_chunks(*shared_options(group), rank, count);
  });
  module.def("eggroll_check_values", [](const std::optional<at::Tensor>& values, int64_t size) {
    optim::eggroll_check_values(values.value_or(at::Tensor()), size);
  });
  module.def("eggroll_shaped", &shaped);
  module.def("eggroll_update", &update);
  module.def("eggroll_check_state",
             [](const at::Tensor& param, const py::dict& options, const optim::StateTensors& state) {
               optim::eggroll_check_state(param, *options_from("Eggroll", options), state);
             });
  module.def("eggroll_check_equal", [](const std::vector<at::Tensor>& tensors, const ProcessGroup& process_group) {
    without_gil([&] {
      optim::eggroll_check_equal(tensors, shards_of(process_group));
      return 0;
    });
  });
  module.def("pack_trits", [](const at::Tensor& signs, int64_t count) { return optim::pack_trits(signs, count); });
  module.def("unpack_trits", [](const at::Tensor& bytes, int64_t count) {
    bool bad = false;
    return optim::unpack_trits(bytes, count, &bad);
  });
});

}  // namespace
}  // namespace torch_ext::python

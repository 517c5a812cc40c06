// The optimizers that the common tests run over; a new one joins with one line in optimizer_cases() and a row in
// tests/optim_db.json.
#pragma once

#include <torch_ext/optim/adahessian.h>
#include <torch_ext/optim/base.h>
#include <torch_ext/optim/eggroll.h>
#include <torch_ext/optim/mezo.h>
#include <torch_ext/optim/mfac.h>

#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "support/json.h"

namespace torch_ext::test {

using Groups = std::vector<torch::optim::OptimizerParamGroup>;

struct OptimizerCase {
  std::string name;
  double xor_lr;  // learning rate that learns XOR
  std::function<std::unique_ptr<optim::Options>()> options;
  std::function<std::unique_ptr<optim::OptimizerBase>(Groups, const optim::Options&)> make;
  std::function<std::unique_ptr<optim::OptimizerBase>(optim::OptimizerBase&&)> move;
  std::string own_state;        // a state tensor of the parameter's shape, if the optimizer keeps it
  bool elementwise = true;      // what happens to an element depends on its own gradient only
  bool reads_gradients = true;  // false: a closure's values are all that it knows
  std::vector<std::pair<std::string, c10::IValue>> large = {};  // options that keep large tensors affordable
  // options with which a few steps make a loss without noise smaller, next to any learning rate up to 0.1
  std::vector<std::pair<std::string, c10::IValue>> steady = {};

  // Options of the type with some fields set explicitly.
  std::unique_ptr<optim::Options> with(const c10::IValue& settings) const {
    auto result = options();
    for (const auto& item : settings.toGenericDict()) result->set(item.key().toStringRef(), item.value());
    return result;
  }
  std::unique_ptr<optim::OptimizerBase> on(std::vector<at::Tensor> params) const {
    return make({torch::optim::OptimizerParamGroup(std::move(params))}, *options());
  }
  std::unique_ptr<optim::OptimizerBase> on(std::vector<at::Tensor> params, const c10::IValue& settings) const {
    return make({torch::optim::OptimizerParamGroup(std::move(params))}, *with(settings));
  }
  // A group with explicitly set options.
  torch::optim::OptimizerParamGroup group(std::vector<at::Tensor> params, const c10::IValue& settings) const {
    return {std::move(params), std::unique_ptr<torch::optim::OptimizerOptions>(with(settings))};
  }
};

inline void PrintTo(const OptimizerCase& value, std::ostream* out) { *out << value.name; }

template <typename Optimizer, typename OptimizerOptions>
OptimizerCase optimizer_case(double xor_lr, const std::string& own_state) {
  return {
      Optimizer::static_schema().optimizer,
      xor_lr,
      [] { return std::make_unique<OptimizerOptions>(); },
      [](Groups groups, const optim::Options& defaults) {
        return std::make_unique<Optimizer>(std::move(groups), static_cast<const OptimizerOptions&>(defaults));
      },
      [](optim::OptimizerBase&& from) { return std::make_unique<Optimizer>(std::move(static_cast<Optimizer&>(from))); },
      own_state};
}

inline const std::vector<OptimizerCase>& optimizer_cases() {
  static const std::vector<OptimizerCase> cases = [] {
    OptimizerCase mfac = optimizer_case<optim::MFAC, optim::MFACOptions>(1e-3, "momentum_buffer");
    mfac.elementwise = false;
    mfac.large = {{"num_grads", int64_t{4}}};
    mfac.steady = {{"damping", 1.0}};
    OptimizerCase eggroll = optimizer_case<optim::Eggroll, optim::EggrollOptions>(2.0, "momentum_buffer");
    OptimizerCase mezo = optimizer_case<optim::MeZO, optim::MeZOOptions>(0.5, "");
    for (OptimizerCase* item : {&eggroll, &mezo}) item->elementwise = item->reads_gradients = false;
    return std::vector<OptimizerCase>{optimizer_case<optim::AdaHessian, optim::AdaHessianOptions>(0.15, "exp_avg"),
                                      std::move(mfac), std::move(eggroll), std::move(mezo)};
  }();
  return cases;
}

// Rows of tests/optim_db.json that no gradient drives, so that the common tests, all of gradients, cannot: their own
// files hold what applies to them (test_alflb.cpp).
inline const std::vector<std::string>& other_optimizers() {
  static const std::vector<std::string> names{"ALFLB"};
  return names;
}

// tests/optim_db.json.
inline c10::impl::GenericDict optim_db() {
  static const c10::IValue table = read_json(std::string(TORCH_EXT_TEST_DATA_DIR) + "/optim_db.json");
  return table.toGenericDict();
}

struct Variant {
  std::string name;
  c10::IValue options;
  c10::impl::GenericDict row;
};

inline std::vector<Variant> variants_of(const std::string& optimizer) {
  std::vector<Variant> result;
  for (const c10::IValue& item : optim_db().at(optimizer).toGenericDict().at("variants").toListRef()) {
    const auto row = item.toGenericDict();
    result.push_back({row.at("name").toStringRef(), row.at("options"), row});
  }
  return result;
}

}  // namespace torch_ext::test

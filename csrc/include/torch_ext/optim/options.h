// The field table of an optimizer and the option and state classes that live on it.
//
// Every optimizer has ONE table (name, type, default, range, per group or global, state tensors). The C++ accessors,
// the checks of both languages, serialization, equality and group inheritance all read it.
#pragma once

#include <ATen/core/ivalue.h>
#include <torch/optim/optimizer.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace torch_ext::optim {

class Options;

// One option: keyword argument in Python, accessor in C++, key of a parameter group, key in a checkpoint.
struct Field {
  enum class Type { kFloat, kOptionalFloat, kFloatPair, kInt, kOptionalInt, kBool, kString, kOptionalString };
  std::string name;
  Type type;
  c10::IValue default_value;
  double low = -std::numeric_limits<double>::infinity();  // numbers must lie in [low, high]; NaN never does
  double high = std::numeric_limits<double>::infinity();
  bool low_open = false, high_open = false;  // the bound itself is excluded
  std::vector<std::string> choices = {};     // of a kString; a kOptionalString may be any
  bool global = false;                       // the same in all groups
};

// One state tensor of a parameter; names starting with global_ belong to the optimizer and sit with the first
// parameter.
struct StateField {
  enum class DType {
    kArithmetic,
    kFloat32,
    kFloat64,
    kInt64,
    kStored
  };  // kArithmetic: float32 for half and bfloat16, else the parameter's; kStored: dtype and device stay as they are
  std::string name;
  DType dtype;
  bool on_cpu = false;  // stays on the CPU wherever the parameter is
  bool shared = false;  // belongs to several parameters and sits with the first of them
};

struct TORCH_EXT_API Schema {
  std::string optimizer;
  int64_t format_version;
  std::vector<Field> fields;
  std::vector<StateField> state;
  std::function<void(const Options&)> check = {};  // rules between fields; may be empty

  const Field* find(const std::string& name) const;  // null if there is none
};

// Values for the fields of one schema. Fields that were set explicitly are remembered, the others inherit from the
// optimizer's defaults when the options are given to a parameter group.
class TORCH_EXT_API Options : public torch::optim::OptimizerOptions {
 public:
  explicit Options(const Schema& schema);

  const Schema& schema() const { return *schema_; }
  const c10::IValue& get(const std::string& name) const;
  // Checks type and range: TypeError / ValueError naming the option.
  void set(const std::string& name, const c10::IValue& value);
  bool is_set(const std::string& name) const;
  void inherit(const Options& defaults);
  // Rules between fields (ValueError).
  void check() const;

  double get_lr() const override;
  void set_lr(double lr) override;
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;

  // Keys of a checkpoint's group that are not ours, such as a scheduler's initial_lr: kept and written back.
  std::map<std::string, c10::IValue> extras;

  friend TORCH_EXT_API bool operator==(const Options& a, const Options& b);
  friend bool operator!=(const Options& a, const Options& b) { return !(a == b); }

 private:
  size_t index(const std::string& name) const;

  const Schema* schema_;
  std::vector<c10::IValue> values_;
  uint64_t explicit_ = 0;  // bit i: field i was set
};

template <typename Derived>
class OptionsOf : public Options {
 public:
  using Options::Options;
  std::unique_ptr<torch::optim::OptimizerOptions> clone() const override {
    return std::make_unique<Derived>(static_cast<const Derived&>(*this));
  }

 protected:
  Derived& assign(const char* name, const c10::IValue& value) {
    set(name, value);
    return static_cast<Derived&>(*this);
  }
  std::tuple<double, double> pair(const char* name) const {
    const auto& elements = get(name).toTupleRef().elements();
    return {elements[0].toDouble(), elements[1].toDouble()};
  }
};

// Looked up by string literal without making a string.
using StateTensors = std::map<std::string, at::Tensor, std::less<>>;

// State tensors of one parameter by name.
class TORCH_EXT_API ParamState : public torch::optim::OptimizerCloneableParamState<ParamState> {
 public:
  StateTensors tensors;

  bool has(const std::string& name) const { return tensors.count(name) != 0; }
  const at::Tensor& at(const std::string& name) const;
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;

  friend TORCH_EXT_API bool operator==(const ParamState& a, const ParamState& b);
};

}  // namespace torch_ext::optim

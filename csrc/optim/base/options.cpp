#include <c10/util/Exception.h>
#include <torch/serialize/input-archive.h>
#include <torch/serialize/output-archive.h>
#include <torch_ext/optim/options.h>

#include <cmath>
#include <sstream>

namespace torch_ext::optim {
namespace {

std::string interval(const Field& field) {
  std::ostringstream text;
  text << (field.low_open ? '(' : '[') << field.low << ", " << field.high << (field.high_open ? ')' : ']');
  return text.str();
}

void check_range(const Schema& schema, const Field& field, double x) {
  const bool below = field.low_open ? x <= field.low : x < field.low;
  const bool above = field.high_open ? x >= field.high : x > field.high;
  TORCH_CHECK_VALUE(!std::isnan(x) && !below && !above, "Invalid ", field.name, ": ", x, " (", schema.optimizer,
                    " needs it in ", interval(field), ")");
}

double number(const Schema& schema, const Field& field, const c10::IValue& value) {
  if (value.isTensor() && value.toTensor().numel() == 1) {  // Python's learning rate may be one
    return number(schema, field, value.toTensor().item<double>());
  }
  TORCH_CHECK_TYPE(value.isDouble() || value.isInt(), schema.optimizer, ": option ", field.name,
                   " must be a number, got ", value.tagKind());
  const double x = value.isInt() ? static_cast<double>(value.toInt()) : value.toDouble();
  check_range(schema, field, x);
  return x;
}

// The value as the field's type, checked.
c10::IValue checked(const Schema& schema, const Field& field, const c10::IValue& value) {
  const auto need = [&](bool ok, const char* type) {
    TORCH_CHECK_TYPE(ok, schema.optimizer, ": option ", field.name, " must be ", type, ", got ", value.tagKind());
  };
  switch (field.type) {
    case Field::Type::kOptionalFloat:
      if (value.isNone()) return value;
      return number(schema, field, value);
    case Field::Type::kFloat:
      return number(schema, field, value);
    case Field::Type::kFloatPair: {
      need(value.isTuple() || value.isList(), "a pair of numbers");
      const auto elements = value.isTuple() ? value.toTupleRef().elements().vec() : value.toListRef().vec();
      TORCH_CHECK_VALUE(elements.size() == 2, "Invalid ", field.name, ": ", schema.optimizer,
                        " needs two numbers, got ", elements.size());
      return c10::ivalue::Tuple::create(number(schema, field, elements[0]), number(schema, field, elements[1]));
    }
    case Field::Type::kOptionalInt:
      if (value.isNone()) return value;
      need(value.isInt(), "an integer or None");
      check_range(schema, field, static_cast<double>(value.toInt()));
      return value;
    case Field::Type::kInt:
      need(value.isInt(), "an integer");
      check_range(schema, field, static_cast<double>(value.toInt()));
      return value;
    case Field::Type::kBool:
      need(value.isBool(), "a bool");
      return value;
    case Field::Type::kOptionalString:
      need(value.isNone() || value.isString(), "a string or None");
      return value;
    case Field::Type::kString: {
      need(value.isString(), "a string");
      for (const std::string& choice : field.choices) {
        if (choice == value.toStringRef()) return value;
      }
      std::ostringstream all;
      for (const std::string& choice : field.choices) all << (all.tellp() > 0 ? ", '" : "'") << choice << '\'';
      TORCH_CHECK_VALUE(false, "Invalid ", field.name, ": '", value.toStringRef(), "' (", schema.optimizer, " knows ",
                        all.str(), ")");
    }
  }
  TORCH_CHECK(false, "unreachable");
}

}  // namespace

const Field* Schema::find(const std::string& name) const {
  for (const Field& field : fields) {
    if (field.name == name) return &field;
  }
  return nullptr;
}

Options::Options(const Schema& schema) : schema_(&schema) {
  for (const Field& field : schema.fields) values_.push_back(field.default_value);
}

size_t Options::index(const std::string& name) const {
  const Field* field = schema_->find(name);
  TORCH_CHECK_VALUE(field != nullptr, schema_->optimizer, " has no option '", name, "'");
  return static_cast<size_t>(field - schema_->fields.data());
}

const c10::IValue& Options::get(const std::string& name) const { return values_[index(name)]; }

void Options::set(const std::string& name, const c10::IValue& value) {
  const size_t i = index(name);
  values_[i] = checked(*schema_, schema_->fields[i], value);
  explicit_ |= uint64_t{1} << i;
}

bool Options::is_set(const std::string& name) const { return (explicit_ >> index(name) & 1) != 0; }

void Options::inherit(const Options& defaults) {
  for (size_t i = 0; i < values_.size(); ++i) {
    if ((explicit_ >> i & 1) == 0) values_[i] = defaults.values_[i];
  }
}

void Options::check() const {
  if (schema_->check) schema_->check(*this);
}

double Options::get_lr() const { return get("lr").toDouble(); }
void Options::set_lr(double lr) { set("lr", lr); }

void Options::serialize(torch::serialize::OutputArchive& archive) const {
  for (size_t i = 0; i < values_.size(); ++i) archive.write(schema_->fields[i].name, values_[i]);
}

void Options::serialize(torch::serialize::InputArchive& archive) {
  for (const Field& field : schema_->fields) {
    c10::IValue value;
    if (archive.try_read(field.name, value)) set(field.name, value);
  }
}

bool operator==(const Options& a, const Options& b) { return a.schema_ == b.schema_ && a.values_ == b.values_; }

const at::Tensor& ParamState::at(const std::string& name) const {
  const auto it = tensors.find(name);
  TORCH_CHECK_INDEX(it != tensors.end(), "this parameter has no state '", name, "' yet");
  return it->second;
}

void ParamState::serialize(torch::serialize::OutputArchive& archive) const {
  for (const auto& [name, tensor] : tensors) archive.write(name, tensor, /*is_buffer=*/true);
}

void ParamState::serialize(torch::serialize::InputArchive& archive) {
  tensors.clear();
  for (const std::string& name : archive.keys()) archive.read(name, tensors[name], /*is_buffer=*/true);
}

bool operator==(const ParamState& a, const ParamState& b) {
  if (a.tensors.size() != b.tensors.size()) return false;
  for (const auto& [name, tensor] : a.tensors) {
    const auto it = b.tensors.find(name);
    if (it == b.tensors.end() || !tensor.equal(it->second)) return false;
  }
  return true;
}

}  // namespace torch_ext::optim

// What every optimizer of the pack owes its users, run over all of them: the traps of torch::optim::Optimizer, options,
// state, both checkpoint formats, schedulers, layouts, dtypes, threads; and the trajectories of tests/optim_db.json.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/optim/base.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/state_dict_file.h"
#include "support/check.h"
#include "support/json.h"
#include "support/optimizers.h"
#include "support/problems.h"

namespace torch_ext::optim {
namespace {

using test::clones;
using test::equal_bits;
using test::expect_error;
using test::OptimizerCase;
using test::Problem;
using test::quartic;
using test::same_bits;
using test::same_value;
using test::tanh_layer;
using test::TemporaryFile;
using test::ThreadCount;
using test::Variant;
using test::variants_of;
using torch::optim::OptimizerParamGroup;

using OptimizerPtr = std::unique_ptr<OptimizerBase>;

c10::impl::GenericDict settings(const std::vector<std::pair<std::string, c10::IValue>>& items) {
  c10::impl::GenericDict dict(c10::StringType::get(), c10::AnyType::get());
  for (const auto& [key, value] : items) dict.insert(key, value);
  return dict;
}

const Options& options_of(const OptimizerParamGroup& group) { return static_cast<const Options&>(group.options()); }
Options& options_of(OptimizerParamGroup& group) { return static_cast<Options&>(group.options()); }

bool is_global(const std::string& state) { return state.rfind("global_", 0) == 0; }

// A copy of a state tensor without what a skipped step may change in it: a window's scratch slot, its counts of rows.
at::Tensor settled(const ParamState& state, const std::string& name, const at::Tensor& tensor) {
  at::Tensor copy = tensor.clone();
  if (name == "window_ring") copy.slice(0, 4, 6).zero_();
  if ((name == "window_rows" || name == "window_scales" || name == "window_indices") && copy.dim() > 1) {
    copy.select(1, state.at("window_ring")[1].item<int64_t>()).zero_();
  }
  if (name == "window_error" && copy.dim() > 1) {  // the half that the next accepted row takes
    copy.select(0, 1 - state.at("window_ring")[8].item<int64_t>() % 2).zero_();
  }
  return copy;
}

// Everything a step may change, frozen.
struct Snapshot {
  std::vector<at::Tensor> params;
  c10::IValue dict;

  Snapshot(const Problem& problem, const OptimizerBase& optimizer)
      : params(clones(problem.params)), dict(optimizer.state_dict().deepcopy()) {}
  ::testing::AssertionResult unchanged(const Problem& problem, const OptimizerBase& optimizer) const {
    if (const auto result = equal_bits(problem.params, params); !result) return result;
    if (same_value(optimizer.state_dict(), dict)) return ::testing::AssertionSuccess();
    return ::testing::AssertionFailure() << "the state_dict differs";
  }
};

void run(OptimizerBase& optimizer, const Problem& problem, int steps) {
  for (int i = 0; i < steps; ++i) optimizer.step(problem.closure());
}

size_t count_stateful(const OptimizerBase& optimizer) {
  return optimizer.state_dict().toGenericDict().at("state").toGenericDict().size();
}

const ParamState& state_of(const OptimizerBase& optimizer, const at::Tensor& param) {
  return static_cast<const ParamState&>(*optimizer.state().at(param.unsafeGetTensorImpl()));
}

// What a test is about that only optimizers of gradients have.
#define NEEDS_GRADIENTS(what) \
  if (!GetParam().reads_gradients) GTEST_SKIP() << GetParam().name << " reads no gradients: " << (what)

class AnyOptimizer : public ::testing::TestWithParam<OptimizerCase> {
 protected:
  OptimizerPtr on(const Problem& problem) const { return GetParam().on(problem.params); }
  OptimizerPtr on(const Problem& problem, const c10::IValue& options) const {
    return GetParam().on(problem.params, options);
  }
  std::vector<Variant> variants() const { return variants_of(GetParam().name); }
};

INSTANTIATE_TEST_SUITE_P(All, AnyOptimizer, ::testing::ValuesIn(test::optimizer_cases()),
                         [](const auto& info) { return info.param.name; });

// --- the ten traps of torch::optim::Optimizer -----------------------------------------------------------------------

TEST_P(AnyOptimizer, Trap01GroupsInheritWhatTheyDoNotSet) {
  const Problem p = quartic({{3}, {4}, {5}, {6}});
  const double standard = GetParam().options()->get_lr();
  const auto group = [&](size_t i, const c10::IValue& options) { return GetParam().group({p.params[i]}, options); };
  auto optimizer =
      GetParam().make({group(0, settings({{"lr", 0.3}})), group(1, settings({})), OptimizerParamGroup({p.params[2]})},
                      *GetParam().with(settings({{"lr", 0.5}})));
  optimizer->add_param_group(group(3, settings({{"lr", standard}})));  // explicit, although it is the type's default
  const std::vector<double> expected{0.3, 0.5, 0.5, standard};
  for (size_t g = 0; g < expected.size(); ++g) EXPECT_EQ(optimizer->param_groups()[g].options().get_lr(), expected[g]);
  for (const Field& field : optimizer->schema().fields) {
    if (field.name == "lr") continue;
    for (const auto& own : optimizer->param_groups())
      EXPECT_TRUE(options_of(own).get(field.name) == field.default_value);
  }
}

TEST_P(AnyOptimizer, Trap01EveryOptionIsInheritedOnItsOwn) {
  for (const Variant& variant : variants()) {
    const Problem p = tanh_layer();
    auto optimizer = GetParam().make({GetParam().group({p.params[0]}, settings({{"lr", 0.0123}}))},
                                     *GetParam().with(variant.options));
    const Options& merged = options_of(optimizer->param_groups()[0]);
    const auto expected = GetParam().with(variant.options);
    for (const Field& field : optimizer->schema().fields) {
      if (field.name == "lr") {
        EXPECT_EQ(merged.get_lr(), 0.0123);
      } else {
        EXPECT_TRUE(merged.get(field.name) == expected->get(field.name)) << variant.name << ", " << field.name;
      }
    }
  }
}

TEST_P(AnyOptimizer, Trap02DuplicateParametersAreRefused) {
  const Problem p = quartic({{3}, {4}});
  const at::Tensor a = p.params[0], b = p.params[1];
  const std::string text = "appear more than once";
  expect_error<c10::ValueError>([&] { GetParam().on({a, b, a}); }, text);
  expect_error<c10::ValueError>(
      [&] {
        GetParam().make({OptimizerParamGroup({a}), OptimizerParamGroup({a})}, *GetParam().options());
      },
      text);
  auto optimizer = GetParam().on({a});
  for (int round = 0; round < 2; ++round) {  // before and after the first step
    expect_error<c10::ValueError>([&] { optimizer->add_param_group(OptimizerParamGroup({b, b})); }, text);
    expect_error<c10::ValueError>([&] { optimizer->add_param_group(OptimizerParamGroup({b, a})); }, text);
    ASSERT_EQ(optimizer->param_groups().size(), 1u);
    run(*optimizer, p, 1);
  }
  optimizer->add_param_group(OptimizerParamGroup({b}));
  EXPECT_EQ(optimizer->param_groups().size(), 2u);
}

// Options of an optimizer that does not exist, with fields that do.
const Schema& other_schema() {
  static const Schema schema{"Other", 1, {{"lr", Field::Type::kFloat, 0.1}}, {}};
  return schema;
}
class OtherOptions : public OptionsOf<OtherOptions> {
 public:
  OtherOptions() : OptionsOf(other_schema()) {}
};

TEST_P(AnyOptimizer, Trap03OptionsOfAnotherOptimizerAreRefused) {
  const Problem p = quartic({{3}, {4}});
  const auto optimizer = GetParam().on({p.params[0]});
  const std::string text = "the options of parameter group 1 are of another optimizer";
  const auto add = [&](std::unique_ptr<torch::optim::OptimizerOptions> options) {
    optimizer->add_param_group({{p.params[1]}, std::move(options)});
  };
  expect_error<c10::TypeError>([&] { add(std::make_unique<torch::optim::AdamWOptions>(0.1)); }, text);
  expect_error<c10::TypeError>([&] { add(std::make_unique<torch::optim::SGDOptions>(0.1)); }, text);
  expect_error<c10::TypeError>([&] { add(std::make_unique<OtherOptions>()); }, text);
  EXPECT_EQ(optimizer->param_groups().size(), 1u);
}

TEST_P(AnyOptimizer, Trap04AddParamGroupIsOurs) {
  static_assert(
      std::is_same_v<decltype(&OptimizerBase::add_param_group), void (OptimizerBase::*)(const OptimizerParamGroup&)>);
  const Problem p = quartic({{3}, {4}});
  const auto optimizer = GetParam().on({p.params[0]}, settings({{"lr", 0.25}}));
  optimizer->add_param_group(GetParam().group({p.params[1]}, settings({})));
  EXPECT_EQ(optimizer->param_groups()[1].options().get_lr(), 0.25);
  expect_error<c10::ValueError>([&] { optimizer->add_param_group(OptimizerParamGroup({p.params[0] * 2})); },
                                "can't optimize a non-leaf tensor");
  expect_error<c10::ValueError>([&] { optimizer->add_param_group(OptimizerParamGroup({at::Tensor()})); },
                                "undefined tensor");
  EXPECT_EQ(optimizer->param_groups().size(), 2u);
}

TEST_P(AnyOptimizer, Trap05StateLivesWhileTheTensorIsInAGroup) {
  Problem p = quartic({{3}, {4}});
  const auto optimizer = on(p);
  run(*optimizer, p, 3);
  EXPECT_EQ(optimizer->state().size(), 2u);
  p.params[1] = p.params[1].detach().clone().requires_grad_();
  optimizer->param_groups()[0].params()[1] = p.params[1];
  optimizer->prune_state();
  EXPECT_EQ(optimizer->state().size(), 1u);
  run(*optimizer, p, 1);
  EXPECT_EQ(state_of(*optimizer, p.params[0]).at("step").item<float>(), 4);
  EXPECT_EQ(state_of(*optimizer, p.params[1]).at("step").item<float>(), 1);
}

TEST_P(AnyOptimizer, Trap06NothingOfTheBaseClassIsLeftEmpty) {
  const Problem p = tanh_layer();
  const auto optimizer = on(p);
  run(*optimizer, p, 2);
  torch::optim::Optimizer& base = *optimizer;
  torch::optim::OptimizerOptions& options = base.param_groups()[0].options();
  options.set_lr(0.042);
  EXPECT_EQ(options.get_lr(), 0.042);
  const auto copy = options.clone();
  EXPECT_EQ(copy->get_lr(), 0.042);
  copy->set_lr(1);
  EXPECT_EQ(options.get_lr(), 0.042);
  const auto state = base.state().begin()->second->clone();
  EXPECT_TRUE(static_cast<ParamState&>(*state) == static_cast<ParamState&>(*base.state().begin()->second));
  std::stringstream file;
  torch::save(base, file);
  const auto loaded = on(p.copy());
  torch::load(static_cast<torch::optim::Optimizer&>(*loaded), file);
  EXPECT_TRUE(same_value(loaded->state_dict(), optimizer->state_dict()));
}

TEST_P(AnyOptimizer, Trap07LoadClearsOldStateAndCasts) {
  NEEDS_GRADIENTS("it steps all parameters");
  // A float32 checkpoint of a parameter that stepped and one that did not, into a float64 optimizer where both did.
  Problem narrow = quartic({{3}, {4}}, at::kFloat);
  const auto saved = on(narrow);
  Problem first = narrow;
  first.params = {narrow.params[0]};
  run(*saved, first, 2);
  ASSERT_EQ(saved->state().size(), 1u);
  const auto check = [&](const auto& load) {
    const Problem wide = quartic({{3}, {4}});
    const auto optimizer = on(wide);
    run(*optimizer, wide, 3);
    load(*optimizer);
    EXPECT_EQ(optimizer->state().size(), 1u);
    const ParamState& state = state_of(*optimizer, wide.params[0]);
    EXPECT_EQ(state.at("step").item<float>(), 2);
    for (const StateField& field : optimizer->schema().state) {
      if (!state.has(field.name) || field.dtype != StateField::DType::kArithmetic) continue;
      EXPECT_EQ(state.at(field.name).scalar_type(), at::kDouble) << field.name;
      EXPECT_TRUE(same_bits(state.at(field.name), state_of(*saved, narrow.params[0]).at(field.name).to(at::kDouble)));
    }
    run(*optimizer, wide, 1);
  };
  check([&](OptimizerBase& optimizer) { optimizer.load_state_dict(saved->state_dict()); });
  check([&](OptimizerBase& optimizer) {
    std::stringstream file;
    torch::save(*saved, file);
    torch::load(optimizer, file);
  });
}

c10::impl::GenericDict group_of(const c10::IValue& dict, size_t g) {
  return dict.toGenericDict().at("param_groups").toListRef()[g].toGenericDict();
}
c10::impl::GenericDict state_of_dict(const c10::IValue& dict, int64_t i) {
  return dict.toGenericDict().at("state").toGenericDict().at(i).toGenericDict();
}

TEST_P(AnyOptimizer, Trap08OlderFilesLoad) {
  const Problem p = tanh_layer();
  const auto optimizer = on(p);
  run(*optimizer, p, 2);
  for (const Field& field : optimizer->schema().fields) {  // every option, as if it were new
    const c10::IValue dict = optimizer->state_dict().deepcopy();
    std::ignore = group_of(dict, 0).erase(field.name);
    const Problem q = p.copy();
    const auto loaded = on(q);
    loaded->load_state_dict(dict);
    EXPECT_TRUE(options_of(loaded->param_groups()[0]).get(field.name) == field.default_value) << field.name;
    run(*loaded, q, 1);
  }
  // The native archive with only the learning rate, written by hand.
  torch::serialize::OutputArchive archive, groups, group, state;
  archive.write("optimizer", c10::IValue(GetParam().name));
  archive.write("format_version", c10::IValue(int64_t{1}));
  group.write("lr", c10::IValue(0.07));
  group.write("size", c10::IValue(static_cast<int64_t>(p.params.size())));
  groups.write("0", group);
  archive.write("groups", groups);
  archive.write("state", state);
  std::stringstream file;
  archive.save_to(file);
  const Problem q = p.copy();
  const auto loaded = on(q);
  torch::load(*loaded, file);
  EXPECT_EQ(loaded->param_groups()[0].options().get_lr(), 0.07);
  run(*loaded, q, 1);
}

TEST_P(AnyOptimizer, Trap08MissingStateIsMadeOrRefused) {
  const Problem p = tanh_layer();
  const auto optimizer = on(p);
  run(*optimizer, p, 2);
  for (const StateField& field : optimizer->schema().state) {
    const c10::IValue dict = optimizer->state_dict().deepcopy();
    for (int64_t i = 0; i < 3; ++i) std::ignore = state_of_dict(dict, i).erase(field.name);
    const Problem q = p.copy();
    const auto loaded = on(q);
    try {
      loaded->load_state_dict(dict);
    } catch (const c10::ValueError& error) {
      EXPECT_NE(std::string(error.what()).find(field.name), std::string::npos) << error.what();
      EXPECT_TRUE(loaded->state().empty());
    }
    run(*loaded, q, 2);
    EXPECT_TRUE(q.params[0].isfinite().all().item<bool>()) << field.name;
  }
}

TEST_P(AnyOptimizer, Trap08ForeignFilesAreRefusedAndChangeNothing) {
  const Problem p = tanh_layer();
  const auto optimizer = on(p);
  run(*optimizer, p, 2);
  const Snapshot before(p, *optimizer);
  const c10::IValue good = before.dict;
  const auto refuse = [&](const auto& change, const std::string& text) {
    const c10::IValue dict = good.deepcopy();
    change(dict.toGenericDict());
    expect_error<c10::Error>([&] { optimizer->load_state_dict(dict); }, text);
    EXPECT_TRUE(before.unchanged(p, *optimizer)) << text;
  };
  using Dict = c10::impl::GenericDict;
  const auto about = [](const Dict& dict) { return dict.at("torch_ext").toGenericDict(); };
  refuse([&](const Dict& dict) { about(dict).insert_or_assign("optimizer", "Other"); },
         "this state_dict is of Other, not of " + GetParam().name);
  refuse([&](const Dict& dict) { about(dict).insert_or_assign("format_version", int64_t{99}); }, "update torch_ext");
  refuse([](const Dict& dict) { std::ignore = dict.erase("state"); }, "it has no 'state'");
  refuse([](const Dict& dict) { std::ignore = dict.erase("param_groups"); }, "it has no 'param_groups'");
  refuse([](const Dict& dict) { dict.insert_or_assign("param_groups", c10::impl::GenericList(c10::AnyType::get())); },
         "parameter groups");
  refuse([](const Dict& dict) { std::ignore = group_of(dict, 0).erase("params"); }, "has no 'params'");
  refuse([](const Dict& dict) { group_of(dict, 0).at("params").toList().pop_back(); }, "parameters in group 0");
  refuse([](const Dict& dict) { group_of(dict, 0).insert_or_assign("lr", -1.0); }, "Invalid lr");
  refuse([](const Dict& dict) { group_of(dict, 0).insert_or_assign("lr", "fast"); }, "lr must be a number");
  const std::string own = GetParam().own_state;
  refuse([&](const Dict& dict) { state_of_dict(dict, 1).insert_or_assign(own, at::zeros({7})); }, "shape");
  refuse([&](const Dict& dict) { state_of_dict(dict, 1).insert_or_assign(own, "text"); }, "is no tensor");
  expect_error<c10::Error>([&] { optimizer->load_state_dict(c10::IValue(int64_t{3})); },
                           "not an optimizer's state_dict");

  std::stringstream sgd_file, module_file, other_file, broken_file;
  torch::optim::SGD sgd(p.copy().params, 0.1);
  torch::save(sgd, sgd_file);
  torch::save(torch::nn::Linear(2, 2), module_file);
  torch::serialize::OutputArchive other;
  other.write("optimizer", c10::IValue("Other"));
  other.write("format_version", c10::IValue(int64_t{1}));
  torch::serialize::OutputArchive nothing(other.compilation_unit());
  other.write("groups", nothing);
  other.write("state", nothing);
  other.save_to(other_file);
  broken_file << "not an archive";
  expect_error<c10::ValueError>([&] { torch::load(*optimizer, sgd_file); }, "not written by an optimizer of torch_ext");
  expect_error<c10::ValueError>([&] { torch::load(*optimizer, module_file); }, "not written by an optimizer");
  expect_error<c10::ValueError>([&] { torch::load(*optimizer, other_file); }, "is of Other");
  expect_error<c10::Error>([&] { torch::load(*optimizer, broken_file); }, "");
  EXPECT_TRUE(before.unchanged(p, *optimizer));

  const TemporaryFile file;
  optimizer->save_state_dict(file.path());
  std::filesystem::resize_file(file.path(), std::filesystem::file_size(file.path()) / 2);
  expect_error<c10::Error>([&] { optimizer->load_state_dict(file.path()); }, file.path());
  expect_error<c10::Error>([&] { optimizer->load_state_dict("/nowhere/at/all"); }, "/nowhere/at/all");
  EXPECT_TRUE(before.unchanged(p, *optimizer));
}

TEST_P(AnyOptimizer, Trap09OptionsAndStateSurviveAsTheyAre) {
  for (const Variant& variant : variants()) {
    auto extreme = GetParam().with(variant.options);
    for (const Field& field : extreme->schema().fields) {  // 64-bit patterns must not pass through a double
      if (field.name == "seed") extreme->set("seed", std::numeric_limits<int64_t>::min() + 1);
    }
    torch::serialize::OutputArchive out;
    extreme->serialize(out);
    std::stringstream file;
    out.save_to(file);
    torch::serialize::InputArchive in;
    in.load_from(file);
    auto loaded = GetParam().options();
    loaded->serialize(in);
    EXPECT_TRUE(*loaded == *extreme) << variant.name;
  }
}

class CountWarnings : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override { messages.push_back(warning.msg()); }
  std::vector<std::string> messages;
};

TEST_P(AnyOptimizer, Trap10NoDeprecationWarningAndTorchsSchedule) {
  CountWarnings counter;
  const c10::WarningUtils::WarningHandlerGuard guard(&counter);
  const Problem p = quartic({{3}, {4}});
  const auto optimizer = on(p, settings({{"lr", 0.1}}));
  torch::optim::StepLR scheduler(*optimizer, /*step_size=*/1, /*gamma=*/0.5);
  std::vector<double> rates;
  for (int i = 0; i < 4; ++i) {
    optimizer->zero_grad();
    run(*optimizer, p, 1);
    scheduler.step();
    rates.push_back(optimizer->param_groups()[0].options().get_lr());
  }
  EXPECT_EQ(rates, (std::vector<double>{0.1, 0.05, 0.025, 0.0125}));  // torch::optim::StepLR does nothing at first
  for (const std::string& message : counter.messages) ADD_FAILURE() << message;
}

// --- accessors, groups, options -------------------------------------------------------------------------------------

TEST_P(AnyOptimizer, Accessors) {
  const Problem p = quartic({{3}, {4}});
  const auto optimizer = on(p, settings({{"lr", 0.2}}));
  const torch::optim::Optimizer& constant = *optimizer;
  EXPECT_EQ(optimizer->defaults().get_lr(), 0.2);
  EXPECT_EQ(constant.defaults().get_lr(), 0.2);
  EXPECT_EQ(&optimizer->param_groups(), &constant.param_groups());
  ASSERT_EQ(constant.param_groups().size(), 1u);
  ASSERT_EQ(constant.param_groups()[0].params().size(), 2u);
  EXPECT_TRUE(constant.param_groups()[0].params()[1].is_same(p.params[1]));
  EXPECT_TRUE(constant.state().empty());
  EXPECT_EQ(optimizer->skipped_steps().item<int64_t>(), 0);
  EXPECT_EQ(optimizer->skipped_steps().scalar_type(), at::kLong);
  EXPECT_TRUE(constant.state().empty());  // asking creates nothing
  run(*optimizer, p, 1);
  EXPECT_EQ(constant.state().size(), 2u);
  EXPECT_EQ(&optimizer->state(), &constant.state());
  EXPECT_EQ(optimizer->schema().optimizer, GetParam().name);
  expect_error<c10::IndexError>([&] { state_of(*optimizer, p.params[0]).at("nothing"); }, "no state 'nothing'");
}

TEST_P(AnyOptimizer, EmptyListsAreRefused) {
  expect_error<c10::ValueError>([&] { GetParam().make({}, *GetParam().options()); }, "got no parameters");
}

TEST_P(AnyOptimizer, OptionsAreCheckedByNameTypeAndRange) {
  auto options = GetParam().options();
  expect_error<c10::ValueError>([&] { options->set("nothing", 1.0); }, "has no option 'nothing'");
  expect_error<c10::ValueError>([&] { options->set("lr", -0.1); }, "Invalid lr");
  expect_error<c10::ValueError>([&] { options->set("lr", std::nan("")); }, "Invalid lr");
  expect_error<c10::ValueError>([&] { options->set_lr(-1); }, "Invalid lr");
  expect_error<c10::TypeError>([&] { options->set("lr", "fast"); }, "lr must be a number");
  EXPECT_FALSE(options->is_set("lr"));
  options->set("lr", int64_t{0});  // zero and integers are numbers
  EXPECT_TRUE(options->is_set("lr"));
  EXPECT_EQ(options->get_lr(), 0);
  EXPECT_TRUE(options->get("lr").isDouble());
}

TEST_P(AnyOptimizer, OptionsEqualityAndClone) {
  const auto plain = GetParam().options();
  for (const Variant& variant : variants()) {
    const auto a = GetParam().with(variant.options), b = GetParam().with(variant.options);
    EXPECT_TRUE(*a == *b) << variant.name;
    EXPECT_EQ(*a != *plain, variant.options.toGenericDict().size() > 0) << variant.name;
    const auto copy = a->clone();
    EXPECT_TRUE(static_cast<Options&>(*copy) == *a) << variant.name;
    copy->set_lr(copy->get_lr() + 1);
    EXPECT_TRUE(static_cast<Options&>(*copy) != *a && *a == *b) << variant.name;
  }
}

TEST_P(AnyOptimizer, GlobalOptionsAgreeInAllGroups) {
  for (const Variant& variant : variants()) {
    const Problem p = quartic({{2, 6}, {2, 6}, {2, 6}});
    auto optimizer = GetParam().make({OptimizerParamGroup({p.params[0]})}, *GetParam().with(variant.options));
    const auto plain = GetParam().options();
    for (const Field& field : optimizer->schema().fields) {
      const c10::IValue value = options_of(optimizer->param_groups()[0]).get(field.name);
      if (!field.global || value == plain->get(field.name)) continue;
      expect_error<c10::ValueError>(
          [&] {
            optimizer->add_param_group(GetParam().group({p.params[1]}, settings({{field.name, field.default_value}})));
          },
          field.name);
      // Loaded global options reach groups that are added later.
      const Problem q = p.copy();
      auto loaded = GetParam().on({q.params[0]});
      loaded->load_state_dict(optimizer->state_dict());
      loaded->add_param_group(OptimizerParamGroup({q.params[1]}));
      EXPECT_TRUE(options_of(loaded->param_groups()[1]).get(field.name) == value) << field.name;
      expect_error<c10::ValueError>(
          [&] {
            loaded->add_param_group(GetParam().group({q.params[2]}, settings({{field.name, field.default_value}})));
          },
          field.name);
    }
  }
}

TEST_P(AnyOptimizer, LearningRateOfEachGroupCounts) {
  NEEDS_GRADIENTS("equal parameters see different noise");
  const Problem p = quartic({{3}, {3}, {3}});
  {
    const at::NoGradGuard no_grad;
    for (auto& param : p.params) param.copy_(p.params[0]);
  }
  const at::Tensor start = p.params[0].detach().clone();
  auto optimizer = GetParam().make({GetParam().group({p.params[0]}, settings({{"lr", 0.1}})),
                                    GetParam().group({p.params[1]}, settings({{"lr", 0.01}})),
                                    GetParam().group({p.params[2]}, settings({{"lr", 1e-28}}))},
                                   *GetParam().options());
  run(*optimizer, p, 1);
  const at::Tensor far = p.params[0].detach() - start, near = p.params[1].detach() - start;
  EXPECT_LT(test::relative_error(near * 10, far), 1e-12);
  EXPECT_GT(far.abs().min().item<double>(), 0);
  EXPECT_TRUE(same_bits(p.params[2], start));
}

// --- steps ----------------------------------------------------------------------------------------------------------

TEST_P(AnyOptimizer, ParametersWithoutGradientAreLeftAlone) {
  NEEDS_GRADIENTS("it steps all parameters");
  Problem p = quartic({{3}, {4}, {5}});
  const auto optimizer = on(p);
  const Snapshot before(p, *optimizer);
  optimizer->step();  // nobody has a gradient
  EXPECT_TRUE(before.unchanged(p, *optimizer));
  EXPECT_EQ(optimizer->state().size(), 0u);
  Problem part = p;
  part.params = {p.params[0], p.params[2]};
  p.params[2].set_requires_grad(false);
  run(*optimizer, part, 2);
  EXPECT_FALSE(same_bits(p.params[0], before.params[0]));
  EXPECT_TRUE(same_bits(p.params[1], before.params[1]));
  EXPECT_TRUE(same_bits(p.params[2], before.params[2]));
  EXPECT_EQ(optimizer->state().size(), 1u);
}

// The optimizer's own counters sit with the first parameter, also while that one does not step.
TEST_P(AnyOptimizer, TheFirstParameterMayJoinLate) {
  NEEDS_GRADIENTS("it steps all parameters");
  Problem p = quartic({{3}, {4}}), straight = p.copy();
  const auto second = [](const Problem& problem) { return [&problem] { return problem.params[1].square().sum(); }; };
  const auto reference = on(straight), saved = on(p);
  for (int i = 0; i < 3; ++i) {
    reference->step(second(straight));
    saved->step(second(p));
  }
  const TemporaryFile file;
  saved->save_state_dict(file.path());
  const Problem q = p.copy();
  const auto loaded = on(q);
  loaded->load_state_dict(file.path());
  run(*reference, straight, 3);
  run(*loaded, q, 3);
  EXPECT_TRUE(equal_bits(q.params, straight.params));
  EXPECT_EQ(state_of(*loaded, q.params[0]).at("step").item<float>(), 3);
  EXPECT_TRUE(same_value(loaded->state_dict(), reference->state_dict()));
}

TEST_P(AnyOptimizer, ZeroGradBothModes) {
  NEEDS_GRADIENTS("there are none to zero");
  const Problem p = quartic({{3}, {4}});
  const auto optimizer = on(p);
  run(*optimizer, p, 1);
  for (const auto& param : p.params) ASSERT_TRUE(param.grad().defined());
  optimizer->zero_grad(/*set_to_none=*/false);
  for (const auto& param : p.params) {
    ASSERT_TRUE(param.grad().defined());
    EXPECT_EQ(param.grad().abs().max().item<double>(), 0);
  }
  run(*optimizer, p, 1);  // a closure that returns its loss is not fooled by gradients of zero
  EXPECT_GT(p.params[0].grad().abs().max().item<double>(), 0);
  optimizer->zero_grad();
  for (const auto& param : p.params) EXPECT_FALSE(param.grad().defined());
}

TEST_P(AnyOptimizer, ExternalVectorOfParameters) {
  NEEDS_GRADIENTS("one step of it need not bring every element nearer");
  const std::vector<at::Tensor> parameters = quartic({{2, 2}, {3, 3}}).params;
  const auto original = clones(parameters);
  const auto optimizer = GetParam().on(parameters);
  optimizer->step([&] { return (parameters[0] * parameters[0]).sum() + (parameters[1] * parameters[1]).sum(); });
  for (size_t i = 0; i < parameters.size(); ++i) {
    EXPECT_TRUE((parameters[i].abs() < original[i].abs()).all().item<bool>());
  }
}

TEST_P(AnyOptimizer, ReturnsTheLossWithoutItsGraph) {
  NEEDS_GRADIENTS("it returns the mean of several losses");
  const Problem p = tanh_layer();
  const auto optimizer = on(p);
  const double expected = p.loss(p.params).item<double>();
  const at::Tensor loss = optimizer->step(p.closure());
  EXPECT_EQ(loss.item<double>(), expected);
  EXPECT_FALSE(loss.requires_grad());
  for (const auto& param : p.params) {
    ASSERT_TRUE(param.grad().defined());
    EXPECT_FALSE(param.grad().requires_grad());
  }
  optimizer->zero_grad();
  EXPECT_FALSE(optimizer->step().defined());
}

TEST_P(AnyOptimizer, ThrowingClosureChangesNothing) {
  NEEDS_GRADIENTS("a loss needs no graph");
  const Problem p = tanh_layer();
  const auto optimizer = on(p);
  const auto fail = [&]() -> at::Tensor {
    p.loss(p.params);
    throw std::runtime_error("out of data");
  };
  for (int round = 0; round < 2; ++round) {
    const Snapshot before(p, *optimizer);
    expect_error<std::runtime_error>([&] { optimizer->step(fail); }, "out of data");
    EXPECT_TRUE(before.unchanged(p, *optimizer));
    expect_error<c10::Error>([&] { optimizer->step([] { return at::Tensor(); }); }, "does the closure return it");
    expect_error<c10::Error>([&] { optimizer->step([&] { return p.loss(p.params).detach(); }); }, "no graph");
    expect_error<c10::Error>([&] { optimizer->step([&] { return p.params[0] * 2; }); }, "one number");
    EXPECT_TRUE(before.unchanged(p, *optimizer));
    EXPECT_TRUE(at::GradMode::is_enabled());
    run(*optimizer, p, 1);
  }
}

TEST_P(AnyOptimizer, NonfiniteStepsChangeNothingAndAreCounted) {
  NEEDS_GRADIENTS("its own tests have values that are not finite");
  for (const Variant& variant : variants()) {
    const Problem p = tanh_layer();
    const auto optimizer = on(p, variant.options);
    const auto frozen = [&] {  // all state but the optimizer's own counters
      std::vector<at::Tensor> tensors = clones(p.params);
      for (const auto& param : p.params) {
        if (optimizer->state().count(param.unsafeGetTensorImpl()) == 0) continue;
        const ParamState& state = state_of(*optimizer, param);
        for (const auto& [name, tensor] : state.tensors) {
          if (!is_global(name)) tensors.push_back(settled(state, name, tensor));
        }
      }
      return tensors;
    };
    run(*optimizer, p, 2);
    const auto before = frozen();
    int64_t skipped = 0;
    for (const double bad :
         {std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity(), std::nan("")}) {
      for (const size_t where : {size_t{0}, size_t{2}}) {
        optimizer->step([&] { return p.loss(p.params) + (p.params[where] * bad).sum(); });
        EXPECT_TRUE(equal_bits(frozen(), before)) << variant.name;
        EXPECT_EQ(optimizer->skipped_steps().item<int64_t>(), ++skipped) << variant.name;
      }
    }
    optimizer->zero_grad();
    run(*optimizer, p, 1);
    EXPECT_FALSE(same_bits(p.params[0], before[0])) << variant.name;
    EXPECT_EQ(optimizer->skipped_steps().item<int64_t>(), skipped);
  }
}

TEST_P(AnyOptimizer, BumpsVersionsOfParameters) {
  const Problem p = quartic({{3}});
  const auto optimizer = on(p);
  const auto version = p.params[0]._version();
  run(*optimizer, p, 1);
  EXPECT_GT(p.params[0]._version(), version);
}

TEST_P(AnyOptimizer, EmptyAndZeroDimensionalParameters) {
  const Problem p = quartic({{0}, {3, 0, 2}, {}, {1}});
  const auto optimizer = on(p);
  const auto before = clones(p.params);
  run(*optimizer, p, 2);
  EXPECT_FALSE(same_bits(p.params[2], before[2]));
  EXPECT_FALSE(same_bits(p.params[3], before[3]));
}

TEST_P(AnyOptimizer, MovesAndContinues) {
  const Problem p = tanh_layer(), q = p.copy();
  auto straight = on(p), from = on(q);
  run(*straight, p, 4);
  run(*from, q, 2);
  const auto moved = GetParam().move(std::move(*from));
  from.reset();
  run(*moved, q, 2);
  EXPECT_TRUE(equal_bits(q.params, p.params));
  EXPECT_TRUE(same_value(moved->state_dict(), straight->state_dict()));
}

// --- schedulers -----------------------------------------------------------------------------------------------------

TEST_P(AnyOptimizer, StepLRChangesTheSteps) {
  Problem p = quartic({{3}, {4}}), q = p.copy();
  const auto groups = [&](const Problem& problem) -> test::Groups {
    return {GetParam().group({problem.params[0]}, settings({{"lr", 0.1}})),
            GetParam().group({problem.params[1]}, settings({{"lr", 0.2}}))};
  };
  auto scheduled = GetParam().make(groups(p), *GetParam().options());
  auto by_hand = GetParam().make(groups(q), *GetParam().options());
  torch::optim::StepLR scheduler(*scheduled, /*step_size=*/2, /*gamma=*/0.1);
  for (int i = 0; i < 6; ++i) {
    run(*scheduled, p, 1);
    scheduler.step();
    run(*by_hand, q, 1);
    if (i > 0 && i % 2 == 0) {  // as torch counts
      for (auto& group : by_hand->param_groups()) group.options().set_lr(group.options().get_lr() * 0.1);
    }
  }
  EXPECT_NEAR(scheduled->param_groups()[0].options().get_lr(), 0.1 * 0.01, 1e-15);
  EXPECT_NEAR(scheduled->param_groups()[1].options().get_lr(), 0.2 * 0.01, 1e-15);
  EXPECT_TRUE(equal_bits(p.params, q.params));
}

TEST_P(AnyOptimizer, ReduceLROnPlateau) {
  const Problem p = quartic({{3}});
  auto options = GetParam().steady;
  options.emplace_back("lr", 0.1);
  const auto optimizer = on(p, settings(options));
  torch::optim::ReduceLROnPlateauScheduler scheduler(*optimizer, torch::optim::ReduceLROnPlateauScheduler::min,
                                                     /*factor=*/0.5, /*patience=*/1);
  const auto lr = [&] { return optimizer->param_groups()[0].options().get_lr(); };
  for (int i = 0; i < 3; ++i) scheduler.step(static_cast<float>(optimizer->step(p.closure()).item<double>()));
  EXPECT_EQ(lr(), 0.1);  // the loss went down
  for (int i = 0; i < 2; ++i) scheduler.step(1e9f);
  EXPECT_NEAR(lr(), 0.05, 1e-9);
}

// --- checkpoints ----------------------------------------------------------------------------------------------------

TEST_P(AnyOptimizer, StateArchiveRoundTrip) {
  const Problem p = tanh_layer();
  const auto optimizer = on(p);
  run(*optimizer, p, 2);
  for (const auto& item : optimizer->state()) {
    torch::serialize::OutputArchive out;
    item.second->serialize(out);
    std::stringstream file;
    out.save_to(file);
    torch::serialize::InputArchive in;
    in.load_from(file);
    ParamState loaded;
    loaded.tensors["stale"] = at::zeros({});
    loaded.serialize(in);
    EXPECT_TRUE(loaded == static_cast<const ParamState&>(*item.second));
    loaded.tensors.begin()->second.add_(1);
    EXPECT_FALSE(loaded == static_cast<const ParamState&>(*item.second));
  }
}

// Two steps, a save, a load into an optimizer with other options, two steps: the same bits as four steps.
TEST_P(AnyOptimizer, ResumesWhereItStopped) {
  const TemporaryFile file;
  const std::vector<std::pair<std::string, std::function<void(OptimizerBase&, OptimizerBase&)>>> ways{
      {"state_dict", [](OptimizerBase& from, OptimizerBase& to) { to.load_state_dict(from.state_dict()); }},
      {"file",
       [&](OptimizerBase& from, OptimizerBase& to) {
         from.save_state_dict(file.path());
         to.load_state_dict(file.path());
       }},
      {"archive",
       [](OptimizerBase& from, OptimizerBase& to) {
         std::stringstream archive;
         torch::save(from, archive);
         torch::load(to, archive);
       }},
  };
  for (const Variant& variant : variants()) {
    for (const auto& [way, transfer] : ways) {
      Problem straight = tanh_layer(), first = straight.copy();
      const auto reference = on(straight, variant.options), saved = on(first, variant.options);
      run(*reference, straight, 4);
      run(*saved, first, 2);
      const Problem second = first.copy();
      const auto resumed = on(second, settings({{"lr", 0.0321}}));
      transfer(*saved, *resumed);
      EXPECT_TRUE(same_value(resumed->state_dict(), saved->state_dict())) << variant.name << ", " << way;
      run(*saved, first, 1);  // what was loaded is a copy
      run(*resumed, second, 2);
      EXPECT_TRUE(equal_bits(second.params, straight.params)) << variant.name << ", " << way;
      EXPECT_TRUE(same_value(resumed->state_dict(), reference->state_dict())) << variant.name << ", " << way;
    }
  }
}

TEST_P(AnyOptimizer, StateDictIsTheOneOfPython) {
  const Problem p = quartic({{3}, {4}, {5}});
  auto optimizer = GetParam().make(
      {OptimizerParamGroup({p.params[0], p.params[1]}), OptimizerParamGroup({p.params[2]})}, *GetParam().options());
  run(*optimizer, p, 1);
  const c10::IValue dict = optimizer->state_dict();
  EXPECT_EQ(dict.toGenericDict().at("torch_ext").toGenericDict().at("optimizer").toStringRef(), GetParam().name);
  EXPECT_EQ(count_stateful(*optimizer), 3u);
  const auto indices = group_of(dict, 1).at("params").toListRef();
  ASSERT_EQ(indices.size(), 1u);
  EXPECT_EQ(indices[0].toInt(), 2);
  for (const Field& field : optimizer->schema().fields) EXPECT_TRUE(group_of(dict, 0).contains(field.name));
  const at::Tensor step = state_of_dict(dict, 2).at("step").toTensor();
  EXPECT_EQ(step.scalar_type(), at::kFloat);
  EXPECT_EQ(step.dim(), 0);
  std::set<std::string> known;
  for (const StateField& field : optimizer->schema().state) known.insert(field.name);
  for (int64_t i = 0; i < 3; ++i) {
    for (const auto& item : state_of_dict(dict, i)) {
      const std::string& name = item.key().toStringRef();
      EXPECT_EQ(known.count(name), 1u) << name << " is not in the schema";
      EXPECT_TRUE(i == 0 || !is_global(name)) << name;
    }
  }
  // What is not ours in a group, such as a Python scheduler's initial_lr, is kept.
  const c10::IValue with_extra = dict.deepcopy();
  group_of(with_extra, 1).insert("initial_lr", 0.7);
  optimizer->load_state_dict(with_extra);
  EXPECT_EQ(group_of(optimizer->state_dict(), 1).at("initial_lr").toDouble(), 0.7);
}

TEST_P(AnyOptimizer, HalfPrecisionParametersKeepFloat32State) {
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    Problem p = quartic({{3, 4}, {5}}, dtype), straight = p.copy();
    const auto saved = on(p), reference = on(straight);
    run(*saved, p, 2);
    run(*reference, straight, 4);
    const TemporaryFile file;
    saved->save_state_dict(file.path());
    std::stringstream archive;
    torch::save(*saved, archive);
    for (const bool native : {false, true}) {
      const Problem q = p.copy();
      const auto loaded = on(q);
      if (native) {
        torch::load(*loaded, archive);
      } else {
        loaded->load_state_dict(file.path());
      }
      for (const StateField& field : loaded->schema().state) {
        const ParamState& state = state_of(*loaded, q.params[0]);
        if (!state.has(field.name) || field.dtype != StateField::DType::kArithmetic) continue;
        EXPECT_EQ(state.at(field.name).scalar_type(), at::kFloat) << field.name;
      }
      EXPECT_TRUE(same_value(loaded->state_dict(), saved->state_dict()));
      run(*loaded, q, 2);
      EXPECT_EQ(q.params[0].scalar_type(), dtype);
      EXPECT_TRUE(equal_bits(q.params, straight.params));
    }
  }
}

// --- layouts, dtypes, threads ---------------------------------------------------------------------------------------

// The same values with other strides: reversed dimensions, every second element of a larger buffer, channels last.
at::Tensor with_layout(const at::Tensor& t, const std::string& layout) {
  if (layout == "sliced" && t.dim() > 0) {
    std::vector<int64_t> wider = t.sizes().vec();
    wider.back() = 2 * wider.back() + 1;
    at::Tensor view = at::zeros(wider, t.options()).slice(-1, 1, std::nullopt, 2);
    view.copy_(t);
    return view;
  }
  if (layout == "channels_last" && t.dim() == 4) return t.contiguous(at::MemoryFormat::ChannelsLast);
  if (layout == "transposed" && t.dim() > 1) {
    std::vector<int64_t> reversed;
    for (int64_t d = t.dim() - 1; d >= 0; --d) reversed.push_back(d);
    return t.permute(reversed).contiguous().permute(reversed);
  }
  return t.clone();
}

TEST_P(AnyOptimizer, EveryLayoutGivesTheContiguousResult) {
  NEEDS_GRADIENTS("every bit of a loss counts, and its sum follows the layout");
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    for (const Variant& variant : variants()) {
      const std::string hvp = variant.options.toGenericDict().contains("hvp")
                                  ? variant.options.toGenericDict().at("hvp").toStringRef()
                                  : "";
      if (hvp == "finite_difference") continue;  // its step length is a norm, and a sum's rounding follows the layout
      const Problem contiguous = quartic({{4, 6}, {2, 3, 4, 2}, {7}, {3, 2, 3}}, dtype);
      const auto start = clones(contiguous.params);
      run(*on(contiguous, variant.options), contiguous, 3);
      for (const std::string layout : {"transposed", "sliced", "channels_last"}) {
        std::vector<at::Tensor> leaves;
        for (const auto& t : start) leaves.push_back(with_layout(t, layout).requires_grad_());
        const Problem other = contiguous.with(leaves);
        const auto optimizer = on(other, variant.options);
        run(*optimizer, other, 3);
        EXPECT_TRUE(equal_bits(other.params, contiguous.params)) << layout << ", " << variant.name << ", " << dtype;
      }
    }
  }
}

TEST_P(AnyOptimizer, DtypesMayBeMixed) {
  if (!GetParam().elementwise) GTEST_SKIP() << GetParam().name << " couples its parameters";
  const std::vector<at::ScalarType> dtypes{at::kFloat, at::kDouble, at::kBFloat16, at::kHalf, at::kFloat};
  Problem mixed = quartic({{5}, {5}, {5}, {5}, {5}});
  for (size_t i = 0; i < dtypes.size(); ++i) {
    mixed.params[i] = mixed.params[i].detach().to(dtypes[i]).clone().requires_grad_();
  }
  const Problem alone = mixed.copy();
  const auto together = on(mixed);
  run(*together, mixed, 3);
  for (size_t i = 0; i < dtypes.size(); ++i) {
    const Problem single = alone.with({alone.params[i]});
    run(*on(single), single, 3);
    EXPECT_TRUE(equal_bits(mixed.params[i], single.params[0])) << dtypes[i];
  }
}

TEST_P(AnyOptimizer, ThreadsDoNotChangeTheBits) {
  NEEDS_GRADIENTS("every bit of a loss counts, and its sum follows the threads");
  for (const Variant& variant : variants()) {
    std::vector<Problem> problems;
    const Problem start = quartic({{300, 600}, {40, 30, 3, 3}, {70000}, {3}}, at::kFloat);
    for (const int threads : {1, 2, 2}) {
      const ThreadCount guard(threads);
      problems.push_back(start.copy());
      const c10::IValue options = variant.options.deepcopy();
      for (const auto& [name, value] : GetParam().large) options.toGenericDict().insert_or_assign(name, value);
      run(*on(problems.back(), options), problems.back(), 2);
      if (variant.name == "finite_difference") break;  // at::norm itself may depend on the thread count
    }
    for (size_t i = 1; i < problems.size(); ++i) {
      EXPECT_TRUE(equal_bits(problems[i].params, problems[0].params)) << variant.name;
    }
  }
}

// --- learning -------------------------------------------------------------------------------------------------------

TEST_P(AnyOptimizer, LearnsXor) {  // as torch's own C++ suite: running loss below 0.1 within 3000 epochs
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(2, 8), torch::nn::Functional(torch::sigmoid), torch::nn::Linear(8, 1),
                              torch::nn::Functional(torch::sigmoid));
  const auto optimizer = GetParam().on(model->parameters(), settings({{"lr", GetParam().xor_lr}}));
  double running_loss = 1;
  int epoch = 0;
  for (; running_loss > 0.1 && epoch < 3000; ++epoch) {
    const at::Tensor bits = torch::randint(2, {200, 2});
    const at::Tensor inputs = bits.to(at::kFloat);
    const at::Tensor labels = bits.select(1, 0).bitwise_xor(bits.select(1, 1)).to(at::kFloat).unsqueeze(1);
    const at::Tensor loss = optimizer->step([&] {
      optimizer->zero_grad();
      return torch::binary_cross_entropy(model->forward(inputs), labels);
    });
    running_loss = running_loss * 0.99 + loss.item<double>() * 0.01;
  }
  EXPECT_LT(epoch, 3000) << "running loss " << running_loss;
}

// --- tests/optim_db.json --------------------------------------------------------------------------------------------

TEST(OptimDb, NamesTheSameOptimizersAsTheRegistry) {
  std::set<std::string> rows, cases;
  for (const auto& item : test::optim_db()) rows.insert(item.key().toStringRef());
  for (const OptimizerCase& item : test::optimizer_cases()) cases.insert(item.name);
  cases.insert(test::other_optimizers().begin(), test::other_optimizers().end());
  EXPECT_EQ(rows, cases);
}

TEST_P(AnyOptimizer, RejectsTheBadOptionsOfTheTable) {
  const auto row = test::optim_db().at(GetParam().name).toGenericDict();
  for (const c10::IValue& item : row.at("options_bad").toListRef()) {
    const auto pair = item.toListRef();
    const std::string& word = pair[1].toStringRef();
    const Problem p = test::problem_named(row.at("problem").toStringRef());
    expect_error<c10::ValueError>(  // most when they are set, those of shapes at the first step
        [&] {
          const auto optimizer = on(p, pair[0]);
          run(*optimizer, p, 1);
        },
        word);
    EXPECT_TRUE(equal_bits(p.params, test::problem_named(row.at("problem").toStringRef()).params)) << word;
  }
}

struct Trajectory {
  OptimizerCase optimizer;
  std::string variant;
};
void PrintTo(const Trajectory& value, std::ostream* out) { *out << value.optimizer.name << ' ' << value.variant; }

std::vector<Trajectory> trajectories() {
  std::vector<Trajectory> result;
  for (const OptimizerCase& item : test::optimizer_cases()) {
    for (const Variant& variant : variants_of(item.name)) result.push_back({item, variant.name});
  }
  return result;
}

class OptimDbTrajectory : public ::testing::TestWithParam<Trajectory> {};

INSTANTIATE_TEST_SUITE_P(All, OptimDbTrajectory, ::testing::ValuesIn(trajectories()), [](const auto& info) {
  std::string name = info.param.optimizer.name + "_" + info.param.variant;
  std::replace_if(
      name.begin(), name.end(), [](char c) { return std::isalnum(static_cast<unsigned char>(c)) == 0; }, '_');
  return name;
});

TEST_P(OptimDbTrajectory, IsFollowed) {
  const OptimizerCase& optimizer_case = GetParam().optimizer;
  const auto all = variants_of(optimizer_case.name);
  const auto found =
      std::find_if(all.begin(), all.end(), [&](const Variant& v) { return v.name == GetParam().variant; });
  ASSERT_NE(found, all.end());
  const auto row = test::optim_db().at(optimizer_case.name).toGenericDict();
  const std::string& driver = row.at("driver").toStringRef();
  ASSERT_TRUE(driver == "graph_closure" || driver == "grad" || driver == "population" || driver == "loss")
      << "the driver " << driver << " is not written yet";
  const auto trajectory = found->row.at("trajectory").toGenericDict();
  const auto parameters = trajectory.at("parameters").toGenericDict();
  const auto iterations = trajectory.at("iterations").toListRef(), losses = trajectory.at("loss").toListRef();
  const auto sign = static_cast<double>(found->row.at("loss_sign").toInt());
  const double rtol = found->row.at("rtol").toDouble();

  const ThreadCount guard(1);
  const Problem p = test::problem_named(row.at("problem").toStringRef());
  const auto optimizer = optimizer_case.on(p.params, found->options);
  size_t sample = 0;
  for (int64_t i = 0; sample < iterations.size(); ++i) {
    const double loss = sign * optimizer->step([&] { return p.loss(p.params) * sign; }).item<double>();
    if (i != iterations[sample].toInt()) continue;
    const double expected_loss = losses[sample].toDouble();
    EXPECT_LE(std::abs(loss - expected_loss), rtol * std::abs(expected_loss)) << "iteration " << i;
    for (size_t k = 0; k < p.params.size(); ++k) {
      std::vector<double> values;
      for (const c10::IValue& x : parameters.at(p.names[k]).toListRef()[sample].toListRef())
        values.push_back(x.toDouble());
      const at::Tensor expected = torch::tensor(values, at::kDouble).reshape(p.params[k].sizes());
      EXPECT_LE(test::relative_error(p.params[k], expected), rtol) << p.names[k] << ", iteration " << i;
    }
    ++sample;
  }
}

}  // namespace
}  // namespace torch_ext::optim

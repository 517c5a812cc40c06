#include "optim/mfac/mfac_state.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Logging.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "core/check.h"
#include "curvature/fisher_window/fisher_window_functor.h"

namespace torch_ext::optim {
namespace {

using curvature::FisherWindowLayout;
using curvature::FisherWindowState;
using kernels::kTile;

constexpr int64_t kFactorForm = 6;  // element of ring; 0 makes the kernels build the factor from the Gram matrix

// Key in the state and place of each tensor of a window.
using WindowTensor = std::pair<std::string, at::Tensor FisherWindowState::*>;
const std::vector<WindowTensor>& window_tensors() {
  static const std::vector<WindowTensor> all = [] {
    std::vector<WindowTensor> result;
    for (const auto& [name, tensor] : curvature::fisher_window_tensors()) result.emplace_back("window_" + name, tensor);
    return result;
  }();
  return all;
}

int64_t tiles_of(int64_t columns) { return (columns + kTile - 1) / kTile; }

at::Device window_device(const MFACBlock& block) {
  const at::Device own = block.params[0].device();
  const auto wanted = block.shared->get("window_device").toOptional<std::string>();
  if (!wanted.has_value()) return own;
  at::Device device(*wanted);
  if (device.type() != at::kCPU && !device.has_index()) {
    device.set_index(own.type() == device.type() ? own.index() : static_cast<c10::DeviceIndex>(0));
  }
  return device;
}

// What the columns of the window in a state are: their number, which slice of them this is, and the elements of each
// parameter that they belong to. In a state: one tensor, in this order.
struct Columns {
  int64_t count, shard, shards;
  std::vector<int64_t> sizes;
  bool operator==(const Columns& other) const {
    return count == other.count && shard == other.shard && shards == other.shards && sizes == other.sizes;
  }
};
constexpr int64_t kSizesBegin = 3;

Columns columns_of(const StateTensors& state) {
  const at::Tensor& layout = state.find("window_layout")->second;
  const auto* values = layout.const_data_ptr<int64_t>();
  return {values[0], values[1], values[2], {values + kSizesBegin, values + layout.numel()}};
}

void set_columns(StateTensors& state, const Columns& columns) {
  std::vector<int64_t> values{columns.count, columns.shard, columns.shards};
  values.insert(values.end(), columns.sizes.begin(), columns.sizes.end());
  state["window_layout"] = at::tensor(values, at::kLong);
}

std::vector<int64_t> sizes_of(const std::vector<at::Tensor>& params) {
  std::vector<int64_t> sizes;
  sizes.reserve(params.size());
  for (const at::Tensor& param : params) sizes.push_back(param.numel());
  return sizes;
}

// Tiles [begin, end) along `dim`, in units of `unit` elements; zeros beyond the end of the tensor.
at::Tensor cut(const at::Tensor& tensor, int64_t dim, int64_t unit, int64_t begin, int64_t end) {
  if (tensor.dim() <= dim) return tensor;  // the format does not use it
  const int64_t have = tensor.size(dim), low = std::min(begin * unit, have), high = std::min(end * unit, have);
  at::Tensor part = tensor.narrow(dim, low, high - low);
  if (high - low < (end - begin) * unit) {
    std::vector<int64_t> rest = part.sizes().vec();
    rest[static_cast<size_t>(dim)] = (end - begin) * unit - (high - low);
    return at::cat({part, at::zeros(rest, part.options())}, dim);
  }
  return part.clone(at::MemoryFormat::Contiguous);
}

// Fits a window to other columns than it was made for; true if it had to.
bool refit(StateTensors& state, const Columns& wanted) {
  const Columns have = columns_of(state);
  if (have == wanted) return false;
  TORCH_CHECK_VALUE(have.shards == 1 || (have.shards == wanted.shards && have.shard == wanted.shard), kMFAC,
                    ": this state's window holds slice ", have.shard, " of ", have.shards, ", this is process ",
                    wanted.shard, " of ", wanted.shards,
                    ": load the file that this process wrote, or one of state_dict(include_window=False)");
  TORCH_CHECK_VALUE(have.shards == 1 || have.count == wanted.count, kMFAC, ": parameters joined a window of ",
                    have.count, " columns that ", have.shards,
                    " processes share: build a new optimizer and load state_dict(include_window=False)");
  const int64_t each = (tiles_of(wanted.count) + wanted.shards - 1) / wanted.shards;
  const int64_t begin = wanted.shard * each, end = begin + each;
  for (const char* name : {"window_rows", "window_scales", "window_indices"}) {
    if (state[name].dim() > 1) state[name] = cut(state[name], 0, 1, begin, end);
  }
  state["window_error"] = cut(state["window_error"], 1, kTile, begin, end);
  set_columns(state, wanted);
  return true;
}

void make_window(MFACBlock& block, const FisherWindowLayout& layout, const Columns& columns) {
  const at::Device device = window_device(block);
  int64_t frozen = 0;
  for (const at::Tensor& param : block.params) frozen += param.requires_grad() ? 0 : param.numel();
  LOG(INFO) << kMFAC << ": a window of " << layout.num_grads << " x " << layout.dim << " in " << layout.format << " on "
            << device << " takes " << curvature::fisher_window_bytes(layout) << " bytes; " << frozen
            << " columns are of parameters that require no gradient";
  const FisherWindowState window = curvature::fisher_window_state(layout, device);
  StateTensors& state = block.states[0];
  for (const auto& [name, tensor] : window_tensors()) state[name] = window.*tensor;
  state["window_damping"] = at::scalar_tensor(block.shared->get("damping").toDouble(), at::kDouble);
  set_columns(state, columns);
}

// True if it has made or moved something.
bool ready_parameter(const at::Tensor& param, const Options& options, StateTensors& state) {
  bool changed = false;
  for (const char* name : {"step", "momentum_buffer"}) {
    const auto found = state.find(name);
    if (found == state.end() || found->second.device() == param.device()) continue;
    found->second = found->second.to(param.device());
    changed = true;
  }
  if (state.count("step") == 0) {
    state["step"] = at::zeros({}, at::TensorOptions(param.device()).dtype(at::kFloat));
    changed = true;
  }
  if (options.get("momentum").toDouble() != 0 && state.count("momentum_buffer") == 0) {
    state["momentum_buffer"] =
        at::zeros_like(param, param.options().dtype(core::arithmetic_type(param.scalar_type())).requires_grad(false));
    changed = true;
  }
  return changed;
}

void check_window(const Options& options, const StateTensors& state) {
  std::vector<std::string> names{"window_damping", "window_layout"};
  for (const auto& [name, tensor] : window_tensors()) names.push_back(name);
  for (const std::string& name : names) {
    TORCH_CHECK_VALUE(state.count(name) != 0, kMFAC, ": the loaded window lacks ", name);
  }
  const at::Tensor& layout = state.find("window_layout")->second;
  TORCH_CHECK_VALUE(layout.dim() == 1 && layout.numel() > kSizesBegin && layout.is_contiguous(), kMFAC,
                    ": loaded window_layout has shape ", layout.sizes());
  const Columns columns = columns_of(state);
  TORCH_CHECK_VALUE(columns.count >= 1 && columns.shard >= 0 && columns.shard < columns.shards, kMFAC,
                    ": loaded window_layout is (", columns.count, ", ", columns.shard, ", ", columns.shards,
                    "), no columns and slice of them");
  const int64_t sum = std::accumulate(columns.sizes.begin(), columns.sizes.end(), int64_t{0});
  TORCH_CHECK_VALUE(sum == columns.count, kMFAC, ": loaded window_layout has ", columns.count,
                    " columns, its parameters ", sum, " elements");
  curvature::fisher_window_check_state(mfac_layout(options, columns.count, columns.shards), mfac_window(state), kMFAC);
}

}  // namespace

bool mfac_is_window(const std::string& name) { return name.rfind("window_", 0) == 0; }

bool mfac_has_columns(const at::Tensor& param) { return at::isFloatingType(param.scalar_type()); }

int64_t mfac_columns(const std::vector<at::Tensor>& params) {
  int64_t columns = 0;
  for (const at::Tensor& param : params) columns += param.numel();
  return columns;
}

FisherWindowLayout mfac_layout(const Options& options, int64_t columns, int64_t shards) {
  FisherWindowLayout layout;
  layout.num_grads = options.get("num_grads").toInt();
  layout.dim = shards == 1 ? columns : (tiles_of(columns) + shards - 1) / shards * kTile;
  layout.format = options.get("window_format").toStringRef();
  layout.topk = options.get("topk").toDouble();
  layout.error_feedback = options.get("error_feedback").toBool();
  return layout;
}

int64_t mfac_memory_bytes(const std::vector<MFACBlock>& blocks, int64_t shards) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  int64_t total = 0;
  for (const MFACBlock& block : blocks) {
    const FisherWindowState window = mfac_window(block.states[0]);
    int64_t bytes = 0;
    if (window.rows.defined()) {
      for (const auto& [name, tensor] : window_tensors()) bytes += static_cast<int64_t>((window.*tensor).nbytes());
    } else {
      bytes = curvature::fisher_window_bytes(mfac_layout(*block.shared, mfac_columns(block.params), shards));
    }
    total = bytes > kMost - total ? kMost : total + bytes;
  }
  return total;
}

int64_t mfac_window_count(const std::vector<MFACBlock>& blocks) {
  int64_t count = 0;
  for (const MFACBlock& block : blocks) {
    const FisherWindowState window = mfac_window(block.states[0]);
    if (window.ring.defined()) count = std::max(count, window.ring[0].item<int64_t>());
  }
  return count;
}

FisherWindowState mfac_window(const StateTensors& state) {
  FisherWindowState window;
  for (const auto& [name, tensor] : window_tensors()) {
    const auto it = state.find(name);
    if (it != state.end()) window.*tensor = it->second;
  }
  return window;
}

void mfac_ready_window(MFACBlock& block, const ColumnShards& shards) {
  const at::NoGradGuard no_grad;
  StateTensors& state = block.states[0];
  const Options& options = *block.shared;
  const Columns columns{mfac_columns(block.params), shards.rank, shards.count, sizes_of(block.params)};
  const FisherWindowLayout layout = mfac_layout(options, columns.count, shards.count);
  block.changed.resize(block.params.size());
  mfac_check_columns(block);
  if (state.count("window_rows") == 0) {
    make_window(block, layout, columns);
    block.changed[0] = 1;
    return;
  }
  if (refit(state, columns)) block.changed[0] = 1;
  const at::Device device = window_device(block);
  for (const auto& [name, tensor] : window_tensors()) {
    at::Tensor& held = state[name];
    if (held.device() == device) continue;
    held = held.to(device);
    block.changed[0] = 1;
  }
  curvature::fisher_window_check_state(layout, mfac_window(state), kMFAC);
  const double damping = options.get("damping").toDouble();
  if (*state["window_damping"].const_data_ptr<double>() != damping) {
    state["window_ring"].select(0, kFactorForm).zero_();
    state["window_damping"] = at::scalar_tensor(damping, at::kDouble);
    block.changed[0] = 1;
  }
}

void mfac_check_columns(const MFACBlock& block) {
  for (size_t i = 1; i < block.states.size(); ++i) {
    TORCH_CHECK_VALUE(
        block.states[i].count("window_layout") == 0, kMFAC, ": ",
        core::describe("parameter", static_cast<size_t>(block.ordinals[i]), block.params[i]),
        " has a window, but is not the first of its block: option blocks, or the order of the parameters, "
        "is not that of the state; load state_dict(include_window=False) to fill a new window");
  }
  if (block.states[0].count("window_layout") == 0) return;
  const std::vector<int64_t> have = columns_of(block.states[0]).sizes, now = sizes_of(block.params);
  const bool prefix = have.size() <= now.size() && std::equal(have.begin(), have.end(), now.begin());
  TORCH_CHECK_VALUE(prefix, kMFAC, ": the window has the columns of other parameters, of ", at::IntArrayRef(have),
                    " elements; those of this optimizer have ", at::IntArrayRef(now),
                    ". Parameters may only join at the end of a window; load state_dict(include_window=False) to fill "
                    "a new one");
}

void mfac_prepare(MFACBlock& block, const ColumnShards& shards) {
  const at::NoGradGuard no_grad;
  mfac_ready_window(block, shards);
  for (size_t i = 0; i < block.params.size(); ++i) {
    if (!block.grads[i].defined()) continue;
    if (ready_parameter(block.params[i], *block.options[i], block.states[i])) block.changed[i] = 1;
  }
}

bool mfac_has_gradients(const MFACBlock& block) {
  return std::any_of(block.grads.begin(), block.grads.end(), [](const at::Tensor& grad) { return grad.defined(); });
}

void mfac_check_state(const at::Tensor& param, const Options& options, const StateTensors& state) {
  bool window = false;
  for (const auto& [name, tensor] : state) {
    const bool buffer = name == "momentum_buffer", shared = mfac_is_window(name);
    window = window || shared;
    TORCH_CHECK_VALUE(buffer || shared || name == "step" || name.rfind("global_", 0) == 0, kMFAC, ": loaded state has ",
                      name, ": it is of another optimizer");
    TORCH_CHECK_VALUE(buffer || shared || tensor.numel() == 1, kMFAC, ": loaded ", name, " has shape ", tensor.sizes());
    TORCH_CHECK_VALUE(!buffer || tensor.sizes() == param.sizes(), kMFAC, ": loaded momentum_buffer has shape ",
                      tensor.sizes(), ", its parameter ", param.sizes());
    TORCH_CHECK_VALUE(!buffer || state.count("step") != 0, kMFAC,
                      ": loaded state has momentum_buffer but no step: it is of another optimizer");
  }
  if (window) check_window(options, state);
}

}  // namespace torch_ext::optim

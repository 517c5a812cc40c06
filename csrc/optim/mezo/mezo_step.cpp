#include "optim/mezo/mezo_step.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <utility>

#include "core/check.h"
#include "core/multi_tensor_cpu.h"
#include "optim/mezo/mezo_kernel.h"

namespace torch_ext::optim {
namespace {

constexpr const char* kName = "MeZO";
enum Pass { kMark, kShift, kRestore };

core::PhiloxStream stream_of(const MezoNoise& noise, int64_t ordinal) {
  return core::philox_stream(noise.seed, /*stream=*/0, ordinal, core::PhiloxTag::kEsVector, noise.epoch);
}

int64_t chunks_of(const at::Tensor& param) { return (param.numel() + core::kChunk - 1) / core::kChunk; }

void launch(Pass pass, const std::vector<kernels::MezoTensor>& tensors, core::DType type, const at::Device& device) {
  if (device.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    const c10::DeviceGuard guard(device);
    auto* const kernel = pass == kMark    ? kernels::mezo_mark_cuda
                         : pass == kShift ? kernels::mezo_shift_cuda
                                          : kernels::mezo_restore_cuda;
    kernel(tensors, type, core::current_stream(device));
#endif
    return;
  }
  std::vector<core::Split> splits;
  std::vector<int64_t> numels;
  for (const auto& tensor : tensors) {
    splits.push_back(core::Split::of(tensor.numel, 1));
    numels.push_back(tensor.numel);
  }
  auto* const kernel = pass == kMark    ? kernels::mezo_mark_cpu
                       : pass == kShift ? kernels::mezo_shift_cpu
                                        : kernels::mezo_restore_cpu;
  core::for_each_chunk(splits, numels,
                       [&](size_t i, int64_t begin, int64_t end) { kernel(tensors[i], type, begin, end); });
}

at::Tensor loss_of(const std::function<at::Tensor()>& closure, const at::Device& device) {
  const at::Tensor loss = closure();
  TORCH_CHECK(loss.defined(), kName, ": there is no loss: does the closure return it?");
  TORCH_CHECK(loss.numel() == 1, kName, ": the closure must return one number, got shape ", loss.sizes());
  return loss.detach().reshape({}).to(device, at::kDouble, /*non_blocking=*/true);
}

}  // namespace

MezoPerturbation::MezoPerturbation(const std::vector<MezoTarget>& targets, const MezoNoise& noise, double scale)
    : noise_(noise), scale_(scale) {
  for (const MezoTarget& target : targets) {
    const at::Tensor& p = target.param;
    if (p.numel() == 0) continue;
    const auto ints = at::TensorOptions(p.device()).dtype(at::kInt);
    records_.push_back({p.detach(),
                        at::empty({(p.numel() + 31) / 32}, ints),
                        at::empty({chunks_of(p)}, ints),
                        {},
                        {},
                        target.ordinal});
  }
  run(kMark);
  for (Record& record : records_) {
    const at::Tensor ends = record.counts.cumsum(0, at::kLong);
    record.offsets = ends - record.counts;
    record.kept = at::empty({ends[-1].item<int64_t>()}, record.param.options().memory_format(c10::nullopt));
  }
  run(kShift);
}

void MezoPerturbation::run(int pass) {
  std::vector<at::Tensor> params;
  for (const Record& record : records_) params.push_back(record.param);
  for (const auto& bucket : core::buckets(params)) {
    std::vector<core::Staged> staged;
    std::vector<kernels::MezoTensor> tensors;
    staged.reserve(bucket.size());
    for (const size_t i : bucket) {
      const Record& r = records_[i];
      const auto strides = core::walking_strides(r.param, true, "parameter", static_cast<size_t>(r.ordinal));
      void* const data = staged.emplace_back(r.param, strides).data();
      tensors.push_back({data, stream_of(noise_, r.ordinal), scale_,
                         reinterpret_cast<uint32_t*>(r.mask.data_ptr<int32_t>()), r.counts.data_ptr<int32_t>(),
                         r.offsets.defined() ? r.offsets.data_ptr<int64_t>() : nullptr,
                         r.kept.defined() ? r.kept.data_ptr() : nullptr, r.param.numel()});
    }
    const at::Tensor& first = params[bucket[0]];
    launch(static_cast<Pass>(pass), tensors, core::dtype_of(first, "MeZO: a parameter"), first.device());
    if (pass == kMark) continue;
    for (const auto& stage : staged) stage.finish();
  }
  if (pass != kMark) core::bump_versions(params);
}

void MezoPerturbation::restore() {
  if (std::exchange(restored_, true)) return;
  const at::NoGradGuard no_grad;
  run(kRestore);
}

MezoPerturbation::~MezoPerturbation() { restore(); }

int64_t MezoPerturbation::bytes() const {
  int64_t total = 0;
  for (const Record& r : records_) {
    for (const at::Tensor& t : {r.mask, r.counts, r.offsets, r.kept}) total += static_cast<int64_t>(t.nbytes());
  }
  return total;
}

int64_t MezoPerturbation::kept() const {
  int64_t total = 0;
  for (const Record& r : records_) total += r.kept.numel();
  return total;
}

void mezo_check_param(const at::Tensor& param, int64_t ordinal) {
  core::check_gradient(kName, static_cast<size_t>(ordinal), param, param);
}

void mezo_init_state(const at::Tensor& param, StateTensors& state) {
  for (auto& [name, tensor] : state) {
    if (name != "global_calls" && tensor.device() != param.device()) tensor = tensor.to(param.device());
  }
  if (state.count("step") == 0) state["step"] = at::zeros({}, at::TensorOptions(param.device()).dtype(at::kFloat));
}

void mezo_check_state(const at::Tensor& param, const StateTensors& state) {
  for (const auto& [name, tensor] : state) {
    TORCH_CHECK_VALUE(tensor.numel() == 1, kName, ": loaded ", name, " has shape ", tensor.sizes(),
                      ", it is a number (of a parameter of shape ", param.sizes(), ")");
  }
}

MezoLosses mezo_losses(const std::vector<MezoTarget>& targets, const MezoNoise& noise, bool maximize,
                       const std::function<at::Tensor()>& closure, const ReduceFn& reduce) {
  TORCH_CHECK(closure, kName, ": step() needs a closure that returns the loss");
  const at::NoGradGuard no_grad;
  const at::Device device = targets.empty() ? at::Device(at::kCPU) : targets[0].param.device();
  std::vector<at::Tensor> losses;
  for (const double sign : {1.0, -1.0}) {
    MezoPerturbation perturbation(targets, noise, sign * noise.eps);
    losses.push_back(loss_of(closure, device));
    perturbation.restore();
  }
  if (reduce) reduce(losses);
  const double factor = (maximize ? -1.0 : 1.0) / (2 * noise.eps);
  return {(losses[0] + losses[1]) * 0.5, (losses[0] - losses[1]) * factor};
}

void mezo_update(const std::vector<MezoTarget>& targets, const MezoNoise& noise, const at::Tensor& slope,
                 const at::Tensor& skipped) {
  const at::NoGradGuard no_grad;
  skipped.add_(slope.isfinite().logical_not().to(skipped.device(), at::kLong));
  std::vector<at::Tensor> params;
  std::vector<size_t> owners;
  for (size_t i = 0; i < targets.size(); ++i) {
    if (targets[i].param.numel() == 0) continue;
    params.push_back(targets[i].param.detach());
    owners.push_back(i);
  }
  for (const auto& bucket : core::buckets(params)) {
    const at::Tensor& first = params[bucket[0]];
    const core::DType type = core::dtype_of(first, "MeZO: a parameter");
    const at::Tensor factor = slope.to(first.device(), at::kDouble, /*non_blocking=*/true);
    std::vector<core::Staged> staged;
    std::vector<kernels::MezoUpdate> tensors;
    std::vector<core::Split> splits;
    std::vector<int64_t> numels;
    staged.reserve(bucket.size());
    for (const size_t i : bucket) {
      const MezoTarget& t = targets[owners[i]];
      const auto strides = core::walking_strides(params[i], true, "parameter", static_cast<size_t>(t.ordinal));
      tensors.push_back({staged.emplace_back(params[i], strides).data(), t.step.data_ptr<float>(),
                         stream_of(noise, t.ordinal), t.lr, t.weight_decay, factor.const_data_ptr<double>(),
                         params[i].numel()});
      splits.push_back(core::Split::of(params[i].numel(), 1));
      numels.push_back(params[i].numel());
    }
    if (first.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
      const c10::DeviceGuard guard(first.device());
      kernels::mezo_update_cuda(tensors, type, core::current_stream(first.device()));
#endif
    } else {
      core::for_each_chunk(splits, numels, [&](size_t i, int64_t begin, int64_t end) {
        kernels::mezo_update_cpu(tensors[i], type, begin, end);
      });
      const bool accepted = factor.isfinite().item<bool>();
      for (const auto& tensor : tensors) *tensor.step += accepted ? 1.0F : 0.0F;
    }
    for (const auto& stage : staged) stage.finish();
  }
  for (const MezoTarget& target : targets) params.push_back(target.step);
  core::bump_versions(params);
}

}  // namespace torch_ext::optim

#include <ATen/core/List.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch_ext/curvature/fisher_window.h>

#include "core/check.h"
#include "curvature/fisher_window/fisher_window_kernel.h"
#include "curvature/fisher_window/fisher_window_op.h"

namespace torch_ext::curvature {
namespace {

FisherWindowState from_map(const std::map<std::string, at::Tensor>& tensors) {
  FisherWindowState state;
  for (const auto& [name, member] : fisher_window_tensors()) {
    const auto found = tensors.find(name);
    if (found != tensors.end()) state.*member = found->second;
  }
  return state;
}

std::map<std::string, at::Tensor> to_map(const FisherWindowState& state) {
  std::map<std::string, at::Tensor> tensors;
  for (const auto& [name, member] : fisher_window_tensors()) tensors[name] = state.*member;
  return tensors;
}

constexpr const char* kAbout = "about";

}  // namespace

at::Tensor fisher_window_about(double damping, int64_t dim) {
  at::Tensor about = at::empty({2}, at::kDouble);
  about[0] = damping;
  about[1] = static_cast<double>(dim);
  return about;
}

void fisher_window_load(const FisherWindowLayout& layout, double damping, const FisherWindowState& state,
                        const std::map<std::string, at::Tensor>& saved) {
  const FisherWindowState from = from_map(saved);
  fisher_window_check_state(layout, from, "FisherWindow");
  const auto found = saved.find(kAbout);
  TORCH_CHECK_VALUE(found != saved.end() && found->second.numel() == 2 && found->second.scalar_type() == at::kDouble,
                    "FisherWindow: the state has no 'about' with damping and dim");
  const at::Tensor about = found->second.detach().cpu().reshape({2});
  TORCH_CHECK_VALUE(about[1].item<double>() == static_cast<double>(layout.dim), "FisherWindow: the state is of dim ",
                    about[1].item<double>(), ", this window has dim ", layout.dim);
  const at::NoGradGuard no_grad;
  for (const auto& [name, member] : fisher_window_tensors()) (state.*member).copy_(from.*member);
  if (about[0].item<double>() != damping) state.ring[kernels::kRingForm] = kernels::kFormNone;
}

void fisher_window_check_row(const at::Tensor& row, int64_t dim, const char* what) {
  TORCH_CHECK(row.layout() == at::kStrided, "FisherWindow: ", what, " is sparse; use .to_dense()");
  TORCH_CHECK(!row.is_complex(), "FisherWindow: ", what, " is complex; use torch.view_as_real on the parameters");
  core::dtype_of(row, std::string("FisherWindow: ") + what);
  TORCH_CHECK_VALUE(row.dim() == 1 && row.size(0) == dim, "FisherWindow: ", what, " must have shape [", dim, "], got ",
                    row.sizes());
}

FisherWindow::FisherWindow(int64_t num_grads, int64_t dim, double damping, const std::string& window_format)
    : FisherWindow(num_grads, dim, damping, window_format, Extra()) {}

FisherWindow::FisherWindow(int64_t num_grads, int64_t dim, double damping, const std::string& window_format,
                           const Extra& extra)
    : num_grads_(num_grads),
      dim_(dim),
      damping_(damping),
      format_(window_format),
      topk_(extra.topk),
      error_feedback_(extra.error_feedback) {
  const FisherWindowLayout layout{num_grads_, dim_, format_, topk_, error_feedback_};
  fisher_window_check(layout, damping_);
  state_ = to_map(fisher_window_state(layout, extra.device));
}

void FisherWindow::push(const at::Tensor& row) {
  const at::NoGradGuard no_grad;
  fisher_window_check_row(row, dim_, "the row");
  const auto blank = tensor("gram").options();
  const at::Tensor dots = at::empty({num_grads_ + 2}, blank), coefficients = at::empty({num_grads_ + 1}, blank);
  const at::Tensor plain = row.detach();
  fisher_window_dots_(tensor("rows"), tensor("scales"), tensor("indices"), tensor("error"), dots, tensor("ring"),
                      c10::List<std::optional<at::Tensor>>({plain}), {plain}, {0.0}, /*negate=*/false,
                      /*grad_scale=*/std::nullopt, format_);
  fisher_window_commit_(tensor("gram"), tensor("factor"), tensor("ring"), coefficients, dots, damping_,
                        /*warmup_scaling=*/false,
                        /*warmup_steps=*/0, /*refactor_every=*/-1, /*nonfinite=*/std::nullopt);
}

at::Tensor FisherWindow::solve_newest() {
  const at::NoGradGuard no_grad;
  TORCH_CHECK_VALUE(count() > 0, "FisherWindow: there is no newest row; push one first");
  const at::Tensor coefficients =
      fisher_window_solve_(tensor("gram"), tensor("factor"), tensor("ring"), std::nullopt, damping_);
  return fisher_window_combine(tensor("rows"), tensor("scales"), tensor("indices"), coefficients, tensor("ring"), dim_,
                               format_);
}

at::Tensor FisherWindow::ihvp(const at::Tensor& x) {
  const at::NoGradGuard no_grad;
  fisher_window_check_row(x, dim_, "x");
  const at::Tensor products =
      fisher_window_project(tensor("rows"), tensor("scales"), tensor("indices"), tensor("ring"), x.detach(), format_);
  const at::Tensor coefficients =
      fisher_window_solve_(tensor("gram"), tensor("factor"), tensor("ring"), products, damping_);
  return fisher_window_residual(tensor("rows"), tensor("scales"), tensor("indices"), coefficients, tensor("ring"),
                                x.detach(), damping_, format_);
}

at::Tensor FisherWindow::gram() const { return fisher_window_gram(tensor("gram"), tensor("ring"), count()); }

int64_t FisherWindow::count() const { return tensor("ring")[kernels::kRingCount].item<int64_t>(); }
int64_t FisherWindow::rejected() const { return tensor("ring")[kernels::kRingRejected].item<int64_t>(); }

int64_t FisherWindow::memory_bytes() const {
  return fisher_window_bytes({num_grads_, dim_, format_, topk_, error_feedback_});
}

std::map<std::string, at::Tensor> FisherWindow::state() const {
  auto tensors = state_;
  tensors[kAbout] = fisher_window_about(damping_, dim_);
  return tensors;
}

void FisherWindow::load_state(const std::map<std::string, at::Tensor>& state) {
  fisher_window_load({num_grads_, dim_, format_, topk_, error_feedback_}, damping_, from_map(state_), state);
}

void FisherWindow::to(const at::Device& device) {
  for (auto& [name, tensor] : state_) tensor = tensor.to(device);
}

}  // namespace torch_ext::curvature

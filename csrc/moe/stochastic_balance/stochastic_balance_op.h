// Checked arguments of online assignment in the form that the kernels take.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>
#include <torch_ext/moe/stochastic_balance.h>

#include <optional>

#include "moe/stochastic_balance/stochastic_balance_kernel.h"

namespace torch_ext::moe {

// Tensors of a problem (float64, contiguous, on one device) and the view on them.
struct BalanceArguments {
  at::Tensor probability, weight, capacity, table;
  kernels::BalanceProblem problem;
};
BalanceArguments balance_arguments(const at::Tensor& probability, const std::optional<at::Tensor>& weight,
                                   const std::optional<at::Tensor>& capacity, const BalanceOptions& options);

// One arrival of an OnlineAssigner: chooses, counts the attempt in load and attempts.
TORCH_EXT_API int64_t balance_assign(const at::Tensor& probability, const std::optional<at::Tensor>& weight,
                                     const std::optional<at::Tensor>& capacity, const BalanceOptions& options,
                                     const at::Tensor& load, const at::Tensor& attempts, const at::Tensor& done);
// Errors of an OnlineAssigner's weight, capacity and options.
TORCH_EXT_API void balance_check(int64_t servers, const std::optional<at::Tensor>& weight,
                                 const std::optional<at::Tensor>& capacity, const BalanceOptions& options);
// One report.
TORCH_EXT_API void balance_report(const at::Tensor& attempts, const at::Tensor& done, int64_t server, bool success);

}  // namespace torch_ext::moe

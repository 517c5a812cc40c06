// Auxiliary losses of mixtures of experts, to compare routing without them. All differentiable in the logits, computed
// in float32 (float64 for float64 logits); rows that are not valid are left out of every mean.
//
// Errors: ValueError for shapes, devices, unknown words, top_k outside [1, E]; TypeError for dtypes.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_ext/export.h>

#include <cstdint>
#include <optional>
#include <string_view>

namespace torch_ext::moe {

// coef * E * sum_e f_e P_e, f_e = counts_e / sum counts (constant), P_e = mean over tokens of s_e / sum_j s_j; coef at
// perfect balance. With the counts of the micro-batch that is the loss of Switch and GShard (arXiv:2101.03961 Eq. 4),
// with counts summed over processes the global-batch loss (arXiv:2501.11873). logits [T, E], counts [E], valid [T].
TORCH_EXT_API at::Tensor balance_loss(const at::Tensor& logits, const at::Tensor& counts, double coef = 1e-2,
                                      std::string_view score = "softmax",
                                      const std::optional<at::Tensor>& valid = std::nullopt);

// The complementary loss of DeepSeek-V3 (arXiv:2412.19437 Eq. 17-20) per sequence, averaged over the sequences: alpha *
// sum_e f_e P_e, f_e = E / (K S) times how often e is among the K largest scores (no bias) of the S tokens. logits
// [B, S, E], valid [B, S].
TORCH_EXT_API at::Tensor sequence_loss(const at::Tensor& logits, int64_t top_k, double alpha = 1e-4,
                                       std::string_view score = "sigmoid",
                                       const std::optional<at::Tensor>& valid = std::nullopt);

// coef * mean over tokens of (log sum_e exp l_e)^2 (ST-MoE, arXiv:2202.08906 Eq. 5). logits [..., E], valid [...].
TORCH_EXT_API at::Tensor z_loss(const at::Tensor& logits, double coef = 1e-3,
                                const std::optional<at::Tensor>& valid = std::nullopt);

}  // namespace torch_ext::moe

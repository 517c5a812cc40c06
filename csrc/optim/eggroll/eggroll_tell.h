// What both languages' Eggroll does between its values and its parameters. Stateless.
#pragma once

#include <torch_ext/ops/eggroll.h>
#include <torch_ext/optim/base.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "torch_ext/optim/population.h"

namespace torch_ext::optim {

// The noise of the members from `begin` on of the update after `updates` others; `shared` are any group's options.
TORCH_EXT_API ops::EggrollNoise eggroll_noise_of(const Options& shared, int64_t updates, int64_t begin);
// Members of one group that share a baseline; 0 without.
TORCH_EXT_API int64_t eggroll_baseline(const Options& shared);
// How a parameter of a group with these options is perturbed.
TORCH_EXT_API std::string eggroll_kind(const at::Tensor& param, const Options& options);
// Errors of parameters that cannot be perturbed: complex, sparse, integer or overlapping ones, a rank above min(m, n).
TORCH_EXT_API void eggroll_check_param(const at::Tensor& param, int64_t ordinal, const Options& options);

// The members that process `rank` of `count` evaluates, and the calls of a closure in which it does.
TORCH_EXT_API std::pair<int64_t, int64_t> eggroll_members(const Options& shared, int64_t rank, int64_t count);
TORCH_EXT_API std::vector<std::pair<int64_t, int64_t>> eggroll_chunks(const Options& shared, int64_t rank,
                                                                      int64_t count);
// ValueError unless a closure's result is one number for each of `size` members.
TORCH_EXT_API void eggroll_check_values(const at::Tensor& values, int64_t size);

struct EggrollShaped {
  at::Tensor coefficients, mean, nonfinite;  // as eggroll_shape
};
// From the values of a process's members to the coefficients of all noise, by way of the other processes. ValueError
// for another number of values and (nonfinite="error") for values that are not finite.
TORCH_EXT_API EggrollShaped eggroll_shaped(const Options& shared, const at::Tensor& values, const ColumnShards& shards);

// One parameter of an update with the state that it needs.
struct EggrollTarget {
  at::Tensor param;
  int64_t ordinal = 0;
  const Options* options = nullptr;
  at::Tensor momentum_buffer, step;  // undefined with update = false
};
// Completes a parameter's state in place and moves it to the parameter's device.
TORCH_EXT_API void eggroll_init_state(const at::Tensor& param, const Options& options, StateTensors& state);
// Loaded state against its parameter; ValueError.
TORCH_EXT_API void eggroll_check_state(const at::Tensor& param, const Options& options, const StateTensors& state);
// Pseudo-gradients of all targets, one after another: into their parameters, or with update = false into .grad.
// `sharded`: each process computes a share of the rows.
TORCH_EXT_API void eggroll_update(const std::vector<EggrollTarget>& targets, const ops::EggrollNoise& noise,
                                  const EggrollShaped& shaped, const at::Tensor& skipped, bool update,
                                  const ColumnShards& shards, bool sharded);

// RuntimeError unless the tensors have the same bits on all processes.
TORCH_EXT_API void eggroll_check_equal(const std::vector<at::Tensor>& tensors, const ColumnShards& shards);

}  // namespace torch_ext::optim

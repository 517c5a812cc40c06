// The passes on a device: threads on the CPU, a stream on CUDA.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "ops/sinkhorn_newton/sinkhorn_solver_kernel.h"

namespace torch_ext::ops {

std::unique_ptr<kernels::SinkhornPasses> make_passes(const kernels::SinkhornCost& cost, const at::Device& device);
kernels::CostRange cost_range(const kernels::SinkhornCost& cost, const at::Device& device);
// mass * exp((f + g - c) / eps) into a contiguous [n, m] of float or double; f and g on the host.
void write_plan(const kernels::SinkhornCost& cost, const kernels::SinkhornPoint& at, double mass,
                const at::Tensor& plan);
// sum_j P_ij (x_i - y_j): [n, d] float64 on the device; f and g on the host.
at::Tensor displacement(const kernels::SinkhornCost& cost, const kernels::SinkhornPoint& at, const at::Device& device);

}  // namespace torch_ext::ops

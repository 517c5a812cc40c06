// CUDA driver: one launch per table of chunks, the table travelling in the kernel's arguments.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "core/multi_tensor.h"

namespace torch_ext::core {

constexpr int kThreads = 512;

inline void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Body is a trivially copyable functor: body(descriptor, first element, last element), called by all threads of a
// block.
template <typename Table, typename Body>
__global__ void __launch_bounds__(kThreads) run_chunks(const __grid_constant__ Table table, const Body body) {
  const auto& tensor = table.tensor[table.owner[blockIdx.x]];
  const int64_t begin = static_cast<int64_t>(table.chunk[blockIdx.x]) * body.chunk(tensor);
  const int64_t end = begin + body.chunk(tensor) < tensor.numel ? begin + body.chunk(tensor) : tensor.numel;
  body(tensor, begin, end);
}

template <typename Descriptor, typename Body>
void launch_chunks(const std::vector<Descriptor>& tensors, const std::vector<Split>& splits, const Body& body,
                   cudaStream_t stream, const char* what) {
  using Table = ChunkTable<Descriptor, 128, 1024>;
  static_assert(sizeof(Table) + sizeof(Body) <= 32764, "kernel arguments exceed what CUDA 12.1 and later accept");
  for_each_table<Table>(tensors, splits, [&](const Table& table) {
    run_chunks<<<table.blocks, kThreads, 0, stream>>>(table, body);
    check_launch(what);
  });
}

}  // namespace torch_ext::core

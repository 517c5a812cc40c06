// Work split of a list of tensors into equal chunks, shared by the CPU and the CUDA driver and by their host tests.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace torch_ext::core {

constexpr int64_t kChunk = 65536;  // elements of one unit of work

// How a tensor of `numel` elements is cut: whole blocks only, so that a block is reduced in one place.
struct Split {
  int64_t block;   // elements that share one second moment (1: elementwise)
  int64_t chunk;   // elements per chunk, a multiple of block
  int64_t chunks;  // number of chunks; 0 for an empty tensor

  static Split of(int64_t numel, int64_t block) {
    const int64_t chunk = block >= kChunk ? block : kChunk / block * block;
    return {block, chunk, (numel + chunk - 1) / chunk};
  }
};

// Kernel argument: descriptors of some tensors and, per thread block, which chunk of which tensor it works on.
// CUDA 12.1 and later take 32 KB of arguments; half of it keeps one launch for about 200 typical tensors.
template <typename Descriptor, int kMaxTensors, int kMaxBlocks>
struct ChunkTable {
  Descriptor tensor[kMaxTensors];
  uint32_t chunk[kMaxBlocks];
  uint16_t owner[kMaxBlocks];
  int32_t blocks;
};

// Fills tables and hands each full one to `launch(table)`. Every chunk of every tensor appears exactly once.
template <typename Table, typename Descriptor, typename Launch>
void for_each_table(const std::vector<Descriptor>& tensors, const std::vector<Split>& splits, const Launch& launch) {
  constexpr auto kMaxTensors = static_cast<int>(std::extent_v<decltype(Table::tensor)>);
  constexpr auto kMaxBlocks = static_cast<int>(std::extent_v<decltype(Table::chunk)>);
  Table table{};
  int used = 0;
  const auto flush = [&] {
    if (table.blocks > 0) launch(table);
    used = table.blocks = 0;
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (splits[i].chunks == 0) continue;
    if (used == kMaxTensors) flush();
    table.tensor[used++] = tensors[i];
    for (int64_t c = 0; c < splits[i].chunks; ++c) {
      if (table.blocks == kMaxBlocks) {
        flush();
        table.tensor[used++] = tensors[i];
      }
      table.owner[table.blocks] = static_cast<uint16_t>(used - 1);
      table.chunk[table.blocks++] = static_cast<uint32_t>(c);
    }
  }
  flush();
}

}  // namespace torch_ext::core

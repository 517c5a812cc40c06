// How one tile of a row is stored, on the CPU.
#pragma once

#include <cstdint>

#include "curvature/fisher_window/fisher_window_kernel.h"

namespace torch_ext::kernels {

// A tile of the new row as it was stored, in the form in which the format multiplies it with older rows.
struct TileQuery {
  alignas(64) double wide[kTile];    // float32, float64, and x of any format
  alignas(64) float narrow[kTile];   // bfloat16; topk with zeros where nothing is kept
  alignas(64) int16_t codes[kTile];  // int8
  float scales[kScales];
};

// Encodes row[kTile] (float, or double for kDouble; overwritten) into the spare slot, with error feedback where the
// window has it.
void window_encode_tile(const WindowView& window, int64_t tile, void* row, TileQuery* query);

}  // namespace torch_ext::kernels

// From a DType at run time to its storage type at compile time.
#pragma once

#include "core/dtype.h"

namespace torch_ext::core {

template <typename Body>
auto dispatch_dtype(DType type, const Body& body) {
  switch (type) {
    case DType::kDouble:
      return body(double{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kHalf:
      return body(Half{});
    default:
      return body(float{});
  }
}

}  // namespace torch_ext::core

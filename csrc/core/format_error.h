// The error that the parts of the checkpoint reader and writer raise. Its text is a predicate ("is truncated: ...");
// the functions of state_dict_file.h put the file's name before it and raise it as c10::Error.
#pragma once

#include <c10/util/StringUtil.h>

#include <stdexcept>

namespace torch_ext::core {

class FormatError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Args>
void require(bool ok, const Args&... message) {
  if (!ok) {
    throw FormatError(c10::str(message...));
  }
}

}  // namespace torch_ext::core

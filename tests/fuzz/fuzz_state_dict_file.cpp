// libFuzzer target of the checkpoint reader: any bytes give a value or a c10::Error, never a crash, leak or hang.
//
// Checksums keep a fuzzer out of the pickle reader, so an input whose first byte is even is a pickle, wrapped here into
// an archive with one record of sixteen bytes; any other input is, without that byte, the archive itself.
//
//   clang++ -fsanitize=fuzzer,address ... && ./fuzz_state_dict_file -rss_limit_mb=4096 corpus/
#include <ATen/core/ivalue.h>
#include <c10/util/Exception.h>
#include <caffe2/serialize/inline_container.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/state_dict_file.h"

namespace {

std::string archive_of(const char* pickle, size_t size) {
  std::string bytes;
  caffe2::serialize::PyTorchStreamWriter writer([&bytes](const void* data, size_t count) {
    bytes.append(static_cast<const char*>(data), count);
    return count;
  });
  writer.writeRecord("data.pkl", pickle, size);
  writer.writeRecord("data/0", "0123456789abcdef", 16);
  writer.writeEndOfFile();
  return bytes;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) {
    return 0;
  }
  const char* rest = reinterpret_cast<const char*>(data) + 1;
  const std::string archive = data[0] % 2 == 0 ? archive_of(rest, size - 1) : std::string(rest, size - 1);
  try {
    torch_ext::core::read_state_dict(archive.data(), archive.size());
  } catch (const c10::Error&) {  // NOLINT(bugprone-empty-catch): the promised answer to bad bytes
  }
  return 0;
}

// Reads the zip archives of torch.save: records stored without compression, 64-bit sizes. Not
// caffe2::serialize::PyTorchStreamReader: that one does not compare checksums, so a flipped bit becomes a wrong number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>

namespace torch_ext::core {

// Random access to the bytes of a file.
class ByteSource {
 public:
  virtual ~ByteSource() = default;
  virtual uint64_t size() const = 0;
  // Copies bytes [offset, offset + count) to `out`. The caller keeps the range inside size().
  virtual void read(uint64_t offset, void* out, size_t count) const = 0;
};

class ZipReader {
 public:
  struct Record {
    uint64_t header = 0;  // position of the local header
    uint64_t size = 0;
    uint64_t packed_size = 0;
    uint32_t crc = 0;
    uint16_t flags = 0;
    uint16_t method = 0;
  };

  // Throws FormatError, here and below, if the source is not a whole archive. `source` must outlive the reader.
  explicit ZipReader(const ByteSource& source);

  // `name` without the archive's leading folder, which torch.save names after the file: "data.pkl", "data/0".
  bool has(const std::string& name) const { return records_.count(folder_ + name) > 0; }
  uint64_t size_of(const std::string& name) const { return find(name).size; }

  // Copies the record's size_of(name) bytes to `out` and compares their checksum.
  void read(const std::string& name, void* out) const;
  std::string read_text(const std::string& name) const;

 private:
  struct Directory {
    uint64_t position = 0;
    uint64_t size = 0;
    uint64_t records = 0;
  };

  const Record& find(const std::string& name) const;
  void check_start() const;
  Directory find_directory() const;
  Directory read_end64(uint64_t end_position) const;
  void read_directory(const Directory& directory);
  void find_folder();
  uint64_t data_position(const std::string& name, const Record& record) const;

  const ByteSource& source_;
  std::unordered_map<std::string, Record> records_;
  std::string folder_;  // ends with '/'
};

}  // namespace torch_ext::core

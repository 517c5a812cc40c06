#include "core/zip_reader.h"

#include <algorithm>
#include <array>
#include <vector>

#include "core/format_error.h"

namespace torch_ext::core {
namespace {

// Layout: PKWARE's APPNOTE.TXT, sections 4.3.7 (local header), 4.3.12 (directory), 4.3.14 to 4.3.16 (end records).
constexpr uint32_t kLocalSignature = 0x04034b50;
constexpr uint32_t kEntrySignature = 0x02014b50;
constexpr uint32_t kEndSignature = 0x06054b50;
constexpr uint32_t kEnd64Signature = 0x06064b50;
constexpr uint32_t kLocator64Signature = 0x07064b50;
constexpr uint64_t kLocalSize = 30;
constexpr uint64_t kEntrySize = 46;
constexpr uint64_t kEndSize = 22;
constexpr uint64_t kEnd64Size = 56;
constexpr uint64_t kLocator64Size = 20;
constexpr uint64_t kMaxComment = 0xffff;
constexpr uint16_t kExtra64 = 0x0001;
constexpr uint16_t kEncrypted = 0x0001;

constexpr char kTruncated[] = "is truncated: the list of records at its end is missing; copy or save the file again";
constexpr char kBadDirectory[] = "is damaged: its list of records is broken; copy or save the file again";

// Little-endian fields of a byte range that the caller has checked.
template <typename T>
T field(std::string_view bytes, size_t position) {
  T value = 0;
  for (size_t i = 0; i < sizeof(T); ++i) {
    value = static_cast<T>(value | (static_cast<T>(static_cast<uint8_t>(bytes[position + i])) << (8 * i)));
  }
  return value;
}

std::string read_bytes(const ByteSource& source, uint64_t position, uint64_t count, const char* error) {
  require(count <= source.size() && position <= source.size() - count, error);
  std::string bytes(count, '\0');
  source.read(position, bytes.data(), count);
  return bytes;
}

// CRC-32 of zip, eight bytes a step ("slicing by 8"): a table lookup per byte would be slower than the disk.
using CrcTables = std::array<std::array<uint32_t, 256>, 8>;

CrcTables make_crc_tables() {
  CrcTables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) {
      crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0xedb88320U : 0U);
    }
    tables[0][byte] = crc;
  }
  for (size_t slice = 1; slice < 8; ++slice) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t previous = tables[slice - 1][byte];
      tables[slice][byte] = (previous >> 8) ^ tables[0][previous & 0xff];
    }
  }
  return tables;
}

uint32_t crc32(std::string_view bytes) {
  static const CrcTables tables = make_crc_tables();
  uint32_t crc = 0xffffffffU;
  size_t i = 0;
  for (; i + 8 <= bytes.size(); i += 8) {
    const uint64_t word = field<uint64_t>(bytes, i) ^ crc;
    crc = 0;
    for (size_t slice = 0; slice < 8; ++slice) {
      crc ^= tables[7 - slice][(word >> (8 * slice)) & 0xff];
    }
  }
  for (; i < bytes.size(); ++i) {
    crc = (crc >> 8) ^ tables[0][(crc ^ static_cast<uint8_t>(bytes[i])) & 0xff];
  }
  return ~crc;
}

// Replaces the fields that an entry marks as too large for 32 bits by those of its 64-bit extra field.
void apply_extra64(std::string_view extra, ZipReader::Record& record) {
  while (extra.size() >= 4) {
    const auto id = field<uint16_t>(extra, 0);
    const size_t size = field<uint16_t>(extra, 2);
    require(size <= extra.size() - 4, kBadDirectory);
    std::string_view body = extra.substr(4, size);
    extra.remove_prefix(4 + size);
    if (id != kExtra64) {
      continue;
    }
    for (uint64_t* value : {&record.size, &record.packed_size, &record.header}) {
      if (*value == 0xffffffffU) {
        require(body.size() >= 8, kBadDirectory);
        *value = field<uint64_t>(body, 0);
        body.remove_prefix(8);
      }
    }
  }
}

}  // namespace

ZipReader::ZipReader(const ByteSource& source) : source_(source) {
  check_start();
  read_directory(find_directory());
  find_folder();
}

// Tells the usual strangers apart, because each has its own remedy.
void ZipReader::check_start() const {
  require(source_.size() > 0, "is empty: nothing was saved, or the copy failed");
  const std::string start = read_bytes(source_, 0, std::min<uint64_t>(source_.size(), 14), kTruncated);
  constexpr std::string_view kLegacy("\x80\x02\x8a\x0al\xfc\x9c\x46\xf9 j\xa8P\x19", 14);
  require(start != kLegacy,
          "is in torch.save's old format; save it again without _use_new_zipfile_serialization=False");
  constexpr std::string_view kMagic("PK\x03\x04", 4);
  const std::string_view magic = std::string_view(start).substr(0, 4);
  require(magic == kMagic.substr(0, magic.size()), "is not a torch.save file: it does not start as a zip archive");
}

ZipReader::Directory ZipReader::find_directory() const {
  const uint64_t tail_size = std::min(source_.size(), kEndSize + kMaxComment);
  const std::string tail = read_bytes(source_, source_.size() - tail_size, tail_size, kTruncated);
  for (uint64_t back = kEndSize; back <= tail.size(); ++back) {
    const std::string_view end = std::string_view(tail).substr(tail.size() - back);
    // The comment must end with the file, or a truncated file with another archive among its bytes would pass.
    if (field<uint32_t>(end, 0) != kEndSignature || field<uint16_t>(end, 20) != back - kEndSize) {
      continue;
    }
    const Directory found{field<uint32_t>(end, 16), field<uint32_t>(end, 12), field<uint16_t>(end, 10)};
    const bool is64 = found.position == 0xffffffffU || found.size == 0xffffffffU || found.records == 0xffffU;
    return is64 ? read_end64(source_.size() - back) : found;
  }
  require(false, kTruncated);
  return {};
}

ZipReader::Directory ZipReader::read_end64(uint64_t end_position) const {
  require(end_position >= kLocator64Size, kBadDirectory);
  const std::string locator = read_bytes(source_, end_position - kLocator64Size, kLocator64Size, kBadDirectory);
  require(field<uint32_t>(locator, 0) == kLocator64Signature, kBadDirectory);
  const std::string end = read_bytes(source_, field<uint64_t>(locator, 8), kEnd64Size, kBadDirectory);
  require(field<uint32_t>(end, 0) == kEnd64Signature, kBadDirectory);
  return {field<uint64_t>(end, 48), field<uint64_t>(end, 40), field<uint64_t>(end, 32)};
}

void ZipReader::read_directory(const Directory& directory) {
  const std::string bytes = read_bytes(source_, directory.position, directory.size, kBadDirectory);
  std::string_view rest = bytes;
  for (uint64_t i = 0; i < directory.records; ++i) {
    require(rest.size() >= kEntrySize && field<uint32_t>(rest, 0) == kEntrySignature, kBadDirectory);
    const size_t name_size = field<uint16_t>(rest, 28);
    const size_t extra_size = field<uint16_t>(rest, 30);
    const size_t entry_size = kEntrySize + name_size + extra_size + field<uint16_t>(rest, 32);
    require(entry_size <= rest.size(), kBadDirectory);
    Record record;
    record.header = field<uint32_t>(rest, 42);
    record.size = field<uint32_t>(rest, 24);
    record.packed_size = field<uint32_t>(rest, 20);
    record.crc = field<uint32_t>(rest, 16);
    record.method = field<uint16_t>(rest, 10);
    record.flags = field<uint16_t>(rest, 8);
    apply_extra64(rest.substr(kEntrySize + name_size, extra_size), record);
    require(records_.emplace(rest.substr(kEntrySize, name_size), record).second, kBadDirectory);
    rest.remove_prefix(entry_size);
  }
}

void ZipReader::find_folder() {
  constexpr std::string_view kPickle = "/data.pkl";
  for (const auto& entry : records_) {
    const std::string_view name = entry.first;
    if (name.size() > kPickle.size() && name.find('/') == name.size() - kPickle.size() &&
        name.substr(name.size() - kPickle.size()) == kPickle) {
      folder_ = name.substr(0, name.size() - kPickle.size() + 1);
    }
  }
  require(!folder_.empty(), "is not a torch.save file: it is a zip archive without the record data.pkl");
  require(
      !has("constants.pkl"),
      "is not a torch.save file: it is a TorchScript archive, as torch::save and torch.jit.save write; load it with "
      "torch::load or torch.jit.load");
}

const ZipReader::Record& ZipReader::find(const std::string& name) const {
  const auto found = records_.find(folder_ + name);
  require(found != records_.end(), "is damaged: its record ", name, " is missing; copy or save the file again");
  return found->second;
}

uint64_t ZipReader::data_position(const std::string& name, const Record& record) const {
  const std::string error = c10::str("is damaged: its record ", name, " is broken; copy or save the file again");
  require((record.flags & kEncrypted) == 0 && record.method == 0 && record.packed_size == record.size,
          "is not a torch.save file: its record ", name, " is compressed or encrypted");
  const std::string local = read_bytes(source_, record.header, kLocalSize, error.c_str());
  require(field<uint32_t>(local, 0) == kLocalSignature, error);
  const uint64_t position = record.header + kLocalSize + field<uint16_t>(local, 26) + field<uint16_t>(local, 28);
  require(record.size <= source_.size() && position <= source_.size() - record.size, error);
  return position;
}

void ZipReader::read(const std::string& name, void* out) const {
  const Record& record = find(name);
  if (record.size == 0) {
    return;  // `out` may be null
  }
  source_.read(data_position(name, record), out, record.size);
  // torch.serialization.set_crc32_options(False) writes zeros.
  require(record.crc == 0 || crc32({static_cast<const char*>(out), record.size}) == record.crc,
          "is damaged: the bytes of its record ", name, " do not match their checksum; copy or save the file again");
}

std::string ZipReader::read_text(const std::string& name) const {
  const Record& record = find(name);
  data_position(name, record);  // before allocating: the size is a claim of the file
  std::string text(record.size, '\0');
  read(name, text.data());
  return text;
}

}  // namespace torch_ext::core

#include "core/state_dict_file.h"

#include <ATen/ops/empty.h>
#include <caffe2/serialize/inline_container.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <new>
#include <random>
#include <string_view>
#include <system_error>
#include <unordered_map>

#include "core/format_error.h"
#include "core/pickle_format.h"
#include "core/pickle_reader.h"
#include "core/pickle_writer.h"
#include "core/zip_reader.h"

namespace torch_ext::core {
namespace {

// Turns every error of `action` into a c10::Error that starts with the file's name.
template <typename Action>
auto naming_errors(const std::string& subject, const char* verb, Action action) {
  try {
    return action();
  } catch (const FormatError& error) {
    TORCH_CHECK(false, subject, " ", error.what());
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, subject, " cannot be ", verb, ": ", error.what_without_backtrace());
  } catch (const std::bad_alloc&) {
    TORCH_CHECK(false, subject, " cannot be ", verb, ": not enough memory");
  } catch (const std::exception& error) {
    TORCH_CHECK(false, subject, " cannot be ", verb, ": ", error.what());
  }
}

std::string error_text(int code) { return std::generic_category().message(code); }

class FileDescriptor {
 public:
  explicit FileDescriptor(int descriptor) : descriptor_(descriptor) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() { close(); }

  int get() const { return descriptor_; }
  int close() {
    const int result = descriptor_ >= 0 ? ::close(descriptor_) : 0;
    descriptor_ = -1;
    return result;
  }

 private:
  int descriptor_;
};

// ---- Reading ----

class FileSource : public ByteSource {
 public:
  explicit FileSource(const std::string& path) : file_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    require(file_.get() >= 0, "cannot be opened: ", error_text(errno));
    struct stat info {};
    require(::fstat(file_.get(), &info) == 0, "cannot be read: ", error_text(errno));
    require(S_ISREG(info.st_mode), "cannot be read: it is a directory or a device, not a regular file");
    size_ = static_cast<uint64_t>(info.st_size);
  }

  uint64_t size() const override { return size_; }

  void read(uint64_t offset, void* out, size_t count) const override {
    auto* to = static_cast<char*>(out);
    while (count > 0) {
      const ssize_t got = ::pread(file_.get(), to, count, static_cast<off_t>(offset));
      if (got < 0 && errno == EINTR) {
        continue;
      }
      require(got >= 0, "cannot be read: ", error_text(errno));
      require(got > 0, "is truncated: it became shorter while it was read");
      to += got;
      offset += static_cast<uint64_t>(got);
      count -= static_cast<size_t>(got);
    }
  }

 private:
  FileDescriptor file_;
  uint64_t size_ = 0;
};

class MemorySource : public ByteSource {
 public:
  MemorySource(const void* data, size_t size) : data_(static_cast<const char*>(data)), size_(size) {}
  uint64_t size() const override { return size_; }
  void read(uint64_t offset, void* out, size_t count) const override {
    if (count > 0) {
      std::memcpy(out, data_ + offset, count);
    }
  }

 private:
  const char* data_;
  size_t size_;
};

// Loads each data record once, so tensors that shared memory when saved share it again.
class RecordLoader {
 public:
  RecordLoader(const ZipReader& archive, uint64_t file_size, c10::Device device)
      : archive_(archive), budget_(file_size), device_(device) {}

  c10::Storage load(const std::string& key, uint64_t nbytes) {
    const std::string name = "data/" + key;
    require(archive_.size_of(name) == nbytes, "is damaged: its record ", name, " has ", archive_.size_of(name),
            " bytes where ", nbytes, " are expected; copy or save the file again");
    auto [entry, is_new] = storages_.try_emplace(key);
    if (is_new) {
      entry->second = read(name, nbytes);
    }
    return entry->second;
  }

 private:
  c10::Storage read(const std::string& name, uint64_t nbytes) {
    // Records that overlap could claim far more memory than the file has bytes.
    require(nbytes <= budget_, "is damaged: its records are larger than the file");
    budget_ -= nbytes;
    const at::Tensor bytes = at::empty({static_cast<int64_t>(nbytes)}, at::kByte);
    archive_.read(name, bytes.mutable_data_ptr());
    return bytes.to(device_).storage();
  }

  const ZipReader& archive_;
  uint64_t budget_;
  c10::Device device_;
  std::unordered_map<std::string, c10::Storage> storages_;
};

c10::IValue read_archive(const ByteSource& source, std::optional<c10::Device> map_location) {
  const ZipReader archive(source);
  const std::string byteorder = archive.has("byteorder") ? archive.read_text("byteorder") : "little";
  require(byteorder == host_byteorder(), "was saved on a machine of other byte order (", byteorder,
          "); load and save it with torch in Python first");
  RecordLoader records(archive, source.size(), map_location.value_or(c10::Device(c10::kCPU)));
  return unpickle_value(archive.read_text("data.pkl"),
                        [&](const std::string& key, uint64_t nbytes) { return records.load(key, nbytes); });
}

// ---- Writing ----

// A new file beside its target that takes the target's place on commit() and vanishes otherwise.
class ReplacementFile {
 public:
  explicit ReplacementFile(const std::string& path)
      : target_(resolve(path)),
        temporary_(name_beside(target_)),
        file_(::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)) {
    require(file_.get() >= 0, "cannot be written: ", error_text(errno));
    struct stat old {};
    if (::stat(target_.c_str(), &old) == 0 && ::fchmod(file_.get(), old.st_mode & 0777) != 0) {
      error_ = errno;  // reported by commit(): a private checkpoint must not become readable to all
    }
  }
  ReplacementFile(const ReplacementFile&) = delete;
  ReplacementFile& operator=(const ReplacementFile&) = delete;
  ~ReplacementFile() {
    if (!committed_) {
      ::unlink(temporary_.c_str());
    }
  }

  // Claims success always and leaves the error to commit(): PyTorchStreamWriter must not fail half-way, because its
  // destructor would then try to finish the archive and throw.
  size_t write(const void* data, size_t count) noexcept {
    const auto* from = static_cast<const char*>(data);
    for (size_t left = count; left > 0 && error_ == 0;) {
      const ssize_t done = ::write(file_.get(), from, left);
      if (done >= 0) {
        from += done;
        left -= static_cast<size_t>(done);
      } else if (errno != EINTR) {
        error_ = errno;
      }
    }
    return count;
  }

  void commit() {
    require(error_ == 0, "cannot be written: ", error_text(error_));
    // Before the rename, or a power cut could leave the new name on an empty file.
    require(::fsync(file_.get()) == 0 && file_.close() == 0, "cannot be written: ", error_text(errno));
    require(::rename(temporary_.c_str(), target_.c_str()) == 0, "cannot be written: ", error_text(errno));
    committed_ = true;
  }

 private:
  // The file a symbolic link points to, so that the link survives the rename.
  static std::string resolve(const std::string& path) {
    std::error_code ignored;
    const std::filesystem::path real = std::filesystem::canonical(path, ignored);
    return real.empty() ? path : real.string();
  }

  static std::string name_beside(const std::string& target) {
    std::random_device random;
    return c10::str(target, ".tmp-", random(), "-", random());
  }

  std::string target_;
  std::string temporary_;
  FileDescriptor file_;
  int error_ = 0;
  bool committed_ = false;
};

// The records of torch.save, in its order; the writer itself adds "version" and ".data/serialization_id".
void write_archive(const PickledValue& value, ReplacementFile& file) {
  caffe2::serialize::PyTorchStreamWriter archive(
      [&file](const void* data, size_t count) { return file.write(data, count); });
  archive.writeRecord("data.pkl", value.pickle.data(), value.pickle.size());
  const std::string_view byteorder = host_byteorder();
  archive.writeRecord("byteorder", byteorder.data(), byteorder.size());
  for (size_t i = 0; i < value.storages.size(); ++i) {
    const at::Tensor storage = value.storages[i].cpu();
    archive.writeRecord("data/" + std::to_string(i), storage.const_data_ptr(), storage.nbytes());
  }
  archive.writeEndOfFile();
}

}  // namespace

void write_state_dict(const c10::IValue& value, const std::string& path) {
  // Pickled first: a value that cannot be stored must not even create a file.
  const auto pickled =
      naming_errors(c10::str("the value for '", path, "'"), "written", [&] { return pickle_value(value); });
  naming_errors(c10::str("'", path, "'"), "written", [&] {
    ReplacementFile file(path);
    write_archive(pickled, file);
    file.commit();
  });
}

c10::IValue read_state_dict(const std::string& path, std::optional<c10::Device> map_location) {
  return naming_errors(c10::str("'", path, "'"), "read", [&] { return read_archive(FileSource(path), map_location); });
}

c10::IValue read_state_dict(const void* data, size_t size, std::optional<c10::Device> map_location) {
  return naming_errors("the state dict in memory", "read",
                       [&] { return read_archive(MemorySource(data, size), map_location); });
}

}  // namespace torch_ext::core

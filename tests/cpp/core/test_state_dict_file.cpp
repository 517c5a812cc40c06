#include <ATen/ATen.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <caffe2/serialize/inline_container.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <torch/serialize/output-archive.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/state_dict_file.h"

namespace torch_ext::core {
namespace {

namespace fs = std::filesystem;

c10::impl::GenericDict make_dict(const std::vector<std::pair<c10::IValue, c10::IValue>>& items) {
  c10::impl::GenericDict dict(c10::AnyType::get(), c10::AnyType::get());
  for (const auto& [key, value] : items) {
    dict.insert(key, value);
  }
  return dict;
}

c10::impl::GenericList make_list(const std::vector<c10::IValue>& items) {
  c10::impl::GenericList list(c10::AnyType::get());
  for (const auto& item : items) {
    list.push_back(item);
  }
  return list;
}

bool equal(const c10::IValue& a, const c10::IValue& b);

bool equal_elements(at::ArrayRef<c10::IValue> a, at::ArrayRef<c10::IValue> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), equal);
}

bool equal_tensors(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() && a.strides() == b.strides() &&
         a.requires_grad() == b.requires_grad() &&
         a.contiguous().view(-1).view(at::kByte).equal(b.contiguous().view(-1).view(at::kByte));
}

// Equal types, order of keys and, for tensors, bits.
bool equal(const c10::IValue& a, const c10::IValue& b) {
  if (a.tagKind() != b.tagKind()) {
    return false;
  }
  if (a.isTensor()) {
    return equal_tensors(a.toTensor(), b.toTensor());
  }
  if (a.isDouble()) {
    return a.toDouble() == b.toDouble() || (std::isnan(a.toDouble()) && std::isnan(b.toDouble()));
  }
  if (a.isTuple()) {
    return equal_elements(a.toTupleRef().elements(), b.toTupleRef().elements());
  }
  if (a.isList()) {
    return equal_elements(a.toList().vec(), b.toList().vec());
  }
  if (a.isGenericDict()) {
    const auto x = a.toGenericDict();
    const auto y = b.toGenericDict();
    return std::equal(x.begin(), x.end(), y.begin(), y.end(), [](const auto& left, const auto& right) {
      return equal(left.key(), right.key()) && equal(left.value(), right.value());
    });
  }
  return a == b;
}

// Shaped like the state_dict of an optimizer.
c10::IValue sample_state() {
  const at::Tensor step = at::full({}, 3.0F);
  const auto state = make_dict({{int64_t{0}, make_dict({{"step", step}, {"exp_avg", at::arange(6.0).view({2, 3})}})},
                                {int64_t{1}, make_dict({{"step", step}, {"exp_avg", at::empty({0})}})}});
  const auto betas = c10::ivalue::Tuple::create({0.9, 0.999});
  const auto group = make_dict({{"lr", 0.1},
                                {"betas", betas},
                                {"seed", int64_t{1} << 40},
                                {"name", "é"},
                                {"maximize", false},
                                {"hessian", c10::IValue()},
                                {"params", make_list({int64_t{0}, int64_t{1}})}});
  return make_dict({{"state", state}, {"param_groups", make_list({group})}});
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

c10::IValue read_bytes(const std::string& bytes) { return read_state_dict(bytes.data(), bytes.size()); }

class StateDictFile : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "state_dict_file_XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  size_t files() const {
    return static_cast<size_t>(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }

  std::string bytes_of(const c10::IValue& value) const {
    write_state_dict(value, path("bytes.pt"));
    return read_file(path("bytes.pt"));
  }
  c10::IValue round_trip(const c10::IValue& value) const { return read_bytes(bytes_of(value)); }

  // A file with this pickle and, as data/0, sixteen bytes.
  static std::string archive_of(const std::string& pickle) {
    std::string bytes;
    caffe2::serialize::PyTorchStreamWriter writer([&bytes](const void* data, size_t count) {
      bytes.append(static_cast<const char*>(data), count);
      return count;
    });
    writer.writeRecord("data.pkl", pickle.data(), pickle.size());
    writer.writeRecord("data/0", "0123456789abcdef", 16);
    writer.writeEndOfFile();
    return bytes;
  }

  fs::path folder_;
};

template <typename Action>
std::string error_of(Action action) {
  try {
    action();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

std::string read_error(const std::string& bytes) {
  return error_of([&] { read_bytes(bytes); });
}

#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

// ---- Round trips ----

TEST_F(StateDictFile, RoundTripKeepsTypesOrderAndValues) {
  const c10::IValue value = sample_state();
  write_state_dict(value, path("a.pt"));
  EXPECT_TRUE(equal(value, read_state_dict(path("a.pt"))));
  EXPECT_EQ(files(), 1U);
}

TEST_F(StateDictFile, EveryScalar) {
  constexpr auto kMin = std::numeric_limits<int64_t>::min();
  constexpr auto kMax = std::numeric_limits<int64_t>::max();
  for (const int64_t value : {int64_t{0}, int64_t{-1}, int64_t{255}, int64_t{65536}, int64_t{INT32_MIN},
                              int64_t{INT32_MAX}, int64_t{INT32_MAX} + 1, int64_t{INT32_MIN} - 1, kMin, kMax}) {
    EXPECT_EQ(round_trip(value).toInt(), value);
  }
  for (const double value : {0.0, -0.0, 0.1, 5e-324, 1e308, HUGE_VAL, -HUGE_VAL}) {
    EXPECT_EQ(round_trip(value).toDouble(), value);
    EXPECT_EQ(std::signbit(round_trip(value).toDouble()), std::signbit(value));
  }
  EXPECT_TRUE(std::isnan(round_trip(std::nan("")).toDouble()));
  EXPECT_TRUE(round_trip(c10::IValue()).isNone());
  EXPECT_EQ(round_trip(std::string("a\0b\n", 4)).toStringRef(), std::string("a\0b\n", 4));
  EXPECT_EQ(round_trip(std::string(100000, 'x')).toStringRef().size(), 100000U);
}

TEST_F(StateDictFile, EveryContainer) {
  for (int64_t size = 0; size < 5; ++size) {
    const std::vector<c10::IValue> values(static_cast<size_t>(size), c10::IValue(size));
    EXPECT_TRUE(equal(round_trip(c10::ivalue::Tuple::create(values)), c10::ivalue::Tuple::create(values)));
    EXPECT_TRUE(equal(round_trip(make_list(values)), make_list(values)));
  }
  const c10::IValue keys = make_dict({{int64_t{3}, "int"}, {"3", "str"}, {true, "bool"}, {2.5, "float"}});
  EXPECT_TRUE(equal(round_trip(keys), keys));
}

// Typed lists and dicts, which C++ code makes most naturally, lose only their static type.
TEST_F(StateDictFile, TypedContainers) {
  EXPECT_TRUE(equal(round_trip(c10::IValue(std::vector<int64_t>{1, 2})), make_list({int64_t{1}, int64_t{2}})));
  EXPECT_TRUE(equal(round_trip(c10::IValue(std::vector<double>{1, 2})), make_list({1.0, 2.0})));
  EXPECT_TRUE(equal(round_trip(c10::IValue(std::vector<bool>{true})), make_list({true})));
  EXPECT_TRUE(equal(round_trip(c10::IValue(std::vector<at::Tensor>{at::ones(2)})), make_list({at::ones(2)})));
  c10::Dict<std::string, int64_t> dict;
  dict.insert("a", 1);
  EXPECT_TRUE(equal(round_trip(dict), make_dict({{"a", int64_t{1}}})));
}

TEST_F(StateDictFile, EveryDtype) {
  using c10::ScalarType;
  for (const ScalarType dtype :
       {ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16, ScalarType::Long,
        ScalarType::Int, ScalarType::Short, ScalarType::Char, ScalarType::Byte, ScalarType::Bool,
        ScalarType::ComplexFloat, ScalarType::ComplexDouble, ScalarType::UInt16, ScalarType::UInt32, ScalarType::UInt64,
        ScalarType::Float8_e4m3fn, ScalarType::Float8_e5m2, ScalarType::Float8_e4m3fnuz, ScalarType::Float8_e5m2fnuz}) {
    const at::Tensor tensor = at::arange(6, at::kFloat).remainder(2).to(dtype).view({2, 3});
    EXPECT_TRUE(equal(round_trip(tensor), tensor)) << dtype;
    EXPECT_TRUE(equal(round_trip(tensor.select(0, 1).select(0, 2)), tensor.select(0, 1).select(0, 2))) << dtype;
    EXPECT_TRUE(equal(round_trip(at::empty({0, 3}, dtype)), at::empty({0, 3}, dtype))) << dtype;
  }
}

TEST_F(StateDictFile, EveryLayout) {
  const at::Tensor base = at::arange(120.0).view({2, 3, 4, 5});
  for (const at::Tensor& tensor :
       {base.permute({3, 1, 0, 2}), base.contiguous(at::MemoryFormat::ChannelsLast), base.slice(3, 1, 4, 2),
        base.select(1, 2), at::ones(1).expand({3, 4}), base.slice(0, 1, 1), at::full({}, 7.0)}) {
    EXPECT_TRUE(equal(round_trip(tensor), tensor)) << tensor.strides();
  }
}

TEST_F(StateDictFile, RequiresGrad) {
  const at::Tensor parameter = at::ones(2).set_requires_grad(true);
  EXPECT_TRUE(equal(round_trip(parameter), parameter));
  EXPECT_TRUE(equal(round_trip(parameter * 2).toTensor().detach(), at::full({2}, 2.0)));
}

TEST_F(StateDictFile, SharedMemoryIsWrittenOnceAndSharedAgain) {
  const at::Tensor base = at::arange(10000.0);
  const c10::IValue value = make_list({base.slice(0, 0, 6000), base.slice(0, 4000), base.view({100, 100}).t()});
  const std::string bytes = bytes_of(value);
  EXPECT_LT(bytes.size(), 44000U);  // 40,000 bytes of data
  const auto loaded = read_bytes(bytes).toList();
  EXPECT_TRUE(equal(loaded, value));
  loaded.get(0).toTensor()[5000].fill_(-1);
  EXPECT_EQ(loaded.get(1).toTensor()[1000].item<float>(), -1);
  EXPECT_EQ(loaded.get(2).toTensor()[0][50].item<float>(), -1);
}

TEST_F(StateDictFile, SliceOfALargeBufferMakesASmallFile) {
  const at::Tensor slice = at::arange(1000000.0).slice(0, 500000, 500003);
  const std::string bytes = bytes_of(slice);
  EXPECT_LT(bytes.size(), 2000U);
  EXPECT_TRUE(equal(read_bytes(bytes), slice));
}

TEST_F(StateDictFile, MemoryViewedAsTwoDtypesKeepsBothValues) {
  const at::Tensor base = at::arange(4.0);
  const c10::IValue value = make_list({base, base.view(at::kInt)});
  EXPECT_TRUE(equal(round_trip(value), value));
}

TEST_F(StateDictFile, SameTensorStaysShared) {
  const at::Tensor tensor = at::ones(3);
  const auto loaded = round_trip(make_list({tensor, tensor})).toList();
  EXPECT_TRUE(loaded.get(0).toTensor().is_alias_of(loaded.get(1).toTensor()));
}

TEST_F(StateDictFile, ManyRecords) {
  c10::impl::GenericList list(c10::AnyType::get());
  for (int64_t i = 0; i < 70000; ++i) {  // beyond the 16-bit counter of a plain zip archive
    list.push_back(at::full({1}, i, at::kLong));
  }
  EXPECT_TRUE(equal(round_trip(list), list));
}

TEST_F(StateDictFile, MapLocation) {
  write_state_dict(at::ones(3), path("a.pt"));
  EXPECT_TRUE(read_state_dict(path("a.pt"), c10::Device(c10::kCPU)).toTensor().device().is_cpu());
  EXPECT_TRUE(read_state_dict(path("a.pt"), c10::Device(c10::kMeta)).toTensor().is_meta());
}

TEST_F(StateDictFile, CudaTensorsKeepTheirLocationAndLoadToCpu) {
  if (!at::detail::getCUDAHooks().hasCUDA()) {
    GTEST_SKIP() << "no GPU";
  }
  const at::Tensor tensor = at::arange(6.0).view({2, 3});
  const std::string bytes = bytes_of(tensor.to(at::Device(at::kCUDA, 0)).t());
  EXPECT_HAS(bytes, "cuda:0");
  EXPECT_TRUE(equal(read_bytes(bytes), tensor.t()));
  EXPECT_TRUE(read_state_dict(bytes.data(), bytes.size(), at::Device(at::kCUDA, 0)).toTensor().is_cuda());
}

TEST_F(StateDictFile, ManyThreads) {
  const c10::IValue value = sample_state();
  std::vector<std::thread> threads;
  threads.reserve(8);
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      const std::string own = path(std::to_string(i % 2) + ".pt");  // four writers per file
      for (int round = 0; round < 4; ++round) {
        write_state_dict(value, own);
        EXPECT_TRUE(equal(read_state_dict(own), value));
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(files(), 2U);
}

// ---- Writing ----

TEST_F(StateDictFile, RefusedValuesLeaveTheOldFile) {
  write_state_dict("old", path("a.pt"));
  const auto error = [&](const c10::IValue& value) {
    return error_of([&] { write_state_dict(make_list({at::ones(2), value}), path("a.pt")); });
  };
  EXPECT_HAS(error(c10::IValue(c10::complex<double>(1, 2))), "a value of kind ComplexDouble");
  EXPECT_HAS(error(at::Tensor()), "undefined tensor");
  EXPECT_HAS(error(at::ones(2).to_sparse()), "layout Sparse");
  EXPECT_HAS(error(at::empty({2}, at::kMeta)), "device meta");
  EXPECT_HAS(error(at::ones(2, at::kComplexFloat).conj()), "resolve_conj()");
  EXPECT_HAS(error(at::zeros({1}, at::kComplexHalf)), "dtype ComplexHalf");
  EXPECT_HAS(error(make_dict({{at::ones(1), int64_t{1}}})), "keys must be int, str, bool or float");
  EXPECT_HAS(error(at::Tensor()), "the value for '" + path("a.pt") + "'");
  EXPECT_EQ(read_state_dict(path("a.pt")).toStringRef(), "old");
  EXPECT_EQ(files(), 1U);
}

TEST_F(StateDictFile, CyclesAndDepth) {
  auto cycle = make_list({});
  cycle.push_back(cycle);
  EXPECT_HAS(error_of([&] { write_state_dict(cycle, path("a.pt")); }), "contains itself");
  cycle.clear();
  c10::IValue deep = int64_t{1};
  for (int i = 0; i < 100; ++i) {
    deep = make_list({deep});
  }
  EXPECT_TRUE(equal(round_trip(deep), deep));
  deep = make_list({deep});
  EXPECT_HAS(error_of([&] { write_state_dict(deep, path("a.pt")); }), "deeper than 100");
  c10::IValue wide = int64_t{1};  // 2^40 values in 40 lists
  for (int i = 0; i < 40; ++i) {
    wide = make_list({wide, wide});
  }
  EXPECT_HAS(error_of([&] { write_state_dict(wide, path("a.pt")); }), "more than 16777216 values");
}

TEST_F(StateDictFile, UnwritablePlace) {
  EXPECT_HAS(error_of([&] { write_state_dict("x", path("no/a.pt")); }), "No such file or directory");
  fs::create_directory(path("folder"));
  EXPECT_HAS(error_of([&] { write_state_dict("x", path("folder")); }), "'" + path("folder") + "' cannot be written");
  EXPECT_EQ(files(), 1U);
}

// The disk fills half-way: here by a limit on the size of files.
TEST_F(StateDictFile, FailedWriteLeavesTheOldFile) {
  write_state_dict("old", path("a.pt"));
  rlimit old_limit{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old_limit), 0);
  const auto old_handler = signal(SIGXFSZ, SIG_IGN);
  const rlimit small{10000, old_limit.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const std::string error = error_of([&] { write_state_dict(at::ones(100000), path("a.pt")); });
  setrlimit(RLIMIT_FSIZE, &old_limit);
  signal(SIGXFSZ, old_handler);
  EXPECT_HAS(error, "cannot be written: File too large");
  EXPECT_EQ(read_state_dict(path("a.pt")).toStringRef(), "old");
  EXPECT_EQ(files(), 1U);
}

TEST_F(StateDictFile, ReplacingKeepsModeAndSymbolicLink) {
  write_state_dict("old", path("a.pt"));
  ASSERT_EQ(chmod(path("a.pt").c_str(), 0600), 0);
  fs::create_symlink(path("a.pt"), path("latest.pt"));
  write_state_dict("new", path("latest.pt"));
  EXPECT_TRUE(fs::is_symlink(path("latest.pt")));
  EXPECT_EQ(read_state_dict(path("a.pt")).toStringRef(), "new");
  EXPECT_EQ(fs::status(path("a.pt")).permissions(), fs::perms(0600));
}

// ---- Reading what is not a good file ----

TEST_F(StateDictFile, MissingFileAndFolder) {
  EXPECT_HAS(error_of([&] { read_state_dict(path("no.pt")); }),
             "'" + path("no.pt") + "' cannot be opened: No such file or directory");
  EXPECT_HAS(error_of([&] { read_state_dict(folder_.string()); }), "not a regular file");
}

TEST_F(StateDictFile, ForeignFiles) {
  const std::string png("\x89PNG\r\n\x1a\n\0\0\0\rIHDR", 16);
  for (const std::string& bytes : {std::string("lr: 0.1\n"), png, std::string(5000, '\0'), std::string("P")}) {
    write_file(path("a.pt"), bytes);
    const std::string error = error_of([&] { read_state_dict(path("a.pt")); });
    EXPECT_HAS(error, "'" + path("a.pt") + (bytes == "P" ? "' is truncated" : "' is not a torch.save file"));
  }
  EXPECT_HAS(read_error(""), "is empty");
  EXPECT_HAS(read_error("\x80\x02\x8a\x0al\xfc\x9c\x46\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."), "old format");
  EXPECT_HAS(read_error(std::string("PK\x05\x06", 4) + std::string(18, '\0')), "is not a torch.save file");
}

TEST_F(StateDictFile, RandomBytes) {
  std::mt19937 random(0);
  for (int round = 0; round < 2000; ++round) {
    std::string bytes(random() % 300, '\0');
    std::generate(bytes.begin(), bytes.end(), [&] { return static_cast<char>(random()); });
    EXPECT_NE(read_error(bytes), "no error");
    EXPECT_NE(read_error("PK\x03\x04" + bytes), "no error");
    EXPECT_NE(read_error(archive_of("\x80\x02" + bytes)), "no error");
  }
}

TEST_F(StateDictFile, TorchScriptArchive) {
  torch::serialize::OutputArchive archive;  // what torch::save(optimizer, path) writes
  archive.write("step", at::ones(1));
  archive.save_to(path("a.pt"));
  EXPECT_HAS(error_of([&] { read_state_dict(path("a.pt")); }), "is a TorchScript archive");
  EXPECT_HAS(error_of([&] { read_state_dict(path("a.pt")); }), "torch::load");
}

TEST_F(StateDictFile, OtherZipArchive) {
  caffe2::serialize::PyTorchStreamWriter writer(path("a.pt"));
  writer.writeRecord("model.json", "{}", 2);
  writer.writeEndOfFile();
  EXPECT_HAS(error_of([&] { read_state_dict(path("a.pt")); }), "zip archive without the record data.pkl");
}

TEST_F(StateDictFile, EveryTruncation) {
  const std::string bytes = bytes_of(sample_state());
  for (size_t size = 1; size < bytes.size(); ++size) {
    const std::string error = read_error(bytes.substr(0, size));
    EXPECT_HAS(error, "is truncated");
  }
  for (size_t size = 0; size < bytes.size(); size += 97) {  // the same through a file
    write_file(path("a.pt"), bytes.substr(0, size));
    EXPECT_HAS(error_of([&] { read_state_dict(path("a.pt")); }), size == 0 ? "is empty" : "is truncated");
  }
}

// No flipped bit is ever read as another value: it is an error, or it sits where it does not matter.
TEST_F(StateDictFile, EveryFlippedBit) {
  const c10::IValue value = sample_state();
  const std::string bytes = bytes_of(value);
  size_t errors = 0;
  for (size_t i = 0; i < bytes.size() * 8; ++i) {
    std::string flipped = bytes;
    flipped[i / 8] = static_cast<char>(flipped[i / 8] ^ (1 << (i % 8)));
    try {
      ASSERT_TRUE(equal(read_bytes(flipped), value)) << "bit " << i;
    } catch (const c10::Error&) {
      ++errors;
    }
  }
  EXPECT_GT(errors, bytes.size());  // of eight times as many; the rest is padding, dates and the like
}

// Several bytes at once, and pickles whose checksum is right: only the pickle reader itself stands in the way.
TEST_F(StateDictFile, MutatedPickles) {
  const std::string bytes = bytes_of(sample_state());
  const size_t start = bytes.find("\x80\x02");
  const std::string pickle = bytes.substr(start, bytes.find("PK\x03\x04", start) - start);
  std::mt19937 random(1);
  for (int round = 0; round < 3000; ++round) {
    std::string mutated = pickle;
    for (unsigned count = 1 + random() % 4; count > 0; --count) {
      mutated[random() % mutated.size()] = static_cast<char>(random());
    }
    const std::string archive = archive_of(mutated);
    error_of([&] { read_bytes(archive); });  // nothing but c10::Error may come out
  }
}

TEST_F(StateDictFile, DamagedRecordIsNamed) {
  std::string bytes = bytes_of(at::full({4}, 1.5F));
  const float value = 1.5F;
  const size_t at = bytes.find(std::string(reinterpret_cast<const char*>(&value), 4));
  bytes[at] = static_cast<char>(bytes[at] ^ 1);
  EXPECT_HAS(read_error(bytes), "is damaged: the bytes of its record data/0 do not match their checksum");
}

TEST_F(StateDictFile, OtherByteOrder) {
  caffe2::serialize::PyTorchStreamWriter writer(path("a.pt"));
  writer.writeRecord("data.pkl", "\x80\x02N.", 4);
  writer.writeRecord("byteorder", "big", 3);
  writer.writeEndOfFile();
  EXPECT_HAS(error_of([&] { read_state_dict(path("a.pt")); }), "other byte order (big)");
}

// ---- Hostile pickles ----

std::string global(const std::string& module, const std::string& name) { return "c" + module + "\n" + name + "\n"; }
std::string text(const std::string& value) {
  return std::string("X") + static_cast<char>(value.size()) + std::string(3, '\0') + value;
}
std::string int32(int64_t value) {
  std::string bytes = "J";
  for (int shift = 0; shift < 32; shift += 8) {
    bytes.push_back(static_cast<char>(value >> shift));
  }
  return bytes;
}
std::string int64(int64_t value) {
  std::string bytes = "\x8a\x08";
  for (int shift = 0; shift < 64; shift += 8) {
    bytes.push_back(static_cast<char>(value >> shift));
  }
  return bytes;
}

// A tensor in the sixteen bytes of record data/0.
std::string tensor_pickle(const std::string& numel, const std::string& offset, const std::string& sizes,
                          const std::string& strides, const std::string& key = "0") {
  return "\x80\x02" + global("torch._utils", "_rebuild_tensor_v2") + "((" + text("storage") +
         global("torch", "FloatStorage") + text(key) + text("cpu") + numel + "tQ" + offset + "(" + sizes + "t(" +
         strides + "t\x89" + global("collections", "OrderedDict") + ")RtR.";
}

TEST_F(StateDictFile, TensorsMustFitTheirStorage) {
  const auto error = [](const std::string& pickle) { return read_error(archive_of(pickle)); };
  const std::string four = int32(4);
  const std::string one = int32(1);
  const std::string zero = int32(0);
  EXPECT_EQ(error(tensor_pickle(four, zero, four, one)), "no error");
  EXPECT_EQ(error(tensor_pickle(four, one, int32(3), one)), "no error");
  EXPECT_HAS(error(tensor_pickle(four, one, four, one)), "larger than its storage");
  EXPECT_HAS(error(tensor_pickle(four, int32(4), "", "")), "larger than its storage");
  EXPECT_HAS(error(tensor_pickle(four, int32(5), zero, one)), "larger than its storage");
  EXPECT_HAS(error(tensor_pickle(four, int32(-1), one, one)), "bad strides");
  EXPECT_HAS(error(tensor_pickle(four, zero, four, one + one)), "bad strides");
  EXPECT_HAS(error(tensor_pickle(four, zero, int32(-4), one)), "negative size or stride");
  EXPECT_HAS(error(tensor_pickle(four, int32(3), four, int32(-1))), "negative size or stride");
  const std::string huge = int64(int64_t{1} << 62);
  EXPECT_HAS(error(tensor_pickle(four, zero, huge + huge, zero + zero)), "too large");
  EXPECT_HAS(error(tensor_pickle(four, zero, int32(3), huge)), "too large");
  EXPECT_HAS(error(tensor_pickle(int32(5), zero, four, one)), "has 16 bytes where 20 are expected");
  EXPECT_HAS(error(tensor_pickle(huge, zero, four, one)), "is damaged");
  EXPECT_HAS(error(tensor_pickle(four, zero, four, one, "1")), "record data/1 is missing");
}

TEST_F(StateDictFile, PythonObjectsAreRefused) {
  const auto error = [](const std::string& pickle) { return read_error(archive_of("\x80\x02" + pickle)); };
  EXPECT_HAS(error(global("os", "system") + "(" + text("true") + "tR."), "needs os.system");
  EXPECT_HAS(error(global("collections", "OrderedDict") + "."), "the Python object collections.OrderedDict");
  EXPECT_HAS(error(global("torch", "float32") + "."), "the Python object torch.float32");
  EXPECT_HAS(
      error("(" + text("storage") + global("torch", "FloatStorage") + text("0") + text("cpu") + int32(4) + "tQ."),
      "a torch storage");
  EXPECT_HAS(error(global("torch", "") + "."), "needs torch.");
  EXPECT_HAS(error("\x8f."), "pickle opcode 143");
  EXPECT_HAS(read_error(archive_of("\x80\x04N.")), "pickle protocol 4");
}

TEST_F(StateDictFile, BrokenPickles) {
  for (const char* pickle : {"",
                             ".",
                             "N",
                             "NN.",
                             "(.",
                             "(N.",
                             "t.",
                             "\x85.",
                             "(\x85.",
                             "a.",
                             "]a.",
                             "]Na",
                             "Na.",
                             "(Ne.",
                             "]Ns.",
                             "}(Nu.",
                             "}]Ns.",
                             "h\x01.",
                             "q\x01.",
                             "R.",
                             ")R.",
                             "))R.",
                             "Q.",
                             "NQ.",
                             "b.",
                             "}Nb.",
                             "X\xff\xff\xff\x7f.",
                             "ctorch",
                             "\x8a\x09xxxxxxxxx.",
                             "\x8a\xff.",
                             "G1.",
                             "N.N"}) {
    EXPECT_NE(read_error(archive_of("\x80\x02" + std::string(pickle))), "no error") << pickle;
    EXPECT_NE(read_error(archive_of(pickle)), "no error") << pickle;
  }
}

// Cycles leak, deep nesting overflows the stack when it is freed, and repeated doubling takes for ever, unless refused.
TEST_F(StateDictFile, PickleBombs) {
  const auto error = [](const std::string& pickle) { return read_error(archive_of("\x80\x02" + pickle)); };
  EXPECT_HAS(error(std::string("]q\0h\0a.", 7)), "contains itself");
  EXPECT_HAS(error(std::string("]q\0(h\0tq\1a.", 11)), "contains itself");
  EXPECT_EQ(error("}}" + text("x") + std::string("]q\0h\0asb.", 9)),
            "no error");  // the cycle is not part of the value
  const size_t depth = 1000000;
  EXPECT_HAS(error(")" + std::string(depth, '\x85') + "."), "nested deeper");
  EXPECT_HAS(error(std::string(depth, ']') + std::string(depth - 1, 'a') + "."), "nested deeper");
  EXPECT_HAS(error(")" + std::string(depth, '\x85')), "ends early");
  EXPECT_HAS(error(std::string(depth, ']') + std::string(depth - 1, 'a')), "ends early");
  EXPECT_HAS(error(std::string(depth, '(')), "ends early");
  std::string doubling = ")";
  for (char i = 0; i < 60; ++i) {
    doubling += std::string("q") + i + "h" + i + "\x86";
  }
  EXPECT_HAS(error(doubling + "."), "holds more than");
}

}  // namespace
}  // namespace torch_ext::core

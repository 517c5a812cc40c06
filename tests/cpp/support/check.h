// Assertions and small guards that the C++ tests share.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <string>
#include <vector>

namespace torch_ext::test {

// Equal dtype, shape and bits, whatever the strides.
inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  const auto bytes = [](const at::Tensor& t) { return t.detach().cpu().contiguous().view({-1}).view(at::kByte); };
  return a.numel() == 0 || bytes(a).equal(bytes(b));
}

inline ::testing::AssertionResult equal_bits(const at::Tensor& a, const at::Tensor& b) {
  if (same_bits(a, b)) return ::testing::AssertionSuccess();
  auto result = ::testing::AssertionFailure() << a.toString() << a.sizes() << " and " << b.toString() << b.sizes();
  if (a.sizes() == b.sizes() && a.numel() > 0) {
    const auto difference = (a.detach().cpu().to(at::kDouble) - b.detach().cpu().to(at::kDouble)).abs();
    result << ": " << difference.ne(0).sum().item<int64_t>() << " of " << a.numel() << " elements differ, by up to "
           << difference.max().item<double>();
  }
  return result;
}

inline ::testing::AssertionResult equal_bits(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  if (a.size() != b.size()) return ::testing::AssertionFailure() << a.size() << " and " << b.size() << " tensors";
  for (size_t i = 0; i < a.size(); ++i) {
    if (auto result = equal_bits(a[i], b[i]); !result) return result << " (tensor " << i << ')';
  }
  return ::testing::AssertionSuccess();
}

// Largest |a - b| relative to the scale of b.
inline double relative_error(const at::Tensor& a, const at::Tensor& b) {
  const auto wide = [](const at::Tensor& t) { return t.detach().cpu().to(at::kDouble); };
  return ((wide(a) - wide(b)).abs().max() / wide(b).abs().max().clamp_min(1e-300)).item<double>();
}

// Trees of dicts, lists, tuples, tensors and scalars; dicts in any order, tensors by bits and dtype.
inline bool same_value(const c10::IValue& a, const c10::IValue& b) {
  if (a.tagKind() != b.tagKind()) return false;
  if (a.isTensor()) return same_bits(a.toTensor(), b.toTensor());
  const auto same_elements = [](at::ArrayRef<c10::IValue> x, at::ArrayRef<c10::IValue> y) {
    return std::equal(x.begin(), x.end(), y.begin(), y.end(), same_value);
  };
  if (a.isTuple()) return same_elements(a.toTupleRef().elements(), b.toTupleRef().elements());
  if (a.isList()) return same_elements(a.toList().vec(), b.toList().vec());
  if (a.isGenericDict()) {
    const auto x = a.toGenericDict(), y = b.toGenericDict();
    if (x.size() != y.size()) return false;
    return std::all_of(x.begin(), x.end(), [&](const auto& item) {
      return y.contains(item.key()) && same_value(item.value(), y.at(item.key()));
    });
  }
  return a == b;
}

// `body` throws an Error (or a class derived from it) whose message contains `text`.
template <typename Error, typename Body>
void expect_error(const Body& body, const std::string& text) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos)
        << "expected '" << text << "' in: " << error.what();
    return;
  } catch (const std::exception& error) {
    ADD_FAILURE() << "expected an error of another type with '" << text << "', got: " << error.what();
    return;
  }
  ADD_FAILURE() << "expected an error with '" << text << "', got none";
}

inline std::vector<at::Tensor> clones(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> result;
  for (const auto& tensor : tensors) result.push_back(tensor.detach().clone());
  return result;
}

// New leaves with the same values, strides and requires_grad.
inline std::vector<at::Tensor> fresh_leaves(const std::vector<at::Tensor>& params) {
  std::vector<at::Tensor> result = clones(params);
  for (size_t i = 0; i < params.size(); ++i) result[i].set_requires_grad(params[i].requires_grad());
  return result;
}

class ThreadCount {
 public:
  explicit ThreadCount(int count) : before_(at::get_num_threads()) { at::set_num_threads(count); }
  ThreadCount(const ThreadCount&) = delete;
  ThreadCount& operator=(const ThreadCount&) = delete;
  ~ThreadCount() { at::set_num_threads(before_); }

 private:
  int before_;
};

// A file name of its own that is removed with its file.
class TemporaryFile {
 public:
  TemporaryFile() {
    static std::atomic<int> next{0};
    path_ = (std::filesystem::temp_directory_path() /
             ("torch_ext_test_" + std::to_string(getpid()) + "_" + std::to_string(next++)))
                .string();
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() {
    std::error_code ignored;
    std::filesystem::remove(path_, ignored);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace torch_ext::test

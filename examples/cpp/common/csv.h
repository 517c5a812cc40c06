// Reads a labelled CSV file into tensors. Used by every example that takes --data FILE.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace examples {

struct Dataset {
  torch::Tensor x;      // [rows, features] float32, as in the file
  torch::Tensor y;      // [rows] int64, the last column
  int64_t classes = 0;  // largest label + 1
};

// A file that cannot be used: what() is "FILE:LINE: reason", or "FILE: reason" when no line is to blame.
struct CsvError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The text between the commas, without blanks at its ends.
inline std::vector<std::string> split_fields(const std::string& line) {
  constexpr auto kBlank = " \t\r";
  std::vector<std::string> fields;
  std::stringstream stream(line + ",");
  for (std::string field; std::getline(stream, field, ',');) {
    const auto begin = field.find_first_not_of(kBlank);
    fields.push_back(begin == std::string::npos ? "" : field.substr(begin, field.find_last_not_of(kBlank) + 1 - begin));
  }
  return fields;
}

// Plain decimal numbers only: no nan, inf, hexadecimal or quotes.
inline std::optional<float> parse_number(const std::string& field) {
  char* end = nullptr;
  const float value = std::strtof(field.c_str(), &end);
  const bool plain = !field.empty() && field.find_first_not_of("+-.0123456789eE") == std::string::npos;
  if (!plain || *end != '\0' || !std::isfinite(value)) return std::nullopt;
  return value;
}

// Comma separated numbers, the last column an integer label from 0. Line 1 is a header if its last field is no number.
inline Dataset read_csv(const std::string& path) {
  constexpr int64_t kMaxLabel = 9999;  // a larger "label" is a quantity, not a class
  if (std::filesystem::is_directory(path)) throw CsvError(path + ": cannot be read: Is a directory");
  std::ifstream file(path);
  if (!file) throw CsvError(path + ": cannot be read: " + std::strerror(errno));

  std::vector<float> values;
  std::vector<int64_t> labels;
  std::size_t columns = 0;
  int64_t line_number = 0, max_label = 0;
  const auto fail = [&](const std::string& reason) {
    throw CsvError(path + ":" + std::to_string(std::max<int64_t>(line_number, 1)) + ": " + reason);
  };

  for (std::string line; std::getline(file, line);) {
    ++line_number;
    if (line_number == 1 && line.rfind("\xEF\xBB\xBF", 0) == 0) line.erase(0, 3);  // byte order mark
    const auto fields = split_fields(line);
    if (fields.size() == 1 && fields[0].empty()) continue;  // blank line
    if (columns == 0) {
      columns = fields.size();
      if (columns < 2) fail("1 column, expected comma separated features and a label");
      if (!parse_number(fields.back())) continue;  // header
    }
    if (fields.size() != columns) {
      fail(std::to_string(fields.size()) + " columns, expected " + std::to_string(columns));
    }
    for (std::size_t i = 0; i < columns; ++i) {
      const auto value = parse_number(fields[i]);
      if (!value) fail("column " + std::to_string(i + 1) + ": '" + fields[i] + "' is not a number");
      if (i + 1 < columns) {
        values.push_back(*value);
      } else if (*value < 0 || *value > kMaxLabel || *value != std::floor(*value)) {
        fail("label '" + fields[i] + "' is not an integer from 0 to " + std::to_string(kMaxLabel));
      } else {
        labels.push_back(static_cast<int64_t>(*value));
        max_label = std::max(max_label, labels.back());
      }
    }
  }
  if (columns == 0) fail("the file is empty");
  if (labels.size() < 2) fail(std::to_string(labels.size()) + " data rows, expected at least 2");

  const auto rows = static_cast<int64_t>(labels.size());
  return {torch::tensor(values).view({rows, -1}), torch::tensor(labels, torch::kInt64), max_label + 1};
}

// Brings the features into [-1, 1]: all by the same factor, or each column by its own.
inline torch::Tensor scale_features(const torch::Tensor& x, bool per_column) {
  const auto largest = per_column ? x.abs().amax(0) : x.abs().max();
  return x / torch::where(largest > 0, largest, 1.0);
}

}  // namespace examples

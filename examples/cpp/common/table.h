// Prints rows of text in aligned columns: the first column to the left, the others to the right.
#pragma once

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

namespace examples {

// printf into a std::string, for table cells and progress lines.
template <class... Args>
std::string format(const char* pattern, Args... args) {
  std::string text(static_cast<std::size_t>(std::snprintf(nullptr, 0, pattern, args...)), '\0');
  std::snprintf(text.data(), text.size() + 1, pattern, args...);
  return text;
}

// rows[0] is the header; every row has the same number of cells.
inline void print_table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<int> widths(rows.at(0).size());
  for (const auto& row : rows) {
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], static_cast<int>(row[i].size()));
  }
  for (const auto& row : rows) {
    for (std::size_t i = 0; i < row.size(); ++i) {
      std::printf("%s%*s", i ? "   " : "", i ? widths[i] : -widths[i], row[i].c_str());
    }
    std::printf("\n");
    if (&row == &rows[0]) {
      for (std::size_t i = 0; i < row.size(); ++i) {
        std::printf("%s%s", i ? "   " : "", std::string(static_cast<std::size_t>(widths[i]), '-').c_str());
      }
      std::printf("\n");
    }
  }
}

}  // namespace examples

// A progress bar on a terminal; where standard error is a file or a pipe, a plain line at each quarter of the way.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>

namespace examples {

class Progress {
 public:
  Progress(std::string label, int total, bool quiet) : label_(std::move(label)), total_(total), quiet_(quiet) {}

  // Reports that `done` of the total is done; `status` is the news, such as "loss 0.012".
  void update(int done, const std::string& status) const {
    constexpr int kWidth = 12;
    const int digits = static_cast<int>(std::to_string(total_).size());
    if (quiet_) return;
    if (isatty(STDERR_FILENO)) {
      const std::string bar(static_cast<std::size_t>(kWidth) * done / total_, '#');
      std::fprintf(stderr, "\r%s [%-*s] %*d/%d  %s\033[K%s", label_.c_str(), kWidth, bar.c_str(), digits, done, total_,
                   status.c_str(), done == total_ ? "\n" : "");
    } else if (done % std::max(1, total_ / 4) == 0 || done == total_) {
      std::fprintf(stderr, "%s %*d/%d  %s\n", label_.c_str(), digits, done, total_, status.c_str());
    }
  }

 private:
  std::string label_;
  int total_;
  bool quiet_;
};

}  // namespace examples

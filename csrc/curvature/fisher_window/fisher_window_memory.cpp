#include "curvature/fisher_window/fisher_window_memory.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>

namespace torch_ext::curvature {
namespace {

// The number behind `key` in lines of "key number ...", or a file's only number for an empty key.
std::optional<int64_t> number_in(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string name;
    int64_t value = 0;
    if (!key.empty() && (!(words >> name) || name != key)) continue;
    if (words >> value) return value;
    return std::nullopt;  // such as "max"
  }
  return std::nullopt;
}

// What a control group still allows. Its usage counts cached files, of which the inactive ones are given up on demand.
std::optional<int64_t> group_allows(const std::string& limit, const std::string& usage, const std::string& stat,
                                    const char* inactive) {
  const auto most = number_in(limit, ""), used = number_in(usage, "");
  if (!most.has_value() || !used.has_value()) return std::nullopt;
  return std::max<int64_t>(0, *most - *used + number_in(stat, inactive).value_or(0));
}

void take_less(std::optional<int64_t>* value, const std::optional<int64_t>& other) {
  if (other.has_value() && (!value->has_value() || *other < **value)) *value = other;
}

std::optional<int64_t> available_on_cpu() {
  std::optional<int64_t> available;
  if (const auto kilobytes = number_in("/proc/meminfo", "MemAvailable:")) available = *kilobytes * 1024;
  std::ifstream groups("/proc/self/cgroup");
  std::string line;
  while (std::getline(groups, line)) {  // "0::/path" (version 2) or "4:memory:/path" (version 1)
    const bool second = line.rfind("0::", 0) == 0;
    if (!second && line.find(":memory:") == std::string::npos) continue;
    std::string path = line.substr(line.rfind(':') + 1);
    for (;;) {  // the limits of all enclosing groups hold
      const std::string folder = (second ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory") + path + "/memory.";
      take_less(&available, second ? group_allows(folder + "max", folder + "current", folder + "stat", "inactive_file")
                                   : group_allows(folder + "limit_in_bytes", folder + "usage_in_bytes", folder + "stat",
                                                  "total_inactive_file"));
      if (path.empty()) break;
      path = path == "/" ? "" : path.substr(0, path.rfind('/'));
    }
  }
  return available;
}

}  // namespace

std::optional<int64_t> available_memory(const c10::Device& device) {
  if (device.is_cpu()) return available_on_cpu();
  if (!device.is_cuda()) return std::nullopt;
  auto* allocator = dynamic_cast<c10::DeviceAllocator*>(c10::GetAllocator(device.type()));
  if (allocator == nullptr || !allocator->initialized()) return std::nullopt;
  const auto total = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  const auto index =
      device.has_index() ? device.index() : c10::impl::VirtualGuardImpl(device.type()).getDevice().index();
  const auto stats = allocator->getDeviceStats(index);
  const int64_t unused = stats.reserved_bytes[total].current - stats.allocated_bytes[total].current;
  return static_cast<int64_t>(allocator->getMemoryInfo(index).first) + unused;
}

}  // namespace torch_ext::curvature

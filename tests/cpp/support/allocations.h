// What the CPU allocator hands out while one of these exists.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>

namespace torch_ext::test {

class Allocations : c10::Allocator {
 public:
  Allocations() : real_(c10::GetCPUAllocator()) { c10::SetCPUAllocator(this, /*priority=*/100); }
  Allocations(const Allocations&) = delete;
  Allocations& operator=(const Allocations&) = delete;
  ~Allocations() override { c10::SetCPUAllocator(real_, /*priority=*/100); }

  int64_t peak() const { return counts_->peak; }        // most bytes at a time
  int64_t largest() const { return counts_->largest; }  // bytes of the largest allocation

 private:
  struct Counts {
    std::atomic<int64_t> held{0}, peak{0}, largest{0};
  };
  struct Block {  // outlives this object, as tensors may
    c10::DataPtr data;
    int64_t bytes;
    std::shared_ptr<Counts> counts;
  };

  static void release(void* block) {
    const std::unique_ptr<Block> owned(static_cast<Block*>(block));
    owned->counts->held -= owned->bytes;
  }
  static void raise(std::atomic<int64_t>& to, int64_t value) {
    int64_t seen = to;
    while (seen < value && !to.compare_exchange_weak(seen, value)) {
    }
  }

  c10::DataPtr allocate(size_t bytes) override {
    auto block = std::make_unique<Block>(Block{real_->allocate(bytes), static_cast<int64_t>(bytes), counts_});
    raise(counts_->peak, counts_->held += block->bytes);
    raise(counts_->largest, block->bytes);
    void* const data = block->data.get();
    return {data, block.release(), &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  c10::Allocator* real_;
  std::shared_ptr<Counts> counts_ = std::make_shared<Counts>();
};

}  // namespace torch_ext::test

// Arithmetic of online assignment: what a server's load is worth, and the chance of an attempt. Host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"
#include "core/math.h"
#include "core/philox.h"

namespace torch_ext::kernels {

enum class BalanceRule : int32_t { kDiscount, kBalance, kLoad, kGreedy };
enum class BalanceDiscount : int32_t { kExp, kSurvival, kTable };

constexpr double kLeastRoom = 0x1p-20;  // 1 - g stays positive: at 0 all keys would tie and only the order decide

// 1 - g(x) for the load x of a server (expected successes over capacity); positive, not increasing.
struct BalanceRoom {
  BalanceDiscount kind;
  const double* table;  // kTable: pairs x, g(x), x increasing; linear between, constant outside
  int64_t points;

  TX_HD double operator()(double x) const {
    if (kind == BalanceDiscount::kSurvival) return core::exponential(-x, -700.0);
    const double room =
        kind == BalanceDiscount::kExp ? 1 - core::exponential(x < 1 ? x - 1 : 0.0, -700.0) : 1 - interpolated(x);
    return room > kLeastRoom ? room : kLeastRoom;
  }

 private:
  TX_HD double interpolated(double x) const {
    if (x <= table[0]) return table[1];
    int64_t i = 1;
    while (i < points && table[2 * i] < x) ++i;
    if (i == points) return table[2 * points - 1];
    const double* a = table + 2 * (i - 1);
    return a[1] + (a[3] - a[1]) * ((x - a[0]) / (a[2] - a[0]));
  }
};

// A number in [0, 1) for attempt `slot` of one arrival: 53 bits that depend on nothing but the seed, the instance, the
// replicate and the place, so that rules can be compared on common chances.
TX_HD double balance_chance(const core::PhiloxStream& arrival, int64_t slot) {
  const core::Philox4 block = arrival.block(static_cast<uint32_t>(slot / 2));
  const uint64_t high = slot % 2 == 0 ? block.x : block.z, low = slot % 2 == 0 ? block.y : block.w;
  return static_cast<double>((high << 21) | (low >> 11)) * 0x1p-53;
}

// What a rule compares: of two servers the one with the larger key takes the arrival, of equal ones the lower number
// (kLoad: first the one with the larger probability).
TX_HD double balance_key(BalanceRule rule, double weight, double probability, double room, double load,
                         int64_t attempts, int64_t capacity) {
  if (rule == BalanceRule::kDiscount) return weight * probability * room;
  if (rule == BalanceRule::kGreedy) return weight * probability;
  if (rule == BalanceRule::kLoad) return -load;
  return -static_cast<double>(attempts) / static_cast<double>(capacity);
}

}  // namespace torch_ext::kernels

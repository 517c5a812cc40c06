// The torch-free core: storage conversions, Philox, power(), the shape of block sums, the work split of both drivers,
// and the list kernels.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "core/block_reduce.h"
#include "core/dtype.h"
#include "core/dtype_dispatch.h"
#include "core/list_kernel.h"
#include "core/math.h"
#include "core/multi_tensor.h"
#include "core/multi_tensor_cpu.h"
#include "core/philox.h"
#include "ops/rademacher/rademacher_kernel.h"
#include "support/check.h"

namespace torch_ext::core {
namespace {

using test::ThreadCount;

constexpr double kInf = std::numeric_limits<double>::infinity();

// --- dtype.h --------------------------------------------------------------------------------------------------------

bool same_float(float a, float b) { return float_bits(a) == float_bits(b) || (std::isnan(a) && std::isnan(b)); }

TEST(DType, LoadsAllHalfAndBFloat16ValuesAsC10Does) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto narrow = static_cast<uint16_t>(bits);
    ASSERT_PRED2(same_float, load(Half{narrow}), static_cast<float>(c10::Half(narrow, c10::Half::from_bits())))
        << "half " << bits;
    ASSERT_PRED2(same_float, load(BFloat16{narrow}),
                 static_cast<float>(c10::BFloat16(narrow, c10::BFloat16::from_bits())))
        << "bfloat16 " << bits;
  }
}

void check_store(float x) {
  Half half;
  BFloat16 bfloat16;
  store(half, x);
  store(bfloat16, x);
  if (std::isnan(x)) {
    ASSERT_TRUE(std::isnan(load(half)) && std::isnan(load(bfloat16))) << std::hex << float_bits(x);
    ASSERT_EQ(bfloat16.bits, c10::BFloat16(x).x);
    return;
  }
  ASSERT_EQ(half.bits, c10::Half(x).x) << std::hexfloat << x;
  ASSERT_EQ(bfloat16.bits, c10::BFloat16(x).x) << std::hexfloat << x;
}

TEST(DType, StoresAsC10Does) {
  // Every upper half of a float with the lower halves around all rounding ties of both types.
  for (uint32_t high = 0; high < 65536; ++high) {
    for (const uint32_t low : {0x0000u, 0x0001u, 0x0fffu, 0x1000u, 0x1001u, 0x2000u, 0x2fffu, 0x3000u, 0x3001u, 0x7fffu,
                               0x8000u, 0x8001u, 0xf000u, 0xffffu}) {
      ASSERT_NO_FATAL_FAILURE(check_store(bits_float(high << 16 | low)));
    }
  }
  std::mt19937 random(0);
  for (int i = 0; i < 1000000; ++i) ASSERT_NO_FATAL_FAILURE(check_store(bits_float(random())));
}

TEST(DType, StoreInvertsLoad) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto narrow = static_cast<uint16_t>(bits);
    Half half;
    BFloat16 bfloat16;
    store(half, load(Half{narrow}));
    store(bfloat16, load(BFloat16{narrow}));
    ASSERT_TRUE(half.bits == narrow || std::isnan(load(Half{narrow}))) << bits;
    ASSERT_TRUE(bfloat16.bits == narrow || std::isnan(load(BFloat16{narrow}))) << bits;
  }
}

TEST(DType, DispatchNamesTheStorageType) {
  const auto size = [](DType type) { return dispatch_dtype(type, [](auto storage) { return sizeof(storage); }); };
  EXPECT_EQ(size(DType::kFloat), 4u);
  EXPECT_EQ(size(DType::kDouble), 8u);
  EXPECT_EQ(size(DType::kBFloat16), 2u);
  EXPECT_EQ(size(DType::kHalf), 2u);
  EXPECT_TRUE((std::is_same_v<opmath_t<Half>, float> && std::is_same_v<opmath_t<double>, double>));
}

// --- philox.h -------------------------------------------------------------------------------------------------------

void check_philox(Philox4 counter, uint32_t key0, uint32_t key1, Philox4 expected) {
  const Philox4 got = philox4x32(counter, key0, key1);
  EXPECT_EQ(got.x, expected.x);
  EXPECT_EQ(got.y, expected.y);
  EXPECT_EQ(got.z, expected.z);
  EXPECT_EQ(got.w, expected.w);
}

TEST(Philox, KnownAnswersOfRandom123) {  // kat_vectors, philox4x32 with 10 rounds
  check_philox({0, 0, 0, 0}, 0, 0, {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u});
  constexpr uint32_t kOnes = 0xffffffffu;
  check_philox({kOnes, kOnes, kOnes, kOnes}, kOnes, kOnes, {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu});
  check_philox({0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}, 0xa4093822u, 0x299f31d0u,
               {0xd16cfe09u, 0x94fdcceb, 0x5001e420u, 0x24126ea1u});
}

TEST(Philox, StreamsLieInTheDocumentedWords) {
  const PhiloxStream stream = philox_stream(-2, 5, 3, PhiloxTag::kProbe, 9);
  EXPECT_EQ(stream.key0, 0xfffffffeu);
  EXPECT_EQ(stream.key1, 0xffffffffu);
  const Philox4 got = stream.block(77), expected = philox4x32({77, 5, 3u << 8 | 3u, 9}, 0xfffffffeu, 0xffffffffu);
  EXPECT_EQ(got.x, expected.x);
  EXPECT_EQ(got.w, expected.w);
}

// --- math.h ---------------------------------------------------------------------------------------------------------

TEST(Power, AgreesWithStdPow) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> exponent(-307, 307), fraction(0, 1);
  double worst = 0;
  for (int i = 0; i < 200000; ++i) {
    const double x = std::pow(10.0, exponent(random));
    for (const double y : {fraction(random) / 2, 0.35, 1.0, -0.5, 1.9 * fraction(random) - 0.9}) {
      const double expected = std::pow(x, y);
      if (expected < 1e-300 || expected > 1e300) continue;
      worst = std::max(worst, std::abs(power(x, y) - expected) / expected);
    }
  }
  EXPECT_LT(worst, 1e-14);
}

TEST(Power, SpecialValues) {
  EXPECT_EQ(power(0, 0.35), 0);
  EXPECT_EQ(power(0, 0), 1);
  EXPECT_EQ(power(0, -0.5), kInf);
  EXPECT_EQ(power(1, 0.35), 1);
  EXPECT_EQ(power(kInf, 0.35), kInf);
  EXPECT_EQ(power(kInf, -0.35), 0);
  EXPECT_EQ(power(kInf, 0), 1);
  EXPECT_TRUE(std::isnan(power(std::nan(""), 0.35)));
  for (const double x : {5e-324, 1e-310, 2.2250738585072014e-308, 1.7976931348623157e308}) {
    EXPECT_NEAR(power(x, 0.35) / std::pow(x, 0.35), 1, 1e-14) << x;
  }
  EXPECT_EQ(power(1e300, 2), kInf);
  EXPECT_EQ(power(1e-300, 2), 0);
}

// --- block_reduce.h -------------------------------------------------------------------------------------------------

// The documented shape, restated: segments of 1024, in each 32 lanes with stride 32, then a tree of halves.
double tree(std::vector<double> lanes) {
  if (lanes.size() == 1) return lanes[0];
  std::vector<double> folded;
  for (size_t i = 0; i < lanes.size() / 2; ++i) folded.push_back(lanes[i] + lanes[i + lanes.size() / 2]);
  return tree(folded);
}

double naive_block_sum(const std::vector<double>& x) {
  double total = 0;
  if (x.size() < 32) {
    for (const double value : x) total += value;
    return total;
  }
  for (size_t begin = 0; begin < x.size(); begin += 1024) {
    std::vector<double> lanes(32, 0.0);
    for (size_t i = begin; i < std::min(x.size(), begin + 1024); ++i) lanes[(i - begin) % 32] += x[i];
    total += tree(lanes);
  }
  return total;
}

TEST(BlockReduce, HasTheDocumentedShape) {
  std::mt19937_64 random(2);
  std::normal_distribution<double> normal;
  std::vector<size_t> sizes{1000, 1023, 1024, 1025, 1056, 2048, 4099, 65536, 70000};
  for (size_t size = 0; size < 68; ++size) sizes.push_back(size);
  for (const size_t size : sizes) {
    std::vector<double> x(size);
    for (double& value : x) value = normal(random) * std::exp(3 * normal(random));
    EXPECT_EQ(sum_block(static_cast<int64_t>(size), [&](int64_t i) { return x[static_cast<size_t>(i)]; }),
              naive_block_sum(x))
        << size;
  }
}

// --- multi_tensor.h: the work split of both drivers -----------------------------------------------------------------

struct Item {
  int64_t numel, block;
  size_t index;
};
using Table = ChunkTable<Item, 128, 1024>;  // the limits of the CUDA driver

// What run_chunks<<<>>> computes from a table, on the host: every thread block's range [begin, end). The ranges of each
// tensor must follow one another from 0 to its end, cut at whole blocks.
void check_tables(const std::vector<Item>& items) {
  std::vector<Split> splits;
  int64_t chunks = 0;
  for (const Item& item : items) {
    splits.push_back(Split::of(item.numel, item.block));
    chunks += splits.back().chunks;
  }
  std::vector<int64_t> covered(items.size(), 0);
  int64_t thread_blocks = 0, failures = 0;
  for_each_table<Table>(items, splits, [&](const Table& table) {
    ASSERT_GT(table.blocks, 0);
    ASSERT_LE(table.blocks, 1024);
    thread_blocks += table.blocks;
    for (int32_t b = 0; b < table.blocks; ++b) {
      ASSERT_LT(table.owner[b], 128);
      const Item& item = table.tensor[table.owner[b]];
      const int64_t chunk =
          item.block >= kChunk ? item.block : kChunk / item.block * item.block;  // as device code has it
      const int64_t begin = static_cast<int64_t>(table.chunk[b]) * chunk;
      const int64_t end = begin + chunk < item.numel ? begin + chunk : item.numel;
      const bool good =
          begin == covered[item.index] && begin < end && begin % item.block == 0 && chunk == splits[item.index].chunk;
      failures += good ? 0 : 1;
      covered[item.index] = end;
    }
  });
  EXPECT_EQ(failures, 0);
  EXPECT_EQ(thread_blocks, chunks);
  for (const Item& item : items) ASSERT_EQ(covered[item.index], item.numel) << "tensor " << item.index;
}

std::vector<Item> with_indices(std::vector<Item> items) {
  for (size_t i = 0; i < items.size(); ++i) items[i].index = i;
  return items;
}

TEST(ChunkTableTest, CoversTailsOnce) {
  std::vector<Item> items;
  for (int64_t tail = 0; tail < 68; ++tail) {
    for (const int64_t whole : {int64_t{0}, kChunk, 3 * kChunk}) items.push_back({whole + tail, 1, 0});
  }
  check_tables(with_indices(items));
}

TEST(ChunkTableTest, CoversManySmallTensors) {
  for (const size_t count : {1u, 127u, 128u, 129u, 256u, 257u, 1000u, 5000u}) {
    std::vector<Item> items;
    for (size_t i = 0; i < count; ++i) items.push_back({static_cast<int64_t>(i % 70), 1, 0});  // some are empty
    check_tables(with_indices(items));
  }
}

TEST(ChunkTableTest, CoversMoreChunksThanATableHolds) {
  for (const int64_t chunks : {1023, 1024, 1025, 2048, 3000}) {
    check_tables(with_indices({{5, 1, 0}, {chunks * kChunk, 1, 0}, {chunks * kChunk - 1, 1, 0}, {7, 1, 0}}));
  }
  std::vector<Item> items(300, Item{10 * kChunk + 1, 1, 0});  // both limits at once
  check_tables(with_indices(items));
}

TEST(ChunkTableTest, CountsBeyond32Bits) {
  constexpr int64_t kBig = int64_t{1} << 31;
  check_tables(with_indices({{kBig - 1, 1, 0}, {kBig, 1, 0}, {kBig + 1, 1, 0}, {4 * kBig + 13, 1, 0}}));
  check_tables(with_indices({{9 * (kBig / 3), 9, 0}, {70000 * int64_t{200000}, 70000, 0}, {int64_t{1} << 38, 1, 0}}));
}

TEST(ChunkTableTest, CutsAtWholeBlocks) {
  for (const int64_t block : {2, 9, 32, 64, 1000, 65535, 65536, 65537, 70000}) {
    std::vector<Item> items;
    for (const int64_t blocks : {0, 1, 2, 3, 7, 100}) items.push_back({blocks * block, block, 0});
    check_tables(with_indices(items));
  }
}

TEST(ChunkTableTest, NoTensorsNoLaunch) {
  int launches = 0;
  for_each_table<Table>(std::vector<Item>{}, {}, [&](const Table&) { ++launches; });
  for_each_table<Table>(std::vector<Item>{{0, 1, 0}}, {Split::of(0, 1)}, [&](const Table&) { ++launches; });
  EXPECT_EQ(launches, 0);
}

TEST(CpuDriver, VisitsEveryElementOnce) {
  std::vector<std::vector<int64_t>> lists{{}, {0}, {0, 1, 0}, {3 * kChunk + 5}, {kChunk, kChunk - 1, kChunk + 1}};
  lists.emplace_back();
  for (int64_t i = 0; i < 400; ++i) lists.back().push_back(i % 68);
  for (const int threads : {1, 2}) {
    const ThreadCount guard(threads);
    for (const auto& numels : lists) {
      for (const int64_t block : {1, 9}) {
        std::vector<Split> splits;
        std::vector<int64_t> sizes;
        for (const int64_t numel : numels) {
          sizes.push_back(numel / block * block);
          splits.push_back(Split::of(sizes.back(), block));
        }
        std::vector<std::vector<std::atomic<int>>> visits;
        for (const int64_t size : sizes) visits.emplace_back(static_cast<size_t>(size));
        std::atomic<int> misaligned{0};
        for_each_chunk(splits, sizes, [&](size_t tensor, int64_t begin, int64_t end) {
          if (begin % block != 0 || end % block != 0 || begin >= end) ++misaligned;
          for (int64_t i = begin; i < end; ++i) ++visits[tensor][static_cast<size_t>(i)];
        });
        EXPECT_EQ(misaligned, 0);
        for (const auto& tensor : visits) {
          EXPECT_TRUE(std::all_of(tensor.begin(), tensor.end(), [](const auto& n) { return n == 1; }));
        }
      }
    }
  }
}

// --- list_kernel.h --------------------------------------------------------------------------------------------------

template <typename S>
S stored(double x) {
  S result;
  store(result, static_cast<opmath_t<S>>(x));
  return result;
}

template <typename S>
constexpr DType dtype_of_storage() {
  if (std::is_same_v<S, double>) return DType::kDouble;
  if (std::is_same_v<S, BFloat16>) return DType::kBFloat16;
  return std::is_same_v<S, Half> ? DType::kHalf : DType::kFloat;
}

template <typename S>
class ListKernel : public ::testing::Test {};
using StorageTypes = ::testing::Types<float, double, BFloat16, Half>;
TYPED_TEST_SUITE(ListKernel, StorageTypes);

TYPED_TEST(ListKernel, FindsEveryNonfinite) {
  using S = TypeParam;
  std::vector<S> buffer(5000, stored<S>(1));
  for (int64_t offset = 0; offset < 4; ++offset) {
    for (int64_t size = 0; size < 68; ++size) {
      EXPECT_FALSE(kernels::has_nonfinite_cpu(buffer.data() + offset, dtype_of_storage<S>(), 0, size));
      for (const double bad : {kInf, -kInf, std::nan("")}) {
        for (int64_t at = 0; at < size; ++at) {
          S& element = buffer[static_cast<size_t>(offset + at)];
          element = stored<S>(bad);
          ASSERT_TRUE(kernels::has_nonfinite_cpu(buffer.data() + offset, dtype_of_storage<S>(), 0, size));
          ASSERT_FALSE(kernels::has_nonfinite_cpu(buffer.data() + offset, dtype_of_storage<S>(), at + 1, size));
          element = stored<S>(1);
        }
      }
    }
  }
  buffer[4999] = stored<S>(kInf);
  EXPECT_TRUE(kernels::has_nonfinite_cpu(buffer.data(), dtype_of_storage<S>(), 0, 5000));
  EXPECT_FALSE(kernels::has_nonfinite_cpu(buffer.data(), dtype_of_storage<S>(), 0, 4999));
  // The largest finite value and the smallest denormal are finite.
  const double most = std::is_same_v<S, Half> ? 65504.0 : std::is_same_v<S, double> ? 1.7976931348623157e308 : 3.3e38;
  buffer[7] = stored<S>(most);
  buffer[8] = stored<S>(std::is_same_v<S, Half> ? 6e-8 : std::is_same_v<S, double> ? 5e-324 : 1e-40);
  EXPECT_FALSE(kernels::has_nonfinite_cpu(buffer.data(), dtype_of_storage<S>(), 0, 4999));
}

TYPED_TEST(ListKernel, AccumulatesElementByElement) {
  using S = TypeParam;
  using T = opmath_t<S>;
  std::mt19937 random(3);
  std::normal_distribution<double> normal;
  for (size_t offset = 0; offset < 4; ++offset) {
    for (size_t size = 0; size < 68; ++size) {
      std::vector<T> sum(size + 4), expected;
      std::vector<S> x(size + 4), sign(size + 4);
      for (size_t i = 0; i < size + 4; ++i) {
        sum[i] = static_cast<T>(normal(random));
        x[i] = stored<S>(normal(random));
        sign[i] = stored<S>(random() % 2 == 0 ? 1 : -1);
      }
      for (const bool with_sign : {false, true}) {
        expected = sum;
        for (size_t i = offset; i < offset + size; ++i) {
          expected[i] += static_cast<T>(0.3) * ((with_sign ? load(sign[i]) : T(1)) * load(x[i]));
        }
        const kernels::AccumulateTensor tensor{sum.data() + offset, x.data() + offset,
                                               with_sign ? sign.data() + offset : nullptr, static_cast<int64_t>(size)};
        kernels::accumulate_cpu(tensor, dtype_of_storage<S>(), 0.3, 0, static_cast<int64_t>(size));
        ASSERT_EQ(sum, expected) << size;
      }
    }
  }
}

TYPED_TEST(ListKernel, RademacherDependsOnTheElementAlone) {
  using S = TypeParam;
  const PhiloxStream stream = philox_stream(12345678901, 2, 7, PhiloxTag::kProbe, 4);
  constexpr int64_t kSize = 128 * 64 * 2 + 200;
  std::vector<S> whole(kSize);
  kernels::rademacher_cpu({whole.data(), kSize, stream}, dtype_of_storage<S>(), 0, kSize);
  for (int64_t e = 0; e < kSize; ++e) {
    const Philox4 block = stream.block(static_cast<uint32_t>(e / 128));
    const uint32_t word = std::vector<uint32_t>{block.x, block.y, block.z, block.w}[static_cast<size_t>(e % 128 / 32)];
    ASSERT_EQ(load(whole[static_cast<size_t>(e)]), (word >> (e % 32) & 1u) != 0 ? 1 : -1) << e;
  }
  std::mt19937_64 random(4);
  for (int trial = 0; trial < 300; ++trial) {
    const auto begin = static_cast<int64_t>(random() % kSize);
    const int64_t end = begin + static_cast<int64_t>(random() % static_cast<uint64_t>(kSize - begin + 1));
    std::vector<S> part(kSize, stored<S>(5));
    kernels::rademacher_cpu({part.data(), kSize, stream}, dtype_of_storage<S>(), begin, end);
    for (int64_t e = 0; e < kSize; ++e) {
      const auto i = static_cast<size_t>(e);
      ASSERT_EQ(load(part[i]), e >= begin && e < end ? load(whole[i]) : 5) << e << " of " << begin << ", " << end;
    }
  }
}

}  // namespace
}  // namespace torch_ext::core

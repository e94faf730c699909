// Element-wise sums of every dtype, on bytes that need not be aligned.
#include <bit>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "execute/execute.hpp"

namespace execute {
namespace {

struct Bfloat16 {
  uint16_t bits;
  float value() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
  static Bfloat16 of(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return {0x7FC0};
    return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
  }
};

struct Float16 {
  uint16_t bits;
  float value() const {
    const uint32_t sign = uint32_t{bits & 0x8000u} << 16, rest = uint32_t{bits & 0x7FFFu} << 13;
    if (rest >= 0x7C00u << 13) return std::bit_cast<float>(sign | 0x7F800000 | rest);
    // the exponent's other bias; a subnormal becomes a normal float by the multiplication
    const float scaled = std::bit_cast<float>(rest) * 0x1p112f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
  }
  static Float16 of(float value) {
    const uint32_t all = std::bit_cast<uint32_t>(value), sign = all >> 16 & 0x8000, bits = all & 0x7FFFFFFF;
    if (bits > 0x7F800000) return {0x7E00};
    if (bits >= 0x47800000) return {static_cast<uint16_t>(sign | 0x7C00)};
    uint32_t half;
    if (bits < 0x38800000) {  // below 2^-14: the addition rounds to multiples of 2^-24
      const float shifted = std::bit_cast<float>(bits) + 0.5f;
      half = std::bit_cast<uint32_t>(shifted) - 0x3F000000;
    } else {
      half = (bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13;
    }
    return {static_cast<uint16_t>(sign | half)};
  }
};

template <class T>
T sum(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    using Unsigned = std::make_unsigned_t<T>;  // wraps, as PyTorch's integers do
    return static_cast<T>(static_cast<Unsigned>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b)));
  } else if constexpr (std::is_floating_point_v<T>) {
    return a + b;
  } else {
    return T::of(a.value() + b.value());
  }
}

template <class T>
void add_as(uint8_t* to, const uint8_t* from, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    T a, b;
    std::memcpy(&a, to + i * sizeof(T), sizeof(T));
    std::memcpy(&b, from + i * sizeof(T), sizeof(T));
    a = sum(a, b);
    std::memcpy(to + i * sizeof(T), &a, sizeof(T));
  }
}

struct Row {
  size_t bytes;
  void (*add)(uint8_t*, const uint8_t*, size_t);
};

const Row& row(Dtype dtype) {
  static constexpr Row rows[] = {
      {4, add_as<float>},   {8, add_as<double>},  {2, add_as<Float16>}, {2, add_as<Bfloat16>}, {1, add_as<int8_t>},
      {1, add_as<uint8_t>}, {2, add_as<int16_t>}, {4, add_as<int32_t>}, {8, add_as<int64_t>}};
  const auto at = static_cast<size_t>(dtype);
  if (at >= std::size(rows)) throw std::invalid_argument("unknown dtype");
  return rows[at];
}

}  // namespace

size_t bytes_of(Dtype dtype) { return row(dtype).bytes; }
void add(uint8_t* to, const uint8_t* from, size_t count, Dtype dtype) { row(dtype).add(to, from, count); }

}  // namespace execute

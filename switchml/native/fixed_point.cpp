#include "fixed_point.hpp"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "packet.hpp"

// One binary runs everywhere and takes the widest vectors of the machine that it runs on.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define WIDEST
#endif

namespace switchml {
namespace {

constexpr int kCoarse = 4;  // binary orders between two units of the int32 wire

struct Scale {
  float first, second;  // 2^power itself may be outside float: two factors, of which the first is exact
};

Scale scale(int power) {
  int half = power >> 1;
  return {std::ldexp(1.0f, half), std::ldexp(1.0f, power - half)};
}

template <class T>
T swapped(T value) {
  if constexpr (sizeof(T) == 4) return static_cast<T>(__builtin_bswap32(static_cast<uint32_t>(value)));
  if constexpr (sizeof(T) == 2) return static_cast<T>(__builtin_bswap16(static_cast<uint16_t>(value)));
  return value;
}

template <class T>
T load(const uint8_t* from, size_t i) {
  T value;
  std::memcpy(&value, from + i * sizeof(T), sizeof(T));
  return swapped(value);
}

template <class T>
void store(uint8_t* to, size_t i, T value) {
  value = swapped(value);
  std::memcpy(to + i * sizeof(T), &value, sizeof(T));
}

WIDEST uint32_t largest_bits(const float* values, size_t count) {
  uint32_t largest = 0;
  for (size_t i = 0; i < count; ++i) {
    uint32_t bits = std::bit_cast<uint32_t>(values[i]) & 0x7FFFFFFF;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

WIDEST void quantise32(const float* values, size_t count, Scale by, uint8_t* out) {
  for (size_t i = 0; i < count; ++i)
    store<int32_t>(out, i, static_cast<int32_t>(__builtin_rintf(values[i] * by.first * by.second)));
}

WIDEST void quantise16(const float* values, size_t count, Scale by, uint8_t* out) {
  for (size_t i = 0; i < count; ++i) {
    float rounded = __builtin_rintf(values[i] * by.first * by.second);
    rounded = rounded > 32767.0f ? 32767.0f : rounded < -32767.0f ? -32767.0f : rounded;
    store<int16_t>(out, i, static_cast<int16_t>(static_cast<int32_t>(rounded)));
  }
}

WIDEST void quantise8(const float* values, size_t count, Scale by, uint8_t* out) {
  for (size_t i = 0; i < count; ++i) {
    float rounded = __builtin_rintf(values[i] * by.first * by.second);
    rounded = rounded > 127.0f ? 127.0f : rounded < -127.0f ? -127.0f : rounded;
    store<int8_t>(out, i, static_cast<int8_t>(static_cast<int32_t>(rounded)));
  }
}

// unsigned addition: it wraps, in whatever order the packets come
#define SWITCHML_SUMS(BITS)                                                                                  \
  WIDEST void write##BITS(int32_t* sums, const uint8_t* from, size_t count) {                         \
    for (size_t i = 0; i < count; ++i) sums[i] = load<int##BITS##_t>(from, i);                               \
  }                                                                                                          \
  WIDEST void add##BITS(int32_t* sums, const uint8_t* from, size_t count) {                           \
    for (size_t i = 0; i < count; ++i)                                                                       \
      sums[i] = static_cast<int32_t>(static_cast<uint32_t>(sums[i]) +                                        \
                                     static_cast<uint32_t>(int32_t{load<int##BITS##_t>(from, i)}));          \
  }
SWITCHML_SUMS(32)
SWITCHML_SUMS(16)
SWITCHML_SUMS(8)
#undef SWITCHML_SUMS

WIDEST void store32s(const int32_t* sums, size_t count, uint8_t* out) {
  for (size_t i = 0; i < count; ++i) store<int32_t>(out, i, sums[i]);
}

WIDEST void store16s(const int32_t* sums, size_t count, uint8_t* out) {
  for (size_t i = 0; i < count; ++i) store<int16_t>(out, i, static_cast<int16_t>(sums[i]));
}

WIDEST void average32(const uint8_t* sums, size_t count, Scale by, float world, float* out) {
  for (size_t i = 0; i < count; ++i) out[i] = static_cast<float>(load<int32_t>(sums, i)) / world * by.first * by.second;
}

WIDEST void average16(const uint8_t* sums, size_t count, Scale by, float world, float* out) {
  for (size_t i = 0; i < count; ++i) out[i] = static_cast<float>(load<int16_t>(sums, i)) / world * by.first * by.second;
}

#define SWITCHML_ERROR(BITS)                                                                                      \
  WIDEST void error##BITS(const float* values, const uint8_t* integers, size_t count, Scale by, float* out) {     \
    for (size_t i = 0; i < count; ++i)                                                                            \
      out[i] = values[i] - static_cast<float>(load<int##BITS##_t>(integers, i)) * by.first * by.second;           \
  }
SWITCHML_ERROR(32)
SWITCHML_ERROR(16)
SWITCHML_ERROR(8)
#undef SWITCHML_ERROR

}  // namespace

uint8_t block_exponent(const float* values, size_t count) {
  uint32_t largest = largest_bits(values, count), exponent = largest >> 23;
  return static_cast<uint8_t>(exponent == 0 && largest > 0 ? 1 : exponent);
}

int unit_exponent(int exponent, uint32_t world, int bytes) {
  int headroom = bytes == 4 ? std::bit_width(world - 1) : 0;
  if (bytes == 4) exponent = (exponent + kCoarse - 1) / kCoarse * kCoarse;
  return exponent - 126 - (8 * bytes - 1 - headroom);
}

void quantise(const float* values, size_t count, int exponent, uint32_t world, int bytes, uint8_t* out) {
  if (exponent == kNonFinite) {
    std::memset(out, 0, count * bytes);
    return;
  }
  Scale by = scale(-unit_exponent(exponent, world, bytes));
  (bytes == 4 ? quantise32 : bytes == 2 ? quantise16 : quantise8)(values, count, by, out);
}

void accumulate(int32_t* sums, const uint8_t* integers, size_t count, int bytes, bool fresh) {
  if (bytes == 4) (fresh ? write32 : add32)(sums, integers, count);
  if (bytes == 2) (fresh ? write16 : add16)(sums, integers, count);
  if (bytes == 1) (fresh ? write8 : add8)(sums, integers, count);
}

void store_sums(const int32_t* sums, size_t count, int bytes, uint8_t* out) {
  (bytes == 4 ? store32s : store16s)(sums, count, out);
}

void dequantise(const uint8_t* sums, size_t count, int exponent, uint32_t world, int up, int down, float* out) {
  if (exponent == kNonFinite) {
    for (size_t i = 0; i < count; ++i) out[i] = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  Scale by = scale(unit_exponent(exponent, world, up));
  (down == 4 ? average32 : average16)(sums, count, by, static_cast<float>(world), out);
}

void rounding_error(const float* values, const uint8_t* integers, size_t count, int exponent, uint32_t world, int bytes,
                    float* out) {
  if (exponent == kNonFinite) {
    std::memset(out, 0, count * sizeof(float));
    return;
  }
  (bytes == 4 ? error32 : bytes == 2 ? error16 : error8)(values, integers, count, scale(unit_exponent(exponent, world, bytes)), out);
}

}  // namespace switchml

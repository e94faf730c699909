// Block floating point: the loops of _fixed_point.py, on packets' bytes. `bytes` is the width of an integer on the wire.
#pragma once

#include <cstddef>
#include <cstdint>

namespace switchml {

// Exponent byte of a chunk: 0 for zeros, 255 with inf or NaN.
uint8_t block_exponent(const float* values, size_t count);

// log2 of one integer step.
int unit_exponent(int exponent, uint32_t world, int bytes);

// Rounds to big-endian integers; zeros where `exponent` is 255.
void quantise(const float* values, size_t count, int exponent, uint32_t world, int bytes, uint8_t* out);

// Adds big-endian integers to `sums`, wrapping; `fresh` writes instead.
void accumulate(int32_t* sums, const uint8_t* integers, size_t count, int bytes, bool fresh);

// Writes sums as big-endian integers.
void store_sums(const int32_t* sums, size_t count, int bytes, uint8_t* out);

// Averages that big-endian sums stand for; `up` is the width in which they were sent. NaN where `exponent` is 255.
void dequantise(const uint8_t* sums, size_t count, int exponent, uint32_t world, int up, int down, float* out);

// What rounding took: values less what their big-endian integers stand for; zeros where `exponent` is 255.
void rounding_error(const float* values, const uint8_t* integers, size_t count, int exponent, uint32_t world, int bytes,
                    float* out);

}  // namespace switchml

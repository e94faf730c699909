#pragma once

#include <cstdint>

// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  int below(int bound) { return static_cast<int>((static_cast<unsigned __int128>(next()) * bound) >> 64); }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }
};

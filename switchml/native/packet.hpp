// The packet table of _packet.py; tests hold both to one file of vectors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace switchml {

constexpr uint8_t kMagic = 0xB1, kFromSwitch = 0xFF, kNonFinite = 0xFF;
constexpr size_t kHeaderBytes = 20, kTagBytes = 16, kBitmapBytes = 8, kMaxWorkers = 64;
constexpr uint16_t kVersionBit = 0x8000;
constexpr uint8_t kChannelMask = 0x3F;
constexpr int kBucketShift = 6;  // in profile full the bits above the channel are the bucket's number % 4

enum Kind : uint8_t { kData = 1, kResult = 2, kProgress = 3, kQuery = 4, kControl = 16 };

struct Header {
  uint8_t kind = 0;
  uint16_t session = 0;
  uint32_t epoch = 0, chunk = 0;
  uint16_t slot = 0;
  uint8_t worker = 0, exponent = 0;
  uint16_t elements = 0;
  uint8_t wire = 0, lane = 0;
};

// What a join has agreed: Membership in _membership.py.
struct Member {
  uint16_t session = 0;
  uint32_t epoch = 0, world = 0, worker = 0, slots = 0, elements = 0;
  int up = 4, down = 4;  // bytes of an integer each way
  bool core = false;
  uint8_t channel = 0;
  std::string key;

  size_t largest_packet() const { return kHeaderBytes + size_t{elements} * down + kBitmapBytes + kTagBytes; }
};

inline uint16_t slot_field(uint32_t chunk, uint32_t slots) {
  return static_cast<uint16_t>(chunk % slots | (chunk / slots & 1 ? kVersionBit : 0));
}

inline uint16_t load16(const uint8_t* p) { return static_cast<uint16_t>(p[0] << 8 | p[1]); }
inline uint32_t load32(const uint8_t* p) { return uint32_t{load16(p)} << 16 | load16(p + 2); }
inline uint64_t load64(const uint8_t* p) { return uint64_t{load32(p)} << 32 | load32(p + 4); }
inline void store16(uint8_t* p, uint16_t v) { p[0] = static_cast<uint8_t>(v >> 8), p[1] = static_cast<uint8_t>(v); }
inline void store32(uint8_t* p, uint32_t v) { store16(p, static_cast<uint16_t>(v >> 16)), store16(p + 2, static_cast<uint16_t>(v)); }
inline void store64(uint8_t* p, uint64_t v) { store32(p, static_cast<uint32_t>(v >> 32)), store32(p + 4, static_cast<uint32_t>(v)); }

inline void encode(const Header& h, uint8_t* p) {
  p[0] = kMagic, p[1] = h.kind, p[14] = h.worker, p[15] = h.exponent, p[18] = h.wire, p[19] = h.lane;
  store16(p + 2, h.session), store32(p + 4, h.epoch), store32(p + 8, h.chunk);
  store16(p + 12, h.slot), store16(p + 16, h.elements);
}

// The header of a packet without its tag; nothing where the packet is not of this protocol or its length does not fit.
inline std::optional<Header> decode(const uint8_t* p, size_t bytes) {
  if (bytes < kHeaderBytes || p[0] != kMagic) return {};
  Header h{p[1], load16(p + 2), load32(p + 4), load32(p + 8), load16(p + 12), p[14], p[15], load16(p + 16), p[18], p[19]};
  size_t payload = bytes - kHeaderBytes;
  bool fits = false;
  switch (h.kind) {
    case kData:
    case kResult:
      fits = (h.wire == 1 || h.wire == 2 || h.wire == 4) && payload == size_t{h.elements} * h.wire;
      break;
    case kProgress: fits = h.elements == 0 && payload == kBitmapBytes; break;
    case kQuery: fits = h.elements == 0 && payload == 0; break;
    case kControl: fits = true; break;
  }
  return fits ? std::optional(h) : std::nullopt;
}

// Whether runs of joined packets pass a path. Losses that are proven to be those of joined packets, so many in a row that
// chance is no cause, end the joining for good.
class Joining {
 public:
  bool passes() const { return row_ < kProof; }
  void arrived() {
    if (passes()) row_ = 0;
  }
  void lost() {
    if (passes()) ++row_;
  }

 private:
  static constexpr int kProof = 16;
  int row_ = 0;
};

// Packets to send, back to back in one buffer, so that a run of equal ones goes to the kernel as one piece.
class Outbox {
 public:
  static constexpr int kAll = -1;
  struct Entry {
    size_t offset, bytes;
    int worker;           // kAll: every worker
    size_t place;         // slot, or version of a slot, that it is of
    bool single;          // a retransmission: must not travel in a run of joined packets, which a path may lose
    bool joined = false;  // it did travel in one
  };

  uint8_t* begin(size_t most) {
    if (used_ + most > capacity_) {
      size_t larger = 2 * (used_ + most);
      auto moved = std::make_unique_for_overwrite<uint8_t[]>(larger);
      if (used_) std::memcpy(moved.get(), buffer_.get(), used_);
      buffer_ = std::move(moved), capacity_ = larger;
    }
    return buffer_.get() + used_;
  }
  void commit(size_t bytes, int worker, size_t place = 0, bool single = false) {
    entries_.push_back({used_, bytes, worker, place, single}), used_ += bytes;
  }
  void clear() { entries_.clear(), used_ = 0; }
  std::vector<Entry>& entries() { return entries_; }
  uint8_t* at(const Entry& entry) { return buffer_.get() + entry.offset; }

 private:
  std::unique_ptr<uint8_t[]> buffer_;
  size_t used_ = 0, capacity_ = 0;
  std::vector<Entry> entries_;
};

}  // namespace switchml

// Counters that one thread adds to and any thread reads.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

namespace switchml {

enum Counter {
  kSentPackets, kSentBytes, kReceivedPackets, kReceivedBytes, kUnsent, kChunks, kRetransmissions,
  kSentProgress, kStale, kForeign, kMalformed, kForged, kCounters
};
constexpr const char* kCounterNames[kCounters] = {
  "sent_packets", "sent_bytes", "received_packets", "received_bytes", "unsent", "chunks", "retransmissions",
  "sent_progress", "stale", "foreign", "malformed", "forged"
};

class Counters {
 public:
  void add(Counter which, uint64_t by = 1) {
    auto& value = values_[which];
    value.store(value.load(std::memory_order_relaxed) + by, std::memory_order_relaxed);
  }
  uint64_t get(int which) const { return values_[which].load(std::memory_order_relaxed); }

 private:
  std::array<std::atomic<uint64_t>, kCounters> values_{};
};

}  // namespace switchml

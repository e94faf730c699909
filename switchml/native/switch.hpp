// The switch as a pure state machine; _switch.py says how it works and is its oracle.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "counters.hpp"
#include "packet.hpp"
#include "tag.hpp"

namespace switchml {

// Where a worker is, and which of the switch's addresses it knows (zeros: the socket has only one).
struct Address {
  std::array<uint8_t, 16> host{};  // IPv6, or IPv4 mapped into it
  std::array<uint8_t, 16> local{};
  uint32_t scope = 0;  // interface of a link-local address
  uint16_t port = 0;
  bool operator==(const Address& other) const {  // of every packet: by words, not by a call for each array
    uint64_t own[4], its[4];
    std::memcpy(own, host.data(), sizeof own), std::memcpy(its, other.host.data(), sizeof its);
    return ((own[0] ^ its[0]) | (own[1] ^ its[1]) | (own[2] ^ its[2]) | (own[3] ^ its[3])) == 0 && scope == other.scope &&
           port == other.port;
  }
};
static_assert(offsetof(Address, local) == 16, "host and local are compared as one");

// Answers to one worker's retransmissions of one chunk: the first at once, each later one after twice the time.
struct Answers {
  int64_t chunk = -1;
  int count = 0;
  double last = 0;
};

// The shortest of late round trips: from a result to the worker's next packet for its slot.
class ShortestTrip {
 public:
  void sample(double seconds) {
    least_ = std::min(least_, seconds);
    if (++count_ == 64) before_ = least_, least_ = kNone, count_ = 0;
  }
  double value() const { return std::min({least_, before_, kUnknown}); }

 private:
  static constexpr double kNone = 1e300, kUnknown = 0.02;  // a worker waits no less before it asks again
  double least_ = kNone, before_ = kNone;
  int count_ = 0;
};

// The slots of one epoch of one session.
class Aggregation {
 public:
  Aggregation(Member member, std::vector<Address> addresses, Counters& counters);

  // Takes a packet whose session and epoch are right. What it sends is for `addresses()[entry.worker]`, or all.
  void receive(const uint8_t* packet, size_t bytes, const Address& source, double now, Outbox& send);
  // Bitmap of the workers that the lowest unfinished chunk waits for.
  uint64_t unfinished() const;
  // Bitmap of the workers whose bucket was of another number or size than that of those before them.
  uint64_t mismatched() const { return mismatched_; }
  void move(std::vector<Address> addresses) { addresses_ = std::move(addresses); }
  // Packets for `worker` were sent, some of them joined.
  void sent(Outbox& box, uint32_t worker);
  bool joins(uint32_t worker) const { return workers_[worker].joining.passes(); }
  const Member& member() const { return member_; }
  const std::vector<Address>& addresses() const { return addresses_; }
  uint64_t chunks() const { return chunks_; }

 private:
  struct Version {
    int64_t chunk = -1;
    uint32_t epoch = 0;
    uint64_t seen = 0;
    uint8_t exponent = 0;
    uint16_t elements = 0;
    uint8_t lane = 0;
    uint64_t joined = 0;  // workers whose result went out in a run
    double finished = 0;
  };
  struct Peer {
    ShortestTrip trip;
    Joining joining;
  };

  bool fits(const Header& header) const;
  void repeated(size_t index, uint32_t worker, double now, Outbox& send);
  // Whether a retransmission may be answered: at most once a round trip and worker, and less often the longer it goes on.
  bool due(std::vector<Answers>& answers, size_t index, uint32_t chunk, uint32_t worker, double now);
  void result(size_t index, int worker, Outbox& send);
  void progress(uint32_t chunk, uint64_t seen, uint8_t lane, int worker, bool answer, Outbox& send);
  void finish(Header header, uint8_t* packet, size_t payload, int worker, size_t index, Outbox& send);
  int32_t* sums(size_t index) { return values_.data() + index * member_.elements; }

  Member member_;
  std::vector<Address> addresses_;
  Counters& counters_;
  Tagger tagger_;
  std::vector<Version> versions_;  // slot * 2 + version
  std::vector<int32_t> values_;
  std::vector<Peer> workers_;
  std::vector<Answers> answered_, told_;  // by version and worker
  uint64_t all_seen_, chunks_ = 0, mismatched_ = 0;
};

// All sessions of a switch: finds the one that a packet belongs to.
class Switch {
 public:
  void install(Member member, std::vector<Address> addresses);
  void remove(uint16_t session) { sessions_.erase(session); }
  Aggregation* find(uint16_t session);
  // The session whose outbox entries were appended, or none.
  Aggregation* receive(const uint8_t* packet, size_t bytes, const Address& source, double now, Outbox& send);
  Counters counters;

 private:
  std::unordered_map<uint16_t, Aggregation> sessions_;
};

}  // namespace switchml

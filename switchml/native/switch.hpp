// The switch as a pure state machine; _switch.py says how it works and is its oracle.
#pragma once

#include <unordered_map>
#include <vector>

#include "counters.hpp"
#include "packet.hpp"
#include "tag.hpp"

namespace switchml {

using Address = uint64_t;  // IPv4 address << 16 | port, in the machine's order

// The slots of one epoch of one session.
class Aggregation {
 public:
  Aggregation(Member member, std::vector<Address> addresses, Counters& counters);

  // Takes a packet whose session and epoch are right. What it sends is for `addresses()[entry.worker]`, or all.
  void receive(const uint8_t* packet, size_t bytes, Address source, Outbox& send);
  // Bitmap of the workers that the lowest unfinished chunk waits for.
  uint64_t unfinished() const;
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
  };

  bool fits(const Header& header) const;
  void repeated(size_t index, uint32_t worker, Outbox& send);
  void result(size_t index, int worker, Outbox& send);
  void progress(uint32_t chunk, uint64_t seen, int worker, bool answer, Outbox& send);
  void finish(Header header, uint8_t* packet, size_t payload, int worker, Outbox& send);
  int32_t* sums(size_t index) { return values_.data() + index * member_.elements; }

  Member member_;
  std::vector<Address> addresses_;
  Counters& counters_;
  Tagger tagger_;
  std::vector<Version> versions_;  // slot * 2 + version
  std::vector<int32_t> values_;
  uint64_t all_seen_, chunks_ = 0;
};

// All sessions of a switch: finds the one that a packet belongs to.
class Switch {
 public:
  void install(Member member, std::vector<Address> addresses);
  void remove(uint16_t session) { sessions_.erase(session); }
  Aggregation* find(uint16_t session);
  // The session whose outbox entries were appended, or none.
  Aggregation* receive(const uint8_t* packet, size_t bytes, Address source, Outbox& send);
  Counters counters;

 private:
  std::unordered_map<uint16_t, Aggregation> sessions_;
};

}  // namespace switchml

// The worker as a pure state machine; _worker.py says how it works and is its oracle.
#pragma once

#include <algorithm>
#include <deque>
#include <vector>

#include "counters.hpp"
#include "packet.hpp"
#include "tag.hpp"

namespace switchml {

class RoundTrip {
 public:
  void sample(double seconds, bool asked);
  double timeout(int tries) const;
  double smoothed() const { return smoothed_; }

 private:
  double smoothed_ = 0, deviation_ = 0;
};

class Worker {
 public:
  explicit Worker(Member member);

  // Takes a bucket of `count` values; `values` and `out` stay valid until it is finished.
  // `residual`, where not null, gets what rounding took; `known`, where not null, holds a guess of the agreed exponents
  // (0: none) and gets what was agreed.
  void submit(const float* values, float* out, float* residual, uint8_t* known, size_t count, double now, Outbox& send);
  void receive(const uint8_t* packet, size_t bytes, double now, Outbox& send);
  void poll(double now, Outbox& send);
  // No earlier than this has poll something to do; infinite with nothing on its way.
  double due() const { return due_; }

  const Member& member() const { return member_; }
  uint64_t finished() const { return finished_.load(std::memory_order_relaxed); }
  uint32_t in_flight() const { return in_flight_; }
  uint64_t next_number() const { return end_; }
  // Lowest chunk number without a result: every worker has all results up to `slots` before it.
  uint64_t low_water_mark() const { return *std::min_element(next_.begin(), next_.end()); }
  // Packets were sent, some of them joined.
  void sent(Outbox& box);
  bool joins() const { return joins_.load(std::memory_order_relaxed); }
  Counters counters;

 private:
  struct Part {  // the data that a number carries
    bool any;
    size_t chunk, from, count;
    uint8_t unit;  // exponent byte of their unit
  };
  struct Bucket {
    uint64_t base, end, left;
    uint32_t lead, chunks, unsolved;
    const float* values;
    float* out;
    float* residual;
    uint8_t* known;
    size_t count, elements;
    uint8_t lane;
    std::vector<uint8_t> exponents, guess, agreed, solved;

    Part carried(uint64_t place) const;
  };
  struct Flight {
    bool active = false, asked = false, joined = false;
    uint32_t number = 0;
    int tries = 0, data_tries = 0, passed = 0;
    double sent = 0, data_sent = 0, due = 0;
    int older = -1, newer = -1;  // slots sent before and after
  };

  Bucket* bucket(uint64_t number);
  Flight* flight(uint64_t number);
  bool done(uint64_t number) const { return next_[number % member_.slots] > number; }
  void attempt(uint64_t number, double now, Outbox& send);
  void data(Bucket& bucket, uint32_t number, bool again, Outbox& send);
  void finish(Header header, uint8_t* packet, size_t payload, bool single, Outbox& send);
  void result(const Header& header, const uint8_t* payload, double now, Outbox& send);
  void early(double sent, double now, Outbox& send);
  void progress(const Header& header, uint64_t seen, double now, Outbox& send);
  void retransmit(Flight& flight, double now, bool payload, Outbox& send);
  void append(Flight& flight, double now);
  void unlink(Flight& flight);
  void retire();

  Member member_;
  Tagger tagger_;
  RoundTrip round_trip_;
  std::deque<Bucket> buckets_;
  std::vector<uint64_t> next_;
  std::vector<Flight> flights_;
  std::atomic<uint64_t> finished_ = 0;
  Joining joining_;
  std::atomic<bool> joins_ = true;
  uint64_t taken_ = 0;  // buckets
  uint64_t end_ = 0;
  size_t counted_ = 0;  // buckets at the front that are counted as finished
  uint32_t in_flight_ = 0;
  int oldest_ = -1, newest_ = -1;
  double due_;
};

}  // namespace switchml

#include "worker.hpp"

#include <algorithm>
#include <limits>

#include "fixed_point.hpp"

namespace switchml {
namespace {

constexpr int kPassed = 3;
constexpr double kFirst = 0.05, kFloor = 0.02, kCeiling = 1.0;
constexpr double kNever = std::numeric_limits<double>::infinity();

bool same_unit(int guess, int agreed, const Member& m) {
  if (guess == kNonFinite || agreed == kNonFinite) return guess == agreed;
  return unit_exponent(guess, m.world, m.up) == unit_exponent(agreed, m.world, m.up);
}

}  // namespace

void RoundTrip::sample(double seconds, bool asked) {
  if (asked) seconds = std::min(seconds, 2 * smoothed_);
  if (smoothed_ == 0) {
    smoothed_ = seconds, deviation_ = seconds / 2;
    return;
  }
  deviation_ += (std::abs(seconds - smoothed_) - deviation_) / 4;
  smoothed_ += (seconds - smoothed_) / 8;
}

double RoundTrip::timeout(int tries) const {
  double first = smoothed_ == 0 ? kFirst : std::max(kFloor, 1.5 * smoothed_ + 4 * deviation_);
  return std::min(kCeiling, first * (1 << std::min(tries - 1, 10)));
}

Worker::Worker(Member member)
    : member_(std::move(member)), tagger_(member_.key), next_(member_.slots), flights_(member_.slots), due_(kNever) {
  for (uint32_t slot = 0; slot < member_.slots; ++slot) next_[slot] = slot;
}

Worker::Part Worker::Bucket::carried(uint64_t place) const {
  size_t chunk = place < lead ? place : place - lead, from = chunk * elements;
  uint8_t unit = place < lead ? guess[chunk] : agreed[chunk];
  bool any = place < lead ? unit != 0 && unit != kNonFinite : !solved[chunk];
  return {any, chunk, from, any ? std::min(elements, count - from) : 0, unit};
}

void Worker::submit(const float* values, float* out, float* residual, uint8_t* known, size_t count, double now,
                    Outbox& send) {
  size_t elements = member_.elements, chunks = (count + elements - 1) / elements;
  Bucket b{.base = end_, .lead = static_cast<uint32_t>(std::min<size_t>(member_.slots, chunks)),
           .chunks = static_cast<uint32_t>(chunks), .unsolved = static_cast<uint32_t>(chunks), .values = values, .out = out,
           .residual = residual, .known = known, .count = count, .elements = elements,
           .lane = static_cast<uint8_t>(member_.channel | (member_.core ? 0 : taken_++ % 4 << kBucketShift)), .exponents = std::vector<uint8_t>(chunks),
           .guess = known ? std::vector<uint8_t>(known, known + chunks) : std::vector<uint8_t>(chunks),
           .agreed = std::vector<uint8_t>(chunks), .solved = std::vector<uint8_t>(chunks)};
  b.left = uint64_t{b.lead} + chunks;
  b.end = end_ = b.base + b.left;
  uint64_t base = b.base, last = std::min<uint64_t>(b.end, base + member_.slots);
  buckets_.push_back(std::move(b));
  retire();
  for (uint64_t number = base; number < last; ++number) attempt(number, now, send);
}

void Worker::receive(const uint8_t* packet, size_t bytes, double now, Outbox& send) {
  std::optional<Header> header;
  if (tagger_.open(packet, bytes)) header = decode(packet, bytes);
  if (!header) return counters.add(kMalformed);
  const Header& h = *header;
  if (h.session != member_.session || h.epoch != member_.epoch || (h.lane & kChannelMask) != member_.channel || h.worker != kFromSwitch)
    return counters.add(kForeign);
  if (h.slot != slot_field(h.chunk, member_.slots)) return counters.add(kMalformed);
  if (h.kind == kResult) return result(h, packet + kHeaderBytes, now, send);
  if (h.kind == kProgress) return progress(h, load64(packet + kHeaderBytes), now, send);
  counters.add(kForeign);
}

void Worker::poll(double now, Outbox& send) {
  if (now < due_) return;
  std::vector<Flight*> late;
  for (int slot = oldest_; slot >= 0; slot = flights_[slot].newer)
    if (flights_[slot].due <= now) late.push_back(&flights_[slot]);
  due_ = kNever;
  for (Flight* each : late) retransmit(*each, now, false, send);
  for (int slot = oldest_; slot >= 0; slot = flights_[slot].newer) due_ = std::min(due_, flights_[slot].due);
}

Worker::Bucket* Worker::bucket(uint64_t number) {
  for (Bucket& b : buckets_)
    if (b.base <= number && number < b.end) return &b;
  return nullptr;
}

Worker::Flight* Worker::flight(uint64_t number) {
  Flight& f = flights_[number % member_.slots];
  return f.active && f.number == number ? &f : nullptr;
}

void Worker::attempt(uint64_t number, double now, Outbox& send) {
  Bucket* b = bucket(number);
  Flight& f = flights_[number % member_.slots];
  if (!b || f.active || next_[number % member_.slots] != number) return;
  if (number - b->base >= b->lead && !done(number - b->lead)) return;
  f.active = true, f.asked = f.joined = false, f.number = static_cast<uint32_t>(number), f.tries = f.data_tries = 1, f.data_sent = now;
  ++in_flight_;
  append(f, now);
  if (uint64_t chunk = number - b->base; chunk < b->chunks) {  // only now: the network need not wait for a pass over all
    size_t from = chunk * b->elements;
    b->exponents[chunk] = block_exponent(b->values + from, std::min(b->elements, b->count - from));
  }
  data(*b, f.number, false, send);
}

void Worker::data(Bucket& b, uint32_t number, bool again, Outbox& send) {
  uint64_t place = number - b.base;
  Header h{.kind = kData, .chunk = number, .exponent = place < b.chunks ? b.exponents[place] : uint8_t{0}, .lane = b.lane};
  uint8_t* packet = send.begin(member_.largest_packet());
  size_t payload = 0;
  if (Part part = b.carried(place); part.any) {
    uint8_t* integers = packet + kHeaderBytes;
    size_t count = part.count;
    payload = count * member_.up;
    if (same_unit(part.unit, std::max(part.unit, b.exponents[part.chunk]), member_))
      quantise(b.values + part.from, count, part.unit, member_.world, member_.up, integers);
    else  // beyond the guess the sum will not be used, whatever is sent
      std::memset(integers, 0, payload);
    if (b.residual)
      rounding_error(b.values + part.from, integers, count, part.unit, member_.world, member_.up, b.residual + part.from);
    if (member_.core && count < member_.elements) {  // hardware knows one size
      std::memset(integers + payload, 0, (member_.elements - count) * member_.up);
      count = member_.elements, payload = count * member_.up;
    }
    h.elements = static_cast<uint16_t>(count);
  }
  finish(h, packet, payload, again, send);
}

void Worker::finish(Header h, uint8_t* packet, size_t payload, bool single, Outbox& send) {
  h.session = member_.session, h.epoch = member_.epoch, h.slot = slot_field(h.chunk, member_.slots);
  h.worker = static_cast<uint8_t>(member_.worker), h.wire = static_cast<uint8_t>(member_.up);
  encode(h, packet);
  send.commit(tagger_.seal(packet, kHeaderBytes + payload), 0, h.chunk % member_.slots, single);
  counters.add(kSentPackets);
}

void Worker::sent(Outbox& box) {
  for (Outbox::Entry& entry : box.entries())
    if (!entry.single) flights_[entry.place].joined = entry.joined;
}

void Worker::result(const Header& h, const uint8_t* payload, double now, Outbox& send) {
  uint64_t number = h.chunk;
  Flight* f = flight(number);
  Bucket* b = bucket(number);
  if (!f || !b) return counters.add(kStale);
  uint64_t place = number - b->base;
  Part part = b->carried(place);
  size_t expected = part.any && member_.core ? member_.elements : part.count;
  bool smaller = place < b->chunks && h.exponent < b->exponents[place];
  if (h.elements != expected || h.wire != member_.down || smaller || h.lane != b->lane) return counters.add(kMalformed);
  double sent = f->sent;
  if (f->joined) {
    // without queries nothing proves a loss but that a retransmission was needed
    if (f->tries == 1) joining_.arrived();
    else if (member_.core) joining_.lost();
    joins_.store(joining_.passes(), std::memory_order_relaxed);
  }
  unlink(*f);
  f->active = false;
  --in_flight_;
  next_[number % member_.slots] = number + member_.slots;
  if (place < b->chunks) {
    b->agreed[place] = h.exponent;
    if (b->known) b->known[place] = h.exponent;
  }
  if (part.any && same_unit(part.unit, b->agreed[part.chunk], member_)) {
    dequantise(payload, part.count, part.unit, member_.world, member_.up, member_.down, b->out + part.from);
    b->solved[part.chunk] = 1, --b->unsolved;
  }
  // the first round waits for the slowest worker's computation: only later data tells the network's time
  if (part.any && place >= b->lead && f->data_tries == 1) round_trip_.sample(now - f->data_sent, f->tries > 1);
  counters.add(kChunks);
  uint32_t lead = b->lead;
  --b->left;
  retire();
  attempt(number + member_.slots, now, send);
  if (lead != member_.slots) attempt(number + lead, now, send);
  early(sent, now, send);
}

void Worker::retire() {
  while (counted_ < buckets_.size() && buckets_[counted_].unsolved == 0) {
    ++counted_;
    finished_.store(finished() + 1, std::memory_order_relaxed);
  }
  while (!buckets_.empty() && buckets_.front().left == 0) {
    buckets_.pop_front();
    --counted_;
  }
}

void Worker::early(double sent, double now, Outbox& send) {
  if (member_.core || oldest_ < 0 || flights_[oldest_].sent >= sent) return;
  std::vector<Flight*> lost;
  for (int slot = oldest_; slot >= 0 && flights_[slot].sent < sent; slot = flights_[slot].newer) {
    Flight& f = flights_[slot];
    if (++f.passed >= kPassed && now - f.sent >= round_trip_.smoothed()) lost.push_back(&f);
  }
  for (Flight* f : lost) retransmit(*f, now, false, send);
}

void Worker::progress(const Header& h, uint64_t seen, double now, Outbox& send) {
  if (seen >> member_.worker & 1) return counters.add(kStale);
  if (Flight* f = flight(h.chunk)) {
    // the question went the way of the data, which had not come
    if (f->joined && f->asked && h.exponent) f->joined = false, joining_.lost(), joins_.store(joining_.passes(), std::memory_order_relaxed);
    if ((f->asked && h.exponent) || now - f->data_sent >= round_trip_.smoothed()) retransmit(*f, now, true, send);
    return;
  }
  Flight* behind = h.chunk >= member_.slots ? flight(h.chunk - member_.slots) : nullptr;
  if (behind && now - behind->sent >= round_trip_.smoothed() / 2) return retransmit(*behind, now, false, send);
  counters.add(kStale);
}

void Worker::retransmit(Flight& f, double now, bool payload, Outbox& send) {
  ++f.tries;
  f.passed = 0;
  unlink(f);
  append(f, now);
  counters.add(kRetransmissions);
  f.asked = !payload && !member_.core;
  if (!f.asked) {
    f.data_sent = now, ++f.data_tries;
    return data(*bucket(f.number), f.number, true, send);
  }
  uint8_t* packet = send.begin(kHeaderBytes + kTagBytes);
  finish({.kind = kQuery, .chunk = f.number, .lane = bucket(f.number)->lane}, packet, 0, true, send);
}

void Worker::append(Flight& f, double now) {
  int slot = static_cast<int>(&f - flights_.data());
  f.sent = now, f.due = now + round_trip_.timeout(f.tries), f.passed = 0;
  f.older = newest_, f.newer = -1;
  (newest_ >= 0 ? flights_[newest_].newer : oldest_) = slot;
  newest_ = slot;
  due_ = std::min(due_, f.due);
}

void Worker::unlink(Flight& f) {
  (f.older >= 0 ? flights_[f.older].newer : oldest_) = f.newer;
  (f.newer >= 0 ? flights_[f.newer].older : newest_) = f.older;
}

}  // namespace switchml

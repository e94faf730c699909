#include "switch.hpp"

#include <algorithm>

#include "fixed_point.hpp"

namespace switchml {

Aggregation::Aggregation(Member member, std::vector<Address> addresses, Counters& counters)
    : member_(std::move(member)), addresses_(std::move(addresses)), counters_(counters), tagger_(member_.key),
      versions_(2 * member_.slots), values_(2 * size_t{member_.slots} * member_.elements), workers_(member_.world),
      answered_(2 * size_t{member_.slots} * member_.world), told_(answered_),
      all_seen_(member_.world == 64 ? ~uint64_t{0} : (uint64_t{1} << member_.world) - 1) {}

void Aggregation::receive(const uint8_t* packet, size_t bytes, const Address& source, double now, Outbox& send) {
  if (!tagger_.open(packet, bytes)) return counters_.add(kForged);
  std::optional<Header> header = decode(packet, bytes);
  if (!header || header->kind == kControl) return counters_.add(kMalformed);
  const Header& h = *header;
  if (h.worker >= member_.world || addresses_[h.worker] != source) return counters_.add(kForeign);
  if (h.slot != slot_field(h.chunk, member_.slots) || !fits(h)) return counters_.add(kMalformed);
  size_t index = size_t{h.chunk % member_.slots} * 2 + (h.slot & kVersionBit ? 1 : 0);
  Version& v = versions_[index];
  int64_t held = v.epoch == member_.epoch ? v.chunk : -1;
  bool started = h.chunk == held, counted = started && v.seen >> h.worker & 1;
  if (h.chunk < held) return counters_.add(kStale);
  if (counted) return repeated(index, h.worker, now, send);
  if (h.kind == kQuery) {
    if (due(answered_, index, h.chunk, h.worker, now)) progress(h.chunk, started ? v.seen : 0, h.lane, h.worker, true, send);
    return;
  }
  if (started && (h.elements != v.elements || h.lane != v.lane)) {
    mismatched_ |= uint64_t{1} << h.worker;
    return counters_.add(kMalformed);
  }
  uint64_t bit = uint64_t{1} << h.worker;
  // the slot's other version: whoever sends this chunk has had its result
  if (Version& before = versions_[index ^ 1]; before.seen == all_seen_ && before.chunk + member_.slots == h.chunk) {
    workers_[h.worker].trip.sample(now - before.finished);
    if (before.joined & bit) workers_[h.worker].joining.arrived();
  }
  if (!started) v = {h.chunk, member_.epoch, 0, 0, h.elements, h.lane};
  accumulate(sums(index), packet + kHeaderBytes, h.elements, member_.up, !started);
  v.seen |= bit;
  v.exponent = std::max(v.exponent, h.exponent);
  if (v.seen != all_seen_) return;
  ++chunks_;
  v.finished = now;
  counters_.add(kChunks);
  result(index, Outbox::kAll, send);
}

bool Aggregation::fits(const Header& h) const {
  if (!member_.core && (h.lane & kChannelMask) != member_.channel) return false;
  if (h.kind == kQuery) return !member_.core;
  bool whole = !member_.core || h.elements == member_.elements;
  return h.kind == kData && h.wire == member_.up && (h.elements == 0 || (h.elements <= member_.elements && whole));
}

bool Aggregation::due(std::vector<Answers>& answers, size_t index, uint32_t chunk, uint32_t worker, double now) {
  constexpr double kCeiling = 1.0;  // as a worker's own waiting
  Answers& given = answers[index * member_.world + worker];
  if (given.chunk != chunk) given = {chunk};
  double wait = workers_[worker].trip.value() * static_cast<double>(uint64_t{1} << std::min(given.count, 20)) / 2;
  if (given.count > 0 && now - given.last < std::min(kCeiling, wait)) return false;
  ++given.count, given.last = now;
  return true;
}

void Aggregation::repeated(size_t index, uint32_t worker, double now, Outbox& send) {
  counters_.add(kRetransmissions);
  Version& v = versions_[index];
  if (v.seen == all_seen_) {
    if (uint64_t bit = uint64_t{1} << worker; v.joined & bit) v.joined &= ~bit, workers_[worker].joining.lost();
    if (due(answered_, index, static_cast<uint32_t>(v.chunk), worker, now)) result(index, static_cast<int>(worker), send);
    return;
  }
  for (uint32_t rank = 0; rank < member_.world; ++rank)
    if (!(v.seen >> rank & 1) && due(told_, index, static_cast<uint32_t>(v.chunk), rank, now))
      progress(static_cast<uint32_t>(v.chunk), v.seen, v.lane, static_cast<int>(rank), false, send);
}

void Aggregation::result(size_t index, int worker, Outbox& send) {
  const Version& v = versions_[index];
  uint8_t* packet = send.begin(member_.largest_packet());
  store_sums(sums(index), v.elements, member_.down, packet + kHeaderBytes);
  Header h{.kind = kResult, .chunk = static_cast<uint32_t>(v.chunk), .exponent = v.exponent, .elements = v.elements,
           .wire = static_cast<uint8_t>(member_.down), .lane = v.lane};
  finish(h, packet, size_t{v.elements} * member_.down, worker, index, send);
}

void Aggregation::progress(uint32_t chunk, uint64_t seen, uint8_t lane, int worker, bool answer, Outbox& send) {
  counters_.add(kSentProgress);
  uint8_t* packet = send.begin(member_.largest_packet());
  store64(packet + kHeaderBytes, seen);
  Header h{.kind = kProgress, .chunk = chunk, .exponent = answer, .wire = static_cast<uint8_t>(member_.up), .lane = lane};
  finish(h, packet, kBitmapBytes, worker, 0, send);
}

void Aggregation::finish(Header h, uint8_t* packet, size_t payload, int worker, size_t index, Outbox& send) {
  h.session = member_.session, h.epoch = member_.epoch, h.slot = slot_field(h.chunk, member_.slots);
  h.worker = kFromSwitch;
  if (member_.core) h.lane = member_.channel;
  encode(h, packet);
  send.commit(tagger_.seal(packet, kHeaderBytes + payload), worker, index, worker != Outbox::kAll);
}

void Aggregation::sent(Outbox& box, uint32_t worker) {
  for (Outbox::Entry& entry : box.entries())
    if (entry.joined) versions_[entry.place].joined |= uint64_t{1} << worker, entry.joined = false;
}

uint64_t Aggregation::unfinished() const {
  const Version* lowest = nullptr;
  for (const Version& v : versions_)
    if (v.seen != 0 && v.seen != all_seen_ && (!lowest || v.chunk < lowest->chunk)) lowest = &v;
  return lowest ? lowest->seen ^ all_seen_ : 0;
}

void Switch::install(Member member, std::vector<Address> addresses) {
  uint16_t session = member.session;
  sessions_.erase(session);
  sessions_.try_emplace(session, std::move(member), std::move(addresses), counters);
}

Aggregation* Switch::find(uint16_t session) {
  auto found = sessions_.find(session);
  return found == sessions_.end() ? nullptr : &found->second;
}

Aggregation* Switch::receive(const uint8_t* packet, size_t bytes, const Address& source, double now, Outbox& send) {
  if (bytes < kHeaderBytes) {
    counters.add(kMalformed);
    return nullptr;
  }
  Aggregation* session = find(load16(packet + 2));
  if (!session || session->member().epoch != load32(packet + 4)) {
    counters.add(kForeign);
    return nullptr;
  }
  session->receive(packet, bytes, source, now, send);
  return session;
}

}  // namespace switchml

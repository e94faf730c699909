// One model's waiting requests, and where each waiting request is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "policy.hpp"

namespace serving {

struct Request {
  Time deadline;
  Id id;
};

// A ring sorted by deadline, equal deadlines in order of arrival.
class RequestQueue {
 public:
  size_t size() const { return size_; }
  const Request& operator[](size_t at) const { return ring_[(head_ + at) & mask_]; }

  // Where the request came to stand.
  size_t insert(const Request& request) {
    if (size_ > mask_) widen();
    size_t at = size_++;
    for (; at > 0 && request.deadline < (*this)[at - 1].deadline; --at) slot(at) = (*this)[at - 1];
    slot(at) = request;
    return at;
  }
  void pop_front() {
    ++head_;
    --size_;
  }
  size_t find(Time deadline, Id id) const {
    size_t low = 0, high = size_;
    while (low < high) {
      const size_t middle = (low + high) / 2;
      if ((*this)[middle].deadline < deadline) low = middle + 1;
      else high = middle;
    }
    while ((*this)[low].id != id) ++low;
    return low;
  }
  void erase(size_t at) {
    for (; at + 1 < size_; ++at) slot(at) = (*this)[at + 1];
    --size_;
  }

 private:
  Request& slot(size_t at) { return ring_[(head_ + at) & mask_]; }
  void widen() {
    std::vector<Request> wider(2 * ring_.size());
    for (size_t at = 0; at < size_; ++at) wider[at] = (*this)[at];
    ring_ = std::move(wider);
    head_ = 0;
    mask_ = ring_.size() - 1;
  }
  std::vector<Request> ring_ = std::vector<Request>(16);
  size_t head_ = 0, size_ = 0, mask_ = 15;
};

// id -> (model, deadline) of every waiting request: open addressing, linear probing, no tombstones.
class Waiting {
 public:
  struct Entry {
    Id id;
    Time deadline;
    int model = -1;  // an empty slot
  };

  size_t size() const { return size_; }
  const Entry* find(Id id) const {
    for (size_t at = home(id);; at = (at + 1) & mask_) {
      if (table_[at].model < 0) return nullptr;
      if (table_[at].id == id) return &table_[at];
    }
  }
  // false where the id is waiting already
  bool insert(Id id, int model, Time deadline) {
    if (2 * size_ > mask_) widen();
    size_t at = home(id);
    for (; table_[at].model >= 0; at = (at + 1) & mask_) {
      if (table_[at].id == id) return false;
    }
    table_[at] = {id, deadline, model};
    ++size_;
    return true;
  }
  void erase(Id id) {
    size_t hole = home(id);
    while (table_[hole].id != id || table_[hole].model < 0) hole = (hole + 1) & mask_;
    for (size_t at = (hole + 1) & mask_; table_[at].model >= 0; at = (at + 1) & mask_) {
      // an entry may move back to the hole if the hole is not before its home
      if (((at - home(table_[at].id)) & mask_) >= ((at - hole) & mask_)) {
        table_[hole] = table_[at];
        hole = at;
      }
    }
    table_[hole].model = -1;
    --size_;
  }

 private:
  size_t home(Id id) const { return (static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u >> 32) & mask_; }
  void widen() {
    std::vector<Entry> old(2 * table_.size());
    old.swap(table_);
    mask_ = table_.size() - 1;
    for (const Entry& entry : old) {
      if (entry.model < 0) continue;
      size_t at = home(entry.id);
      while (table_[at].model >= 0) at = (at + 1) & mask_;
      table_[at] = entry;
    }
  }
  std::vector<Entry> table_ = std::vector<Entry>(64);
  size_t size_ = 0, mask_ = 63;
};

}  // namespace serving

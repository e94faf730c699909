// Ordered sets over small integers: the lowest idle GPU, the earliest timer, the most urgent model.
#pragma once

#include <bit>
#include <cstdint>
#include <utility>
#include <vector>

namespace serving {

// A set of small integers whose least member is found in O(log64 n).
class LowestFirst {
 public:
  void grow(size_t size) {
    for (size_t level = 0;; ++level) {
      size = (size + 63) / 64;
      if (level == levels_.size()) {
        levels_.emplace_back();
        // a new top summarises the level that was the top until now
        if (level > 0) {
          levels_[level].resize(size);
          for (size_t at = 0; at < levels_[level - 1].size(); ++at) {
            if (levels_[level - 1][at]) levels_[level][at / 64] |= bit(at);
          }
        }
      }
      if (levels_[level].size() < size) levels_[level].resize(size);
      if (size <= 1) break;
    }
  }
  bool empty() const { return levels_.empty() || levels_.back().empty() || levels_.back()[0] == 0; }
  bool has(int member) const { return levels_[0][member / 64] & bit(member); }
  int least() const {
    size_t at = 0;
    for (size_t level = levels_.size(); level-- > 0;) at = at * 64 + std::countr_zero(levels_[level][at]);
    return static_cast<int>(at);
  }
  void insert(int member) {
    size_t at = member;
    for (auto& level : levels_) {
      level[at / 64] |= bit(at);
      at /= 64;
    }
    ++count_;
  }
  void erase(int member) {
    size_t at = member;
    for (auto& level : levels_) {
      level[at / 64] &= ~bit(at);
      if (level[at / 64]) break;
      at /= 64;
    }
    --count_;
  }
  int count() const { return count_; }

 private:
  static uint64_t bit(size_t at) { return uint64_t{1} << (at % 64); }
  std::vector<std::vector<uint64_t>> levels_;
  int count_ = 0;
};

// A binary heap of (key, member), each member at most once; ties go to the lower member.
template <typename Key>
class KeyedHeap {
 public:
  void grow(size_t members) { where_.resize(members, -1); }
  bool empty() const { return heap_.empty(); }
  int top() const { return heap_[0].second; }
  const Key& top_key() const { return heap_[0].first; }
  bool has(int member) const { return where_[member] >= 0; }
  const Key& key(int member) const { return heap_[where_[member]].first; }

  void set(int member, const Key& key) {
    int at = where_[member];
    if (at < 0) {
      at = static_cast<int>(heap_.size());
      heap_.push_back({key, member});
      rise(at);
    } else if (heap_[at].first != key) {
      const bool earlier = key < heap_[at].first;
      heap_[at].first = key;
      earlier ? rise(at) : sink(at);
    }
  }
  void erase(int member) {
    const int at = where_[member];
    if (at < 0) return;
    where_[member] = -1;
    const auto last = heap_.back();
    heap_.pop_back();
    if (at == static_cast<int>(heap_.size())) return;
    heap_[at] = last;
    rise(at);
    sink(where_[last.second]);
  }

 private:
  void rise(int at) {
    const auto mover = heap_[at];
    for (; at > 0 && mover < heap_[(at - 1) / 2]; at = (at - 1) / 2) put(at, heap_[(at - 1) / 2]);
    put(at, mover);
  }
  void sink(int at) {
    const auto mover = heap_[at];
    const int size = static_cast<int>(heap_.size());
    for (int child; (child = 2 * at + 1) < size; at = child) {
      if (child + 1 < size && heap_[child + 1] < heap_[child]) ++child;
      if (!(heap_[child] < mover)) break;
      put(at, heap_[child]);
    }
    put(at, mover);
  }
  void put(int at, const std::pair<Key, int>& entry) {
    heap_[at] = entry;
    where_[entry.second] = at;
  }
  std::vector<std::pair<Key, int>> heap_;
  std::vector<int> where_;
};

}  // namespace serving

#include "scheduler/model.hpp"

namespace serving {

Profile::Profile(std::vector<Time> latency) : latency_(std::move(latency)) {
  const auto size = static_cast<Time>(latency_.size());
  slope_ = size < 2 ? 0 : (latency_.back() - latency_[0]) / (size - 1);
  fixed_ = std::max<Time>(0, latency_[0] - slope_);
}

int Profile::within(Time time) const {
  return static_cast<int>(std::upper_bound(latency_.begin(), latency_.end(), time) - latency_.begin());
}

void Meter::close() {
  if (filled_ == kBuckets) {
    count_ -= counts_[at_];
    squares_ -= counts_[at_] * counts_[at_];
    budget_ -= budgets_[at_];
  } else {
    ++filled_;
  }
  counts_[at_] = open_count_;
  budgets_[at_] = open_budget_;
  count_ += open_count_;
  squares_ += open_count_ * open_count_;
  budget_ += open_budget_;
  open_count_ = open_budget_ = 0;
  at_ = (at_ + 1) % kBuckets;
}

bool Meter::add(Time now, Time budget) {
  if (!started_) {
    started_ = true;
    open_until_ = now + kBucket;
  }
  const bool due = now >= open_until_;
  if (due) {
    const Time passed = (now - open_until_) / kBucket + 1;
    for (Time k = 0; k < std::min<Time>(passed, kBuckets + 1); ++k) close();
    open_until_ += passed * kBucket;
  }
  ++open_count_;
  open_budget_ += budget;
  return due;
}

bool Meter::bursty() const { return filled_ >= 20 && filled_ * squares_ - count_ * count_ > 3 * filled_ * count_; }

}  // namespace serving

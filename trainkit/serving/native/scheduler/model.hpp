// One model of the scheduler: its requests, its arrival rate, and the batch it would run next.
#pragma once

#include "policy.hpp"
#include "scheduler/queue.hpp"

namespace serving {

enum class Drop : uint8_t { kWindow, kTimeout, kAuto };
enum class Defer : uint8_t { kAlways, kDemand, kNever, kAuto };

struct Rules {
  Drop drop = Drop::kWindow;
  Defer defer = Defer::kAuto;
  Time jitter = 0;
};

// Arrivals of the last five seconds in buckets of 50 ms (the published scheduler's meter).
class Meter {
 public:
  static constexpr Time kBucket = 50'000'000;
  static constexpr int kBuckets = 100;

  // true where a bucket was completed: what hangs on the rate is due
  bool add(Time now, Time budget);
  // Over completed buckets only.
  int64_t count() const { return count_; }
  Time window() const { return filled_ * kBucket; }
  // Mean time that a request had left when it came; the first bucket has only what it saw.
  Time budget() const { return count_ > 0 ? budget_ / count_ : open_count_ > 0 ? open_budget_ / open_count_ : 0; }
  // Index of dispersion of the buckets' counts above 3 (Poisson: 1), from 20 buckets on.
  bool bursty() const;

 private:
  void close();
  int64_t counts_[kBuckets] = {}, budgets_[kBuckets] = {};
  int64_t count_ = 0, squares_ = 0, budget_ = 0;
  int64_t open_count_ = 0, open_budget_ = 0;
  int filled_ = 0, at_ = 0;
  Time open_until_ = 0;
  bool started_ = false;
};

// What a model would do next.
struct Candidate {
  int batch = 0;   // 0: nothing waits
  Time start = 0;  // from here on it should run
  Time latest = 0; // from here on it cannot
};

struct Model {
  Profile profile;
  int priority = 0;
  RequestQueue queue;
  // Requests before `split` cannot wait for a batch of all that came after them; they run if a smaller one suits them.
  size_t split = 0;
  Meter meter;
  int target = 0;
  bool deferring = true, bursty = false;
  bool present = true, touched = false;
  Time latest = 0;

  // Batch size that keeps up with the rate when GPUs start staggered: the largest b with
  // l(b) + l(b) / n <= budget, where n = rate * l(b) / b GPUs are the model's demand.
  void retarget(const Rules& rules);
  // The next batch as of `now`; drops what can no longer be met.
  Candidate next(int index, Time now, const Rules& rules, Waiting& waiting, Actions& out);
};

}  // namespace serving

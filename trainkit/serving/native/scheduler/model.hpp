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
  // End of the bucket that is being filled.
  Time open_until() const { return open_until_; }
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

// What the models share: how loaded the GPUs are, and how long a schedulable batch waits for one.
struct Pool {
  int gpus = 0, models = 0;
  // Sums over models of their demand in thousandths of a GPU, and of its square.
  int64_t demand = 0, squares = 0;
  Time wait = 0;
  bool few = false, deferring = false, overloaded = false;

  void weigh();
  // A batch was dispatched `waited` after it became schedulable: a moving mean over about 32 batches.
  void note(Time waited) { wait += (waited - wait) >> 5; }
  // How much before the last moment a batch becomes schedulable, so that a GPU is found in time.
  Time allowance() const { return overloaded ? wait : 2 * wait; }
};

struct Model {
  Profile profile;
  int priority = 0;
  RequestQueue queue;
  // Requests before `split` cannot wait for a batch of all that came after them; they run if a smaller one suits them.
  size_t split = 0;
  Meter meter;
  int target = 0;
  int64_t demand = 0;
  bool bursty = false;
  bool present = true, touched = false;
  Time ready_since = -1;  // schedulable without a GPU since then

  // Batch size that keeps up with the rate when GPUs start staggered: the largest b with
  // l(b) + l(b) / n <= budget, where n = rate * l(b) / b GPUs are the model's demand.
  void retarget(const Rules& rules, Pool& pool);
  // The next batch as of `now`; drops what can no longer be met.
  Candidate next(int index, Time now, const Rules& rules, const Pool& pool, Waiting& waiting, Actions& out);
};

}  // namespace serving

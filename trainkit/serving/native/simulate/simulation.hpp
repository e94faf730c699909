// Discrete events over a policy: arrivals, abandonments, batches that end, the policy's own timer.
#pragma once

#include <vector>

#include "policy.hpp"
#include "scheduler/sets.hpp"

namespace serving {

enum class Fate : uint8_t { kPending, kDone, kLate, kDropped, kAbandoned };

// Requests in the order of `arrival`; all arrays as long as each other. `abandoned` lists requests by `abandon_at`.
struct Load {
  std::vector<Time> arrival, deadline;  // at the policy
  std::vector<Time> due;                // at the client: an answer after it is late
  std::vector<int64_t> model;
  std::vector<Time> abandon_at;
  std::vector<int64_t> abandoned;
};

class Simulation {
 public:
  // Batches take `latencies` plus `network` plus up to `jitter` more, uniformly.
  Simulation(Policy& policy, std::vector<Profile> latencies, int gpus, Load load, Time network, Time jitter,
             uint64_t seed);

  // All events before `until`.
  void run(Time until);
  bool over() const { return next_arrival_ == load_.arrival.size() && ends_.empty() && policy_.next_timer() == kNever; }
  Time now() const { return now_; }
  void add_gpu(int gpu);
  // A busy GPU ends its batch first.
  void remove_gpu(int gpu);

  std::vector<uint8_t> fate;
  std::vector<Time> answered;
  std::vector<Time> busy;  // by GPU
  std::vector<int64_t> batches_by_size;
  int64_t preempted = 0;

 private:
  void act();
  void end(int gpu);
  void start(const Action& action);
  Time extra();

  Policy& policy_;
  std::vector<Profile> latencies_;
  Load load_;
  Time network_, jitter_, now_ = 0;
  uint64_t random_;
  size_t next_arrival_ = 0, next_abandon_ = 0;
  KeyedHeap<Time> ends_;
  std::vector<std::vector<Id>> running_;
  std::vector<bool> leaving_;
  Actions out_;
};

}  // namespace serving

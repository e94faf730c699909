// Other systems' scheduling rules as published, for comparison in simulation.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "policy.hpp"
#include "scheduler/sets.hpp"

namespace serving {

struct Waiter {
  Id id;
  Time arrival, deadline;
};

// What they share: queues in order of arrival, cancellation by search, one timer.
class Published : public Policy {
 public:
  void cancel(Id id, Time now, Actions& out) override;
  Time next_timer() const override { return timers_.empty() ? kNever : timers_.top_key(); }

 protected:
  Published(std::vector<Profile> profiles, size_t queues);
  // Drop heads that not even a batch of `size` started now can meet.
  void drop_late(std::deque<Waiter>& queue, int model, Time now, int size, Actions& out) const;
  void dispatch(std::deque<Waiter>& queue, int model, int gpu, int size, Actions& out) const;

  std::vector<Profile> profiles_;
  std::vector<std::deque<Waiter>> queues_;
  KeyedHeap<Time> timers_;
};

// Each replica forms batches of its own requests, which arrive by turns: at most `largest`, or after `wait` from the
// first one's arrival. Ray Serve's serve.batch and LitServe's max_batch_size and batch_timeout; with timeout drop, as
// neither knows deadlines (a favour to them).
std::unique_ptr<Policy> per_replica(std::vector<Profile> profiles, int gpus, int largest, Time wait);

// BentoML's adaptive batching ("CORK" dispatcher): waits while the batch's gain promises more than the wait costs.
// Its regression of the latency is given the true line. It polls every millisecond, as published.
std::unique_ptr<Policy> bentoml(std::vector<Profile> profiles, int gpus, std::vector<Time> slo);

// Nexus: a static plan of (gpu, model, batch, rate share) by squishy bin packing; round robin over a GPU's sessions,
// early drop by a window of the planned batch.
struct Session {
  int gpu, model, batch;
  double share;
};
std::unique_ptr<Policy> nexus(std::vector<Profile> profiles, int gpus, std::vector<Session> plan);

// Clockwork: a central queue, batch sizes that are powers of two, the strategy whose latest start comes first, no
// waiting for larger batches; requests that cannot be met are refused.
std::unique_ptr<Policy> clockwork(std::vector<Profile> profiles, int gpus);

// Shepherd's online part (Flex): the largest feasible batch over all models on an idle GPU; a running batch is
// preempted by one at least `lambda` times as large (3.03 as published).
std::unique_ptr<Policy> shepherd(std::vector<Profile> profiles, int gpus, double lambda);

}  // namespace serving

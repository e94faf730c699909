// Deferred batch scheduling with central matchmaking (Symphony, arXiv 2308.07470).
#pragma once

#include <utility>
#include <vector>

#include "scheduler/model.hpp"
#include "scheduler/sets.hpp"

namespace serving {

class Scheduler : public Policy {
 public:
  Scheduler(std::vector<Profile> profiles, int gpus, Rules rules);

  void on_request(Id id, int model, Time deadline, Time now, Actions& out) override;
  // One decision a model for all of them.
  void on_requests(const Id* ids, const int64_t* models, const Time* deadlines, size_t count, Time now, Actions& out);
  void on_gpu_free(int gpu, Time now, Actions& out) override;
  void on_timer(Time now, Actions& out) override;
  Time next_timer() const override { return timers_.empty() ? kNever : timers_.top_key(); }
  void cancel(Id id, Time now, Actions& out) override;
  void add_gpu(int gpu, Time now, Actions& out) override;
  void remove_gpu(int gpu, Time now) override;
  int add_model(Profile profile, int priority);
  void remove_model(int model, Time now, Actions& out);

  size_t waiting() const { return waiting_.size(); }
  size_t waiting_of(int model) const { return known(model).queue.size(); }
  int idle_gpus() const { return idle_.count(); }
  int models() const { return static_cast<int>(models_.size()); }

 private:
  enum class Gpu : uint8_t { kAbsent, kIdle, kBusy };
  // Most urgent first: higher priority, then the earlier end of the schedulable window.
  using Urgency = std::pair<int, Time>;

  const Model& known(int64_t model) const;
  void advance(Time now);
  void enrol(Id id, int model, Time deadline, Time now);
  void queue(Id id, int model, Time deadline, Time now);
  void settle(int model, Time now, Actions& out);
  void match(Time now, Actions& out);

  Rules rules_;
  Pool pool_;
  std::vector<Model> models_;
  Waiting waiting_;
  KeyedHeap<Time> timers_;
  KeyedHeap<Urgency> ready_;  // schedulable now, without a GPU
  LowestFirst idle_;
  std::vector<Gpu> gpus_;
  std::vector<int> touched_;
  Time now_ = 0;
};

}  // namespace serving

#include <algorithm>

#include "simulate/published.hpp"

namespace serving {
namespace {

// One queue a model, any GPU.
class Central : public Published {
 public:
  Central(std::vector<Profile> profiles, int gpus)
      : Published(std::move(profiles), 0), running_(gpus), running_model_(gpus, -1) {
    queues_.resize(profiles_.size());
    idle_.grow(gpus);
    for (int gpu = 0; gpu < gpus; ++gpu) idle_.insert(gpu);
  }
  void on_request(Id id, int model, Time deadline, Time now, Actions& out) override {
    queues_[model].push_back({id, now, deadline});
    serve(now, out);
  }
  void on_gpu_free(int gpu, Time now, Actions& out) override {
    running_[gpu].clear();
    idle_.insert(gpu);
    serve(now, out);
  }
  void on_timer(Time, Actions&) override {}

 protected:
  virtual void serve(Time now, Actions& out) = 0;
  void run(int model, int gpu, int size, Actions& out) {
    running_[gpu].assign(queues_[model].begin(), queues_[model].begin() + size);
    running_model_[gpu] = model;
    dispatch(queues_[model], model, gpu, size, out);
  }

  LowestFirst idle_;
  std::vector<std::vector<Waiter>> running_;
  std::vector<int> running_model_;
};

class Clockwork : public Central {
  using Central::Central;

  void serve(Time now, Actions& out) override {
    while (!idle_.empty()) {
      int best = -1, best_size = 0;
      Time soonest = kNever;
      for (int model = 0; model < static_cast<int>(profiles_.size()); ++model) {
        auto& waiters = queues_[model];
        drop_late(waiters, model, now, 1, out);
        if (waiters.empty()) continue;
        const Time deadline = waiters.front().deadline;
        const int most = std::min<int>(profiles_[model].within(deadline - now), static_cast<int>(waiters.size()));
        int size = 1;
        while (2 * size <= most) size *= 2;
        const Time latest = deadline - profiles_[model].of(size);
        if (latest < soonest) best = model, best_size = size, soonest = latest;
      }
      if (best < 0) return;
      const int gpu = idle_.least();
      idle_.erase(gpu);
      run(best, gpu, best_size, out);
    }
  }
};

class Shepherd : public Central {
 public:
  Shepherd(std::vector<Profile> profiles, int gpus, double lambda)
      : Central(std::move(profiles), gpus), lambda_(lambda) {}

 private:
  struct Batch {
    int model = -1, size = 0;
    size_t first = 0;
  };

  Batch largest(Time now, Actions& out) {
    Batch best;
    for (int model = 0; model < static_cast<int>(profiles_.size()); ++model) {
      auto& waiters = queues_[model];
      drop_late(waiters, model, now, 1, out);
      for (size_t first = 0; static_cast<int>(waiters.size() - first) > best.size && first < waiters.size(); ++first) {
        const int size = std::min<int>(profiles_[model].within(waiters[first].deadline - now),
                                       static_cast<int>(waiters.size() - first));
        if (size > best.size) best = {model, size, first};
        if (size == profiles_[model].largest()) break;
      }
    }
    return best;
  }
  // Waiters before the batch step aside, keep their place, and come back behind it.
  void run_from(const Batch& batch, int gpu, Actions& out) {
    auto& waiters = queues_[batch.model];
    const std::vector<Waiter> aside(waiters.begin(), waiters.begin() + batch.first);
    waiters.erase(waiters.begin(), waiters.begin() + batch.first);
    run(batch.model, gpu, batch.size, out);
    waiters.insert(waiters.begin(), aside.begin(), aside.end());
  }
  void serve(Time now, Actions& out) override {
    while (!idle_.empty()) {
      const Batch batch = largest(now, out);
      if (batch.model < 0) return;
      const int gpu = idle_.least();
      idle_.erase(gpu);
      run_from(batch, gpu, out);
    }
    const Batch batch = largest(now, out);
    if (batch.model < 0) return;
    const auto smallest = std::min_element(running_.begin(), running_.end(),
                                           [](const auto& a, const auto& b) { return a.size() < b.size(); });
    if (batch.size < lambda_ * smallest->size()) return;
    const auto gpu = static_cast<int>(smallest - running_.begin());
    const std::vector<Waiter> interrupted = *smallest;
    const int model = running_model_[gpu];
    out.preempt(model, gpu);
    run_from(batch, gpu, out);
    auto& waiters = queues_[model];
    waiters.insert(waiters.begin(), interrupted.begin(), interrupted.end());
  }

  double lambda_;
};

}  // namespace

std::unique_ptr<Policy> clockwork(std::vector<Profile> profiles, int gpus) {
  return std::make_unique<Clockwork>(std::move(profiles), gpus);
}
std::unique_ptr<Policy> shepherd(std::vector<Profile> profiles, int gpus, double lambda) {
  return std::make_unique<Shepherd>(std::move(profiles), gpus, lambda);
}

}  // namespace serving

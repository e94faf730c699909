#include <algorithm>
#include <cmath>

#include "simulate/published.hpp"

namespace serving {
namespace {

// Queue g * models + m holds what GPU g will run of model m.
class Replicas : public Published {
 public:
  Replicas(std::vector<Profile> profiles, int gpus) : Published(std::move(profiles), 0), gpus_(gpus), busy_(gpus) {
    queues_.resize(static_cast<size_t>(gpus) * profiles_.size());
    timers_.grow(gpus);
    turn_.resize(profiles_.size());
  }
  void on_request(Id id, int model, Time deadline, Time now, Actions& out) override {
    const int gpu = route(model);
    queue(gpu, model).push_back({id, now, deadline});
    if (!busy_[gpu]) serve(gpu, now, out);
  }
  void on_gpu_free(int gpu, Time now, Actions& out) override {
    busy_[gpu] = false;
    serve(gpu, now, out);
  }
  void on_timer(Time now, Actions& out) override {
    while (!timers_.empty() && timers_.top_key() <= now) {
      const int gpu = timers_.top();
      timers_.erase(gpu);
      if (!busy_[gpu]) serve(gpu, now, out);
    }
  }

 protected:
  virtual int route(int model) { return static_cast<int>(turn_[model]++ % gpus_); }
  // The idle GPU runs a batch, or sets its timer.
  virtual void serve(int gpu, Time now, Actions& out) = 0;
  std::deque<Waiter>& queue(int gpu, int model) { return queues_[gpu * profiles_.size() + model]; }
  void run(int gpu, int model, int size, Actions& out) {
    busy_[gpu] = true;
    timers_.erase(gpu);
    dispatch(queue(gpu, model), model, gpu, size, out);
  }

  int gpus_;
  std::vector<bool> busy_;
  std::vector<int64_t> turn_;
};

class PerReplica : public Replicas {
 public:
  PerReplica(std::vector<Profile> profiles, int gpus, int largest, Time wait)
      : Replicas(std::move(profiles), gpus), largest_(largest), wait_(wait) {}

 private:
  void serve(int gpu, Time now, Actions& out) override {
    int best = -1;
    Time soonest = kNever;
    for (int model = 0; model < static_cast<int>(profiles_.size()); ++model) {
      auto& waiters = queue(gpu, model);
      drop_late(waiters, model, now, 1, out);
      if (waiters.empty()) continue;
      const bool full = static_cast<int>(waiters.size()) >= largest(model);
      const Time at = full ? now : std::max(now, waiters.front().arrival + wait_);
      if (at < soonest) best = model, soonest = at;
    }
    if (best < 0) {
      timers_.erase(gpu);
    } else if (soonest > now) {
      timers_.set(gpu, soonest);
    } else {
      run(gpu, best, std::min<int>(largest(best), static_cast<int>(queue(gpu, best).size())), out);
    }
  }
  int largest(int model) const { return std::min(largest_, profiles_[model].largest()); }

  int largest_;
  Time wait_;
};

class BentoML : public Replicas {
 public:
  BentoML(std::vector<Profile> profiles, int gpus, std::vector<Time> slo)
      : Replicas(std::move(profiles), gpus), slo_(std::move(slo)), waits_(queues_.size(), 10e6) {}

 private:
  static constexpr Time kTick = 1'000'000;

  void serve(int gpu, Time now, Actions& out) override {
    bool waiting = false;
    for (int model = 0; model < static_cast<int>(profiles_.size()); ++model) {
      auto& waiters = queue(gpu, model);
      const Profile& profile = profiles_[model];
      while (waiters.size() > 1 && now - waiters.front().arrival + profile.of(waiters.size()) >= slo_[model]) {
        out.drop(model, waiters.front().id);
        waiters.pop_front();
      }
      if (waiters.empty()) continue;
      const auto size = static_cast<int>(waiters.size());
      const double slope = static_cast<double>(profile.of(2) - profile.of(1));
      const double since = static_cast<double>(now - waiters.back().arrival);
      double& mean = waits_[gpu * profiles_.size() + model];
      if (size < profile.largest() && size * (since + kTick + slope) <= mean * .95) {
        waiting = true;
        continue;
      }
      // the published dispatcher refreshes a mean over 50 batches; this one decays as fast
      mean += (since - mean) / 50;
      run(gpu, model, std::min(size, profile.largest()), out);
      return;
    }
    if (waiting) timers_.set(gpu, now + kTick);
  }

  std::vector<Time> slo_;
  std::vector<double> waits_;
};

class Nexus : public Replicas {
 public:
  Nexus(std::vector<Profile> profiles, int gpus, std::vector<Session> plan)
      : Replicas(std::move(profiles), gpus), sessions_(gpus), of_model_(profiles_.size()), last_(gpus) {
    for (const Session& session : plan) {
      sessions_[session.gpu].push_back(session);
      of_model_[session.model].push_back({session, 0.});
    }
  }

 private:
  // smooth weighted round robin
  int route(int model) override {
    std::pair<Session, double>* best = nullptr;
    double total = 0;
    for (auto& entry : of_model_[model]) {
      entry.second += entry.first.share;
      total += entry.first.share;
      if (!best || entry.second > best->second) best = &entry;
    }
    if (!best) throw Refused("the plan must place every model that gets requests");
    best->second -= total;
    return best->first.gpu;
  }
  void serve(int gpu, Time now, Actions& out) override {
    const auto& sessions = sessions_[gpu];
    for (size_t turn = 1; turn <= sessions.size(); ++turn) {
      const size_t at = (last_[gpu] + turn) % sessions.size();
      const auto& [_, model, planned, share] = sessions[at];
      auto& waiters = queue(gpu, model);
      drop_late(waiters, model, now, std::min<int>(planned, std::max<int>(1, static_cast<int>(waiters.size()))), out);
      if (waiters.empty()) continue;
      const int fits = profiles_[model].within(waiters.front().deadline - now);
      last_[gpu] = at;
      run(gpu, model, std::min<int>(fits, static_cast<int>(waiters.size())), out);
      return;
    }
  }

  std::vector<std::vector<Session>> sessions_;
  std::vector<std::vector<std::pair<Session, double>>> of_model_;
  std::vector<size_t> last_;
};

}  // namespace

std::unique_ptr<Policy> per_replica(std::vector<Profile> profiles, int gpus, int largest, Time wait) {
  return std::make_unique<PerReplica>(std::move(profiles), gpus, largest, wait);
}
std::unique_ptr<Policy> bentoml(std::vector<Profile> profiles, int gpus, std::vector<Time> slo) {
  return std::make_unique<BentoML>(std::move(profiles), gpus, std::move(slo));
}
std::unique_ptr<Policy> nexus(std::vector<Profile> profiles, int gpus, std::vector<Session> plan) {
  return std::make_unique<Nexus>(std::move(profiles), gpus, std::move(plan));
}

}  // namespace serving

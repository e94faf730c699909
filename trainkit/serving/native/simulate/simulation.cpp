#include "simulate/simulation.hpp"

namespace serving {

Simulation::Simulation(Policy& policy, std::vector<Profile> latencies, int gpus, Load load, Time network, Time jitter,
                       uint64_t seed)
    : fate(load.arrival.size()),
      answered(load.arrival.size()),
      busy(gpus),
      policy_(policy),
      latencies_(std::move(latencies)),
      load_(std::move(load)),
      network_(network),
      jitter_(jitter),
      random_(seed),
      running_(gpus),
      leaving_(gpus) {
  ends_.grow(gpus);
  int largest = 0;
  for (const Profile& profile : latencies_) largest = std::max(largest, profile.largest());
  batches_by_size.resize(largest + 1);
}

// splitmix64
Time Simulation::extra() {
  if (jitter_ == 0) return 0;
  uint64_t z = random_ += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return static_cast<Time>((z ^ z >> 31) % static_cast<uint64_t>(jitter_ + 1));
}

void Simulation::start(const Action& action) {
  const size_t size = action.end - action.begin;
  const Time length = latencies_[action.model].of(size) + network_ + extra();
  running_[action.gpu].assign(out_.ids.begin() + action.begin, out_.ids.begin() + action.end);
  ends_.set(action.gpu, now_ + length);
  busy[action.gpu] += length;
  ++batches_by_size[size];
}

void Simulation::act() {
  for (const Action& action : out_.actions) {
    switch (action.kind) {
      case Kind::kDispatch:
        start(action);
        break;
      case Kind::kPreempt:
        ++preempted;
        busy[action.gpu] -= ends_.key(action.gpu) - now_;
        ends_.erase(action.gpu);
        break;
      case Kind::kDrop:
        for (size_t at = action.begin; at < action.end; ++at) {
          uint8_t& is = fate[out_.ids[at]];
          if (is == static_cast<uint8_t>(Fate::kPending)) {
            is = static_cast<uint8_t>(Fate::kDropped);
            answered[out_.ids[at]] = now_;
          }
        }
    }
  }
  out_.clear();
}

void Simulation::end(int gpu) {
  ends_.erase(gpu);
  for (Id id : running_[gpu]) {
    if (fate[id] != static_cast<uint8_t>(Fate::kPending)) continue;  // abandoned meanwhile
    fate[id] = static_cast<uint8_t>(now_ <= load_.due[id] ? Fate::kDone : Fate::kLate);
    answered[id] = now_;
  }
  if (!leaving_[gpu]) policy_.on_gpu_free(gpu, now_, out_);
  leaving_[gpu] = false;
}

void Simulation::run(Time until) {
  while (true) {
    const Time end_at = ends_.empty() ? kNever : ends_.top_key();
    const Time arrival = next_arrival_ < load_.arrival.size() ? load_.arrival[next_arrival_] : kNever;
    const Time abandon = next_abandon_ < load_.abandon_at.size() ? load_.abandon_at[next_abandon_] : kNever;
    const Time timer = policy_.next_timer();
    const Time first = std::min(std::min(end_at, arrival), std::min(abandon, timer));
    if (first == kNever || first >= until) return;
    now_ = std::max(now_, first);
    if (first == end_at) {
      end(ends_.top());
    } else if (first == arrival) {
      const size_t at = next_arrival_++;
      policy_.on_request(static_cast<Id>(at), static_cast<int>(load_.model[at]), load_.deadline[at], now_, out_);
    } else if (first == abandon) {
      const Id id = load_.abandoned[next_abandon_++];
      if (fate[id] != static_cast<uint8_t>(Fate::kPending)) continue;
      fate[id] = static_cast<uint8_t>(Fate::kAbandoned);
      answered[id] = now_;
      policy_.cancel(id, now_, out_);
    } else {
      policy_.on_timer(now_, out_);
    }
    if (!out_.actions.empty()) act();
  }
}

void Simulation::add_gpu(int gpu) {
  if (gpu >= static_cast<int>(running_.size())) {
    running_.resize(gpu + 1);
    busy.resize(gpu + 1);
    leaving_.resize(gpu + 1);
    ends_.grow(gpu + 1);
  }
  policy_.add_gpu(gpu, now_, out_);
  act();
}

void Simulation::remove_gpu(int gpu) {
  policy_.remove_gpu(gpu, now_);
  leaving_[gpu] = ends_.has(gpu);
}

}  // namespace serving

#include "scheduler/scheduler.hpp"

#include <string>

namespace serving {

// Far from where sums of times would wrap.
constexpr Time kFarthest = 1'000'000'000'000'000, kLast = 4'000'000'000'000'000'000;

Scheduler::Scheduler(std::vector<Profile> profiles, int gpus, Rules rules) : rules_(rules) {
  for (Profile& profile : profiles) add_model(std::move(profile), 0);
  gpus_.assign(gpus, Gpu::kIdle);
  pool_.gpus = gpus;
  idle_.grow(std::max(gpus, 1));
  for (int gpu = 0; gpu < gpus; ++gpu) idle_.insert(gpu);
}

const Model& Scheduler::known(int64_t model) const {
  if (model < 0 || model >= models() || !models_[model].present) {
    throw Refused("there is no model " + std::to_string(model) + ": " + std::to_string(models()) + " were added");
  }
  return models_[model];
}

void Scheduler::advance(Time now) {
  if (now < now_ || now > kLast) {
    throw Refused("time runs forward, up to 4 * 10^18 ns: it was " + std::to_string(now_) + ", got " + std::to_string(now));
  }
  now_ = now;
}

void Scheduler::enrol(Id id, int model, Time deadline, Time now) {
  if (deadline > now + kFarthest) {
    throw Refused("a deadline is at most 10^15 ns away, got " + std::to_string(deadline) + " at " + std::to_string(now));
  }
  if (!waiting_.insert(id, model, deadline)) {
    throw Refused("a waiting request's id must not be used again, got " + std::to_string(id));
  }
}

void Scheduler::queue(Id id, int model, Time deadline, Time now) {
  Model& of = models_[model];
  if (of.meter.add(now, std::max<Time>(deadline - now, 0)) || of.target == 0) {
    of.retarget(rules_, pool_);
    pool_.weigh();
  }
  if (of.queue.insert({deadline, id}) < of.split) ++of.split;
}

void Scheduler::on_request(Id id, int model, Time deadline, Time now, Actions& out) {
  known(model);
  advance(now);
  enrol(id, model, deadline, now);
  queue(id, model, deadline, now);
  settle(model, now, out);
}

void Scheduler::on_requests(const Id* ids, const int64_t* models, const Time* deadlines, size_t count, Time now,
                            Actions& out) {
  for (size_t at = 0; at < count; ++at) known(models[at]);
  advance(now);
  size_t enrolled = 0;
  try {
    for (; enrolled < count; ++enrolled) enrol(ids[enrolled], static_cast<int>(models[enrolled]), deadlines[enrolled], now);
  } catch (const Refused&) {
    while (enrolled > 0) waiting_.erase(ids[--enrolled]);
    throw;
  }
  touched_.clear();
  for (size_t at = 0; at < count; ++at) {
    const int model = static_cast<int>(models[at]);
    queue(ids[at], model, deadlines[at], now);
    if (!models_[model].touched) touched_.push_back(model);
    models_[model].touched = true;
  }
  for (int model : touched_) settle(model, now, out);
}

// Bring one model's timer and place in line up to date; dispatch what is due while a GPU idles.
void Scheduler::settle(int model, Time now, Actions& out) {
  Model& of = models_[model];
  of.touched = false;
  while (true) {
    const Candidate found = of.next(model, now, rules_, pool_, waiting_, out);
    if (found.batch == 0) {
      timers_.erase(model);
      ready_.erase(model);
      of.ready_since = -1;
      return;
    }
    if (found.start > now) {
      ready_.erase(model);
      of.ready_since = -1;
      timers_.set(model, found.start);
      return;
    }
    if (idle_.empty()) {
      if (of.ready_since < 0) of.ready_since = now;
      ready_.set(model, {-of.priority, found.latest});
      timers_.set(model, found.latest + 1);
      return;
    }
    pool_.note(of.ready_since < 0 ? 0 : now - of.ready_since);
    of.ready_since = -1;
    const int gpu = idle_.least();
    idle_.erase(gpu);
    gpus_[gpu] = Gpu::kBusy;
    const size_t begin = out.ids.size();
    for (int k = 0; k < found.batch; ++k) {
      waiting_.erase(of.queue[0].id);
      out.ids.push_back(of.queue[0].id);
      of.queue.pop_front();
    }
    of.split = of.split > static_cast<size_t>(found.batch) ? of.split - found.batch : 0;
    out.dispatch(model, gpu, begin);
  }
}

void Scheduler::match(Time now, Actions& out) {
  while (!idle_.empty() && !ready_.empty()) settle(ready_.top(), now, out);
}

void Scheduler::on_gpu_free(int gpu, Time now, Actions& out) {
  if (gpu < 0 || gpu >= static_cast<int>(gpus_.size()) || gpus_[gpu] != Gpu::kBusy) {
    throw Refused("a GPU becomes free after a dispatch to it, got GPU " + std::to_string(gpu) + ", which runs nothing");
  }
  advance(now);
  gpus_[gpu] = Gpu::kIdle;
  idle_.insert(gpu);
  match(now, out);
}

void Scheduler::on_timer(Time now, Actions& out) {
  advance(now);
  while (!timers_.empty() && timers_.top_key() <= now) settle(timers_.top(), now, out);
}

void Scheduler::cancel(Id id, Time now, Actions& out) {
  advance(now);
  const Waiting::Entry* found = waiting_.find(id);
  if (!found) return;  // it runs or is gone
  const int model = found->model;
  Model& of = models_[model];
  const size_t at = of.queue.find(found->deadline, id);
  of.queue.erase(at);
  if (at < of.split) --of.split;
  waiting_.erase(id);
  settle(model, now, out);
}

void Scheduler::add_gpu(int gpu, Time now, Actions& out) {
  if (gpu < 0 || gpu > 1'000'000 || (gpu < static_cast<int>(gpus_.size()) && gpus_[gpu] != Gpu::kAbsent)) {
    throw Refused("a new GPU's number is from 0 to 1000000 and not in use, got " + std::to_string(gpu));
  }
  advance(now);
  if (gpu >= static_cast<int>(gpus_.size())) {
    gpus_.resize(gpu + 1, Gpu::kAbsent);
    idle_.grow(gpu + 1);
  }
  gpus_[gpu] = Gpu::kIdle;
  ++pool_.gpus;
  idle_.insert(gpu);
  match(now, out);
}

void Scheduler::remove_gpu(int gpu, Time now) {
  if (gpu < 0 || gpu >= static_cast<int>(gpus_.size()) || gpus_[gpu] == Gpu::kAbsent) {
    throw Refused("there is no GPU " + std::to_string(gpu) + " to remove");
  }
  advance(now);
  if (gpus_[gpu] == Gpu::kIdle) idle_.erase(gpu);
  gpus_[gpu] = Gpu::kAbsent;
  --pool_.gpus;
}

int Scheduler::add_model(Profile profile, int priority) {
  models_.push_back({.profile = std::move(profile), .priority = priority});
  ++pool_.models;
  timers_.grow(models_.size());
  ready_.grow(models_.size());
  return models() - 1;
}

void Scheduler::remove_model(int model, Time now, Actions& out) {
  known(model);
  advance(now);
  Model& of = models_[model];
  for (; of.queue.size() > 0; of.queue.pop_front()) {
    waiting_.erase(of.queue[0].id);
    out.drop(model, of.queue[0].id);
  }
  of.split = 0;
  of.present = false;
  --pool_.models;
  pool_.demand -= of.demand;
  pool_.squares -= of.demand * of.demand;
  timers_.erase(model);
  ready_.erase(model);
}

}  // namespace serving

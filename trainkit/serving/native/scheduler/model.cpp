#include "scheduler/model.hpp"

namespace serving {

using Wide = __int128;

// A thousand models of a million GPUs each do not wrap their squares' sum.
constexpr int64_t kMostDemand = 50'000'000;

void Pool::weigh() {
  // Deferral needs a GPU at the right moment: GPUs that outnumber the models, and models that need more than one GPU
  // each (the mean of their demands, weighted by demand). Between 1.3 and 1.6 GPUs it stays as it was.
  few = 2 * gpus < 3 * models;
  if (demand == 0) deferring = !few;
  else if (few || 10 * squares <= 13 * 1000 * demand) deferring = false;
  else if (10 * squares > 16 * 1000 * demand) deferring = true;
  overloaded = 5 * demand > 6 * int64_t{1000} * gpus;
}

void Model::retarget(const Rules& rules, Pool& pool) {
  const Time budget = meter.budget(), window = meter.window();
  const int64_t count = meter.count();
  if (count == 0) {
    target = std::max(1, profile.within(budget / 2));
    return;
  }
  const auto keeps_up = [&](int size) {
    return Wide{profile.of(size)} * count + Wide{window} * size <= Wide{budget} * count;
  };
  int low = 1, high = profile.largest();
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (keeps_up(middle)) low = middle;
    else high = middle - 1;
  }
  target = low;
  pool.demand -= demand;
  pool.squares -= demand * demand;
  demand = std::min<int64_t>(kMostDemand, static_cast<int64_t>(Wide{profile.of(target)} * count * 1000 / (Wide{window} * target)));
  pool.demand += demand;
  pool.squares += demand * demand;
  bursty = rules.drop == Drop::kAuto && meter.bursty();
}

Candidate Model::next(int index, Time now, const Rules& rules, const Pool& pool, Waiting& waiting,
                      Actions& out) {
  const auto drop_front = [&] {
    waiting.erase(queue[0].id);
    out.drop(index, queue[0].id);
    queue.pop_front();
  };
  while (split < queue.size() && queue[split].deadline < now + profile.of(queue.size() - split)) ++split;
  if (split == queue.size()) {
    while (queue.size() > 0) drop_front();
    split = 0;
    return {};
  }
  // Batches much below the target would waste the GPUs: what keeps them small goes. An eighth less is tolerated while
  // there is capacity, half where models share few GPUs: there a batch often waits for its GPU and is small when it
  // gets one.
  const bool timeout = rules.drop == Drop::kTimeout || (rules.drop == Drop::kAuto && bursty && !pool.overloaded);
  const int least = timeout ? 1 : pool.overloaded ? target : std::max(1, target * (pool.few ? 4 : 7) / 8);
  const int wanted = static_cast<int>(std::min<size_t>(least, queue.size() - split));
  for (const Time finish = now + profile.of(wanted); split > 0 && queue[0].deadline < finish; --split) drop_front();

  const Time deadline = queue[0].deadline;
  Candidate found;
  found.batch = static_cast<int>(std::min<size_t>(profile.within(deadline - now), queue.size()));
  found.latest = deadline - profile.of(found.batch);
  found.start = now;
  const bool grows = found.batch < profile.largest();
  const bool deferred = rules.defer == Defer::kAlways || (rules.defer == Defer::kAuto && pool.deferring && profile.gains());
  // dispatch once the batch pays for its fixed cost at the model's rate; for half of it where models share few GPUs,
  // as an idle one will soon be wanted by another model
  const int worth = rules.defer == Defer::kAuto && pool.few ? 2 * found.batch : found.batch;
  const bool enough = !deferred && Wide{worth} * meter.window() >= Wide{profile.fixed()} * meter.count();
  if (grows && rules.defer != Defer::kNever && !enough) {
    // from `frontrun` on, one more request would not fit
    const Time frontrun = deadline - profile.of(found.batch + 1);
    found.start = std::max(now, frontrun - rules.jitter - pool.allowance());
    // who knows no rate waits for one as long as measuring it takes, and no longer
    if (rules.defer == Defer::kAuto && meter.count() == 0) found.start = std::min(found.start, std::max(now, meter.open_until()));
  }
  return found;
}

}  // namespace serving

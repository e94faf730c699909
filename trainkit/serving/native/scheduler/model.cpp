#include "scheduler/model.hpp"

namespace serving {

using Wide = __int128;

void Model::retarget(const Rules& rules) {
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
  // Deferral suits a model that needs more than one GPU; between 1 and 1.3 the rule stays as it was.
  const Wide need = Wide{profile.of(target)} * count, have = Wide{window} * target;
  if (need <= have) deferring = false;
  else if (10 * need > 13 * have) deferring = true;
  bursty = rules.drop == Drop::kAuto && meter.bursty();
}

Candidate Model::next(int index, Time now, const Rules& rules, Waiting& waiting, Actions& out) {
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
  const bool window = rules.drop == Drop::kWindow || (rules.drop == Drop::kAuto && !bursty);
  const int wanted = std::min<int>(window ? target : 1, static_cast<int>(queue.size() - split));
  for (const Time finish = now + profile.of(wanted); split > 0 && queue[0].deadline < finish; --split) drop_front();

  const Time deadline = queue[0].deadline;
  Candidate found;
  found.batch = std::min<int>(profile.within(deadline - now), static_cast<int>(std::min<size_t>(queue.size(), INT32_MAX)));
  found.latest = deadline - profile.of(found.batch);
  found.start = now;
  const bool grows = found.batch < profile.largest();
  const bool deferred = rules.defer == Defer::kAlways || (rules.defer == Defer::kAuto && deferring);
  // dispatch once the batch pays for its fixed cost at the model's rate
  const bool enough = !deferred && Wide{found.batch} * meter.window() >= Wide{profile.fixed()} * meter.count();
  if (grows && rules.defer != Defer::kNever && !enough) {
    // from `frontrun` on, one more request would not fit
    const Time frontrun = deadline - profile.of(found.batch + 1);
    found.start = std::max(now, std::min(frontrun, found.latest) - rules.jitter);
  }
  return found;
}

}  // namespace serving

#include "simulate/published.hpp"

#include <algorithm>

namespace serving {

Published::Published(std::vector<Profile> profiles, size_t queues)
    : profiles_(std::move(profiles)), queues_(queues) {
  timers_.grow(queues);
}

void Published::cancel(Id id, Time, Actions&) {
  for (auto& queue : queues_) {
    std::erase_if(queue, [&](const Waiter& waiter) { return waiter.id == id; });
  }
}

void Published::drop_late(std::deque<Waiter>& queue, int model, Time now, int size, Actions& out) const {
  while (!queue.empty() && queue.front().deadline < now + profiles_[model].of(size)) {
    out.drop(model, queue.front().id);
    queue.pop_front();
  }
}

void Published::dispatch(std::deque<Waiter>& queue, int model, int gpu, int size, Actions& out) const {
  const size_t begin = out.ids.size();
  for (int k = 0; k < size; ++k) {
    out.ids.push_back(queue.front().id);
    queue.pop_front();
  }
  out.dispatch(model, gpu, begin);
}

}  // namespace serving

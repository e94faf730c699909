#pragma once

#include <cmath>

#include "order/order.hpp"

namespace order {

// Simulated annealing over swaps of hosts and of whole stretches of ranks, in rounds of growing length that each start
// from the best so far: what it finds depends on the seed and on how many rounds there was time for. The first round
// begins at a temperature of `heat_share` of the cost.
//
// A Kernel keeps the cost of a placement up to date: touch(rank) after the rank's host changed, total() with ties
// broken by average(), worst(random) a rank that the cost hangs on.
template <class Kernel>
Found anneal(Kernel& kernel, std::vector<int>& host, uint64_t seed, int64_t rounds, double heat_share, const Late& late) {
  constexpr double kTie = 1;  // of the average: leads through plateaus, and keeps what the dearest does not show
  constexpr int kStale = 4;
  const int size = static_cast<int>(host.size());
  int levels = 1;
  while ((1 << levels) < size) ++levels;
  Random random{seed};
  Found found{host, true, 0};
  double least = kernel.total();
  int stale = 0;
  const auto swap = [&](int a, int b, int count) {
    for (int k = 0; k < count; ++k) std::swap(host[a + k], host[b + k]);
    for (int k = 0; k < count; ++k) kernel.touch(a + k), kernel.touch(b + k);
  };
  const auto place = [&](const std::vector<int>& order) {
    host = order;
    for (int rank = 0; rank < size; ++rank) kernel.touch(rank);
  };
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t steps = std::max<int64_t>(10000, 400 * size) << std::min<int64_t>(round, 4);
    // after a round in vain, one hot enough to leave the valley
    const double hottest = (stale % 2 ? 5 : 1) * heat_share * least / (1 << std::min<int64_t>(round / 2, 3));
    const double before = least;
    double now = kernel.total() + kTie * kernel.average();
    for (int64_t step = 0; step < steps; ++step, ++found.tried) {
      if (found.tried % 1024 == 1023 && late()) {
        found.converged = false;
        return found;
      }
      const double left = 1 - static_cast<double>(step) / static_cast<double>(steps);
      const double heat = hottest * left * left + 1e-300;
      // a rank that matters, or any; with it an aligned stretch of 2^level ranks, small ones most often
      const int one = random.below(4) ? kernel.worst(random) : random.below(size);
      int level = 0;
      while (level < levels - 1 && random.below(3) == 0) ++level;
      const int count = 1 << level, a = one / count * count;
      // the other stretch lies in a neighbourhood whose size is drawn too
      const int around = count << (1 + random.below(levels - level));
      const int corner = one / around * around;
      const int b = corner + random.below(std::max(1, (std::min(around, size - corner)) / count)) * count;
      if (a == b || a + count > size || b + count > size) continue;
      swap(a, b, count);
      const double then = kernel.total() + kTie * kernel.average();
      if (then <= now || random.uniform() < std::exp((now - then) / heat)) {
        now = then;
        if (kernel.total() < least * (1 - 1e-12)) least = kernel.total(), found.order = host;
      } else {
        swap(a, b, count);
      }
    }
    place(found.order);
    stale = least < before * (1 - 1e-4) ? 0 : stale + 1;
    if (stale == kStale) return found;
  }
  return found;
}

}  // namespace order

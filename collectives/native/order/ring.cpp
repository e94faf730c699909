// Iterated local search for a directed ring. Moves: 2-opt (a stretch turned round, whose inner costs change where the
// matrix is not symmetric), Or-opt (one to three hosts moved elsewhere, either way round), over the nearest neighbours
// of hosts whose surroundings changed. Perturbation: two neighbouring stretches change places (a double bridge).
#include <cmath>
#include <numeric>

#include "order/order.hpp"

namespace order {
namespace {

constexpr int kNearest = 10;
constexpr int kSegment = 3;     // hosts moved by Or-opt
constexpr int kStretch = 30;    // hosts in a stretch of a perturbation
constexpr double kHeat = 0.05;  // of an average hop

class Ring {
 public:
  Ring(Matrix cost, std::vector<int> tour)
      : cost_(cost), size_(cost.size), tour_(std::move(tour)), place_(size_), waiting_(size_, 0) {
    for (int at = 0; at < size_; ++at) place_[tour_[at]] = at;
    const int kept = std::min(kNearest, size_ - 1);
    near_.resize(static_cast<size_t>(size_) * kept);
    std::vector<int> others(size_ - 1);
    for (int a = 0; a < size_; ++a) {
      std::iota(others.begin(), others.end(), 0);
      for (int b = a; b < size_ - 1; ++b) others[b] = b + 1;
      const auto nearer = [&](int x, int y) {
        const double dx = std::min(cost_(a, x), cost_(x, a)), dy = std::min(cost_(a, y), cost_(y, a));
        return dx < dy || (dx == dy && x < y);
      };
      std::partial_sort(others.begin(), others.begin() + kept, others.end(), nearer);
      std::copy(others.begin(), others.begin() + kept, near_.begin() + static_cast<size_t>(a) * kept);
    }
    kept_ = kept;
    total_ = length();
    // moves that gain less are rounding
    least_ = 1e-12 * (total_ + 1e-300);
    for (int host : tour_) wait(host);
  }

  const std::vector<int>& tour() const { return tour_; }
  double total() const { return total_; }

  double length() const {
    double sum = 0;
    for (int at = 0; at < size_; ++at) sum += cost_(tour_[at], tour_[wrap(at + 1)]);
    return sum;
  }

  void descend() {
    while (!queue_.empty()) {
      const int host = queue_.back();
      queue_.pop_back();
      waiting_[host] = 0;
      while (turn(host) || carry(host)) {
      }
    }
  }

  // Two neighbouring stretches change places.
  void perturb(Random& random) {
    const int longest = std::max(1, std::min(kStretch, (size_ - 1) / 2));
    const int start = random.below(size_), first = 1 + random.below(longest);
    const int second = 1 + random.below(std::min(longest, size_ - 1 - first));
    const int before = host(start - 1), a = host(start), b = host(start + first - 1);
    const int c = host(start + first), d = host(start + first + second - 1), after = host(start + first + second);
    total_ += cost_(before, c) + cost_(d, a) + cost_(b, after) - cost_(before, a) - cost_(b, c) - cost_(d, after);
    exchange(start, first, second);
    for (int end : {before, a, b, c, d, after}) wait(end);
  }

  void turn_all() {
    std::reverse(tour_.begin(), tour_.end());
    for (int at = 0; at < size_; ++at) place_[tour_[at]] = at;
    total_ = length();
    for (int host : tour_) wait(host);
  }

  void save() { saved_tour_ = tour_, saved_place_ = place_, saved_total_ = total_; }
  void restore() { tour_ = saved_tour_, place_ = saved_place_, total_ = saved_total_; }

 private:
  int wrap(int at) const { return at >= size_ ? at - size_ : at < 0 ? at + size_ : at; }
  int host(int at) const { return tour_[wrap(at)]; }
  int after(int host) const { return tour_[wrap(place_[host] + 1)]; }
  int before(int host) const { return tour_[wrap(place_[host] - 1)]; }
  void put(int at, int host) { tour_[at] = host, place_[host] = at; }
  void wait(int host) {
    if (!waiting_[host]) waiting_[host] = 1, queue_.push_back(host);
  }

  void reverse(int from, int count) {
    int left = from, right = wrap(from + count - 1);
    for (int pair = count / 2; pair > 0; --pair) {
      const int x = tour_[left], y = tour_[right];
      put(left, y), put(right, x);
      left = wrap(left + 1), right = wrap(right - 1);
    }
  }

  // The stretches [from, from + first) and the `second` places behind it change places.
  void exchange(int from, int first, int second) {
    scratch_.clear();
    for (int k = 0; k < first + second; ++k) scratch_.push_back(host(from + (k < second ? first + k : k - second)));
    for (int k = 0; k < first + second; ++k) put(wrap(from + k), scratch_[k]);
  }

  // Turns [from, from + count) round if that is cheaper; its ends' new neighbours are p and q.
  bool turned(int from, int count) {
    // either side may be turned: as undirected rings they are the same
    if (2 * count > size_) from = wrap(from + count), count = size_ - count;
    if (count < 2) return false;
    const int p = host(from - 1), x = host(from), y = host(from + count - 1), q = host(from + count);
    double gain = cost_(p, x) + cost_(y, q) - cost_(p, y) - cost_(x, q);
    for (int k = 0, a = x; k < count - 1; ++k) {
      const int b = host(from + k + 1);
      gain += cost_(a, b) - cost_(b, a);
      a = b;
    }
    if (gain <= least_) return false;
    reverse(from, count);
    total_ -= gain;
    for (int end : {p, x, y, q}) wait(end);
    return true;
  }

  // 2-opt moves that put a next to one of its nearest.
  bool turn(int a) {
    const int* near = &near_[static_cast<size_t>(a) * kept_];
    const int next = after(a), last = before(a);
    const double out = cost_(a, next), in = cost_(last, a);
    // what symmetric parts of the four costs say; the rest is for turned() to find out
    for (int k = 0; k < kept_; ++k) {
      const int e = near[k];
      const double there = std::min(cost_(a, e), cost_(e, a));
      if (there >= out && there >= in) break;
      if (e != next && out + cost_(e, after(e)) - there - cost_(next, after(e)) > least_ &&
          turned(wrap(place_[a] + 1), wrap(place_[e] - place_[a])))
        return true;
      if (e != last && in + cost_(before(e), e) - there - cost_(last, before(e)) > least_ &&
          turned(place_[a], wrap(place_[e] - place_[a])))
        return true;
    }
    return false;
  }

  // Or-opt moves of the stretches that begin or end at a.
  bool carry(int a) {
    for (int count = 1; count <= std::min(kSegment, size_ - 3); ++count)
      if (carry_stretch(place_[a], count) || (count > 1 && carry_stretch(wrap(place_[a] - count + 1), count))) return true;
    return false;
  }

  bool carry_stretch(int from, int count) {
    const int p = host(from - 1), x = host(from), y = host(from + count - 1), q = host(from + count);
    const double freed = cost_(p, x) + cost_(y, q) - cost_(p, q);
    if (freed <= least_) return false;
    double back = 0;
    for (int k = 0; k < count - 1; ++k)
      back += cost_(host(from + k + 1), host(from + k)) - cost_(host(from + k), host(from + k + 1));
    const auto inside = [&](int at) { return wrap(at - from) < count; };
    const auto into = [&](int u, bool turn) {  // between u and what follows it
      if (inside(place_[u]) || u == p) return false;
      const int v = after(u);
      const double paid = turn ? cost_(u, y) + back + cost_(x, v) - cost_(u, v) : cost_(u, x) + cost_(y, v) - cost_(u, v);
      if (freed - paid <= least_) return false;
      total_ -= freed - paid;
      const int ahead = wrap(place_[u] - from) - count + 1;  // places between the stretch and its new home
      if (2 * ahead <= size_) {
        if (turn) reverse(from, count);
        exchange(from, count, ahead);
      } else {
        if (turn) reverse(from, count);
        const int behind = size_ - count - ahead;
        exchange(wrap(from - behind), behind, count);
      }
      for (int end : {p, q, x, y, u, v}) wait(end);
      return true;
    };
    for (int k = 0; k < kept_; ++k) {
      const int u = near_[static_cast<size_t>(x) * kept_ + k];
      if (std::min(cost_(u, x), cost_(x, u)) >= freed) break;
      if (into(u, false)) return true;
      if (!inside(place_[u]) && into(before(u), true)) return true;
    }
    for (int k = 0; k < kept_; ++k) {
      const int v = near_[static_cast<size_t>(y) * kept_ + k];
      if (std::min(cost_(v, y), cost_(y, v)) >= freed) break;
      if (into(v, true)) return true;
      if (!inside(place_[v]) && into(before(v), false)) return true;
    }
    return false;
  }

  Matrix cost_;
  int size_;
  int kept_ = 0;
  std::vector<int> tour_, place_, near_, queue_, scratch_, saved_tour_, saved_place_;
  std::vector<char> waiting_;
  double total_ = 0, saved_total_ = 0, least_ = 0;
};

}  // namespace

Found search_ring(Matrix cost, std::vector<int> start, uint64_t seed, int64_t rounds, int64_t patience, const Late& late) {
  Found found{std::move(start), true, 0};
  if (cost.size < 5) return found;  // left to enumeration
  Random random{seed};
  Ring ring(cost, found.order);
  ring.descend();
  double least = ring.total();
  found.order = ring.tour();
  // a little worse is let through now and then
  const double heat = kHeat * least / cost.size;
  int64_t last = 0;
  for (; found.tried < rounds && found.tried - last < patience; ++found.tried) {
    if (found.tried % 256 == 255 && late()) {
      found.converged = false;
      break;
    }
    ring.save();
    const double before = ring.total();
    ring.perturb(random);
    ring.descend();
    if (ring.total() < least * (1 - 1e-9)) {
      least = ring.total(), last = found.tried;
      found.order = ring.tour();
    } else if (ring.total() > before - heat * std::log(1 - random.uniform())) {
      ring.restore();
    }
  }
  ring = Ring(cost, found.order);
  // the same ring the other way round, where that is cheaper
  ring.descend();
  ring.save();
  const double one_way = ring.length();
  ring.turn_all();
  ring.descend();
  if (ring.length() >= one_way) ring.restore();
  found.order = ring.tour();
  return found;
}

}  // namespace order

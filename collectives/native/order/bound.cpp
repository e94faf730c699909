// Lower bounds: Held and Karp's for rings, cheapest walks for trees.
#include <cmath>
#include <limits>

#include "order/order.hpp"

namespace order {
namespace {

constexpr double kFar = std::numeric_limits<double>::infinity();

// Least one-trees of the matrix cost(i, j) - out[i] - in[j], each pair taken in its cheaper direction. A directed ring
// leaves and enters every host once, so with sum(out) + sum(in) added each of them is a lower bound (Held, Karp: The
// traveling-salesman problem and minimum spanning trees, 1970; one multiplier a direction instead of one a host).
class OneTree {
 public:
  explicit OneTree(Matrix cost)
      : size_(cost.size), forward_(cost.data, cost.data + static_cast<size_t>(size_) * size_), backward_(forward_.size()),
        key_(size_), from_(size_), left_(size_) {
    for (int i = 0; i < size_; ++i)
      for (int j = 0; j < size_; ++j) backward_[static_cast<size_t>(j) * size_ + i] = cost(i, j);
    symmetric = forward_ == backward_;
  }

  bool symmetric = false;
  std::vector<int> leaves, enters;  // arcs of the last tree out of and into each host

  double weight(const std::vector<double>& out, const std::vector<double>& in) {
    leaves.assign(size_, 0), enters.assign(size_, 0);
    int count = 0;
    for (int j = 1; j < size_; ++j) left_[count++] = j, key_[j] = kFar;
    double sum = 0;
    int newest = left_[--count];
    while (count > 0) {
      const double* row = &forward_[static_cast<size_t>(newest) * size_];
      const double* column = &backward_[static_cast<size_t>(newest) * size_];
      int nearest = 0;
      double least = kFar;
      for (int k = 0; k < count; ++k) {
        const int j = left_[k];
        const double there = std::min(row[j] - out[newest] - in[j], column[j] - out[j] - in[newest]);
        if (there < key_[j]) key_[j] = there, from_[j] = newest;
        if (key_[j] < least) least = key_[j], nearest = k;
      }
      const int j = left_[nearest];
      left_[nearest] = left_[--count];
      sum += least;
      arc(from_[j], j, out, in);
      newest = j;
    }
    return sum + at_first(out, in);
  }

 private:
  void arc(int i, int j, const std::vector<double>& out, const std::vector<double>& in) {
    const double there = forward_[static_cast<size_t>(i) * size_ + j] - out[i] - in[j];
    const double back = forward_[static_cast<size_t>(j) * size_ + i] - out[j] - in[i];
    const int tail = there <= back ? i : j;
    ++leaves[tail], ++enters[i + j - tail];
  }

  // Host 0: its cheapest arc out and its cheapest arc in, to different hosts.
  double at_first(const std::vector<double>& out, const std::vector<double>& in) {
    int away[2] = {-1, -1}, home[2] = {-1, -1};
    const auto there = [&](int j) { return forward_[j] - out[0] - in[j]; };
    const auto back = [&](int j) { return backward_[j] - out[j] - in[0]; };
    for (int j = 1; j < size_; ++j) {
      if (away[0] < 0 || there(j) < there(away[0])) away[1] = away[0], away[0] = j;
      else if (away[1] < 0 || there(j) < there(away[1])) away[1] = j;
      if (home[0] < 0 || back(j) < back(home[0])) home[1] = home[0], home[0] = j;
      else if (home[1] < 0 || back(j) < back(home[1])) home[1] = j;
    }
    int one = away[0], other = home[0];
    if (one == other) {
      if (there(away[1]) + back(home[0]) < there(away[0]) + back(home[1])) one = away[1];
      else other = home[1];
    }
    ++leaves[0], ++enters[one], ++leaves[other], ++enters[0];
    return there(one) + back(other);
  }

  const int size_;
  std::vector<double> forward_, backward_, key_;
  std::vector<int> from_, left_;
};

}  // namespace

double ring_bound(Matrix cost, double upper, int iterations, const Late& late) {
  const size_t n = cost.size;
  OneTree tree(cost);
  std::vector<double> out(n, 0), in(n, 0), push_out(n, 0), push_in(n, 0), best_out(n, 0), best_in(n, 0);
  double best = 0;
  // One multiplier a host first: it climbs fast. Two, where the matrix is not symmetric, then climb further.
  for (const bool together : {true, false}) {
    if (!together && tree.symmetric) break;
    double scale = together ? 2 : 0.5;
    out = best_out, in = best_in;
    for (int iteration = 0, stale = 0; iteration < iterations && scale > 1e-4; ++iteration) {
      if (iteration % 16 == 15 && late()) return best;
      double bound = tree.weight(out, in), norm = 0;
      for (size_t i = 0; i < n; ++i) bound += out[i] + in[i];
      if (bound > best * (1 + 1e-6)) stale = 0;
      else if (++stale == 20) scale *= 0.75, stale = 0;
      if (bound > best) best = bound, best_out = out, best_in = in;
      if (best >= upper * (1 - 1e-12)) return best;
      for (size_t i = 0; i < n; ++i) {
        double leaves = 1 - tree.leaves[i], enters = 1 - tree.enters[i];
        if (together) leaves = enters = (leaves + enters) / 2;
        push_out[i] = 0.7 * leaves + 0.3 * push_out[i];
        push_in[i] = 0.7 * enters + 0.3 * push_in[i];
        norm += leaves * leaves + enters * enters;
      }
      if (norm == 0) break;
      const double step = scale * (upper * 1.001 - bound) / norm;
      for (size_t i = 0; i < n; ++i) out[i] += step * push_out[i], in[i] += step * push_in[i];
    }
  }
  return best;
}

std::vector<float> walks(Matrix cost, int hops, const Late& late) {
  constexpr size_t kRows = 8;  // at a time: the matrix is read once for all of them
  constexpr float kNone = std::numeric_limits<float>::infinity();
  const size_t n = cost.size, area = n * n;
  std::vector<float> hop(area), least((hops + 1) * area, kNone);
  // a millionth less for every hop outweighs rounding
  for (size_t at = 0; at < area; ++at) hop[at] = static_cast<float>(cost.data[at] * (1 - 1e-6));
  for (size_t i = 0; i < n; ++i) hop[i * n + i] = kNone, least[i * n + i] = 0;
  for (int k = 1; k <= hops; ++k)
    for (size_t i = 0; i < n; i += kRows) {
      if (late()) return {};
      for (size_t j = 0; j < n; ++j)
        for (size_t row = i; row < std::min(n, i + kRows); ++row) {
          const float by = least[(k - 1) * area + row * n + j];
          if (by == kNone) continue;
          float* __restrict to = &least[k * area + row * n];
          const float* __restrict from = &hop[j * n];
          for (size_t v = 0; v < n; ++v) {
            const float way = by + from[v];
            to[v] = way < to[v] ? way : to[v];
          }
        }
    }
  return least;
}

}  // namespace order

// Random search for good Cayley digraphs: breadth-first search from the identity gives the layers, and the in-links
// that each element may use, in one pass; a candidate is dropped as soon as it can no longer improve the frontier.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <bit>
#include <tuple>

#include "direct/direct.hpp"
#include "random.hpp"

namespace nb = nanobind;
using Table = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

namespace direct {
namespace {

class Evaluator {
 public:
  Evaluator(const uint16_t* right, int order, int degree, int64_t unit)
      : right_(right), order_(order), degree_(degree), unit_(unit), depth_(order), mask_(order),
        queue_(order), inside_(size_t{1} << degree) {}

  // The sum of the step loads in 1/unit shards and the depth; {-1, depth so far} where `limit` ruled it out or the
  // generators do not span the group. limit[t]: a sum below it is wanted at depth t.
  std::pair<int64_t, int> run(const std::vector<int>& generators, const std::vector<int64_t>& limit) {
    std::fill(depth_.begin(), depth_.end(), kFar);
    depth_[0] = 0;
    queue_[0] = 0;
    int64_t sum = 0;
    int begin = 0, end = 1;
    for (int t = 1;; ++t) {
      int tail = end;
      for (int at = begin; at < end; ++at)
        for (int i = 0; i < degree_; ++i) {
          const int x = right_[generators[i] * static_cast<size_t>(order_) + queue_[at]];
          if (depth_[x] == kFar) {
            depth_[x] = static_cast<uint16_t>(t);
            mask_[x] = uint32_t{1} << i;
            queue_[tail++] = static_cast<uint16_t>(x);
          } else if (depth_[x] == t) {
            mask_[x] |= uint32_t{1} << i;
          }
        }
      if (tail == end) return {-1, t};
      // What is still missing needs so many more layers and, spread evenly, at least so much load.
      int layers = t;
      for (int64_t missing = order_ - tail, layer = tail - end; missing > 0; ++layers) missing -= layer *= degree_;
      if (layers >= static_cast<int>(limit.size())) return {-1, t};
      if (sum + even(order_ - end) >= limit[layers]) return {-1, t};
      sum += load(end, tail);
      if (sum + even(order_ - tail) >= limit[layers]) return {-1, t};
      if (tail == order_) return {sum, t};
      begin = end, end = tail;
    }
  }

 private:
  int64_t even(int64_t sources) const { return sources * (unit_ / degree_); }

  // Hall's bound over the sets of links for the elements queue_[from, to).
  int64_t load(int from, int to) {
    const uint32_t all = (uint32_t{1} << degree_) - 1;
    std::fill(inside_.begin(), inside_.end(), 0);
    for (int at = from; at < to; ++at) ++inside_[mask_[queue_[at]]];
    for (int i = 0; i < degree_; ++i)
      for (uint32_t set = 0; set <= all; ++set)
        if (set >> i & 1) inside_[set] += inside_[set ^ (uint32_t{1} << i)];
    int64_t worst = 0;
    for (uint32_t set = 1; set <= all; ++set) worst = std::max(worst, inside_[set] * (unit_ / std::popcount(set)));
    return worst;
  }

  const uint16_t* right_;
  const int order_, degree_;
  const int64_t unit_;
  std::vector<uint16_t> depth_;
  std::vector<uint32_t> mask_;
  std::vector<uint16_t> queue_;
  std::vector<int64_t> inside_;
};

int inverse(const uint16_t* right, int order, int g) {
  const uint16_t* row = right + g * static_cast<size_t>(order);
  return static_cast<int>(std::find(row, row + order, 0) - row);
}

// Completes `generators` at random; false where the draw of an inverse-closed set missed the degree.
bool draw(const uint16_t* right, int order, int degree, bool symmetric, Random& random, std::vector<int>& generators) {
  const bool repeats = degree >= order;
  while (static_cast<int>(generators.size()) < degree) {
    const int g = 1 + random.below(order - 1);
    const int back = symmetric ? inverse(right, order, g) : g;
    const bool known = std::find(generators.begin(), generators.end(), g) != generators.end();
    if (known && !repeats) {
      if (symmetric) return false;
      continue;
    }
    generators.push_back(g);
    if (back != g) generators.push_back(back);
  }
  return static_cast<int>(generators.size()) == degree;
}

// Takes one or two generators (of a symmetric set: with their inverses) out of `start`.
void thin(const uint16_t* right, int order, bool symmetric, Random& random, std::vector<int>& start) {
  for (int count = 1 + random.below(2); count > 0 && !start.empty(); --count) {
    const int g = start[random.below(static_cast<int>(start.size()))];
    start.erase(std::find(start.begin(), start.end(), g));
    const auto back = symmetric ? std::find(start.begin(), start.end(), inverse(right, order, g)) : start.end();
    if (back != start.end() && *back != g) start.erase(back);
  }
}

using Found = std::tuple<int, int64_t, int64_t, std::vector<int>>;

// Draws `trials` generator sets, afresh or, where there is a `start`, by changing one or two of its generators (it moves
// to each better set found); keeps each whose one-way sum is below one_way[depth], or whose sum over both
// directions (the transpose has the inverse generators) is below both_ways[depth]. The limits tighten as it goes.
std::vector<Found> search(
    Table right, int degree, bool symmetric, int64_t unit, std::vector<int64_t> one_way,
    std::vector<int64_t> both_ways, int trials, uint64_t seed, std::vector<int> start) {
  nb::gil_scoped_release released;
  const int order = static_cast<int>(right.shape(0));
  const int64_t least = (order - 1) * (unit / degree);
  const std::vector<int64_t> open(order + 1, INT64_MAX);
  Random random{seed};
  Evaluator evaluator(right.data(), order, degree, unit);
  std::vector<Found> found;
  std::vector<int> generators, inverses(degree);
  std::vector<int64_t> wanted(one_way.size());
  const auto tighten = [&](size_t depth, int64_t sum, int64_t total) {
    for (size_t t = depth; t < wanted.size(); ++t) {
      one_way[t] = std::min(one_way[t], sum);
      both_ways[t] = std::min(both_ways[t], total);
      wanted[t] = std::max(one_way[t], both_ways[t] - least);
    }
  };
  tighten(0, INT64_MAX, INT64_MAX);
  for (int trial = 0; trial < trials; ++trial) {
    generators = start;
    thin(right.data(), order, symmetric, random, generators);
    if (!draw(right.data(), order, degree, symmetric, random, generators)) continue;
    auto [sum, depth] = evaluator.run(generators, wanted);
    if (sum < 0) continue;
    int64_t back = sum;
    if (!symmetric) {
      for (int i = 0; i < degree; ++i) inverses[i] = inverse(right.data(), order, generators[i]);
      back = evaluator.run(inverses, open).first;
      if (back < sum) std::swap(back, sum), std::swap(inverses, generators);
    }
    if (sum >= one_way[depth] && sum + back >= both_ways[depth]) continue;
    found.emplace_back(depth, sum, back, generators);
    if (!start.empty()) start = generators;
    tighten(depth, sum, sum + back);
  }
  return found;
}

// One candidate without limits: (depth, sum of the loads); (-1, 0) where the generators do not span the group.
std::pair<int, int64_t> evaluate(Table right, const std::vector<int>& generators, int64_t unit) {
  const int order = static_cast<int>(right.shape(0));
  Evaluator evaluator(right.data(), order, static_cast<int>(generators.size()), unit);
  const std::vector<int64_t> open(order + 1, INT64_MAX);
  const auto [sum, depth] = evaluator.run(generators, open);
  return sum < 0 ? std::pair<int, int64_t>{-1, 0} : std::pair<int, int64_t>{depth, sum};
}

}  // namespace
}  // namespace direct

void bind_direct_search(nb::module_& m) {
  m.def("direct_search", &direct::search, nb::arg("right"), nb::arg("degree"), nb::arg("symmetric"), nb::arg("unit"),
        nb::arg("one_way"), nb::arg("both_ways"), nb::arg("trials"), nb::arg("seed"), nb::arg("start"),
        "Random generator sets that improve on a limit: (depth, sum of loads in 1/unit shards, the transpose's, "
        "generators).");
  m.def("direct_evaluate", &direct::evaluate, nb::arg("right"), nb::arg("generators"), nb::arg("unit"),
        "Depth and sum of loads of one Cayley digraph; depth -1 where the generators do not span the group.");
}

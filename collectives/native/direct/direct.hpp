#pragma once

#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

namespace direct {

// A non-negative rational in lowest terms; numerator and denominator stay far below 2^31 here (shards over links).
struct Ratio {
  int64_t top = 0;
  int64_t bottom = 1;
  bool operator<(const Ratio& other) const { return top * other.bottom < other.top * bottom; }
};

inline Ratio reduced(int64_t top, int64_t bottom) {
  const int64_t common = std::gcd(top, bottom);
  return {top / common, bottom / common};
}

constexpr uint16_t kFar = 0xffff;

// The in-links of every node: parallel links merged into one of a greater width, self-loops dropped.
struct InLinks {
  int nodes = 0;
  std::vector<int> first;   // [nodes + 1]
  std::vector<int> sender;  // [links]
  std::vector<int> width;   // [links]

  InLinks(int nodes, const int32_t* tail, const int32_t* head, size_t links);
  int degree(int u) const { return first[u + 1] - first[u]; }
};

// distance[v] = hops from v to u, kFar where there is no path.
void distances_to(const InLinks& graph, int u, std::vector<uint16_t>& distance);

// Distances to a node, computed at the first question and kept.
class Distances {
 public:
  explicit Distances(const InLinks& graph) : graph_(graph), rows_(graph.nodes) {}
  const std::vector<uint16_t>& to(int u) {
    if (rows_[u].empty()) distances_to(graph_, u, rows_[u]);
    return rows_[u];
  }

 private:
  const InLinks& graph_;
  std::vector<std::vector<uint16_t>> rows_;
};

// The sources at one distance from a receiver which may use the same in-links.
struct Group {
  std::vector<int> links;    // positions among the receiver's in-links, ascending
  std::vector<int> sources;  // ascending
};

// layers[t - 1] holds the groups of the sources at distance t from u; throws where a source does not reach u.
std::vector<std::vector<Group>> layers_of(const InLinks& graph, Distances& distances, int u);

// The least possible load of the busiest in-link, in shards per link of width one (Hall's condition, by Newton
// steps over cuts).
Ratio least_load(const std::vector<Group>& groups, const int* width, int links);

// Integral split: share[g][i] units of group g over its i-th link, `unit` for each source, at most limit * width
// over a link. The caller made sure that it exists.
std::vector<std::vector<int64_t>> split(
    const std::vector<Group>& groups, const int* width, int links, int64_t unit, int64_t limit);

}  // namespace direct

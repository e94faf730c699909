// Collectives over trees of ranks: the cost is that of the dearest way from a root to a leaf in any of them.
#include "order/anneal.hpp"

namespace order {
namespace {

class TreesKernel {
 public:
  TreesKernel(Matrix cost, Matrix latency, const Trees& trees, double weight, const std::vector<int>& host)
      : cost_(cost), latency_(latency), trees_(trees), weight_(weight), host_(host), children_(trees.size()),
        edge_(trees.size(), std::vector<double>(cost.size, 0)), below_(edge_), root_(trees.size()) {
    for (size_t t = 0; t < trees.size(); ++t) {
      children_[t].resize(cost.size);
      for (int rank = 0; rank < cost.size; ++rank) {
        if (trees[t][rank] < 0) root_[t] = rank;
        else children_[t][trees[t][rank]].push_back(rank);
      }
      std::vector<int> down{root_[t]};
      for (size_t k = 0; k < down.size(); ++k)
        down.insert(down.end(), children_[t][down[k]].begin(), children_[t][down[k]].end());
      for (size_t k = down.size(); k-- > 0;) {
        if (down[k] != root_[t]) weigh(t, down[k]);
        below_[t][down[k]] = deepest(t, down[k]);
      }
    }
  }

  void touch(int rank) {
    for (size_t t = 0; t < trees_.size(); ++t) {
      for (int child : children_[t][rank]) weigh(t, child);
      below_[t][rank] = deepest(t, rank);
      int parent = trees_[t][rank];
      if (parent < 0) continue;
      weigh(t, rank);
      for (; parent >= 0; parent = trees_[t][parent]) {
        const double depth = deepest(t, parent);
        if (depth == below_[t][parent]) break;
        below_[t][parent] = depth;
      }
    }
  }

  double total() const {
    double worst = 0;
    for (size_t t = 0; t < trees_.size(); ++t) worst = std::max(worst, below_[t][root_[t]]);
    return worst;
  }

  double average() const { return sum_ / static_cast<double>(trees_.size() * cost_.size); }

  // A rank on the dearest way.
  int worst(Random& random) const {
    size_t t = 0;
    for (size_t other = 1; other < trees_.size(); ++other)
      if (below_[other][root_[other]] > below_[t][root_[t]]) t = other;
    int chosen = root_[t], seen = 0;
    for (int rank = root_[t];;) {
      if (random.below(++seen) == 0) chosen = rank;
      int next = -1;
      for (int child : children_[t][rank])
        if (next < 0 || edge_[t][child] + below_[t][child] > edge_[t][next] + below_[t][next]) next = child;
      if (next < 0) return chosen;
      rank = next;
    }
  }

 private:
  void weigh(size_t t, int child) {
    const int a = host_[child], b = host_[trees_[t][child]];
    const double value = latency_(a, b) + weight_ * cost_(a, b);
    sum_ += value - edge_[t][child];
    edge_[t][child] = value;
  }

  double deepest(size_t t, int rank) const {
    double depth = 0;
    for (int child : children_[t][rank]) depth = std::max(depth, edge_[t][child] + below_[t][child]);
    return depth;
  }

  const Matrix cost_, latency_;
  const Trees& trees_;
  const double weight_;
  const std::vector<int>& host_;
  std::vector<std::vector<std::vector<int>>> children_;
  std::vector<std::vector<double>> edge_, below_;  // of the edge to the parent; of the dearest way down
  std::vector<int> root_;
  double sum_ = 0;
};

}  // namespace

Found search_trees(Matrix cost, Matrix latency, const Trees& trees, double weight, std::vector<int> start,
                   uint64_t seed, int64_t rounds, const Late& late) {
  TreesKernel kernel(cost, latency, trees, weight, start);
  return anneal(kernel, start, seed, rounds, 0.03, late);
}

double trees_cost(Matrix cost, Matrix latency, const Trees& trees, double weight, const std::vector<int>& order) {
  return TreesKernel(cost, latency, trees, weight, order).total();
}

}  // namespace order

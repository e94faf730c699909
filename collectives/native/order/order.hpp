#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <vector>

#include "random.hpp"

namespace order {

// A square matrix of costs, row by row; entry (i, j) is what going from i to j costs.
struct Matrix {
  int size = 0;
  const double* data = nullptr;
  double operator()(int i, int j) const { return data[static_cast<size_t>(i) * size + j]; }
};

// Asked every so often: whether time is up. It also lets Ctrl-C through, by throwing.
using Late = std::function<bool()>;

struct Found {
  std::vector<int> order;  // rank -> host
  bool converged = false;  // ended by itself, not by the clock
  int64_t tried = 0;       // perturbations or swaps
};

// A cheap ring: iterated local search (2-opt, Or-opt, double bridge) from `start`.
Found search_ring(Matrix cost, std::vector<int> start, uint64_t seed, int64_t rounds, int64_t patience, const Late& late);

// Held and Karp's bound on every directed ring, by subgradient ascent over one-trees.
double ring_bound(Matrix cost, double upper, int iterations, const Late& late);

// A collective as stages that follow each other: in stage s, pairs of ranks exchange weight[s] of the message.
struct Stages {
  std::vector<double> weight;
  std::vector<int> first;  // [stages + 1], into left and right
  std::vector<int> left, right;
};

// Parents of every rank in each of some trees over the same ranks; -1 at a root.
using Trees = std::vector<std::vector<int>>;

// Both matrices symmetric. An exchange of `weight` of the message costs latency + weight * cost.
Found search_stages(Matrix cost, Matrix latency, const Stages& stages, std::vector<int> start, uint64_t seed,
                    int64_t rounds, const Late& late);
double stages_cost(Matrix cost, Matrix latency, const Stages& stages, const std::vector<int>& order);

// Every tree carries the same share; its cost is that of its dearest way from the root to a leaf.
Found search_trees(Matrix cost, Matrix latency, const Trees& trees, double weight, std::vector<int> start,
                   uint64_t seed, int64_t rounds, const Late& late);
double trees_cost(Matrix cost, Matrix latency, const Trees& trees, double weight, const std::vector<int>& order);

// The least cost, rounded down, of a walk of exactly k hops between any two hosts, k = 0, 1, ..., hops:
// [hops + 1][size][size]; empty where time was short.
std::vector<float> walks(Matrix cost, int hops, const Late& late);

}  // namespace order

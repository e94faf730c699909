#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <vector>

// Integer graph algorithms of the forests. Vertices are 0..n-1; every quantity is int64 and never a float.
namespace forest {

using Int = std::int64_t;
using Ints = std::vector<Int>;
// __int128 is what every compiler that we build with calls it; -Wpedantic would rather not know.
__extension__ using Wide = __int128;

constexpr Int kInfinite = INT64_MAX / 4;

// Called from long loops: lets an interrupt through and reports progress (phase, done, total).
using Tick = std::function<void(const char *phase, Int done, Int total)>;

struct Network {
  int n = 0;
  std::vector<int> tail, head;
  Ints cap;

  int arcs() const { return static_cast<int>(tail.size()); }
};

// The product, or an error: a silent wrap would be a wrong bound.
inline Int checked(Wide value) {
  if (value > kInfinite || value < -kInfinite)
    throw std::overflow_error("the capacities leave 64 bits once scaled: give them in a coarser unit");
  return static_cast<Int>(value);
}

// Dinic's max-flow on a fixed set of arcs whose capacities are set anew for each run.
class MaxFlow {
 public:
  explicit MaxFlow(int n) : n_(n), first_(n + 1, 0) {}

  int add(int tail, int head);  // returns the arc's number
  void freeze();                // after the last add
  void set(int arc, Int cap) {
    residual_[2 * arc] = cap;
    residual_[2 * arc + 1] = 0;
  }
  Int residual(int arc) const { return residual_[2 * arc]; }
  Int run(int source, int sink, Int limit);
  std::vector<char> source_side(int source) const;  // after a run that stayed below its limit

 private:
  bool layer(int source, int sink);
  Int push(int vertex, int sink, Int limit);

  int n_;
  std::vector<int> head_, first_, out_, level_, next_, queue_;
  std::vector<int> tail_;
  Ints residual_;
};

struct Bound {
  Int p = 0, q = 1;        // max over cuts S of weight(S) / capacity out of S
  std::vector<char> cut;   // a set that reaches it
  Int maxflows = 0;
};

// Discrete Newton iteration over integer max-flows; exact.
Bound search(const Network &net, const Ints &weight, const std::vector<int> &sinks, const Tick &tick);

// Cuts that let less than `need` from the sources (capacity weight[v] from a super-source into v) reach a sink; all
// different ones, or the first.
std::vector<std::vector<char>> violated_cuts(const Network &net, const Ints &weight, const std::vector<int> &sinks,
                                             Int need, bool all, const Tick &tick);

// The largest capacities within net.cap that every vertex of `through` passes on entirely.
Ints balanced(const Network &net, const std::vector<char> &through, const Tick &tick);

// Trees in one flat form. Edge e of a tree goes edge_tail[e] -> edge_head[e] over path[path_start[e]..path_start[e+1]).
struct Trees {
  Ints root, multiplicity, edge_start{0}, edge_tail, edge_head, path_start{0}, path;
};

enum class Deal { plain, proportional, round_robin };

// Edge splitting of every vertex that is no terminal, then packing of `weight[v]` trees rooted at each v that span the
// terminals, then the way back to physical paths.
Trees pack_trees(const Network &net, const Ints &weight, const std::vector<int> &terminals, Deal deal, const Tick &tick);

// Trees grown greedily against a budget per arc class; empty when they do not fit. `weight[v]` trees at each v.
Trees grow_trees(const Network &net, const Ints &weight, const std::vector<int> &terminals, const std::vector<int> &klass,
                 const Ints &budget, bool depth_first, const Tick &tick);

struct Symmetry {
  std::vector<std::vector<int>> group;  // elements of a group that moves every compute node freely, identity first
};

// A group of block rotations of the compute nodes (in their given order) under which the network is unchanged.
Symmetry free_rotations(const Network &net, const Ints &colour, const std::vector<int> &compute, const Tick &tick);

// Orbit number of every arc (then of every vertex) under the rotations and swaps of blocks that leave the network
// unchanged.
struct Orbits {
  std::vector<int> arc, vertex;
};
Orbits orbits(const Network &net, const Ints &colour, const std::vector<int> &compute, const Tick &tick);

}  // namespace forest

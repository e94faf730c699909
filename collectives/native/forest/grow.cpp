#include <algorithm>
#include <queue>
#include <tuple>

#include "forest/forest.hpp"

namespace forest {
namespace {

// Prim's growth with physical paths: the tree always takes the vertex that the least scarce links reach, from its
// shallowest vertex. Nothing here proves that all trees will fit: they do, or there are none.
class Grower {
 public:
  Grower(const Network &net, const std::vector<int> &terminals, const std::vector<int> &klass, const Ints &budget,
         bool depth_first)
      : net_(net), klass_(klass), left_(budget), budget_(budget), depth_first_(depth_first), size_(terminals.size()),
        terminal_(net.n, 0), price_(net.arcs()), out_(net.n), label_(net.n), via_(net.n), depth_(net.n) {
    for (int v : terminals) terminal_[v] = 1;
    for (int e = 0; e < net.arcs(); e++) {
      if (net.cap[e] == 0) continue;
      out_[net.tail[e]].push_back(e);
      price_[e] = (Int{1} << 40) / net.cap[e];
    }
  }

  // Appends one tree of `width` equal ones, or leaves everything as it was.
  bool tree(int root, Int width, Trees &flat) {
    const Ints before = left_;
    const auto edges = flat.edge_tail.size(), ends = flat.path.size();
    depth_.assign(net_.n, -1);
    depth_[root] = 0;
    width_ = width;
    std::size_t have = 1;
    bool fresh = true;
    restart();
    while (have < size_) {
      int y = next();
      if (y < 0) {
        if (fresh) break;
        fresh = true;
        restart();
        continue;
      }
      if (!take(y)) {
        // A link on the way ran out since the way was found.
        if (fresh) break;
        fresh = true;
        restart();
        continue;
      }
      fresh = false;
      have++;
      const int x = path_.front();
      depth_[y] = depth_[x] + 1;
      flat.edge_tail.push_back(x);
      flat.edge_head.push_back(y);
      flat.path.insert(flat.path.end(), path_.begin(), path_.end());
      flat.path_start.push_back(static_cast<Int>(flat.path.size()));
      source(y);
    }
    if (have < size_) {
      left_ = before;
      flat.edge_tail.resize(edges);
      flat.edge_head.resize(edges);
      flat.path.resize(ends);
      flat.path_start.resize(edges + 1);
      return false;
    }
    flat.root.push_back(root);
    flat.multiplicity.push_back(width);
    flat.edge_start.push_back(static_cast<Int>(flat.edge_tail.size()));
    return true;
  }

 private:
  using Cost = std::tuple<Int, Int, Int, Int>;  // dearest link, then (all links, depth) in either order, then wear

  void restart() {
    heap_ = {};
    label_.assign(net_.n, Cost{INT64_MAX, 0, 0, 0});
    for (int v = 0; v < net_.n; v++)
      if (depth_[v] >= 0) source(v);
  }

  void source(int v) {
    label_[v] = depth_first_ ? Cost{0, depth_[v], 0, 0} : Cost{0, 0, depth_[v], 0};
    via_[v] = -1;
    relax(v);
  }

  void relax(int v) {
    auto [worst, second, third, wear] = label_[v];
    for (int e : out_[v]) {
      const int to = net_.head[e], k = klass_[e];
      if (depth_[to] >= 0 || left_[k] < width_) continue;
      Cost cost{std::max(worst, price_[e]), second, third, wear + static_cast<Int>((Wide(budget_[k] - left_[k]) << 20) / budget_[k])};
      (depth_first_ ? std::get<2>(cost) : std::get<1>(cost)) += price_[e];
      if (cost >= label_[to]) continue;
      label_[to] = cost;
      via_[to] = e;
      heap_.emplace(cost, to);
    }
  }

  // The nearest terminal outside the tree; -1 if there is none.
  int next() {
    while (!heap_.empty()) {
      auto [cost, v] = heap_.top();
      heap_.pop();
      if (cost != label_[v] || depth_[v] >= 0) continue;
      if (terminal_[v]) return v;
      relax(v);
    }
    return -1;
  }

  // Claims the path to y, kept in path_.
  bool take(int y) {
    path_.assign(1, y);
    std::vector<int> arcs;
    for (int v = y; via_[v] >= 0; v = net_.tail[via_[v]]) {
      arcs.push_back(via_[v]);
      path_.push_back(net_.tail[via_[v]]);
    }
    std::reverse(path_.begin(), path_.end());
    for (std::size_t i = 0; i < arcs.size(); i++)
      if ((left_[klass_[arcs[i]]] -= width_) < 0) {
        for (std::size_t j = 0; j <= i; j++) left_[klass_[arcs[j]]] += width_;
        return false;
      }
    return true;
  }

  const Network &net_;
  const std::vector<int> &klass_;
  Ints left_;
  const Ints &budget_;
  bool depth_first_;
  std::size_t size_;
  Int width_ = 1;
  std::vector<char> terminal_;
  Ints price_;
  std::vector<std::vector<int>> out_;
  std::vector<Cost> label_;
  std::vector<int> via_, depth_, path_;
  std::priority_queue<std::pair<Cost, int>, std::vector<std::pair<Cost, int>>, std::greater<>> heap_;
};

}  // namespace

Trees grow_trees(const Network &net, const Ints &weight, const std::vector<int> &terminals, const std::vector<int> &klass,
                 const Ints &budget, bool depth_first, const Tick &tick) {
  Grower grower(net, terminals, klass, budget, depth_first);
  Trees flat;
  for (int root = 0; root < net.n; root++) {
    tick("grow", root, net.n);
    for (Int rest = weight[root], width = rest; rest > 0;) {
      width = std::min(width, rest);
      if (grower.tree(root, width, flat))
        rest -= width;
      else if (width > 1)
        width /= 2;
      else
        return {};
    }
  }
  return flat;
}

}  // namespace forest

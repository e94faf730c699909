#include <algorithm>
#include <numeric>

#include "forest/split.hpp"

namespace forest {
namespace {

struct Tree {
  int root;
  Int multiplicity;
  std::vector<int> arcs;      // in growing order
  std::vector<int> vertices;  // in growing order, the root first
  std::vector<char> has;
};

// Packing of capacitated spanning out-trees after the proof of Edmonds' theorem: an arc may enter the tree in hand as
// often as all unfinished trees can still be completed, which one max-flow tells. Finished trees have left the graph;
// trees not begun are a capacity from the source to their root; only trees begun and put aside have a vertex.
class Packer {
 public:
  Packer(const Splitter &split, int n, const Ints &weight, const std::vector<int> &terminals, const Tick &tick)
      : tick_(tick), n_(n), source_(n), size_(terminals.size()), waiting_(weight), out_(n + 1), level_(n + 1), next_(n + 1) {
    for (std::size_t e = 0; e < split.tail.size(); e++) {
      number_.push_back(-1);
      if (split.cap[e] == 0 || split.tail[e] == split.source()) continue;
      number_.back() = link(split.tail[e], split.head[e], split.cap[e]);
      leaving_[split.tail[e]].push_back(static_cast<int>(e));
    }
    from_source_.assign(n, -1);
    for (int v : terminals) from_source_[v] = link(source_, v, weight[v]);
    rest_ = std::accumulate(weight.begin(), weight.end(), Int{0});
  }

  std::vector<Tree> run(const Splitter &split) {
    std::vector<Tree> done;
    const Int all = rest_;
    Int finished = 0;
    for (int root = 0; root < n_; root++) {
      if (waiting_[root] == 0) continue;
      aside_.push_back({root, waiting_[root], {}, {root}, std::vector<char>(n_, 0)});
      aside_.back().has[root] = 1;
      set(from_source_[root], 0);
      waiting_[root] = 0;
      while (!aside_.empty()) {
        Tree tree = std::move(aside_.back());
        aside_.pop_back();
        close_slot();
        grow(tree, split, finished, all);
        finished += tree.multiplicity;
        done.push_back(std::move(tree));
      }
    }
    return done;
  }

 private:
  int link(int u, int v, Int cap) {
    int half = static_cast<int>(to_.size());
    for (auto [a, b, c] : {std::tuple{u, v, cap}, std::tuple{v, u, Int{0}}}) {
      to_.push_back(b);
      base_.push_back(c);
      now_.push_back(c);
      out_[a].push_back(static_cast<int>(to_.size()) - 1);
    }
    return half;
  }
  void set(int half, Int cap) { base_[half] = now_[half] = cap; }

  // A vertex for a tree put aside: the source may reach all that the tree has, up to its multiplicity.
  void open_slot(const Tree &tree) {
    if (used_ == slots_.size()) {
      int vertex = static_cast<int>(out_.size());
      out_.emplace_back();
      level_.push_back(0);
      next_.push_back(0);
      Slot slot{link(source_, vertex, 0), std::vector<int>(n_, -1)};
      for (int v = 0; v < n_; v++)
        if (from_source_[v] >= 0) slot.to[v] = link(vertex, v, 0);
      slots_.push_back(std::move(slot));
    }
    Slot &slot = slots_[used_++];
    set(slot.from_source, tree.multiplicity);
    for (int v = 0; v < n_; v++)
      if (slot.to[v] >= 0) set(slot.to[v], tree.has[v] ? kInfinite : 0);
  }
  void close_slot() {
    if (used_ > aside_.size()) set(slots_[--used_].from_source, 0);
  }

  void grow(Tree &tree, const Splitter &split, Int finished, Int all) {
    rest_ -= tree.multiplicity;
    for (std::size_t at = 0; at < tree.vertices.size() && tree.vertices.size() < size_; at++) {
      int x = tree.vertices[at];
      std::vector<int> choice;
      for (int e : leaving_[x])
        if (!tree.has[split.head[e]] && base_[number_[e]] > 0) choice.push_back(e);
      std::stable_sort(choice.begin(), choice.end(), [&](int a, int b) { return base_[number_[a]] > base_[number_[b]]; });
      for (int e : choice) {
        tick_("pack", finished, all);
        Int most = std::min(tree.multiplicity, base_[number_[e]]);
        Int fits = spare(x, split.head[e], most);
        if (fits <= 0) continue;
        if (fits < tree.multiplicity) {
          Tree other = tree;
          other.multiplicity -= fits;
          rest_ += other.multiplicity;
          open_slot(other);
          aside_.push_back(std::move(other));
          tree.multiplicity = fits;
        }
        set(number_[e], base_[number_[e]] - fits);
        tree.arcs.push_back(e);
        tree.vertices.push_back(split.head[e]);
        tree.has[split.head[e]] = 1;
      }
    }
    if (tree.vertices.size() < size_) throw std::logic_error("a tree could not be completed");
  }

  // By how much the flow into y, with x free to draw from, exceeds what the other unfinished trees need; at most `most`.
  Int spare(int x, int y, Int most) {
    Int need = rest_, direct = 0;
    // Trees that have y already reach it by themselves.
    std::vector<std::pair<int, Int>> hushed;
    auto hush = [&](int half) {
      direct += base_[half];
      hushed.emplace_back(half, base_[half]);
      now_[half] = 0;
    };
    if (base_[from_source_[y]] > 0) hush(from_source_[y]);
    for (std::size_t i = 0; i < used_; i++)
      if (aside_[i].has[y]) hush(slots_[i].from_source);
    need -= direct;
    Int saved = now_[from_source_[x]];
    now_[from_source_[x]] = kInfinite;
    Int flow = 0;
    const Int limit = need + most;
    while (flow < limit && layer(y)) {
      std::fill(next_.begin(), next_.end(), 0);
      flow += push(source_, y, limit - flow);
    }
    for (int half : touched_) {
      now_[half] = base_[half];
      now_[half ^ 1] = base_[half ^ 1];
    }
    touched_.clear();
    now_[from_source_[x]] = saved;
    now_[from_source_[x] ^ 1] = 0;
    for (auto [half, cap] : hushed) now_[half] = cap;
    return std::min(most, flow - need);
  }

  bool layer(int sink) {
    std::fill(level_.begin(), level_.end(), -1);
    queue_.assign(1, source_);
    level_[source_] = 0;
    for (std::size_t done = 0; done < queue_.size(); done++) {
      int v = queue_[done];
      for (int half : out_[v])
        if (now_[half] > 0 && level_[to_[half]] < 0) {
          level_[to_[half]] = level_[v] + 1;
          if (to_[half] == sink) return true;
          queue_.push_back(to_[half]);
        }
    }
    return false;
  }

  Int push(int v, int sink, Int limit) {
    if (v == sink) return limit;
    Int sent = 0;
    for (int &i = next_[v]; i < static_cast<int>(out_[v].size()); i++) {
      int half = out_[v][i];
      if (now_[half] <= 0 || level_[to_[half]] != level_[v] + 1) continue;
      Int some = push(to_[half], sink, std::min(limit - sent, now_[half]));
      if (some == 0) continue;
      touched_.push_back(half);
      now_[half] -= some;
      now_[half ^ 1] += some;
      sent += some;
      if (sent == limit) return sent;
    }
    level_[v] = -1;
    return sent;
  }

  struct Slot {
    int from_source;
    std::vector<int> to;
  };

  const Tick &tick_;
  int n_, source_;
  std::size_t size_;
  Ints waiting_;
  Int rest_ = 0;  // multiplicity of all unfinished trees but the one in hand
  std::vector<int> to_, number_, from_source_, touched_, queue_;
  Ints base_, now_;
  std::vector<std::vector<int>> out_;
  std::vector<int> level_, next_;
  std::unordered_map<int, std::vector<int>> leaving_;
  std::vector<Slot> slots_;
  std::size_t used_ = 0;
  std::vector<Tree> aside_;  // aside_[i] owns slots_[i]
};

// Gives every arc of every tree one physical path; a tree whose arcs need several is dealt out over copies.
Trees route(const std::vector<Tree> &trees, Splitter &split) {
  Trees flat;
  for (const Tree &tree : trees)
    for (Int rest = tree.multiplicity; rest > 0;) {
      Int some = rest;
      std::vector<Splitter::Piece *> chosen;
      for (int e : tree.arcs) {
        // The smallest piece that carries everything, or the largest.
        Splitter::Piece *best = nullptr;
        for (auto &piece : split.pieces[e]) {
          if (piece.amount == 0) continue;
          bool better = best == nullptr || (best->amount >= rest ? piece.amount >= rest && piece.amount < best->amount
                                                                  : piece.amount > best->amount);
          if (better) best = &piece;
        }
        chosen.push_back(best);
        some = std::min(some, best->amount);
      }
      for (std::size_t i = 0; i < chosen.size(); i++) {
        chosen[i]->amount -= some;
        flat.edge_tail.push_back(split.tail[tree.arcs[i]]);
        flat.edge_head.push_back(split.head[tree.arcs[i]]);
        flat.path.insert(flat.path.end(), chosen[i]->path.begin(), chosen[i]->path.end());
        flat.path_start.push_back(static_cast<Int>(flat.path.size()));
      }
      flat.root.push_back(tree.root);
      flat.multiplicity.push_back(some);
      flat.edge_start.push_back(static_cast<Int>(flat.edge_tail.size()));
      rest -= some;
    }
  return flat;
}

}  // namespace

Trees pack_trees(const Network &net, const Ints &weight, const std::vector<int> &terminals, Deal deal, const Tick &tick) {
  std::vector<char> spanned(net.n, 0);
  for (int v : terminals) spanned[v] = 1;
  std::vector<int> switches;
  for (int v = 0; v < net.n; v++)
    if (!spanned[v]) switches.push_back(v);
  Splitter split(net, weight, terminals, tick);
  split.run(switches, deal);
  Packer packer(split, net.n, weight, terminals, tick);
  return route(packer.run(split), split);
}

}  // namespace forest

#include "forest/forest.hpp"

#include <algorithm>
#include <numeric>
#include <set>

namespace forest {

int MaxFlow::add(int tail, int head) {
  tail_.push_back(tail);
  head_.push_back(head);
  tail_.push_back(head);
  head_.push_back(tail);
  return static_cast<int>(tail_.size() / 2) - 1;
}

void MaxFlow::freeze() {
  std::fill(first_.begin(), first_.end(), 0);
  for (int t : tail_) first_[t + 1]++;
  std::partial_sum(first_.begin(), first_.end(), first_.begin());
  out_.resize(tail_.size());
  std::vector<int> place(first_.begin(), first_.end() - 1);
  for (int half = 0; half < static_cast<int>(tail_.size()); half++) out_[place[tail_[half]]++] = half;
  residual_.assign(tail_.size(), 0);
  level_.resize(n_);
  next_.resize(n_);
  queue_.resize(n_);
}

bool MaxFlow::layer(int source, int sink) {
  std::fill(level_.begin(), level_.end(), -1);
  int done = 0, filled = 0;
  queue_[filled++] = source;
  level_[source] = 0;
  while (done < filled) {
    int v = queue_[done++];
    for (int i = first_[v]; i < first_[v + 1]; i++) {
      int half = out_[i], to = head_[half];
      if (residual_[half] > 0 && level_[to] < 0) {
        level_[to] = level_[v] + 1;
        if (to == sink) return true;
        queue_[filled++] = to;
      }
    }
  }
  return false;
}

Int MaxFlow::push(int v, int sink, Int limit) {
  if (v == sink) return limit;
  Int sent = 0;
  for (int &i = next_[v]; i < first_[v + 1]; i++) {
    int half = out_[i], to = head_[half];
    if (residual_[half] <= 0 || level_[to] != level_[v] + 1) continue;
    Int some = push(to, sink, std::min(limit - sent, residual_[half]));
    if (some == 0) continue;
    residual_[half] -= some;
    residual_[half ^ 1] += some;
    sent += some;
    if (sent == limit) return sent;
  }
  level_[v] = -1;
  return sent;
}

Int MaxFlow::run(int source, int sink, Int limit) {
  Int total = 0;
  while (total < limit && layer(source, sink)) {
    std::copy(first_.begin(), first_.end() - 1, next_.begin());
    total += push(source, sink, limit - total);
  }
  return total;
}

std::vector<char> MaxFlow::source_side(int source) const {
  std::vector<char> seen(n_, 0);
  std::vector<int> stack{source};
  seen[source] = 1;
  while (!stack.empty()) {
    int v = stack.back();
    stack.pop_back();
    for (int i = first_[v]; i < first_[v + 1]; i++)
      if (residual_[out_[i]] > 0 && !seen[head_[out_[i]]]) {
        seen[head_[out_[i]]] = 1;
        stack.push_back(head_[out_[i]]);
      }
  }
  return seen;
}

namespace {

// The network with a super-source n; its arcs are numbered first the network's, then one for each vertex with weight.
struct Rooted {
  Rooted(const Network &net, const Ints &weight) : net(net), weight(weight), flow(net.n + 1) {
    for (int e = 0; e < net.arcs(); e++) flow.add(net.tail[e], net.head[e]);
    for (int v = 0; v < net.n; v++)
      if (weight[v] > 0) {
        flow.add(net.n, v);
        roots.push_back(v);
      }
    flow.freeze();
  }

  // Flow into `sink` with the network's capacities times p and the weights times q.
  Int run(int sink, Int p, Int q, Int limit) {
    for (int e = 0; e < net.arcs(); e++) flow.set(e, net.cap[e] * p);
    for (std::size_t i = 0; i < roots.size(); i++) flow.set(net.arcs() + static_cast<int>(i), weight[roots[i]] * q);
    return flow.run(net.n, sink, limit);
  }

  const Network &net;
  const Ints &weight;
  MaxFlow flow;
  std::vector<int> roots;
};

}  // namespace

Bound search(const Network &net, const Ints &weight, const std::vector<int> &sinks, const Tick &tick) {
  const Int total = std::accumulate(weight.begin(), weight.end(), Int{0});
  Ints in(net.n, 0);
  Wide everything = 0;
  for (int e = 0; e < net.arcs(); e++) {
    in[net.head[e]] = checked(Wide(in[net.head[e]]) + net.cap[e]);
    everything += net.cap[e];
  }
  checked(everything * total);  // bounds every flow and every product below
  Bound best;
  auto raise = [&](Int p, Int q, auto &&make_cut) {
    if (Wide(p) * best.q <= Wide(best.p) * q) return false;
    Int g = std::gcd(p, q);
    best.p = p / g;
    best.q = q / g;
    best.cut = make_cut();
    return true;
  };
  for (int v : sinks)
    raise(total - weight[v], in[v], [&] {
      std::vector<char> cut(net.n, 1);
      cut[v] = 0;
      return cut;
    });
  Rooted rooted(net, weight);
  std::size_t passed = 0, at = 0;
  while (passed < sinks.size() && best.q > 0) {
    tick("search", static_cast<Int>(passed), static_cast<Int>(sinks.size()));
    const Int need = checked(Wide(total) * best.q);
    best.maxflows++;
    if (rooted.run(sinks[at], best.p, best.q, need) < need) {
      std::vector<char> side = rooted.flow.source_side(net.n);
      side.pop_back();
      Int inside = 0, out = 0;
      for (int v = 0; v < net.n; v++) inside += side[v] ? weight[v] : 0;
      for (int e = 0; e < net.arcs(); e++) out += side[net.tail[e]] && !side[net.head[e]] ? net.cap[e] : 0;
      if (!raise(inside, out, [&] { return side; })) throw std::logic_error("a violated cut did not raise the bound");
      passed = 0;
    } else {
      passed++;
      at = (at + 1) % sinks.size();
    }
  }
  return best;
}

std::vector<std::vector<char>> violated_cuts(const Network &net, const Ints &weight, const std::vector<int> &sinks,
                                             Int need, bool all, const Tick &tick) {
  Rooted rooted(net, weight);
  std::set<std::vector<char>> found;
  for (std::size_t i = 0; i < sinks.size(); i++) {
    tick("cuts", static_cast<Int>(i), static_cast<Int>(sinks.size()));
    if (rooted.run(sinks[i], 1, 1, need) >= need) continue;
    std::vector<char> side = rooted.flow.source_side(net.n);
    side.pop_back();
    found.insert(std::move(side));
    if (!all) break;
  }
  return {found.begin(), found.end()};
}

Ints balanced(const Network &net, const std::vector<char> &through, const Tick &tick) {
  tick("balance", 0, 1);
  // All vertices but the ones to balance are one source for what they send and one sink for what they take.
  const int source = net.n, sink = net.n + 1;
  MaxFlow flow(net.n + 2);
  for (int e = 0; e < net.arcs(); e++)
    flow.add(through[net.tail[e]] ? net.tail[e] : source, through[net.head[e]] ? net.head[e] : sink);
  flow.freeze();
  for (int e = 0; e < net.arcs(); e++) flow.set(e, net.cap[e]);
  flow.run(source, sink, kInfinite);
  Ints used(net.arcs());
  for (int e = 0; e < net.arcs(); e++) used[e] = net.cap[e] - flow.residual(e);
  return used;
}

}  // namespace forest

#include "forest/split.hpp"

#include <algorithm>
#include <numeric>

namespace forest {

Splitter::Splitter(const Network &net, const Ints &weight, const std::vector<int> &sinks, const Tick &tick)
    : n_(net.n), source_(net.n), sinks_(sinks), tick_(tick), out_(net.n + 1), in_(net.n + 1), seen_(net.n + 1, 0),
      via_(net.n + 1), queue_(net.n + 1) {
  for (int e = 0; e < net.arcs(); e++)
    if (net.cap[e] > 0) {
      int arc = arc_between(net.tail[e], net.head[e]);
      cap[arc] += net.cap[e];
      pieces[arc].push_back({{net.tail[e], net.head[e]}, net.cap[e]});
    }
  for (int v = 0; v < n_; v++)
    if (weight[v] > 0) cap[arc_between(source_, v)] = weight[v];
  total_ = std::accumulate(weight.begin(), weight.end(), Int{0});
}

int Splitter::arc_between(int u, int v) {
  auto [slot, fresh] = number_.try_emplace(Int(u) * (n_ + 1) + v, static_cast<int>(tail.size()));
  if (fresh) {
    tail.push_back(u);
    head.push_back(v);
    cap.push_back(0);
    pieces.emplace_back();
    out_[u].push_back(slot->second);
    in_[v].push_back(slot->second);
  }
  return slot->second;
}

// Moves up to `limit` from `from` to `to` in the residual graph of one sink's flow; the amount moved.
Int Splitter::augment(Ints &flow, int from, int to, Int limit) {
  Int moved = 0;
  while (moved < limit) {
    stamp_++;
    int done = 0, filled = 0;
    queue_[filled++] = from;
    seen_[from] = stamp_;
    bool found = false;
    auto visit = [&](int v, int half) {
      if (seen_[v] == stamp_) return;
      seen_[v] = stamp_;
      via_[v] = half;
      queue_[filled++] = v;
      found = found || v == to;
    };
    while (done < filled && !found) {
      int v = queue_[done++];
      for (int e : out_[v])
        if (flow[e] < cap[e]) visit(head[e], 2 * e);
      for (int e : in_[v])
        if (flow[e] > 0) visit(tail[e], 2 * e + 1);
    }
    if (!found) break;
    Int most = limit - moved;
    for (int v = to; v != from;) {
      int e = via_[v] >> 1;
      bool back = via_[v] & 1;
      most = std::min(most, back ? flow[e] : cap[e] - flow[e]);
      v = back ? head[e] : tail[e];
    }
    for (int v = to; v != from;) {
      int e = via_[v] >> 1;
      bool back = via_[v] & 1;
      put(flow, e, flow[e] + (back ? -most : most));
      v = back ? head[e] : tail[e];
    }
    moved += most;
  }
  return moved;
}

void Splitter::put(Ints &flow, int e, Int value) {
  if (&flow == journal_of_) journal_.emplace_back(e, flow[e]);
  flow[e] = value;
}

// Brings one sink's flow back within the capacities after (a, b) gave way to c; what of its value was lost.
Int Splitter::repair(Ints &flow, int sink, int a, int b, int c) {
  Int over = std::max(flow[a] - cap[a], flow[b] - cap[b]);
  if (over <= 0) return 0;
  Int moved = std::min({over, flow[a], flow[b]});
  if (c >= 0) moved = std::min(moved, cap[c] - flow[c]);
  put(flow, a, flow[a] - moved);
  put(flow, b, flow[b] - moved);
  if (c >= 0) put(flow, c, flow[c] + moved);
  Int lost = 0;
  for (int e : {a, b}) {
    Int excess = flow[e] - cap[e];
    if (excess <= 0) continue;
    put(flow, e, cap[e]);
    Int rest = excess - augment(flow, tail[e], head[e], excess);
    if (rest == 0) continue;
    // Take the rest out of the flow: back from the tail to the source, and from the sink back to the head.
    if (tail[e] != source_) augment(flow, tail[e], source_, rest);
    if (head[e] != sink) augment(flow, sink, head[e], rest);
    lost += rest;
  }
  return lost > 0 ? lost - augment(flow, source_, sink, lost) : 0;
}

// Replaces up to `amount` of a = (u, w), b = (w, t) by (u, t), as much as keeps every sink's flow; the amount.
Int Splitter::split(int a, int b, Int amount) {
  const int u = tail[a], t = head[b];
  const int c = u == t ? -1 : arc_between(u, t);
  auto change = [&](Int by) {
    cap[a] -= by;
    cap[b] -= by;
    if (c >= 0) cap[c] += by;
  };
  change(amount);
  Int deficit = 0;
  std::vector<std::pair<std::size_t, std::vector<std::pair<int, Int>>>> undo;
  for (std::size_t i = 0; i < sinks_.size() && deficit < amount; i++) {
    tick_("split", static_cast<Int>(i), static_cast<Int>(sinks_.size()));
    Ints &flow = flows_[i];
    flow.resize(tail.size(), 0);
    if (flow[a] <= cap[a] && flow[b] <= cap[b]) continue;
    journal_.clear();
    journal_of_ = &flow;
    deficit = std::max(deficit, repair(flow, sinks_[i], a, b, c));
    journal_of_ = nullptr;
    undo.emplace_back(i, journal_);
  }
  if (deficit > 0) {
    for (auto it = undo.rbegin(); it != undo.rend(); ++it)
      for (auto step = it->second.rbegin(); step != it->second.rend(); ++step) flows_[it->first][step->first] = step->second;
    change(-deficit);
    if (deficit < amount)
      for (std::size_t i = 0; i < sinks_.size(); i++) {
        flows_[i].resize(tail.size(), 0);
        if (repair(flows_[i], sinks_[i], a, b, c) > 0) throw std::logic_error("splitting lost a flow it had kept");
      }
  }
  const Int kept = amount - deficit;
  if (kept > 0) join(a, b, c, kept);
  return kept;
}

// The physical side of a split: `amount` of a's paths run on into b's.
void Splitter::join(int a, int b, int c, Int amount) {
  while (amount > 0) {
    Piece &left = pieces[a].back(), &right = pieces[b].back();
    Int some = std::min({amount, left.amount, right.amount});
    if (c >= 0) {
      std::vector<int> path = left.path;
      for (std::size_t i = 1; i < right.path.size(); i++) {
        // A path that comes back to a vertex skips the detour.
        auto again = std::find(path.begin(), path.end(), right.path[i]);
        if (again == path.end())
          path.push_back(right.path[i]);
        else
          path.erase(again + 1, path.end());
      }
      auto same = std::find_if(pieces[c].begin(), pieces[c].end(), [&](const Piece &p) { return p.path == path; });
      if (same != pieces[c].end())
        same->amount += some;
      else
        pieces[c].push_back({std::move(path), some});
    }
    amount -= some;
    if ((left.amount -= some) == 0) pieces[a].pop_back();
    if ((right.amount -= some) == 0) pieces[b].pop_back();
  }
}

void Splitter::remove_switch(int w, Deal deal) {
  const std::vector<int> in = in_[w], out = out_[w];
  if (deal != Deal::plain) {
    // Each sender gets its share of each receiver.
    Int sum = 0;
    for (int b : out) sum += cap[b];
    std::vector<std::vector<Int>> share(in.size(), std::vector<Int>(out.size(), 0));
    for (std::size_t i = 0; i < in.size(); i++) {
      Int own = 0;
      for (int b : out) own += head[b] == tail[in[i]] ? cap[b] : 0;
      for (std::size_t j = 0; j < out.size(); j++)
        if (head[out[j]] != tail[in[i]] && sum > own)
          share[i][j] = static_cast<Int>(Wide(cap[in[i]]) * cap[out[j]] / (sum - own));
    }
    for (std::size_t i = 0; i < in.size(); i++)
      for (std::size_t j = 0; j < out.size(); j++) {
        tick_("split", static_cast<Int>(i), static_cast<Int>(in.size()));
        Int amount = std::min({share[i][j], cap[in[i]], cap[out[j]]});
        if (amount > 0) split(in[i], out[j], amount);
      }
  }
  if (deal == Deal::round_robin)
    for (std::size_t shift = 1; shift <= out.size(); shift++)
      for (std::size_t i = 0; i < in.size(); i++) {
        tick_("split", static_cast<Int>(shift), static_cast<Int>(out.size()));
        int a = in[i], b = out[(i + shift) % out.size()];
        if (cap[a] > 0 && cap[b] > 0 && head[b] != tail[a]) split(a, b, 1);
      }
  for (std::size_t i = 0; i < in.size(); i++) {
    const int a = in[i];
    for (bool back : {false, true})
      for (int b : out)
        if ((head[b] == tail[a]) == back && cap[a] > 0 && cap[b] > 0) {
          tick_("split", static_cast<Int>(i), static_cast<Int>(in.size()));
          split(a, b, std::min(cap[a], cap[b]));
        }
    if (cap[a] > 0) throw std::logic_error("a switch could not be split off: its capacities are not balanced");
  }
}

void Splitter::run(const std::vector<int> &switches, Deal deal) {
  if (!switches.empty()) {
    flows_.assign(sinks_.size(), Ints(tail.size(), 0));
    for (std::size_t i = 0; i < sinks_.size(); i++) {
      tick_("flows", static_cast<Int>(i), static_cast<Int>(sinks_.size()));
      if (augment(flows_[i], source_, sinks_[i], total_) < total_)
        throw std::logic_error("the capacities do not carry the trees asked for");
    }
  }
  for (int w : switches) remove_switch(w, deal);
}

}  // namespace forest

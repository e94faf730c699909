#include "direct/direct.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <map>
#include <stdexcept>

namespace direct {

// Up to this in-degree every set of links is enumerated, which beats the flows.
constexpr int kEnumerated = 10;

InLinks::InLinks(int count, const int32_t* tail, const int32_t* head, size_t links) : nodes(count), first(count + 1) {
  // sorted by receiver, then by sender
  std::vector<int> start(count + 1), all(links);
  for (size_t i = 0; i < links; ++i) ++start[head[i]];
  std::partial_sum(start.begin(), start.end(), start.begin());
  for (size_t i = 0; i < links; ++i) all[--start[head[i]]] = tail[i];
  start[count] = static_cast<int>(links);
  sender.reserve(links), width.reserve(links);
  for (int u = 0; u < count; ++u) {
    std::sort(all.begin() + start[u], all.begin() + start[u + 1]);
    for (int i = start[u]; i < start[u + 1]; ++i) {
      if (all[i] == u) continue;
      if (static_cast<int>(sender.size()) > first[u] && sender.back() == all[i]) {
        ++width.back();
        continue;
      }
      sender.push_back(all[i]);
      width.push_back(1);
    }
    first[u + 1] = static_cast<int>(sender.size());
  }
}

void distances_to(const InLinks& graph, int u, std::vector<uint16_t>& distance) {
  distance.assign(graph.nodes, kFar);
  std::vector<int> queue{u};
  queue.reserve(graph.nodes);
  distance[u] = 0;
  for (size_t at = 0; at < queue.size(); ++at) {
    const int x = queue[at];
    for (int i = graph.first[x]; i < graph.first[x + 1]; ++i) {
      const int w = graph.sender[i];
      if (distance[w] != kFar) continue;
      distance[w] = distance[x] + 1;
      queue.push_back(w);
    }
  }
}

std::vector<std::vector<Group>> layers_of(const InLinks& graph, Distances& distances, int u) {
  const int begin = graph.first[u], links = graph.degree(u);
  const auto& far = distances.to(u);
  std::vector<const uint16_t*> before(links);
  for (int i = 0; i < links; ++i) before[i] = distances.to(graph.sender[begin + i]).data();
  int depth = 0;
  for (int v = 0; v < graph.nodes; ++v) {
    if (far[v] == kFar)
      throw std::invalid_argument("node " + std::to_string(v) + " does not reach node " + std::to_string(u));
    depth = std::max<int>(depth, far[v]);
  }
  std::vector<std::vector<Group>> layers(depth);
  // Where the sets of links are few they index a table; a map costs more than all the rest.
  const bool few = links <= kEnumerated;
  std::vector<int> table(few ? static_cast<size_t>(depth) << links : 0, -1);
  std::vector<std::map<std::vector<int>, int>> known(few ? 0 : depth);
  std::vector<int> usable;
  for (int v = 0; v < graph.nodes; ++v) {
    const int t = far[v];
    if (t == 0) continue;
    usable.clear();
    size_t set = 0;
    for (int i = 0; i < links; ++i)
      if (before[i][v] == t - 1) usable.push_back(i), set |= size_t{1} << (i & 63);
    auto& layer = layers[t - 1];
    int& place = few ? table[(static_cast<size_t>(t - 1) << links) + set] : known[t - 1].try_emplace(usable, -1).first->second;
    if (place < 0) {
      place = static_cast<int>(layer.size());
      layer.push_back({usable, {}});
    }
    layer[place].sources.push_back(v);
  }
  return layers;
}

namespace {

// Maximum flow from groups (supply[g]) over links (capacity[i]): augmenting paths found breadth first.
class Bipartite {
 public:
  Bipartite(const std::vector<Group>& groups, std::vector<int64_t> supply, std::vector<int64_t> capacity)
      : groups_(groups), supply_(std::move(supply)), room_(std::move(capacity)), users_(room_.size()) {
    share_.resize(groups.size());
    for (size_t g = 0; g < groups.size(); ++g) {
      share_[g].resize(groups[g].links.size());
      for (size_t i = 0; i < groups[g].links.size(); ++i) users_[groups[g].links[i]].emplace_back(g, i);
    }
  }

  // True where the whole supply fits.
  bool run() {
    bool whole = true;
    for (size_t g = 0; g < groups_.size(); ++g) {
      for (size_t i = 0; i < groups_[g].links.size() && supply_[g] > 0; ++i) {
        int64_t& room = room_[groups_[g].links[i]];
        const int64_t moved = std::min(supply_[g], room);
        share_[g][i] += moved, room -= moved, supply_[g] -= moved;
      }
      while (supply_[g] > 0 && augment(g)) {
      }
      whole = whole && supply_[g] == 0;
    }
    return whole;
  }

  // After an incomplete run: the links that the unserved groups reach in the residual network.
  std::vector<char> reached_links() {
    std::vector<char> reached(room_.size(), 0);
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (supply_[g] == 0) continue;
      search(g, -1);
      for (size_t i = 0; i < reached.size(); ++i) reached[i] |= from_group_[i] >= 0;
    }
    return reached;
  }

  std::vector<std::vector<int64_t>> take() { return std::move(share_); }

 private:
  // Breadth-first search from group g; stops at the first link with room if `goal` is null. from_group_[i] is the
  // group that reached link i, from_slot_[i] the slot of link i in that group, via_[h] the (link, slot) that
  // reached group h.
  int search(size_t g, int stop) {
    from_group_.assign(room_.size(), -1);
    from_slot_.assign(room_.size(), -1);
    via_.assign(groups_.size(), {-1, -1});
    std::vector<size_t> queue{g};
    via_[g] = {-2, -2};
    for (size_t at = 0; at < queue.size(); ++at) {
      const size_t h = queue[at];
      for (size_t i = 0; i < groups_[h].links.size(); ++i) {
        const int link = groups_[h].links[i];
        if (from_group_[link] >= 0) continue;
        from_group_[link] = static_cast<int>(h);
        from_slot_[link] = static_cast<int>(i);
        if (stop >= 0 && room_[link] > 0) return link;
        for (auto [user, slot] : users_[link])
          if (via_[user].first == -1 && share_[user][slot] > 0) {
            via_[user] = {link, static_cast<int>(slot)};
            queue.push_back(user);
          }
      }
    }
    return -1;
  }

  bool augment(size_t g) {
    const int end = search(g, 1);
    if (end < 0) return false;
    int64_t moved = std::min(supply_[g], room_[end]);
    for (int link = end, h = from_group_[end]; h != static_cast<int>(g); link = via_[h].first, h = from_group_[link])
      moved = std::min(moved, share_[h][via_[h].second]);
    room_[end] -= moved;
    supply_[g] -= moved;
    int link = end;
    while (true) {
      const int h = from_group_[link];
      share_[h][from_slot_[link]] += moved;
      if (h == static_cast<int>(g)) return true;
      share_[h][via_[h].second] -= moved;
      link = via_[h].first;
    }
  }

  const std::vector<Group>& groups_;
  std::vector<int64_t> supply_, room_;
  std::vector<std::vector<std::pair<size_t, size_t>>> users_;
  std::vector<std::vector<int64_t>> share_;
  std::vector<int> from_group_, from_slot_;
  std::vector<std::pair<int, int>> via_;
};

Ratio least_load_by_sets(const std::vector<Group>& groups, const int* width, int links) {
  std::array<int64_t, 1 << kEnumerated> inside, room;
  std::fill_n(inside.begin(), 1 << links, 0);
  for (const Group& group : groups) {
    int set = 0;
    for (int i : group.links) set |= 1 << i;
    inside[set] += static_cast<int64_t>(group.sources.size());
  }
  for (int i = 0; i < links; ++i)
    for (int set = 0; set < 1 << links; ++set)
      if (set >> i & 1) inside[set] += inside[set ^ (1 << i)];
  Ratio best;
  room[0] = 0;
  for (int set = 1; set < 1 << links; ++set) {
    room[set] = room[set & (set - 1)] + width[std::countr_zero(static_cast<unsigned>(set))];
    const Ratio load{inside[set], room[set]};
    if (best < load) best = load;
  }
  return reduced(best.top, best.bottom);
}

}  // namespace

Ratio least_load(const std::vector<Group>& groups, const int* width, int links) {
  if (links <= kEnumerated) return least_load_by_sets(groups, width, links);
  Ratio load;
  std::vector<char> chosen(links, 1);
  while (true) {
    int64_t inside = 0, room = 0;
    for (const Group& group : groups)
      if (std::all_of(group.links.begin(), group.links.end(), [&](int i) { return chosen[i]; }))
        inside += static_cast<int64_t>(group.sources.size());
    for (int i = 0; i < links; ++i) room += chosen[i] ? width[i] : 0;
    load = reduced(inside, room);
    std::vector<int64_t> supply, capacity;
    for (const Group& group : groups) supply.push_back(static_cast<int64_t>(group.sources.size()) * load.bottom);
    for (int i = 0; i < links; ++i) capacity.push_back(load.top * width[i]);
    Bipartite flow(groups, std::move(supply), std::move(capacity));
    if (flow.run()) return load;
    chosen = flow.reached_links();
  }
}

std::vector<std::vector<int64_t>> split(
    const std::vector<Group>& groups, const int* width, int links, int64_t unit, int64_t limit) {
  std::vector<int64_t> supply, capacity;
  for (const Group& group : groups) supply.push_back(static_cast<int64_t>(group.sources.size()) * unit);
  for (int i = 0; i < links; ++i) capacity.push_back(limit * width[i]);
  Bipartite flow(groups, std::move(supply), std::move(capacity));
  if (!flow.run()) throw std::logic_error("the links are too narrow for one step of the schedule");
  return flow.take();
}

}  // namespace direct

#include <algorithm>
#include <numeric>
#include <unordered_set>

#include "forest/forest.hpp"

// Symmetry of regular fabrics. Real fabrics are numbered by their levels (pod, box, device), so their symmetries are
// looked for where they are: rotations and swaps of equal blocks of consecutive compute nodes. Every one is checked on
// every arc before it is believed.
namespace forest {
namespace {

using Permutation = std::vector<int>;
using Hash = std::uint64_t;

Hash mix(Hash x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

class Checker {
 public:
  Checker(const Network &net, const Ints &colour, const std::vector<int> &compute)
      : net_(net), colour_(colour), compute_(compute), rank_(net.n, -1) {
    for (std::size_t i = 0; i < compute.size(); i++) rank_[compute[i]] = static_cast<int>(i);
    for (int v = 0; v < net.n; v++)
      if (rank_[v] < 0) switches_.push_back(v);
    for (int e = 0; e < net.arcs(); e++) keys_.push_back({key(net.tail[e], net.head[e]), e});
    std::sort(keys_.begin(), keys_.end());
    Ints same(compute.size());
    std::iota(same.begin(), same.end(), 0);
    plain_ = hashes(same);
  }

  // The permutation of all vertices that takes compute node i to image[i], or nothing if the network forbids it.
  Permutation extend(const Ints &image) const {
    Permutation whole(net_.n);
    Ints origin(image.size());
    for (std::size_t i = 0; i < image.size(); i++) {
      const int from = compute_[i], to = compute_[image[i]];
      if (colour_[from] != colour_[to]) return {};
      whole[from] = to;
      origin[image[i]] = static_cast<Int>(i);
    }
    if (!switches_.empty()) {
      // A switch goes where its neighbours go: equal hashes under the old and the new names of the compute nodes.
      const std::vector<Hash> moved = hashes(origin);
      std::vector<int> before = switches_, after = switches_;
      std::stable_sort(before.begin(), before.end(), [&](int a, int b) { return plain_[a] < plain_[b]; });
      std::stable_sort(after.begin(), after.end(), [&](int a, int b) { return moved[a] < moved[b]; });
      for (std::size_t i = 0; i < before.size(); i++) {
        if (plain_[before[i]] != moved[after[i]] || colour_[before[i]] != colour_[after[i]]) return {};
        whole[before[i]] = after[i];
      }
    }
    for (int e = 0; e < net_.arcs(); e++) {
      const int other = arc(whole[net_.tail[e]], whole[net_.head[e]]);
      if (other < 0 || net_.cap[other] != net_.cap[e]) return {};
    }
    return whole;
  }

  int arc(int u, int v) const {
    auto it = std::lower_bound(keys_.begin(), keys_.end(), std::pair{key(u, v), -1});
    return it != keys_.end() && it->first == key(u, v) ? it->second : -1;
  }

 private:
  Int key(int u, int v) const { return Int(u) * net_.n + v; }

  std::vector<Hash> hashes(const Ints &name) const {
    std::vector<Hash> now(net_.n), next;
    for (int v = 0; v < net_.n; v++) now[v] = mix(Hash(rank_[v] >= 0 ? name[rank_[v]] + 1 : 0) ^ mix(Hash(colour_[v])));
    // Compute nodes keep their names; a switch is known by what it reaches within four links.
    for (int round = 0; round < 4; round++) {
      next = now;
      for (int e = 0; e < net_.arcs(); e++) {
        const int u = net_.tail[e], v = net_.head[e];
        if (rank_[v] < 0) next[v] += mix(now[u] * 3 + Hash(net_.cap[e]));
        if (rank_[u] < 0) next[u] += mix(now[v] * 5 + Hash(net_.cap[e]));
      }
      for (int v : switches_) next[v] = mix(next[v]);
      now.swap(next);
    }
    return now;
  }

  const Network &net_;
  const Ints &colour_;
  const std::vector<int> &compute_;
  std::vector<int> rank_, switches_;
  std::vector<std::pair<Int, int>> keys_;
  std::vector<Hash> plain_;
};

std::vector<Int> divisors(Int n) {
  std::vector<Int> found;
  for (Int d = 1; d <= n; d++)
    if (n % d == 0) found.push_back(d);
  return found;
}

Ints rotation(Int size, Int shift, Int block) {
  Ints image(size);
  for (Int i = 0; i < size; i++) image[i] = i / block * block + (i % block + shift) % block;
  return image;
}

Permutation after(const Permutation &first, const Permutation &second) {
  Permutation both(first.size());
  for (std::size_t v = 0; v < first.size(); v++) both[v] = second[first[v]];
  return both;
}

int find(std::vector<int> &parent, int x) {
  while (parent[x] != x) x = parent[x] = parent[parent[x]];
  return x;
}

std::vector<int> numbered(std::vector<int> &parent) {
  std::vector<int> number(parent.size()), seen(parent.size(), -1);
  int count = 0;
  for (std::size_t x = 0; x < parent.size(); x++) {
    const int top = find(parent, static_cast<int>(x));
    if (seen[top] < 0) seen[top] = count++;
    number[x] = seen[top];
  }
  return number;
}

}  // namespace

Symmetry free_rotations(const Network &net, const Ints &colour, const std::vector<int> &compute, const Tick &tick) {
  Checker checker(net, colour, compute);
  const Int size = static_cast<Int>(compute.size());
  Permutation identity(net.n);
  std::iota(identity.begin(), identity.end(), 0);
  Symmetry symmetry{{identity}};
  auto &group = symmetry.group;
  std::vector<Permutation> generators;
  for (Int block : divisors(size))
    for (Int shift : divisors(block)) {
      if (shift == block || static_cast<Int>(group.size()) == size) continue;
      tick("symmetry", block, size);
      const Ints image = rotation(size, shift, block);
      bool known = std::any_of(group.begin(), group.end(), [&](const Permutation &g) { return g[compute[0]] == compute[image[0]]; });
      if (known) continue;
      const Permutation step = checker.extend(image);
      if (step.empty()) continue;
      if (std::any_of(generators.begin(), generators.end(), [&](const Permutation &g) { return after(g, step) != after(step, g); }))
        continue;
      // The commuting step adds its powers' cosets until a power is in the group; no element may hold a node still.
      std::vector<Permutation> larger = group;
      bool moves = true;
      for (Permutation power = step; moves && std::find(group.begin(), group.end(), power) == group.end(); power = after(power, step))
        for (const Permutation &g : group) {
          Permutation element = after(g, power);
          moves = moves && std::none_of(compute.begin(), compute.end(), [&](int v) { return element[v] == v; });
          if (!moves) break;
          larger.push_back(std::move(element));
        }
      if (!moves) continue;
      group = std::move(larger);
      generators.push_back(step);
    }
  return symmetry;
}

Orbits orbits(const Network &net, const Ints &colour, const std::vector<int> &compute, const Tick &tick) {
  Checker checker(net, colour, compute);
  const Int size = static_cast<Int>(compute.size());
  std::vector<int> arc(net.arcs()), vertex(net.n);
  std::iota(arc.begin(), arc.end(), 0);
  std::iota(vertex.begin(), vertex.end(), 0);
  auto unite = [&](const Ints &image) {
    const Permutation whole = checker.extend(image);
    if (whole.empty()) return false;
    for (int e = 0; e < net.arcs(); e++) arc[find(arc, e)] = find(arc, checker.arc(whole[net.tail[e]], whole[net.head[e]]));
    for (int v = 0; v < net.n; v++) vertex[find(vertex, v)] = find(vertex, whole[v]);
    return true;
  };
  for (Int block : divisors(size))
    for (Int shift : divisors(block))
      if (shift < block) unite(rotation(size, shift, block));
  for (Int block : divisors(size)) {
    std::vector<Int> kinds;  // one block of each kind met so far
    for (Int at = 0; at < size / block; at++) {
      tick("symmetry", at, size / block);
      auto swapped = [&](Int other) {
        Ints image(size);
        std::iota(image.begin(), image.end(), 0);
        for (Int i = 0; i < block; i++) {
          image[at * block + i] = other * block + i;
          image[other * block + i] = at * block + i;
        }
        return unite(image);
      };
      if (kinds.size() < 4 && std::none_of(kinds.begin(), kinds.end(), swapped)) kinds.push_back(at);
    }
  }
  return {numbered(arc), numbered(vertex)};
}

}  // namespace forest

#pragma once

#include <unordered_map>
#include <utility>

#include "forest/forest.hpp"

namespace forest {

// Removes switches by splitting pairs of arcs while N persistent flows witness that every sink still gets everything.
class Splitter {
 public:
  struct Piece {
    std::vector<int> path;  // physical vertices
    Int amount;
  };

  Splitter(const Network &net, const Ints &weight, const std::vector<int> &sinks, const Tick &tick);
  void run(const std::vector<int> &switches, Deal deal);
  int source() const { return source_; }

  // Arcs by number; what was split off keeps its number at capacity 0.
  std::vector<int> tail, head;
  Ints cap;
  std::vector<std::vector<Piece>> pieces;

 private:
  int arc_between(int u, int v);
  Int augment(Ints &flow, int from, int to, Int limit);
  void put(Ints &flow, int e, Int value);
  Int repair(Ints &flow, int sink, int a, int b, int c);
  Int split(int a, int b, Int amount);
  void join(int a, int b, int c, Int amount);
  void remove_switch(int w, Deal deal);

  int n_, source_;
  Int total_ = 0;
  const std::vector<int> &sinks_;
  const Tick &tick_;
  std::unordered_map<Int, int> number_;
  std::vector<std::vector<int>> out_, in_;
  std::vector<Ints> flows_;
  std::vector<int> seen_, via_, queue_;
  int stamp_ = 0;
  Ints *journal_of_ = nullptr;
  std::vector<std::pair<int, Int>> journal_;
};

}  // namespace forest

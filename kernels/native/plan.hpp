#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace paged {

// Index arrays as `_tables.Tables` describes them.
struct Tables {
  std::span<const int32_t> qo_indptr, kv_indptr, kv_indices, last_page_len;

  int requests() const { return static_cast<int>(qo_indptr.size()) - 1; }
  int queries(int i) const { return qo_indptr[i + 1] - qo_indptr[i]; }
  int pages(int i) const { return kv_indptr[i + 1] - kv_indptr[i]; }
};

// `_plan_reference.Shape`.
struct Shape {
  int page_size, num_pages, group, kv_heads;
  bool causal;
  int window, bm, bn, workers;
  bool share;
};

// Tokens [first, first + count) over blocks [lo, hi) of the keys of a request.
struct Segment {
  int first, count, request, lo, hi;
};

// A piece before it is cut and given a head.
struct Tile {
  int first, count, page, keys, lo, full_lo, full_hi, hi;
};

// A plan's arrays, whose memory is kept from plan to plan; what they hold stands in `_plan_reference.Plan`.
class Planner {
public:
  // Throws std::invalid_argument on tables that a kernel could not follow.
  void plan(const Tables &tables, const Shape &shape);

  std::vector<int32_t> worker_indptr, pieces, tokens, merge_indptr, merge_rows;
  int rows = 0;

private:
  void check(const Tables &tables, const Shape &shape);
  void segment(const Tables &tables, const Shape &shape);
  void divide(const Tables &tables, const Shape &shape, int first, int last, int lo);
  void tile(const Tables &tables, const Shape &shape);
  void cut(const Tables &tables, const Shape &shape);

  std::vector<int32_t> lengths_, alike_, stands_, covers_, counts_;
  std::vector<Segment> segments_;
  std::vector<Tile> tiles_;
};

}  // namespace paged

#include "plan.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace paged {
namespace {

constexpr int START = 3;    // _plan_reference.START
constexpr int PIECE = 12;   // _plan_reference.PIECE

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

int clip(int x, int lo, int hi) { return std::max(lo, std::min(x, hi)); }

std::string str(int64_t x) { return std::to_string(x); }

[[noreturn]] void refuse(const std::string &text) { throw std::invalid_argument(text); }

void check_rises(const char *name, std::span<const int32_t> x) {
  if (x[0] != 0) refuse(std::string(name) + " must begin with 0, got " + str(x[0]));
  for (size_t i = 0; i + 1 < x.size(); ++i)
    if (x[i + 1] < x[i])
      refuse(std::string(name) + " must not fall, got " + str(x[i]) + " and then " + str(x[i + 1]) + " at request " + str(i));
}

}  // namespace

void Planner::check(const Tables &t, const Shape &s) {
  const size_t B = t.qo_indptr.size() - 1;
  if (t.qo_indptr.empty() || t.kv_indptr.size() != B + 1 || t.last_page_len.size() != B)
    refuse("qo_indptr and kv_indptr must have one number more than there are requests and kv_last_page_len as many, got " +
           str(t.qo_indptr.size()) + ", " + str(t.kv_indptr.size()) + " and " + str(t.last_page_len.size()));
  check_rises("qo_indptr", t.qo_indptr);
  check_rises("kv_indptr", t.kv_indptr);
  if (static_cast<size_t>(t.kv_indptr[B]) != t.kv_indices.size())
    refuse("kv_indptr must end at the " + str(t.kv_indices.size()) + " numbers of kv_indices, got " + str(t.kv_indptr[B]));
  // Without a branch for each, which a compiler makes wide; where one is wrong, look for it.
  const uint32_t most = static_cast<uint32_t>(s.num_pages);
  bool wrong = false;
  for (const int32_t page : t.kv_indices) wrong |= static_cast<uint32_t>(page) >= most;
  if (wrong) {
    size_t i = 0;
    while (static_cast<uint32_t>(t.kv_indices[i]) < most) ++i;
    const auto after = std::upper_bound(t.kv_indptr.begin(), t.kv_indptr.end(), static_cast<int32_t>(i));
    refuse("kv_indices must name pages from 0 to " + str(s.num_pages - 1) + ", got " + str(t.kv_indices[i]) + " at " + str(i) +
           " (request " + str(after - t.kv_indptr.begin() - 1) + ")");
  }
  for (size_t i = 0; i < B; ++i)
    if (t.pages(static_cast<int>(i)) > 0 && (t.last_page_len[i] < 1 || t.last_page_len[i] > s.page_size))
      refuse("kv_last_page_len must be 1 to page_size = " + str(s.page_size) + " keys, got " + str(t.last_page_len[i]) +
             " at request " + str(i));
}

void Planner::segment(const Tables &t, const Shape &s) {
  const int B = t.requests();
  lengths_.resize(B);
  for (int i = 0; i < B; ++i)
    lengths_[i] = t.pages(i) > 0 ? (t.pages(i) - 1) * s.page_size + t.last_page_len[i] : 0;
  alike_.assign(B, 0);
  for (int i = 1; s.share && i < B; ++i) {
    if (t.queries(i - 1) == 0 || t.queries(i) == 0) continue;
    const int n = std::min(t.pages(i - 1), t.pages(i));
    const auto a = t.kv_indices.begin() + t.kv_indptr[i - 1], b = t.kv_indices.begin() + t.kv_indptr[i];
    const int pages = static_cast<int>(std::mismatch(a, a + n, b).first - a);
    int sees = pages * s.page_size;
    // What every query of both sees wholly.
    for (int r = i - 1; r <= i; ++r) sees = std::min(sees, lengths_[r] - (s.causal ? t.queries(r) - 1 : 0));
    alike_[i] = std::max(0, sees) / s.bn;
  }
  segments_.clear();
  int begin = 0;
  for (int i = 1; i <= B; ++i)
    if (i == B || alike_[i] == 0) {
      divide(t, s, begin, i, 0);
      begin = i;
    }
}

void Planner::divide(const Tables &t, const Shape &s, int first, int last, int lo) {
  const int start = t.qo_indptr[first], count = t.qo_indptr[last] - start;
  if (last - first == 1) {
    segments_.push_back({start, count, first, lo, ceil_div(lengths_[first], s.bn)});
    return;
  }
  const int common = *std::min_element(alike_.begin() + first + 1, alike_.begin() + last);
  const int tiles = ceil_div(count, s.bm / s.group);
  // Shared if it spares more blocks than it adds parts to merge.
  const bool shared = static_cast<int64_t>(last - first - tiles) * (common - lo) >= last - first + tiles;
  if (shared) segments_.push_back({start, count, first, lo, common});
  int begin = first;
  for (int i = first + 1; i <= last; ++i)
    if (i == last || alike_[i] <= common) {
      divide(t, s, begin, i, shared ? common : lo);
      begin = i;
    }
}

void Planner::tile(const Tables &t, const Shape &s) {
  const int B = t.requests(), T = t.qo_indptr[B], step = s.bm / s.group;
  stands_.resize(T);
  tokens.resize(static_cast<size_t>(T) * 3);
  for (int b = 0, at = 0; b < B; ++b)
    for (int i = 0; i < t.queries(b); ++i, ++at) {
      const int off = lengths_[b] - t.queries(b);
      stands_[at] = i + off;
      tokens[3 * at] = b;
      tokens[3 * at + 1] = i;
      tokens[3 * at + 2] = off;
    }
  covers_.assign(T, 0);
  tiles_.clear();
  for (const Segment &g : segments_) {
    const int keys = lengths_[g.request], end = g.first + g.count;
    for (int first = g.first; first < end; first += step) {
      const int count = std::min(step, end - first);
      const auto [low, high] = std::minmax_element(stands_.begin() + first, stands_.begin() + first + count);
      int lo = 0, full_lo = 0, full_hi = keys / s.bn, hi = ceil_div(keys, s.bn);
      if (s.causal) {
        full_hi = std::max(*low + 1, 0) / s.bn;
        hi = ceil_div(std::max(*high + 1, 0), s.bn);
      }
      if (s.window > 0) {
        lo = std::max(*low - s.window + 1, 0) / s.bn;
        full_lo = ceil_div(std::max(*high - s.window + 1, 0), s.bn);
        if (!s.causal) {
          full_hi = std::max(*low + s.window, 0) / s.bn;
          hi = ceil_div(std::max(*high + s.window, 0), s.bn);
        }
      }
      full_hi = std::min(full_hi, keys / s.bn);
      hi = std::min(hi, ceil_div(keys, s.bn));
      lo = clip(lo, g.lo, g.hi);
      hi = clip(hi, lo, g.hi);
      full_lo = clip(full_lo, lo, hi);
      full_hi = clip(full_hi, full_lo, hi);
      tiles_.push_back({first, count, t.kv_indptr[g.request], keys, lo, full_lo, full_hi, hi});
      for (int i = 0; i < count; ++i) ++covers_[first + i];
    }
  }
}

void Planner::cut(const Tables &t, const Shape &s) {
  const int T = t.qo_indptr[t.requests()];
  int64_t blocks = 0;
  for (const Tile &x : tiles_) blocks += x.hi - x.lo;
  blocks *= s.kv_heads;
  // Every cut adds a piece.
  const int64_t starts = static_cast<int64_t>(s.kv_heads) * static_cast<int64_t>(tiles_.size()) + s.workers;
  const int budget = std::max(START + 1, ceil_div(blocks + START * starts, s.workers));
  pieces.clear();
  worker_indptr.clear();
  worker_indptr.push_back(0);
  counts_.assign(static_cast<size_t>(T) * s.kv_heads, 0);
  int left = budget, made = 0;
  rows = 0;
  for (const Tile &x : tiles_) {
    const bool alone = *std::max_element(covers_.begin() + x.first, covers_.begin() + x.first + x.count) == 1;
    for (int head = 0; head < s.kv_heads; ++head) {
      int at = x.lo;
      do {
        if (left <= START && static_cast<int>(worker_indptr.size()) < s.workers) {
          worker_indptr.push_back(made);
          left = budget;
        }
        const bool last = static_cast<int>(worker_indptr.size()) == s.workers;
        const int stop = last ? x.hi : std::min(x.hi, at + left - START);
        const bool whole = alone && at == x.lo && stop == x.hi;
        if (!whole)
          for (int i = 0; i < x.count; ++i) ++counts_[static_cast<size_t>(x.first + i) * s.kv_heads + head];
        const int32_t piece[PIECE] = {
            x.first, x.count, x.page, x.keys, head, at, clip(x.full_lo, at, stop), clip(x.full_hi, at, stop), stop,
            whole ? -1 : rows, 0, 0};
        pieces.insert(pieces.end(), piece, piece + PIECE);
        ++made;
        if (!whole) rows += x.count * s.group;
        left -= stop - at + START;
        at = stop;
      } while (at < x.hi);
    }
  }
  worker_indptr.resize(s.workers + 1, made);
  merge_indptr.resize(counts_.size() + 1);
  merge_indptr[0] = 0;
  for (size_t i = 0; i < counts_.size(); ++i) merge_indptr[i + 1] = merge_indptr[i] + counts_[i];
  merge_rows.resize(merge_indptr.back());
  // From each list's end: the counts fall to 0 as the pieces are walked from the last.
  for (int p = made - 1; p >= 0; --p) {
    const int32_t *piece = pieces.data() + static_cast<size_t>(p) * PIECE;
    if (piece[9] < 0) continue;
    for (int i = 0; i < piece[1]; ++i) {
      const size_t list = static_cast<size_t>(piece[0] + i) * s.kv_heads + piece[4];
      merge_rows[merge_indptr[list] + --counts_[list]] = piece[9] + i * s.group;
    }
  }
}

void Planner::plan(const Tables &tables, const Shape &shape) {
  check(tables, shape);
  segment(tables, shape);
  tile(tables, shape);
  cut(tables, shape);
}

}  // namespace paged

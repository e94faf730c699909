#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>

#include "plan.hpp"

namespace nb = nanobind;
using Numbers = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Buffer = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

namespace {

std::span<const int32_t> view(const Numbers &x) { return {x.data(), x.size()}; }

nb::tuple made(paged::Planner &self, Numbers qo_indptr, Numbers kv_indptr, Numbers kv_indices, Numbers last_page_len,
               int page_size, int num_pages, int group, int kv_heads, bool causal, int window, int bm, int bn, int workers,
               bool share) {
  self.plan({view(qo_indptr), view(kv_indptr), view(kv_indices), view(last_page_len)},
            {page_size, num_pages, group, kv_heads, causal, window, bm, bn, workers, share});
  return nb::make_tuple(self.worker_indptr.size(), self.pieces.size(), self.tokens.size(), self.merge_indptr.size(),
                        self.merge_rows.size(), self.rows);
}

void written(const paged::Planner &self, Buffer buffer, size_t workers, size_t pieces, size_t tokens, size_t merge_indptr,
           size_t merge_rows) {
  const auto put = [&](const std::vector<int32_t> &x, size_t at) {
    if (at + x.size() > buffer.size()) throw nb::value_error("the buffer is too short for the plan");
    std::copy(x.begin(), x.end(), buffer.data() + at);
  };
  put(self.worker_indptr, workers);
  put(self.pieces, pieces);
  put(self.tokens, tokens);
  put(self.merge_indptr, merge_indptr);
  put(self.merge_rows, merge_rows);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Plans of paged attention.";
  nb::class_<paged::Planner>(m, "Planner")
      .def(nb::init<>())
      .def("plan", &made, "Sizes of the plan's five arrays, and rows of its parts.")
      .def("write", &written, "Write the arrays into a buffer, each at its offset.");
}

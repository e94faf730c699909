// Cost and schedule of breadth-first broadcast on a direct-connect topology.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <optional>

#include "direct/direct.hpp"

namespace nb = nanobind;
using Int32s = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

namespace direct {
namespace {

void interruptible() {
  nb::gil_scoped_acquire held;
  if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

// A pair (from, to) without a path, if there is one.
std::optional<std::array<int, 2>> unreached(int nodes, Int32s tail, Int32s head) {
  std::vector<uint16_t> distance;
  distances_to(InLinks(nodes, tail.data(), head.data(), tail.size()), 0, distance);
  for (int v = 0; v < nodes; ++v)
    if (distance[v] == kFar) return {{v, 0}};
  distances_to(InLinks(nodes, head.data(), tail.data(), tail.size()), 0, distance);
  for (int v = 0; v < nodes; ++v)
    if (distance[v] == kFar) return {{0, v}};
  return {};
}

// For every step, over the given receivers: the greatest of the least link loads, as [step, (top, bottom)].
std::vector<std::array<int64_t, 2>> loads(int nodes, Int32s tail, Int32s head, Int32s receivers) {
  std::vector<std::array<int64_t, 2>> answer;
  nb::gil_scoped_release released;
  const InLinks graph(nodes, tail.data(), head.data(), tail.size());
  Distances distances(graph);
  std::vector<Ratio> worst;
  for (size_t r = 0; r < receivers.size(); ++r) {
    const int u = receivers.data()[r];
    if (r % 64 == 63) interruptible();
    const auto layers = layers_of(graph, distances, u);
    if (worst.size() < layers.size()) worst.resize(layers.size());
    for (size_t t = 0; t < layers.size(); ++t) {
      const Ratio load = least_load(layers[t], graph.width.data() + graph.first[u], graph.degree(u));
      if (worst[t] < load) worst[t] = load;
    }
  }
  for (const Ratio& load : worst) answer.push_back({load.top, load.bottom});
  return answer;
}

constexpr int kColumns = 6;  // step, sender, receiver, source, first chunk, end chunk

// The transfers of the whole allgather. A shard is `chunks` chunks; in step t a link of width one carries at most
// limits[t] of them.
nb::ndarray<nb::numpy, int32_t, nb::ndim<2>> transfers(
    int nodes, Int32s tail, Int32s head, int64_t chunks, const std::vector<int64_t>& limits) {
  auto* rows = new std::vector<int32_t>;
  nb::capsule owner(rows, [](void* p) noexcept { delete static_cast<std::vector<int32_t>*>(p); });
  {
    nb::gil_scoped_release released;
    const InLinks graph(nodes, tail.data(), head.data(), tail.size());
    Distances distances(graph);
    rows->reserve(static_cast<size_t>(nodes) * nodes * kColumns);
    for (int u = 0; u < nodes; ++u) {
      if (u % 64 == 63) interruptible();
      const int begin = graph.first[u];
      const auto layers = layers_of(graph, distances, u);
      for (size_t t = 0; t < layers.size(); ++t) {
        const auto share = split(layers[t], graph.width.data() + begin, graph.degree(u), chunks, limits.at(t));
        for (size_t g = 0; g < layers[t].size(); ++g) {
          // The group's sources lie one after another on a line, which its links cut: at most links - 1 are split.
          const Group& group = layers[t][g];
          int64_t from = 0;
          for (size_t i = 0; i < group.links.size(); ++i) {
            for (const int64_t end = from + share[g][i]; from < end;) {
              const int64_t first = from % chunks, last = std::min(chunks, first + end - from);
              const int32_t row[kColumns] = {
                  static_cast<int32_t>(t), graph.sender[begin + group.links[i]], u, group.sources[from / chunks],
                  static_cast<int32_t>(first), static_cast<int32_t>(last)};
              rows->insert(rows->end(), row, row + kColumns);
              from += last - first;
            }
          }
        }
      }
    }
  }
  return {rows->data(), {rows->size() / kColumns, kColumns}, owner};
}

}  // namespace
}  // namespace direct

void bind_direct_search(nb::module_& m);

void bind_direct(nb::module_& m) {
  m.def("direct_unreached", &direct::unreached, nb::arg("nodes"), nb::arg("tail"), nb::arg("head"),
        "A pair (from, to) of nodes without a path, or None.");
  m.def("direct_loads", &direct::loads, nb::arg("nodes"), nb::arg("tail"), nb::arg("head"), nb::arg("receivers"),
        "Step by step, the greatest of the receivers' least link loads as (numerator, denominator), in shards.");
  m.def("direct_transfers", &direct::transfers, nb::arg("nodes"), nb::arg("tail"), nb::arg("head"), nb::arg("chunks"),
        nb::arg("limits"),
        "Rows (step, sender, receiver, source, first chunk, end chunk) of the breadth-first allgather.");
  bind_direct_search(m);
}

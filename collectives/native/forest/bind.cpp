#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>

#include "forest/forest.hpp"

namespace nb = nanobind;
using namespace forest;

namespace {

using Array = nb::ndarray<const Int, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Progress = std::optional<nb::callable>;

Ints ints(const Array &array) { return Ints(array.data(), array.data() + array.size()); }
std::vector<int> vertices(const Array &array) { return std::vector<int>(array.data(), array.data() + array.size()); }

Network network(int n, const Array &tail, const Array &head, const Array &cap) {
  return {n, vertices(tail), vertices(head), ints(cap)};
}

template <class T>
nb::object numpy(const std::vector<T> &values) {
  auto *kept = new Ints(values.begin(), values.end());
  nb::capsule owner(kept, [](void *p) noexcept { delete static_cast<Ints *>(p); });
  return nb::cast(nb::ndarray<nb::numpy, Int, nb::ndim<1>>(kept->data(), {kept->size()}, owner));
}

// At most every 50 ms: lets Ctrl-C through and tells the progress function, which may end the work by what it raises.
Tick ticking(const Progress &progress) {
  auto last = std::chrono::steady_clock::now();
  return [last, &progress](const char *phase, Int done, Int total) mutable {
    auto now = std::chrono::steady_clock::now();
    if (now - last < std::chrono::milliseconds(50)) return;
    last = now;
    nb::gil_scoped_acquire python;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
    if (progress) (*progress)(phase, done, total);
  };
}

// Graph work with other Python threads running.
template <class Work>
auto alone(Work &&work) {
  nb::gil_scoped_release others;
  return work();
}

nb::tuple flat(const Trees &trees) {
  return nb::make_tuple(numpy(trees.root), numpy(trees.multiplicity), numpy(trees.edge_start), numpy(trees.edge_tail),
                        numpy(trees.edge_head), numpy(trees.path_start), numpy(trees.path));
}

}  // namespace

void bind_forest(nb::module_ &m) {
  using namespace nb::literals;
  m.def(
      "search",
      [](int n, const Array &tail, const Array &head, const Array &cap, const Array &weight, const Array &sinks, const Progress &progress) {
        const Network net = network(n, tail, head, cap);
        Bound best = alone([&] { return search(net, ints(weight), vertices(sinks), ticking(progress)); });
        return nb::make_tuple(best.p, best.q, numpy(best.cut), best.maxflows);
      },
      "n"_a, "tail"_a, "head"_a, "cap"_a, "weight"_a, "sinks"_a, "progress"_a = nb::none(),
      "(p, q, cut, maxflows): p/q is the greatest weight(S) / capacity out of S over cuts S, exactly.");
  m.def(
      "violated_cuts",
      [](int n, const Array &tail, const Array &head, const Array &cap, const Array &weight, const Array &sinks, Int need, bool all,
         const Progress &progress) {
        nb::list found;
        const Network net = network(n, tail, head, cap);
        for (const auto &cut : alone([&] { return violated_cuts(net, ints(weight), vertices(sinks), need, all, ticking(progress)); }))
          found.append(numpy(cut));
        return found;
      },
      "n"_a, "tail"_a, "head"_a, "cap"_a, "weight"_a, "sinks"_a, "need"_a, "all"_a, "progress"_a = nb::none(),
      "Cuts that let less than `need` from the weighted sources reach a sink.");
  m.def(
      "balanced",
      [](int n, const Array &tail, const Array &head, const Array &cap, const Array &through, const Progress &progress) {
        const Ints mask = ints(through);
        return numpy(balanced(network(n, tail, head, cap), std::vector<char>(mask.begin(), mask.end()), ticking(progress)));
      },
      "n"_a, "tail"_a, "head"_a, "cap"_a, "through"_a, "progress"_a = nb::none(),
      "The largest capacities within `cap` that every vertex marked in `through` passes on entirely.");
  m.def(
      "pack_trees",
      [](int n, const Array &tail, const Array &head, const Array &cap, const Array &weight, const Array &terminals, int deal,
         const Progress &progress) {
        const Network net = network(n, tail, head, cap);
        return flat(alone([&] { return pack_trees(net, ints(weight), vertices(terminals), static_cast<Deal>(deal), ticking(progress)); }));
      },
      "n"_a, "tail"_a, "head"_a, "cap"_a, "weight"_a, "terminals"_a, "deal"_a, "progress"_a = nb::none(),
      "Trees by splitting and packing: (root, multiplicity, edge_start, edge_tail, edge_head, path_start, path).");
  m.def(
      "grow_trees",
      [](int n, const Array &tail, const Array &head, const Array &cap, const Array &weight, const Array &terminals, const Array &klass,
         const Array &budget, bool depth_first, const Progress &progress) {
        const Network net = network(n, tail, head, cap);
        return flat(alone([&] {
          return grow_trees(net, ints(weight), vertices(terminals), vertices(klass), ints(budget), depth_first, ticking(progress));
        }));
      },
      "n"_a, "tail"_a, "head"_a, "cap"_a, "weight"_a, "terminals"_a, "klass"_a, "budget"_a, "depth_first"_a, "progress"_a = nb::none(),
      "Trees by greedy growth within a budget per arc class, in the form of pack_trees; none where they do not fit.");
  m.def(
      "free_rotations",
      [](int n, const Array &tail, const Array &head, const Array &cap, const Array &colour, const Array &compute, const Progress &progress) {
        const Network net = network(n, tail, head, cap);
        Symmetry symmetry = alone([&] { return free_rotations(net, ints(colour), vertices(compute), ticking(progress)); });
        nb::list group;
        for (const auto &element : symmetry.group) group.append(numpy(element));
        return group;
      },
      "n"_a, "tail"_a, "head"_a, "cap"_a, "colour"_a, "compute"_a, "progress"_a = nb::none(),
      "Elements (permutations of the vertices) of a group of symmetries none of which but the identity fixes a compute node.");
  m.def(
      "orbits",
      [](int n, const Array &tail, const Array &head, const Array &cap, const Array &colour, const Array &compute, const Progress &progress) {
        const Network net = network(n, tail, head, cap);
        Orbits found = alone([&] { return orbits(net, ints(colour), vertices(compute), ticking(progress)); });
        return nb::make_tuple(numpy(found.arc), numpy(found.vertex));
      },
      "n"_a, "tail"_a, "head"_a, "cap"_a, "colour"_a, "compute"_a, "progress"_a = nb::none(),
      "(orbit of each arc, orbit of each vertex) under verified symmetries of the network.");
}

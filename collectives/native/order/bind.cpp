#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "order/order.hpp"

namespace nb = nanobind;
using namespace order;

namespace {

using Square = nb::ndarray<const double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Indices = std::vector<int>;
using Result = std::tuple<Indices, bool, int64_t>;

Matrix matrix(const Square& square) { return {static_cast<int>(square.shape(0)), square.data()}; }

// Time is up after `seconds`; asks Python for signals, so that Ctrl-C ends a search.
Late until(double seconds) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  return [end] {
    if (std::chrono::steady_clock::now() >= end) return true;
    nb::gil_scoped_acquire held;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
    return false;
  };
}

Result result(Found found) { return {std::move(found.order), found.converged, found.tried}; }

Stages stages_of(const std::vector<double>& weight, const Indices& first, const Indices& left, const Indices& right) {
  return {weight, first, left, right};
}

}  // namespace

void bind_order(nb::module_& m) {
  using namespace nb::literals;
  m.def(
      "order_ring",
      [](const Square& cost, Indices start, uint64_t seed, int64_t rounds, int64_t patience, double seconds) {
        nb::gil_scoped_release released;
        return result(search_ring(matrix(cost), std::move(start), seed, rounds, patience, until(seconds)));
      },
      "cost"_a, "start"_a, "seed"_a, "rounds"_a, "patience"_a, "seconds"_a,
      "Iterated local search for a cheap directed ring: (order, ended by itself, perturbations).");
  m.def(
      "order_ring_bound",
      [](const Square& cost, double upper, int iterations, double seconds) {
        nb::gil_scoped_release released;
        return ring_bound(matrix(cost), upper, iterations, until(seconds));
      },
      "cost"_a, "upper"_a, "iterations"_a, "seconds"_a, "Held and Karp's lower bound on directed rings.");
  m.def(
      "order_stages",
      [](const Square& cost, const Square& latency, const std::vector<double>& weight, const Indices& first,
         const Indices& left, const Indices& right, Indices start, uint64_t seed, int64_t rounds, double seconds) {
        nb::gil_scoped_release released;
        return result(search_stages(matrix(cost), matrix(latency), stages_of(weight, first, left, right),
                                    std::move(start), seed, rounds, until(seconds)));
      },
      "cost"_a, "latency"_a, "weight"_a, "first"_a, "left"_a, "right"_a, "start"_a, "seed"_a, "rounds"_a, "seconds"_a,
      "Annealed placement for a collective in stages: (order, ended by itself, swaps).");
  m.def(
      "order_stages_cost",
      [](const Square& cost, const Square& latency, const std::vector<double>& weight, const Indices& first,
         const Indices& left, const Indices& right, const Indices& order) {
        return stages_cost(matrix(cost), matrix(latency), stages_of(weight, first, left, right), order);
      },
      "cost"_a, "latency"_a, "weight"_a, "first"_a, "left"_a, "right"_a, "order"_a, "What the search of stages counts.");
  m.def(
      "order_trees",
      [](const Square& cost, const Square& latency, const Trees& trees, double weight, Indices start, uint64_t seed,
         int64_t rounds, double seconds) {
        nb::gil_scoped_release released;
        return result(search_trees(matrix(cost), matrix(latency), trees, weight, std::move(start), seed, rounds, until(seconds)));
      },
      "cost"_a, "latency"_a, "trees"_a, "weight"_a, "start"_a, "seed"_a, "rounds"_a, "seconds"_a,
      "Annealed placement for a collective over trees: (order, ended by itself, swaps).");
  m.def(
      "order_trees_cost",
      [](const Square& cost, const Square& latency, const Trees& trees, double weight, const Indices& order) {
        return trees_cost(matrix(cost), matrix(latency), trees, weight, order);
      },
      "cost"_a, "latency"_a, "trees"_a, "weight"_a, "order"_a, "What the search of trees counts.");
  m.def(
      "order_walks",
      [](const Square& cost, int hops, double seconds) {
        auto* kept = new std::vector<float>;
        {
          nb::gil_scoped_release released;
          *kept = walks(matrix(cost), hops, until(seconds));
        }
        const size_t n = kept->empty() ? 0 : cost.shape(0), layers = kept->empty() ? 0 : hops + 1;
        nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<float>*>(p); });
        return nb::ndarray<nb::numpy, float, nb::ndim<3>>(kept->data(), {layers, n, n}, owner);
      },
      "cost"_a, "hops"_a, "seconds"_a, "Least cost, rounded down, of walks of exactly k hops: [hops + 1, N, N]; empty where time was short.");
}

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>

#include "scheduler/scheduler.hpp"
#include "simulate/published.hpp"
#include "simulate/simulation.hpp"

namespace nb = nanobind;
using namespace serving;

namespace {

using Numbers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Tables = std::vector<std::vector<Time>>;
using Plan = std::vector<std::tuple<int, int, int, double>>;

template <typename To>
std::vector<To> copied(const Numbers& from) {
  return {from.data(), from.data() + from.size()};
}
template <typename T>
nb::object array(const std::vector<T>& from) {
  auto* owned = new std::vector<T>(from);
  nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T, nb::ndim<1>>(owned->data(), {owned->size()}, owner));
}
std::vector<Profile> profiles(const Tables& tables) { return {tables.begin(), tables.end()}; }

// A policy and the events over it.
struct Run {
  std::unique_ptr<Policy> policy;
  Tables latencies;
  int gpus;
  std::unique_ptr<Simulation> simulation;
};

}  // namespace

void bind_simulate(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<Run>(m, "Run", "One simulated run of one policy.")
      .def_static(
          "scheduler",
          [](const Tables& seen, const Tables& latencies, int gpus, int drop, int defer, Time jitter) {
            return Run{std::make_unique<Scheduler>(profiles(seen), gpus,
                                                   Rules{static_cast<Drop>(drop), static_cast<Defer>(defer), jitter}),
                       latencies, gpus, nullptr};
          },
          "seen"_a, "latencies"_a, "gpus"_a, "drop"_a, "defer"_a, "jitter"_a)
      .def_static(
          "per_replica",
          [](const Tables& seen, const Tables& latencies, int gpus, int largest, Time wait) {
            return Run{per_replica(profiles(seen), gpus, largest, wait), latencies, gpus, nullptr};
          },
          "seen"_a, "latencies"_a, "gpus"_a, "largest"_a, "wait"_a)
      .def_static(
          "bentoml",
          [](const Tables& seen, const Tables& latencies, int gpus, std::vector<Time> slo) {
            return Run{bentoml(profiles(seen), gpus, std::move(slo)), latencies, gpus, nullptr};
          },
          "seen"_a, "latencies"_a, "gpus"_a, "slo"_a)
      .def_static(
          "nexus",
          [](const Tables& seen, const Tables& latencies, int gpus, const Plan& plan) {
            std::vector<Session> sessions;
            for (const auto& [gpu, model, batch, share] : plan) sessions.push_back({gpu, model, batch, share});
            return Run{nexus(profiles(seen), gpus, std::move(sessions)), latencies, gpus, nullptr};
          },
          "seen"_a, "latencies"_a, "gpus"_a, "plan"_a)
      .def_static(
          "clockwork",
          [](const Tables& seen, const Tables& latencies, int gpus) {
            return Run{clockwork(profiles(seen), gpus), latencies, gpus, nullptr};
          },
          "seen"_a, "latencies"_a, "gpus"_a)
      .def_static(
          "shepherd",
          [](const Tables& seen, const Tables& latencies, int gpus, double lambda) {
            return Run{shepherd(profiles(seen), gpus, lambda), latencies, gpus, nullptr};
          },
          "seen"_a, "latencies"_a, "gpus"_a, "lambda_"_a)
      .def(
          "load",
          [](Run& run, const Numbers& arrival, const Numbers& deadline, const Numbers& due, const Numbers& model,
             const Numbers& abandon_at, const Numbers& abandoned, Time network, Time jitter, uint64_t seed) {
            Load load{copied<Time>(arrival),      copied<Time>(deadline), copied<Time>(due), copied<int64_t>(model),
                      copied<Time>(abandon_at), copied<int64_t>(abandoned)};
            run.simulation = std::make_unique<Simulation>(*run.policy, profiles(run.latencies), run.gpus,
                                                          std::move(load), network, jitter, seed);
          },
          "arrival"_a, "deadline"_a, "due"_a, "model"_a, "abandon_at"_a, "abandoned"_a, "network"_a, "jitter"_a,
          "seed"_a)
      .def(
          "until",
          [](Run& run, Time until) {
            nb::gil_scoped_release released;
            run.simulation->run(until);
          },
          "until"_a)
      .def("add_gpu", [](Run& run, int gpu) { run.simulation->add_gpu(gpu); }, "gpu"_a)
      .def("remove_gpu", [](Run& run, int gpu) { run.simulation->remove_gpu(gpu); }, "gpu"_a)
      .def_prop_ro("over", [](const Run& run) { return run.simulation->over(); })
      .def_prop_ro("now", [](const Run& run) { return run.simulation->now(); })
      .def_prop_ro("preempted", [](const Run& run) { return run.simulation->preempted; })
      .def_prop_ro("fate", [](const Run& run) { return array(run.simulation->fate); })
      .def_prop_ro("answered", [](const Run& run) { return array(run.simulation->answered); })
      .def_prop_ro("busy", [](const Run& run) { return array(run.simulation->busy); })
      .def_prop_ro("batches_by_size", [](const Run& run) { return array(run.simulation->batches_by_size); });
}

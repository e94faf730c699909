#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include "scheduler/scheduler.hpp"

namespace nb = nanobind;
using namespace serving;

namespace {

using Numbers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The scheduler and what turns its actions into Python's Dispatch and Drop.
class Core {
 public:
  Core(const std::vector<std::vector<Time>>& latencies, int gpus, int drop, int defer, Time jitter, nb::object dispatch,
       nb::object drop_type)
      : scheduler_(std::vector<Profile>(latencies.begin(), latencies.end()), gpus,
                   {static_cast<Drop>(drop), static_cast<Defer>(defer), jitter}),
        dispatch_(std::move(dispatch)),
        drop_(std::move(drop_type)) {}

  template <typename Event>
  nb::object acted(Event event) {
    out_.clear();
    event(scheduler_, out_);
    if (out_.actions.empty()) return empty_;
    nb::list found;
    for (const Action& action : out_.actions) {
      nb::object ids = nb::steal(PyTuple_New(static_cast<Py_ssize_t>(action.end - action.begin)));
      for (size_t at = action.begin; at < action.end; ++at) {
        PyTuple_SET_ITEM(ids.ptr(), at - action.begin, PyLong_FromLongLong(out_.ids[at]));
      }
      found.append(action.kind == Kind::kDispatch ? dispatch_(action.model, ids, action.gpu) : drop_(action.model, ids));
    }
    return nb::tuple(found);
  }

  Scheduler scheduler_;

 private:
  nb::object dispatch_, drop_, empty_ = nb::tuple();
  Actions out_;
};

}  // namespace

void bind_scheduler(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<Core>(m, "Core", "The scheduler in integer nanoseconds; models are numbers in the order they were added.")
      .def(nb::init<const std::vector<std::vector<Time>>&, int, int, int, Time, nb::object, nb::object>(), "latencies"_a,
           "gpus"_a, "drop"_a, "defer"_a, "jitter"_a, "dispatch_type"_a, "drop_type"_a)
      .def("on_request",
           [](Core& core, Id id, int model, Time deadline, Time now) {
             return core.acted([&](Scheduler& s, Actions& out) { s.on_request(id, model, deadline, now, out); });
           },
           "id"_a, "model"_a, "deadline"_a, "now"_a)
      .def("on_requests",
           [](Core& core, const Numbers& ids, const Numbers& models, const Numbers& deadlines, Time now) {
             if (models.size() != ids.size() || deadlines.size() != ids.size()) {
               throw Refused("ids, models and deadlines must be equally long");
             }
             return core.acted([&](Scheduler& s, Actions& out) {
               s.on_requests(ids.data(), models.data(), deadlines.data(), ids.size(), now, out);
             });
           },
           "ids"_a, "models"_a, "deadlines"_a, "now"_a)
      .def("on_gpu_free",
           [](Core& core, int gpu, Time now) {
             return core.acted([&](Scheduler& s, Actions& out) { s.on_gpu_free(gpu, now, out); });
           },
           "gpu"_a, "now"_a)
      .def("on_timer",
           [](Core& core, Time now) { return core.acted([&](Scheduler& s, Actions& out) { s.on_timer(now, out); }); },
           "now"_a)
      .def("cancel",
           [](Core& core, const std::vector<Id>& ids, Time now) {
             return core.acted([&](Scheduler& s, Actions& out) {
               for (Id id : ids) s.cancel(id, now, out);
             });
           },
           "ids"_a, "now"_a)
      .def("add_gpu",
           [](Core& core, int gpu, Time now) {
             return core.acted([&](Scheduler& s, Actions& out) { s.add_gpu(gpu, now, out); });
           },
           "gpu"_a, "now"_a)
      .def("remove_gpu", [](Core& core, int gpu, Time now) { core.scheduler_.remove_gpu(gpu, now); }, "gpu"_a, "now"_a)
      .def("add_model",
           [](Core& core, std::vector<Time> latency, int priority) {
             return core.scheduler_.add_model(Profile(std::move(latency)), priority);
           },
           "latency"_a, "priority"_a)
      .def("remove_model",
           [](Core& core, int model, Time now) {
             return core.acted([&](Scheduler& s, Actions& out) { s.remove_model(model, now, out); });
           },
           "model"_a, "now"_a)
      .def("waiting_of", [](const Core& core, int model) { return core.scheduler_.waiting_of(model); }, "model"_a)
      .def_prop_ro("next_timer",
                   [](const Core& core) -> nb::object {
                     const Time at = core.scheduler_.next_timer();
                     return at == kNever ? nb::none() : nb::object(nb::int_(at));
                   })
      .def_prop_ro("waiting", [](const Core& core) { return core.scheduler_.waiting(); })
      .def_prop_ro("idle_gpus", [](const Core& core) { return core.scheduler_.idle_gpus(); });
}

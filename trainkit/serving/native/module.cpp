#include <nanobind/nanobind.h>

namespace nb = nanobind;

// One registration function per family of sources.
void bind_scheduler(nb::module_ &m);
void bind_simulate(nb::module_ &m);

NB_MODULE(_native, m) {
  m.doc() = "The serving scheduler and its discrete-event simulation.";
  bind_scheduler(m);
  bind_simulate(m);
}

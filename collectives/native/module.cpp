#include <nanobind/nanobind.h>

namespace nb = nanobind;

// One registration function per family of sources.
void bind_direct(nb::module_ &m);
void bind_execute(nb::module_ &m);
void bind_forest(nb::module_ &m);
void bind_order(nb::module_ &m);

NB_MODULE(_native, m) {
  m.doc() = "Integer graph algorithms of trainkit.collectives: max-flow, splitting, packing.";
  bind_direct(m);
  bind_execute(m);
  bind_forest(m);
  bind_order(m);
}

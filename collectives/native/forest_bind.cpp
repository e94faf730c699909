#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_forest(nb::module_ &) {}

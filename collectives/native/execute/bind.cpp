#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>

#include <algorithm>

#include "execute/execute.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace execute;

namespace {

template <class T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class T>
std::vector<T> values(const Array<T>& array) {
  return std::vector<T>(array.data(), array.data() + array.size());
}

// Everything is checked here, so that the engine need not.
std::shared_ptr<Program> program_of(
    Array<uint8_t> kind, Array<int32_t> peer, Array<int32_t> op, Array<int64_t> begin, Array<int64_t> end,
    Array<int64_t> source, Array<int32_t> next_start, Array<int32_t> next, int64_t elements) {
  auto p = std::make_shared<Program>();
  p->kind = values(kind), p->peer = values(peer), p->op = values(op), p->begin = values(begin), p->end = values(end);
  p->source = values(source), p->next_start = values(next_start), p->next = values(next), p->elements = elements;
  const size_t size = p->size();
  for (size_t length : {p->peer.size(), p->op.size(), p->begin.size(), p->end.size(), p->source.size()})
    if (length != size) throw nb::value_error("a program's columns must be equally long");
  if (p->next_start.size() != size + 1 || p->next_start[0] != 0 || p->next_start[size] != static_cast<int64_t>(p->next.size()))
    throw nb::value_error("next_start must run from 0 to the length of next");
  p->waits.assign(size, 0);
  for (size_t at = 0; at < size; ++at) {
    const bool copies = p->kind[at] == static_cast<uint8_t>(Kind::kCopy);
    if (p->kind[at] > static_cast<uint8_t>(Kind::kCopy) || p->begin[at] < 0 || p->end[at] < p->begin[at] || p->end[at] > elements)
      throw nb::value_error("an operation lies outside the buffer");
    if (!copies) p->peers.insert(p->peer[at]);
    if (copies && (p->source[at] < 0 || p->source[at] + p->end[at] - p->begin[at] > elements))
      throw nb::value_error("a copy reads outside the buffer");
    if (p->next_start[at + 1] < p->next_start[at]) throw nb::value_error("next_start must not fall");
    for (int32_t i = p->next_start[at]; i < p->next_start[at + 1]; ++i) {
      if (p->next[i] <= static_cast<int64_t>(at) || p->next[i] >= static_cast<int64_t>(size))
        throw nb::value_error("an operation may only be followed by later ones");
      ++p->waits[p->next[i]];
    }
  }
  return p;
}

struct Handle {
  std::shared_ptr<Engine> engine;
  std::shared_ptr<Job> job;
};

}  // namespace

void bind_execute(nb::module_& m) {
  nb::class_<Program>(m, "ExecuteProgram", "One rank's operations for one size of message.")
      .def_prop_ro("elements", [](const Program& p) { return p.elements; });
  m.def("execute_program", &program_of, "kind"_a, "peer"_a, "op"_a, "begin"_a, "end"_a, "source"_a, "next_start"_a,
        "next"_a, "elements"_a, "The program behind these columns; refuses what would leave the buffer.");
  m.def(
      "execute_add",
      [](nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> to, Array<uint8_t> from, int dtype) {
        const size_t width = bytes_of(static_cast<Dtype>(dtype));
        if (to.size() != from.size() || to.size() % width != 0) throw nb::value_error("lengths must be equal and whole");
        add(to.data(), from.data(), to.size() / width, static_cast<Dtype>(dtype));
      },
      "to"_a, "source"_a, "dtype"_a, "to += source, both as bytes.");
  nb::class_<Handle>(m, "ExecuteJob", "A collective that runs.")
      .def(
          "wait",
          [](Handle& handle) {
            while (true) {
              {
                nb::gil_scoped_release released;
                if (handle.engine->wait(*handle.job, 0.1)) break;
              }
              if (PyErr_CheckSignals() != 0) throw nb::python_error();
            }
            return !handle.engine->failed(*handle.job);
          },
          "Block until it has ended; whether it ended well.")
      .def("done", [](Handle& handle) { return handle.engine->wait(*handle.job, 0); });
  nb::class_<Engine>(m, "ExecuteEngine", "The TCP data path of one process.")
      .def("__init__", [](Engine* self, int rank, double deadline, bool overlap) { new (self) Engine(rank, deadline, overlap); },
           "rank"_a, "deadline"_a, "overlap"_a)
      .def("add_peer", &Engine::add_peer, "rank"_a, "source"_a, "sink"_a, "Take over two connected sockets.")
      .def(
          "submit",
          [](std::shared_ptr<Engine> self, std::shared_ptr<const Program> program, uintptr_t address, int64_t elements,
             int dtype, uint64_t call) {
            if (elements != program->elements) throw nb::value_error("the program was made for another size");
            return Handle{self, self->submit(program, reinterpret_cast<uint8_t*>(address), static_cast<Dtype>(dtype), call)};
          },
          "program"_a, "address"_a, "elements"_a, "dtype"_a, "call"_a = 0, "Start a collective, in place on memory that stays until it ends.")
      .def("failure", [](Engine& self) {
        const Failure f = self.failure();
        const int op = f.op == Failure::kNoOp ? -1 : static_cast<int>(f.op);
        return nb::make_tuple(static_cast<int>(f.reason), static_cast<int>(f.culprit), op, static_cast<int>(f.reporter));
      }, "(reason, rank, op or -1, rank that saw it); reason 0 while all is well.")
      .def("awaited", &Engine::awaited, nb::call_guard<nb::gil_scoped_release>(),
           "A rank that the oldest collective waits for, or -1.")
      .def("lost", &Engine::lost, "(a rank whose connection has ended or -1, whether it said that it goes).")
      .def("abort", &Engine::abort, "reason"_a = static_cast<uint32_t>(Failure::kAborted), "culprit"_a = -1,
           "Fail what runs, on all ranks; whoever is to blame, or this rank.")
      .def("close", &Engine::close, nb::call_guard<nb::gil_scoped_release>(), "End the thread and the connections.")
      .def_prop_ro("sent", &Engine::sent, "Bytes handed to the connections so far.")
      .def_prop_ro("received", &Engine::received, "Bytes that came in so far.");
}

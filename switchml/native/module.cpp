#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdio>

#include "drive.hpp"
#include "fixed_point.hpp"
#include "tag.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace switchml;

namespace {

using Floats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Place = std::pair<std::string, int>;  // host in dotted form, port

Member member_of(nb::object m) {
  auto number = [&](const char* name) { return nb::cast<uint32_t>(m.attr(name)); };
  auto wire = nb::cast<std::string>(m.attr("wire"));
  nb::bytes key = nb::cast<nb::bytes>(m.attr("key"));
  Member member;
  member.session = static_cast<uint16_t>(number("session"));
  member.epoch = number("epoch"), member.world = number("world"), member.worker = number("worker");
  member.slots = number("slots"), member.elements = number("elements"), member.lane = static_cast<uint8_t>(number("lane"));
  member.up = wire == "int32" ? 4 : wire == "int16" ? 2 : 1;
  member.down = wire == "int8" ? 2 : 4;
  member.core = nb::cast<std::string>(m.attr("profile")) == "core";
  member.key = std::string(key.c_str(), key.size());
  if (member.world < 1 || member.world > kMaxWorkers || member.worker >= member.world || member.slots < 1 ||
      member.slots > 0x4000 || member.elements < 1 || member.elements > 16384)
    throw nb::value_error("a membership outside the protocol's limits: see _packet.py");
  return member;
}

Address address_of(const Place& place) {
  unsigned a, b, c, d;
  char rest;
  if (std::sscanf(place.first.c_str(), "%u.%u.%u.%u%c", &a, &b, &c, &d, &rest) != 4 || (a | b | c | d) > 255)
    throw nb::value_error("an address is (IPv4 in dotted form, port)");
  return (Address{a} << 24 | b << 16 | c << 8 | d) << 16 | static_cast<uint16_t>(place.second);
}

Place place_of(Address address) {
  char host[16];
  auto ip = static_cast<uint32_t>(address >> 16);
  std::snprintf(host, sizeof host, "%u.%u.%u.%u", ip >> 24, ip >> 16 & 255, ip >> 8 & 255, ip & 255);
  return {host, static_cast<int>(address & 0xFFFF)};
}

const uint8_t* octets(const nb::bytes& data) { return reinterpret_cast<const uint8_t*>(data.c_str()); }

nb::bytes packet_of(Outbox& box, const Outbox::Entry& entry) { return nb::bytes(box.at(entry), entry.bytes); }

nb::list packets_of(Outbox& box) {
  nb::list packets;
  for (const auto& entry : box.entries()) packets.append(packet_of(box, entry));
  return packets;
}

nb::dict counters_of(const Counters& counters) {
  nb::dict named;
  for (int i = 0; i < kCounters; ++i) named[kCounterNames[i]] = counters.get(i);
  return named;
}

nb::list heard_of(const std::vector<Control>& heard) {
  nb::list all;
  for (const auto& [data, source] : heard) all.append(nb::make_tuple(nb::bytes(data.data(), data.size()), place_of(source)));
  return all;
}

}  // namespace

NB_MODULE(_native, m) {
  // sessions live in daemon threads, which the interpreter leaves as they are when it ends
  nb::set_leak_warnings(false);
  m.doc() = "SwitchML's packet path: the state machines of _worker.py and _switch.py, and what moves their packets.";

  nb::class_<Port>(m, "Port")
      .def("__init__", [](Port* self, int socket, int wake, Worker& worker) { new (self) Port(socket, wake, worker.counters); },
           "socket"_a, "wake"_a, "core"_a, nb::keep_alive<1, 4>())
      .def("__init__", [](Port* self, int socket, int wake, Switch& core) { new (self) Port(socket, wake, core.counters); },
           "socket"_a, "wake"_a, "core"_a, nb::keep_alive<1, 4>());

  nb::class_<Worker>(m, "Worker")
      .def("__init__", [](Worker* self, nb::object member) { new (self) Worker(member_of(member)); }, "member"_a)
      .def("submit",
           [](Worker& w, Floats values, Floats out, double now, std::optional<Floats> residual, std::optional<Bytes> known,
              Port* port) {
             size_t count = out.shape(0), elements = w.member().elements;
             if (values.shape(0) != count || (residual && residual->shape(0) != count))
               throw nb::value_error("values, out and residual differ in length");
             if (known && known->shape(0) != (count + elements - 1) / elements)
               throw nb::value_error("known has one byte a chunk");
             Outbox box;
             {
               nb::gil_scoped_release free;
               w.submit(values.data(), out.data(), residual ? residual->data() : nullptr, known ? known->data() : nullptr,
                        count, now, box);
               if (port) {
                 port->send(box, 0, 0);
                 box.clear();
               }
             }
             return packets_of(box);
           },
           "values"_a, "out"_a, "now"_a, "residual"_a = nb::none(), "known"_a = nb::none(),
           "port"_a = nb::none(), "Take a bucket in, and send its first packets where there is a port; the caller keeps the arrays until it is finished.")
      .def("receive",
           [](Worker& w, nb::bytes data, double now) {
             Outbox box;
             w.receive(octets(data), data.size(), now, box);
             return packets_of(box);
           },
           "data"_a, "now"_a)
      .def("poll",
           [](Worker& w, double now) {
             Outbox box;
             w.poll(now, box);
             return packets_of(box);
           },
           "now"_a)
      .def("due", [](Worker& w) { return w.in_flight() ? std::optional(w.due()) : std::nullopt; })
      .def("drive",
           [](Worker& w, Port& port, double until) {
             std::vector<Control> heard;
             {
               nb::gil_scoped_release free;
               heard = drive(w, port, until);
             }
             return heard_of(heard);
           },
           "port"_a, "until"_a)
      .def_prop_ro("finished", &Worker::finished)
      .def_prop_ro("in_flight", &Worker::in_flight)
      .def_prop_ro("next_number", &Worker::next_number)
      .def_prop_ro("settled", &Worker::settled)
      .def_prop_ro("chunks", [](Worker& w) { return w.counters.get(kChunks); })
      .def_prop_ro("counters", [](Worker& w) { return counters_of(w.counters); });

  nb::class_<Switch>(m, "Switch")
      .def(nb::init<>())
      .def("install",
           [](Switch& s, nb::object member, const std::vector<Place>& places) {
             std::vector<Address> addresses;
             for (const Place& place : places) addresses.push_back(address_of(place));
             s.install(member_of(member), std::move(addresses));
           },
           "member"_a, "addresses"_a)
      .def("remove", &Switch::remove, "session"_a)
      .def("unfinished",
           [](Switch& s, uint16_t session) {
             Aggregation* found = s.find(session);
             return found ? found->unfinished() : 0;
           },
           "session"_a)
      .def("chunks",
           [](Switch& s, uint16_t session) {
             Aggregation* found = s.find(session);
             return found ? found->chunks() : 0;
           },
           "session"_a)
      .def("total",
           [](Switch& s, const std::string& counter) {
             for (int i = 0; i < kCounters; ++i)
               if (counter == kCounterNames[i]) return s.counters.get(i);
             throw nb::key_error(counter.c_str());
           },
           "counter"_a)
      .def("receive",
           [](Switch& s, nb::bytes data, const Place& source) {
             Outbox box;
             Aggregation* session = s.receive(octets(data), data.size(), address_of(source), box);
             nb::list sent;
             for (const auto& entry : box.entries())
               for (size_t w = 0; w < session->addresses().size(); ++w)
                 if (entry.worker == Outbox::kAll || entry.worker == static_cast<int>(w))
                   sent.append(nb::make_tuple(place_of(session->addresses()[w]), packet_of(box, entry)));
             return sent;
           },
           "data"_a, "source"_a)
      .def("drive",
           [](Switch& s, Port& port, double until) {
             std::vector<Control> heard;
             {
               nb::gil_scoped_release free;
               heard = drive(s, port, until);
             }
             return heard_of(heard);
           },
           "port"_a, "until"_a);

  m.def("seal",
        [](nb::bytes packet, nb::bytes key) {
          Tagger tagger(std::string(key.c_str(), key.size()));
          std::string sealed(packet.c_str(), packet.size());
          sealed.resize(packet.size() + kTagBytes);
          size_t bytes = tagger.seal(reinterpret_cast<uint8_t*>(sealed.data()), packet.size());
          return nb::bytes(sealed.data(), bytes);
        },
        "packet"_a, "key"_a, "The packet with its tag.");
  m.def("unseal",
        [](nb::bytes packet, nb::bytes key) -> std::optional<nb::bytes> {
          Tagger tagger(std::string(key.c_str(), key.size()));
          size_t bytes = packet.size();
          if (!tagger.open(octets(packet), bytes)) return {};
          return nb::bytes(packet.c_str(), bytes);
        },
        "packet"_a, "key"_a, "The packet without its tag; None where the tag is wrong.");
  m.def("hkdf",
        [](nb::bytes secret, nb::bytes salt, nb::bytes info, size_t bytes) {
          auto text = [](const nb::bytes& b) { return std::string(b.c_str(), b.size()); };
          std::string key = hkdf(text(secret), text(salt), text(info), bytes);
          return nb::bytes(key.data(), key.size());
        },
        "secret"_a, "salt"_a, "info"_a, "bytes"_a, "HKDF-SHA256 (RFC 5869).");
}

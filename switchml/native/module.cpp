#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <arpa/inet.h>

#include <cstdlib>
#include <cstring>

#include "drive.hpp"
#include "fixed_point.hpp"
#include "tag.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace switchml;

namespace {

using Floats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
Member member_of(nb::object m) {
  auto number = [&](const char* name) { return nb::cast<uint32_t>(m.attr(name)); };
  auto wire = nb::cast<std::string>(m.attr("wire"));
  nb::bytes key = nb::cast<nb::bytes>(m.attr("key"));
  Member member;
  member.session = static_cast<uint16_t>(number("session"));
  member.epoch = number("epoch"), member.world = number("world"), member.worker = number("worker");
  member.slots = number("slots"), member.elements = number("elements"), member.channel = static_cast<uint8_t>(number("channel"));
  member.up = wire == "int32" ? 4 : wire == "int16" ? 2 : 1;
  member.down = wire == "int8" ? 2 : 4;
  member.core = nb::cast<std::string>(m.attr("profile")) == "core";
  member.key = std::string(key.c_str(), key.size());
  if (member.world < 1 || member.world > kMaxWorkers || member.worker >= member.world || member.slots < 1 ||
      member.slots > 0x4000 || member.elements < 1 || member.elements > 16367)
    throw nb::value_error("a membership outside the protocol's limits: see _packet.py");
  return member;
}

std::array<uint8_t, 16> host_of(const std::string& text) {
  std::array<uint8_t, 16> host;
  std::string v6 = text.find(':') == std::string::npos ? "::ffff:" + text : text;
  if (inet_pton(AF_INET6, v6.c_str(), host.data()) != 1)
    throw nb::value_error("an address is (IPv4 or IPv6 address, port), or that and the address that was asked");
  return host;
}

std::string text_of(const std::array<uint8_t, 16>& host) {
  char text[INET6_ADDRSTRLEN];
  inet_ntop(AF_INET6, host.data(), text, sizeof text);
  return std::strncmp(text, "::ffff:", 7) == 0 && std::strchr(text, '.') ? text + 7 : text;
}

// (host, port), or (host, port, the address of ours that was asked); a link-local host ends in %interface's number.
Address address_of(const nb::tuple& place) {
  auto host = nb::cast<std::string>(place[0]);
  Address address;
  if (size_t scope = host.find('%'); scope != std::string::npos) {
    address.scope = static_cast<uint32_t>(std::strtoul(host.c_str() + scope + 1, nullptr, 10));
    host.resize(scope);
  }
  address.host = host_of(host), address.port = static_cast<uint16_t>(nb::cast<int>(place[1]));
  if (nb::len(place) > 2) address.local = host_of(nb::cast<std::string>(place[2]));
  return address;
}

nb::tuple place_of(const Address& address) {
  std::string host = text_of(address.host);
  if (address.scope) host += "%" + std::to_string(address.scope);
  int port = address.port;
  if (address.local == decltype(address.local){}) return nb::make_tuple(host, port);
  return nb::make_tuple(host, port, text_of(address.local));
}

std::vector<Address> addresses_of(const nb::object& places) {
  std::vector<Address> addresses;
  for (nb::handle place : places) addresses.push_back(address_of(nb::cast<nb::tuple>(place)));
  return addresses;
}

const uint8_t* octets(const nb::bytes& data) { return reinterpret_cast<const uint8_t*>(data.c_str()); }

nb::bytes packet_of(Outbox& box, const Outbox::Entry& entry) { return nb::bytes(box.at(entry), entry.bytes); }

nb::list packets_of(Outbox& box) {
  nb::list packets;
  for (auto& entry : box.entries()) packets.append(packet_of(box, entry));
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
           "socket"_a, "wake"_a, "core"_a, nb::keep_alive<1, 4>())
      .def("send",
           [](Port& port, nb::bytes data, const nb::tuple& to) {
             return port.send(std::string(data.c_str(), data.size()), address_of(to));
           },
           "data"_a, "to"_a, "Send one packet as it is; False where the kernel does not take it.");

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
                 port->send(box, 0, nullptr, w.joins());
                 w.sent(box);
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
      .def_prop_ro("low_water_mark", &Worker::low_water_mark)
      .def_prop_ro("joins", &Worker::joins, "Whether joined packets are sent.")
      .def_prop_ro("chunks", [](Worker& w) { return w.counters.get(kChunks); })
      .def_prop_ro("counters", [](Worker& w) { return counters_of(w.counters); });

  nb::class_<Switch>(m, "Switch")
      .def(nb::init<>())
      .def("install",
           [](Switch& s, nb::object member, const nb::object& places) { s.install(member_of(member), addresses_of(places)); },
           "member"_a, "addresses"_a)
      .def("move",
           [](Switch& s, nb::object member, const nb::object& places) {
             if (Aggregation* found = s.find(member_of(member).session)) found->move(addresses_of(places));
           },
           "member"_a, "addresses"_a)
      .def("mismatched",
           [](Switch& s, uint16_t session) {
             Aggregation* found = s.find(session);
             return found ? found->mismatched() : 0;
           },
           "session"_a)
      .def("joins",
           [](Switch& s, uint16_t session, uint32_t worker) {
             Aggregation* found = s.find(session);
             return !found || worker >= found->addresses().size() || found->joins(worker);
           },
           "session"_a, "worker"_a, "Whether joined packets are sent to this worker.")
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
           [](Switch& s, nb::bytes data, const nb::tuple& source, double now) {
             Outbox box;
             Aggregation* session = s.receive(octets(data), data.size(), address_of(source), now, box);
             nb::list sent;
             for (auto& entry : box.entries())
               for (size_t w = 0; w < session->addresses().size(); ++w)
                 if (entry.worker == Outbox::kAll || entry.worker == static_cast<int>(w))
                   sent.append(nb::make_tuple(place_of(session->addresses()[w]), packet_of(box, entry)));
             return sent;
           },
           "data"_a, "source"_a, "now"_a = 0.0)
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
}

// The sockets' side of the native packet path: packets between a UDP socket and a state machine, in batches.
#pragma once

#include <sys/socket.h>

#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "switch.hpp"
#include "worker.hpp"

namespace switchml {

double monotonic();

// A control packet and where it came from.
using Control = std::pair<std::string, Address>;

// A non-blocking UDP socket, IPv4 or IPv6, that is read and written in batches; the kernel joins and splits runs of equal
// packets (UDP_GRO, UDP_SEGMENT) where it can. A socket of all of a machine's addresses answers from the one asked.
class Port {
 public:
  Port(int socket, int wake, Counters& counters);

  // Waits until there are packets, the wake descriptor is signalled, or `until`. False: woken.
  bool wait(double until);
  // Calls take(packet, bytes, source) for every packet there is, up to some; false where there was none.
  template <class Take>
  bool receive(Take take);
  // Sends what is for `worker` (or for all), to `to`, or to the connected peer where it is null.
  // `join`: runs may travel joined, and their entries are marked.
  void send(Outbox& box, int worker, const Address* to, bool join);
  // Sends one packet as it is; false where the kernel does not take it.
  bool send(const std::string& packet, const Address& to);

 private:
  struct Datagram;
  void flush(std::vector<Datagram>& run);

  int socket_, wake_, family_ = 0;
  Counters& counters_;
  bool segment_ = true, any_ = false;
  std::vector<uint8_t> buffer_, control_;
};

// How many control packets of one address and of one host are looked at: a flood of them costs a look-up each, and not the
// time in which a job's own would be answered. A worker that joins sends a dozen in a window.
class Throttle {
 public:
  bool admits(const Address& source, double now);

 private:
  double until_ = 0;
  std::unordered_map<uint64_t, uint32_t> addresses_, hosts_;
};

// Drives a worker until control packets came, a bucket was finished, the wake descriptor was signalled, or `until`.
std::vector<Control> drive(Worker& worker, Port& port, double until);

// Drives a switch until control packets came, the wake descriptor was signalled, or `until`.
std::vector<Control> drive(Switch& core, Port& port, Throttle& throttle, double until);

}  // namespace switchml

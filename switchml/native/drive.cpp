#include "drive.hpp"

#include <netinet/in.h>
#include <netinet/udp.h>
#include <poll.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>

namespace switchml {
namespace {

constexpr size_t kBatch = 16;         // datagrams a system call
constexpr size_t kDatagram = 65536;   // bytes of the largest, joined ones included
constexpr size_t kJoined = 65000;     // bytes of a run that the kernel splits
constexpr size_t kSegments = 64;      // packets of such a run
constexpr size_t kControlBytes = CMSG_SPACE(sizeof(int));
constexpr int kSendWait = 5;          // milliseconds for room in the send buffer

sockaddr_in socket_address(Address address) {
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_addr.s_addr = htonl(static_cast<uint32_t>(address >> 16));
  to.sin_port = htons(static_cast<uint16_t>(address));
  return to;
}

Address address_of(const sockaddr_in& from) {
  return Address{ntohl(from.sin_addr.s_addr)} << 16 | ntohs(from.sin_port);
}

}  // namespace

double monotonic() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// A message to the kernel under construction: a run of packets of equal length, of which the last may be shorter.
struct Port::Datagram {
  std::vector<iovec> pieces;
  size_t bytes = 0, segment = 0;
  sockaddr_in to{};
  alignas(cmsghdr) uint8_t control[CMSG_SPACE(sizeof(uint16_t))] = {};

  bool takes(size_t more) const {
    return pieces.size() < kSegments && pieces.back().iov_len == segment && more <= segment && bytes + more <= kJoined;
  }
  void add(uint8_t* packet, size_t length) {
    if (pieces.empty()) segment = length;
    pieces.push_back({packet, length});
    bytes += length;
  }
  msghdr message(bool connected) {
    msghdr m{};
    if (!connected) m.msg_name = &to, m.msg_namelen = sizeof to;
    m.msg_iov = pieces.data(), m.msg_iovlen = pieces.size();
    if (pieces.size() > 1) {
      m.msg_control = control, m.msg_controllen = sizeof control;
      cmsghdr* c = CMSG_FIRSTHDR(&m);
      c->cmsg_level = SOL_UDP, c->cmsg_type = UDP_SEGMENT, c->cmsg_len = CMSG_LEN(sizeof(uint16_t));
      uint16_t size = static_cast<uint16_t>(segment);
      std::memcpy(CMSG_DATA(c), &size, sizeof size);
    }
    return m;
  }
};

Port::Port(int socket, int wake, Counters& counters)
    : socket_(socket), wake_(wake), counters_(counters), buffer_(kBatch * kDatagram), control_(kBatch * kControlBytes) {
  int on = 1;
  setsockopt(socket_, SOL_UDP, UDP_GRO, &on, sizeof on);  // an older kernel gives single packets
}

bool Port::wait(double until) {
  double left = std::clamp(until - monotonic(), 0.0, 3600.0);
  timespec timeout{static_cast<time_t>(left), static_cast<long>(1e9 * (left - std::floor(left)))};
  pollfd watched[2] = {{socket_, POLLIN, 0}, {wake_, POLLIN, 0}};
  if (ppoll(watched, 2, &timeout, nullptr) <= 0 || !(watched[1].revents & POLLIN)) return true;
  uint64_t signals;
  [[maybe_unused]] ssize_t got = read(wake_, &signals, sizeof signals);
  return false;
}

template <class Take>
bool Port::receive(Take take) {
  mmsghdr messages[kBatch] = {};
  iovec pieces[kBatch];
  sockaddr_in from[kBatch];
  for (size_t i = 0; i < kBatch; ++i) {
    pieces[i] = {buffer_.data() + i * kDatagram, kDatagram};
    messages[i].msg_hdr = {&from[i], sizeof from[i], &pieces[i], 1, control_.data() + i * kControlBytes, kControlBytes, 0};
  }
  int count = recvmmsg(socket_, messages, kBatch, MSG_DONTWAIT, nullptr);
  for (int i = 0; i < count; ++i) {
    size_t bytes = messages[i].msg_len, segment = bytes;
    for (cmsghdr* c = CMSG_FIRSTHDR(&messages[i].msg_hdr); c; c = CMSG_NXTHDR(&messages[i].msg_hdr, c))
      if (c->cmsg_level == SOL_UDP && c->cmsg_type == UDP_GRO) {
        int size;
        std::memcpy(&size, CMSG_DATA(c), sizeof size);
        segment = static_cast<size_t>(size);
      }
    const uint8_t* packet = static_cast<const uint8_t*>(pieces[i].iov_base);
    do {
      size_t length = std::min(segment, bytes);
      take(packet, length, address_of(from[i]));
      packet += length, bytes -= length;
    } while (bytes > 0);
  }
  return count > 0;
}

void Port::send(Outbox& box, int worker, Address to) {
  std::vector<Datagram> runs;
  for (const Outbox::Entry& entry : box.entries()) {
    if (entry.worker != worker && entry.worker != Outbox::kAll) continue;
    if (runs.empty() || !segment_ || !runs.back().takes(entry.bytes)) {
      runs.emplace_back();
      if (to) runs.back().to = socket_address(to);
    }
    runs.back().add(box.at(entry), entry.bytes);
    counters_.add(kSentBytes, entry.bytes);
  }
  flush(runs);
}

void Port::flush(std::vector<Datagram>& runs) {
  std::vector<mmsghdr> messages(runs.size());
  for (size_t i = 0; i < runs.size(); ++i) messages[i].msg_hdr = runs[i].message(runs[i].to.sin_family == 0);
  for (size_t done = 0; done < messages.size();) {
    int sent = sendmmsg(socket_, messages.data() + done, static_cast<unsigned>(messages.size() - done), MSG_DONTWAIT);
    if (sent > 0) {
      done += static_cast<size_t>(sent);
      continue;
    }
    if (errno == EAGAIN || errno == ENOBUFS) {
      pollfd watched{socket_, POLLOUT, 0};
      if (poll(&watched, 1, kSendWait) > 0) continue;
    } else if (runs[done].pieces.size() > 1) {  // this path takes no runs
      segment_ = false;
      std::vector<Datagram> singles;
      for (iovec& piece : runs[done].pieces) {
        singles.emplace_back().to = runs[done].to;
        singles.back().add(static_cast<uint8_t*>(piece.iov_base), piece.iov_len);
      }
      flush(singles);
      ++done;
      continue;
    } else if (errno == ECONNREFUSED && sendmmsg(socket_, messages.data() + done, 1, MSG_DONTWAIT) == 1) {
      ++done;  // the refusal was of an earlier packet
      continue;
    }
    counters_.add(kUnsent);  // lost like any other packet
    ++done;
  }
}

std::vector<Control> drive(Worker& worker, Port& port, double until) {
  std::vector<Control> heard;
  Outbox box;
  uint64_t finished = worker.finished();
  auto take = [&](double now) {
    return [&, now](const uint8_t* packet, size_t bytes, Address source) {
      if (bytes >= kHeaderBytes && packet[0] == kMagic && packet[1] == kControl) {
        heard.emplace_back(std::string(reinterpret_cast<const char*>(packet), bytes), source);
        return;
      }
      worker.counters.add(kReceivedPackets);
      worker.counters.add(kReceivedBytes, bytes);
      worker.receive(packet, bytes, now, box);
    };
  };
  for (;;) {
    bool any = port.receive(take(monotonic()));
    double now = monotonic();
    worker.poll(now, box);
    port.send(box, 0, 0);
    box.clear();
    if (!heard.empty() || worker.finished() != finished || now >= until) return heard;
    if (!any && !port.wait(std::min(until, worker.due()))) return heard;
  }
}

std::vector<Control> drive(Switch& core, Port& port, double until) {
  std::vector<Control> heard;
  Outbox box;
  Aggregation* current = nullptr;
  auto flush = [&] {
    if (current && !box.entries().empty())
      for (size_t worker = 0; worker < current->addresses().size(); ++worker)
        port.send(box, static_cast<int>(worker), current->addresses()[worker]);
    box.clear();
  };
  auto take = [&](const uint8_t* packet, size_t bytes, Address source) {
    if (bytes >= kHeaderBytes && packet[0] == kMagic && packet[1] == kControl) {
      heard.emplace_back(std::string(reinterpret_cast<const char*>(packet), bytes), source);
      return;
    }
    core.counters.add(kReceivedPackets);
    core.counters.add(kReceivedBytes, bytes);
    if (Aggregation* session = bytes >= kHeaderBytes ? core.find(load16(packet + 2)) : nullptr; session != current) {
      flush();
      current = session;
    }
    core.receive(packet, bytes, source, box);
  };
  for (;;) {
    bool any = port.receive(take);
    for (const Outbox::Entry& entry : box.entries())
      core.counters.add(kSentPackets, entry.worker == Outbox::kAll ? current->addresses().size() : 1);
    flush();
    if (!heard.empty() || monotonic() >= until) return heard;
    if (!any && !port.wait(until)) return heard;
  }
}

}  // namespace switchml

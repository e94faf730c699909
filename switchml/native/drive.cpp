#include "drive.hpp"

#include <arpa/inet.h>
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
constexpr size_t kControlBytes = CMSG_SPACE(sizeof(int)) + CMSG_SPACE(sizeof(in6_pktinfo));
constexpr int kSendWait = 5;          // milliseconds for room in the send buffer
constexpr std::array<uint8_t, 12> kMapped{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF};

std::array<uint8_t, 16> mapped(const in_addr& host) {
  std::array<uint8_t, 16> out;
  std::copy(kMapped.begin(), kMapped.end(), out.begin());
  std::memcpy(out.data() + kMapped.size(), &host, sizeof host);
  return out;
}

in_addr unmapped(const std::array<uint8_t, 16>& host) {
  in_addr out;
  std::memcpy(&out, host.data() + kMapped.size(), sizeof out);
  return out;
}

socklen_t socket_address(const Address& address, int family, sockaddr_in6& to) {
  to = {};
  if (family == AF_INET6) {
    to.sin6_family = AF_INET6, to.sin6_port = htons(address.port), to.sin6_scope_id = address.scope;
    std::memcpy(&to.sin6_addr, address.host.data(), sizeof to.sin6_addr);
    return sizeof to;
  }
  auto& v4 = reinterpret_cast<sockaddr_in&>(to);
  v4.sin_family = AF_INET, v4.sin_port = htons(address.port), v4.sin_addr = unmapped(address.host);
  return sizeof v4;
}

Address address_of(const sockaddr_in6& from) {
  Address address;
  if (from.sin6_family == AF_INET) {
    auto& v4 = reinterpret_cast<const sockaddr_in&>(from);
    address.host = mapped(v4.sin_addr), address.port = ntohs(v4.sin_port);
  } else {
    std::memcpy(address.host.data(), &from.sin6_addr, address.host.size());
    address.port = ntohs(from.sin6_port), address.scope = from.sin6_scope_id;
  }
  return address;
}

// Appends a control message; its length in `used`.
template <class Value>
void put(uint8_t* control, size_t& used, int level, int type, const Value& value) {
  auto* c = reinterpret_cast<cmsghdr*>(control + used);
  c->cmsg_level = level, c->cmsg_type = type, c->cmsg_len = CMSG_LEN(sizeof value);
  std::memcpy(CMSG_DATA(c), &value, sizeof value);
  used += CMSG_SPACE(sizeof value);
}

// Says which of the machine's addresses a packet is to come from.
void put_local(uint8_t* control, size_t& used, const Address& to, int family) {
  if (family == AF_INET6) {
    in6_pktinfo info{};
    std::memcpy(&info.ipi6_addr, to.local.data(), sizeof info.ipi6_addr);
    put(control, used, IPPROTO_IPV6, IPV6_PKTINFO, info);
  } else {
    in_pktinfo info{};
    info.ipi_spec_dst = unmapped(to.local);
    put(control, used, IPPROTO_IP, IP_PKTINFO, info);
  }
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
  sockaddr_in6 to{};
  socklen_t to_bytes = 0;  // 0: the connected peer
  const Address* peer = nullptr;
  alignas(cmsghdr) uint8_t control[CMSG_SPACE(sizeof(uint16_t)) + CMSG_SPACE(sizeof(in6_pktinfo))] = {};

  bool takes(size_t more) const {
    return pieces.size() < kSegments && pieces.back().iov_len == segment && more <= segment && bytes + more <= kJoined;
  }
  void add(uint8_t* packet, size_t length) {
    if (pieces.empty()) segment = length;
    pieces.push_back({packet, length});
    bytes += length;
  }
  msghdr message(bool any) {
    msghdr m{};
    size_t used = 0;
    if (to_bytes) m.msg_name = &to, m.msg_namelen = to_bytes;
    if (any && to_bytes) put_local(control, used, *peer, to.sin6_family);
    m.msg_iov = pieces.data(), m.msg_iovlen = pieces.size();
    if (pieces.size() > 1) put(control, used, SOL_UDP, UDP_SEGMENT, static_cast<uint16_t>(segment));
    if (used) m.msg_control = control, m.msg_controllen = used;
    return m;
  }
};

Port::Port(int socket, int wake, Counters& counters)
    : socket_(socket), wake_(wake), counters_(counters), buffer_(kBatch * kDatagram), control_(kBatch * kControlBytes) {
  int on = 1;
  setsockopt(socket_, SOL_UDP, UDP_GRO, &on, sizeof on);  // an older kernel gives single packets
  sockaddr_in6 own{};
  socklen_t bytes = sizeof own;
  getsockname(socket_, reinterpret_cast<sockaddr*>(&own), &bytes);
  family_ = own.sin6_family;
  Address bound = address_of(own);
  any_ = bound.host == decltype(bound.host){} || bound.host == mapped(in_addr{});
  if (!any_) return;
  if (family_ == AF_INET6) setsockopt(socket_, IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof on);
  else setsockopt(socket_, IPPROTO_IP, IP_PKTINFO, &on, sizeof on);
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
  sockaddr_in6 from[kBatch];
  for (size_t i = 0; i < kBatch; ++i) {
    pieces[i] = {buffer_.data() + i * kDatagram, kDatagram};
    messages[i].msg_hdr = {&from[i], sizeof from[i], &pieces[i], 1, control_.data() + i * kControlBytes, kControlBytes, 0};
  }
  int count = recvmmsg(socket_, messages, kBatch, MSG_DONTWAIT, nullptr);
  for (int i = 0; i < count; ++i) {
    size_t bytes = messages[i].msg_len, segment = bytes;
    Address source = address_of(from[i]);
    for (cmsghdr* c = CMSG_FIRSTHDR(&messages[i].msg_hdr); c; c = CMSG_NXTHDR(&messages[i].msg_hdr, c)) {
      if (c->cmsg_level == SOL_UDP && c->cmsg_type == UDP_GRO) {
        int size;
        std::memcpy(&size, CMSG_DATA(c), sizeof size);
        segment = static_cast<size_t>(size);
      } else if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_PKTINFO) {
        in_pktinfo info;
        std::memcpy(&info, CMSG_DATA(c), sizeof info);
        source.local = mapped(info.ipi_spec_dst);
      } else if (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_PKTINFO) {
        in6_pktinfo info;
        std::memcpy(&info, CMSG_DATA(c), sizeof info);
        std::memcpy(source.local.data(), &info.ipi6_addr, source.local.size());
      }
    }
    const uint8_t* packet = static_cast<const uint8_t*>(pieces[i].iov_base);
    do {
      size_t length = std::min(segment, bytes);
      take(packet, length, source);
      packet += length, bytes -= length;
    } while (bytes > 0);
  }
  return count > 0;
}

void Port::send(Outbox& box, int worker, const Address* to, bool join) {
  std::vector<Datagram> runs;
  Outbox::Entry* first = nullptr;  // of the last datagram, where others may follow it
  for (Outbox::Entry& entry : box.entries()) {
    if (entry.worker != worker && entry.worker != Outbox::kAll) continue;
    entry.joined = false;
    counters_.add(kSentBytes, entry.bytes);
    if (to) counters_.add(kSentPackets);  // a worker counts its own; before they go, so that no reader sees fewer than came
    if (first && !entry.single && runs.back().takes(entry.bytes)) {
      first->joined = entry.joined = true;
    } else {
      Datagram& run = runs.emplace_back();
      if (to) run.peer = to, run.to_bytes = socket_address(*to, family_, run.to);
      first = join && segment_ && !entry.single ? &entry : nullptr;
    }
    runs.back().add(box.at(entry), entry.bytes);
  }
  flush(runs);
}

bool Port::send(const std::string& packet, const Address& to) {
  Datagram one;
  one.peer = &to, one.to_bytes = socket_address(to, family_, one.to);
  one.add(reinterpret_cast<uint8_t*>(const_cast<char*>(packet.data())), packet.size());
  msghdr message = one.message(any_);
  return sendmsg(socket_, &message, MSG_DONTWAIT) >= 0;
}

void Port::flush(std::vector<Datagram>& runs) {
  std::vector<mmsghdr> messages(runs.size());
  for (size_t i = 0; i < runs.size(); ++i) messages[i].msg_hdr = runs[i].message(any_);
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
        Datagram& single = singles.emplace_back();
        single.peer = runs[done].peer, single.to = runs[done].to, single.to_bytes = runs[done].to_bytes;
        single.add(static_cast<uint8_t*>(piece.iov_base), piece.iov_len);
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
    return [&, now](const uint8_t* packet, size_t bytes, const Address& source) {
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
    port.send(box, 0, nullptr, worker.joins());
    worker.sent(box);
    box.clear();
    if (!heard.empty() || worker.finished() != finished || now >= until) return heard;
    if (!any && !port.wait(std::min(until, worker.due()))) return heard;
  }
}

bool Throttle::admits(const Address& source, double now) {
  constexpr double kWindow = 0.1;
  constexpr uint32_t kAnAddress = 64, kAHost = 512;
  constexpr size_t kMost = 8192;
  if (now >= until_) until_ = now + kWindow, addresses_.clear(), hosts_.clear();
  uint64_t high, low;
  std::memcpy(&high, source.host.data(), sizeof high);
  std::memcpy(&low, source.host.data() + sizeof high, sizeof low);
  uint64_t host = (high * 0x9E3779B97F4A7C15 ^ low) * 0xD6E8FEB86659FD93;
  uint64_t address = (host ^ source.port) * 0x9E3779B97F4A7C15;
  if (addresses_.size() >= kMost && !addresses_.contains(address)) return false;
  return ++addresses_[address] <= kAnAddress && ++hosts_[host] <= kAHost;
}

std::vector<Control> drive(Switch& core, Port& port, Throttle& throttle, double until) {
  std::vector<Control> heard;
  Outbox box;
  Aggregation* current = nullptr;
  auto flush = [&] {
    if (current && !box.entries().empty())
      for (uint32_t worker = 0; worker < current->addresses().size(); ++worker) {
        bool join = current->joins(worker);
        port.send(box, static_cast<int>(worker), &current->addresses()[worker], join);
        if (join) current->sent(box, worker);
      }
    box.clear();
  };
  double now = monotonic();
  auto take = [&](const uint8_t* packet, size_t bytes, const Address& source) {
    if (bytes >= kHeaderBytes && packet[0] == kMagic && packet[1] == kControl) {
      if (!throttle.admits(source, now)) return core.counters.add(kThrottled);
      heard.emplace_back(std::string(reinterpret_cast<const char*>(packet), bytes), source);
      return;
    }
    core.counters.add(kReceivedPackets);
    core.counters.add(kReceivedBytes, bytes);
    if (Aggregation* session = bytes >= kHeaderBytes ? core.find(load16(packet + 2)) : nullptr; session != current) {
      flush();
      current = session;
    }
    core.receive(packet, bytes, source, now, box);
  };
  for (;;) {
    bool any = port.receive(take);
    flush();
    if (!heard.empty() || (now = monotonic()) >= until) return heard;
    if (!any && !port.wait(until)) return heard;
    if (!any) now = monotonic();
  }
}

}  // namespace switchml

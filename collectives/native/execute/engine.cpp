#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include "execute/execute.hpp"

namespace execute {
namespace {

constexpr size_t kTurn = 1 << 20;       // bytes read from one peer before the others have their turn
constexpr double kGrace = 0.2;          // seconds for a rank's last words after its connection has ended
constexpr size_t kPooled = 64;          // staging buffers kept
constexpr double kLook = 60;            // seconds between looks at the clock, at most
constexpr uint32_t kWakeTag = 0xFFFFFFFF;
// parts of the deadline after which a silent peer is asked, one that did not answer is blamed, one that has not begun the
// job, then, some seconds later, whoever is waited for: whoever knows most speaks first
constexpr double kAsk = 0.5, kSilent = 0.9, kAbsent = 0.95, kMoment = 0.5;

double monotonic() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool again(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

}  // namespace

Engine::Engine(int rank, double deadline, bool overlap) : rank_(rank), deadline_(deadline), overlap_(overlap) {
  epoll_ = epoll_create1(EPOLL_CLOEXEC);
  event_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (epoll_ < 0 || event_ < 0) throw std::system_error(errno, std::generic_category(), "epoll");
  epoll_event watched{};
  watched.events = EPOLLIN, watched.data.u32 = kWakeTag;
  epoll_ctl(epoll_, EPOLL_CTL_ADD, event_, &watched);
  thread_ = std::thread([this] { loop(); });
}

void Engine::wake() {
  const uint64_t one = 1;
  [[maybe_unused]] ssize_t written = write(event_, &one, sizeof one);
}

void Engine::add_peer(int rank, int in, int out) {
  std::lock_guard held(mutex_);
  if (stop_) throw std::runtime_error("the engine is closed");
  known_.insert(rank);
  arrivals_.push_back({rank, in, out});
  wake();
}

std::shared_ptr<Job> Engine::submit(std::shared_ptr<const Program> program, uint8_t* data, Dtype dtype, uint64_t call) {
  bytes_of(dtype);  // refuses an unknown one
  std::lock_guard held(mutex_);
  if (stop_) throw std::runtime_error("the engine is closed");
  if (!std::includes(known_.begin(), known_.end(), program->peers.begin(), program->peers.end()))
    throw std::invalid_argument("a program talks to a rank without a connection");
  auto job = std::make_shared<Job>();
  job->waits = program->waits, job->left = program->size();
  job->program = std::move(program), job->data = data, job->dtype = dtype;
  job->number = numbered_++, job->call = call;
  if (failure_.reason != Failure::kNone) {
    job->done = job->failed = true;
  } else {
    submitted_.push_back(job);
    wake();
  }
  return job;
}

bool Engine::wait(const Job& job, double seconds) {
  std::unique_lock held(mutex_);
  return ended_.wait_for(held, std::chrono::duration<double>(seconds), [&] { return job.done; });
}

bool Engine::failed(const Job& job) {
  std::lock_guard held(mutex_);
  return job.failed;
}

Failure Engine::failure() {
  std::lock_guard held(mutex_);
  return failure_;
}

int Engine::awaited() {
  std::unique_lock held(mutex_);
  if (stop_) return -1;
  asked_ = true;
  wake();
  ended_.wait_for(held, std::chrono::seconds(1), [&] { return !asked_; });
  return asked_ ? -1 : awaited_;
}

std::pair<int, bool> Engine::lost() const { return {lost_, lost_left_}; }

void Engine::abort(uint32_t reason, int culprit) {
  std::lock_guard held(mutex_);
  const auto me = static_cast<uint32_t>(rank_);
  abort_ = {reason, culprit < 0 ? me : static_cast<uint32_t>(culprit), Failure::kNoOp, me};
  wake();
}

void Engine::close() {
  {
    std::lock_guard held(mutex_);
    if (std::exchange(stop_, true)) return;
    wake();
  }
  thread_.join();
  for (auto& peer : peers_) say(*peer, {kLeave, 0, 0, 0}), ::close(peer->in), ::close(peer->out);
  for (auto& [rank, in, out] : arrivals_) ::close(in), ::close(out);
  ::close(event_), ::close(epoll_);
}

void Engine::loop() {
  epoll_event events[64];
  while (true) {
    const int count = epoll_wait(epoll_, events, 64, timeout());
    for (int i = 0; i < count && !broken_; ++i) {
      const uint32_t tag = events[i].data.u32;
      if (tag == kWakeTag) continue;
      Peer& peer = *peers_[tag >> 1];
      if ((tag & 1) == 0) {
        read_data(peer);
      } else {
        if (events[i].events & ~EPOLLOUT) read_control(peer);
        if (!broken_ && events[i].events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) peer.blocked = false, stirred_.push_back(&peer);
      }
      settle();
    }
    uint64_t signals;
    [[maybe_unused]] ssize_t got = read(event_, &signals, sizeof signals);
    {
      std::lock_guard held(mutex_);
      if (stop_) {
        for (auto* jobs : {&submitted_, &waiting_, &running_})
          for (auto& job : *jobs) job->done = job->failed = true;
        ended_.notify_all();
        return;
      }
    }
    take_commands();
    if (!broken_) check_time();
    if (broken_) {
      running_.clear(), waiting_.clear(), settled_.clear(), stirred_.clear(), staged_.clear();
      for (auto& peer : peers_) {
        peer->expected.clear(), peer->outgoing.clear();
        peer->reading = false, peer->in_lost = peer->out_lost = 1;
        watch(*peer);
      }
    }
  }
}

void Engine::take_commands() {
  std::vector<std::array<int, 3>> arrivals;
  std::deque<std::shared_ptr<Job>> jobs;
  Failure aborted;
  {
    std::lock_guard held(mutex_);
    arrivals.swap(arrivals_), jobs.swap(submitted_);
    aborted = std::exchange(abort_, {});
    if (asked_) {
      const auto missing = waits();
      awaited_ = missing.empty() ? -1 : missing[0].peer->rank, asked_ = false;
      ended_.notify_all();
    }
  }
  for (auto [rank, in, out] : arrivals) {
    peers_.push_back(std::make_unique<Peer>());
    Peer& peer = *peers_.back();
    peer.rank = rank, peer.in = in, peer.out = out;
    by_rank_[rank] = &peer;
    watch(peer);
  }
  begun_ += static_cast<uint32_t>(jobs.size());
  for (auto& job : jobs) waiting_.push_back(std::move(job));
  if (aborted.reason != Failure::kNone) fail(aborted);
  while (!broken_ && !waiting_.empty() && (overlap_ || running_.empty())) {
    auto job = std::move(waiting_.front());
    waiting_.pop_front();
    start(std::move(job));
    settle();
  }
}

void Engine::start(std::shared_ptr<Job> owned) {
  Job& job = *owned;
  const Program& program = *job.program;
  if (running_.empty()) progress_ = monotonic();
  started_ = job.number + 1;
  running_.push_back(std::move(owned));
  for (size_t at = 0; at < program.size(); ++at) {
    const auto kind = static_cast<Kind>(program.kind[at]);
    if (kind == Kind::kCopy || program.empty(static_cast<int32_t>(at))) continue;
    Peer& peer = *by_rank_.at(program.peer[at]);
    (kind == Kind::kOut ? peer.outgoing : peer.expected).push_back({&job, static_cast<int32_t>(at)});
  }
  for (size_t at = 0; at < program.size(); ++at)
    if (program.waits[at] == 0) ready(job, static_cast<int32_t>(at));
  for (auto& peer : peers_) {
    if (broken_) return;
    if (peer->have == sizeof(Header) && !peer->reading) read_data(*peer);
    watch(*peer);
  }
}

void Engine::ready(Job& job, int32_t at) {
  const Program& program = *job.program;
  const auto kind = static_cast<Kind>(program.kind[at]);
  if (program.empty(at)) {
    complete(job, at);
  } else if (kind == Kind::kCopy) {
    const size_t width = bytes_of(job.dtype);
    std::memmove(job.data + program.begin[at] * width, job.data + program.source[at] * width,
                 (program.end[at] - program.begin[at]) * width);
    complete(job, at);
  } else if (kind == Kind::kOut) {
    stirred_.push_back(by_rank_.at(program.peer[at]));
  } else if (auto found = staged_.find({job.number, at}); found != staged_.end()) {
    std::vector<uint8_t> bytes = std::move(found->second);
    staged_.erase(found);
    apply(job, at, bytes.data());
    if (pool_.size() < kPooled) pool_.push_back(std::move(bytes));
  }
}

void Engine::apply(Job& job, int32_t at, const uint8_t* from) {
  const Program& program = *job.program;
  const size_t width = bytes_of(job.dtype), count = static_cast<size_t>(program.end[at] - program.begin[at]);
  uint8_t* to = job.data + program.begin[at] * width;
  if (static_cast<Kind>(program.kind[at]) == Kind::kReduce)
    add(to, from, count, job.dtype);
  else
    std::memcpy(to, from, count * width);
  complete(job, at);
}

void Engine::complete(Job& job, int32_t at) {
  --job.left;
  settled_.push_back({&job, at});
}

// Tells followers, sends what became ready, ends jobs; until nothing moves.
void Engine::settle() {
  while (!broken_ && !(settled_.empty() && stirred_.empty())) {
    if (!settled_.empty()) {
      const auto [job, at] = settled_.back();
      settled_.pop_back();
      const Program& program = *job->program;
      for (int32_t i = program.next_start[at]; i < program.next_start[at + 1]; ++i)
        if (--job->waits[program.next[i]] == 0) ready(*job, program.next[i]);
    } else {
      Peer& peer = *stirred_.back();
      stirred_.pop_back();
      if (!peer.blocked) write_data(peer);
    }
  }
  if (broken_) return;
  bool ended = false;
  for (auto job = running_.begin(); job != running_.end();) {
    if ((*job)->left > 0) {
      ++job;
      continue;
    }
    std::lock_guard held(mutex_);
    (*job)->done = ended = true;
    job = running_.erase(job);
  }
  if (ended) {
    ended_.notify_all();
    wake();  // the next one may start
  }
}

std::vector<uint8_t> Engine::buffer(size_t bytes) {
  std::vector<uint8_t> taken;
  if (!pool_.empty()) {
    taken = std::move(pool_.back());
    pool_.pop_back();
  }
  if (taken.size() < bytes) taken.resize(bytes);
  return taken;
}

// A header is complete: where do its bytes go? False where nothing may be read now.
bool Engine::open_frame(Peer& peer) {
  const auto me = static_cast<uint32_t>(rank_), from = static_cast<uint32_t>(peer.rank);
  if (peer.expected.empty()) {
    // of a job to come; or of one that expects nothing from there: the rank has called something else
    if (peer.header.job < started_) fail({Failure::kMismatch, from, peer.header.op, me});
    return false;
  }
  const auto [job, at] = peer.expected.front();
  const Program& program = *job->program;
  const size_t width = bytes_of(job->dtype), bytes = static_cast<size_t>(program.end[at] - program.begin[at]) * width;
  if (peer.header.job != job->number || peer.header.op != static_cast<uint32_t>(program.op[at]) ||
      peer.header.bytes != bytes || peer.header.call != job->call) {
    fail({Failure::kMismatch, from, static_cast<uint32_t>(program.op[at]), me});
    return false;
  }
  peer.reading = true, peer.have = 0, peer.left = bytes;
  peer.direct = static_cast<Kind>(program.kind[at]) == Kind::kStore && job->waits[at] == 0;
  if (!peer.direct) peer.staged = buffer(bytes);
  peer.cursor = peer.direct ? job->data + program.begin[at] * width : peer.staged.data();
  return true;
}

// A frame's bytes are complete.
void Engine::close_frame(Peer& peer) {
  const auto [job, at] = peer.expected.front();
  peer.expected.pop_front();
  peer.reading = false;
  if (peer.direct) {
    complete(*job, at);
  } else if (job->waits[at] == 0) {
    apply(*job, at, peer.staged.data());
    if (pool_.size() < kPooled) pool_.push_back(std::move(peer.staged));
  } else {
    staged_[{job->number, at}] = std::move(peer.staged);
  }
}

void Engine::read_data(Peer& peer) {
  for (size_t turn = 0; turn < kTurn && !broken_ && peer.in_lost == 0;) {
    if (!peer.reading && peer.have == sizeof(Header) && !open_frame(peer)) break;
    // the payload, and the next header after it
    iovec pieces[2] = {{peer.cursor, peer.reading ? peer.left : 0},
                       {reinterpret_cast<uint8_t*>(&peer.header) + peer.have, sizeof(Header) - peer.have}};
    const ssize_t got = peer.reading ? readv(peer.in, pieces, 2) : readv(peer.in, pieces + 1, 1);
    if (got <= 0) {
      if (got < 0 && again(errno)) break;
      lose(peer, peer.in_lost);
      break;
    }
    progress_ = monotonic();
    received_ += static_cast<uint64_t>(got);
    turn += static_cast<size_t>(got);
    const size_t payload = peer.reading ? std::min<size_t>(static_cast<size_t>(got), peer.left) : 0;
    peer.cursor += payload, peer.left -= payload, peer.have += static_cast<size_t>(got) - payload;
    if (peer.reading && peer.left == 0) close_frame(peer);
  }
  if (!broken_) watch(peer);
}

void Engine::write_data(Peer& peer) {
  while (!peer.outgoing.empty() && peer.out_lost == 0) {
    const auto [job, at] = peer.outgoing.front();
    if (job->waits[at] != 0) break;
    const Program& program = *job->program;
    const size_t width = bytes_of(job->dtype), bytes = static_cast<size_t>(program.end[at] - program.begin[at]) * width;
    peer.sending = {job->number, static_cast<uint32_t>(program.op[at]), bytes, job->call};
    const size_t head = std::min(peer.gone, sizeof(Header)), body = peer.gone - head;
    iovec pieces[2] = {{reinterpret_cast<uint8_t*>(&peer.sending) + head, sizeof(Header) - head},
                       {job->data + program.begin[at] * width + body, bytes - body}};
    msghdr message{};
    message.msg_iov = pieces, message.msg_iovlen = 2;
    const ssize_t put = sendmsg(peer.out, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (put < 0) {
      if (again(errno))
        peer.blocked = true;
      else
        lose(peer, peer.out_lost);
      break;
    }
    progress_ = monotonic();
    sent_ += static_cast<uint64_t>(put);
    peer.gone += static_cast<size_t>(put);
    if (peer.gone < sizeof(Header) + bytes) continue;
    peer.gone = 0;
    peer.outgoing.pop_front();
    complete(*job, at);
  }
  watch(peer);
}

void Engine::read_control(Peer& peer) {
  while (peer.out_lost == 0) {
    const ssize_t got = recv(peer.out, reinterpret_cast<uint8_t*>(&peer.control) + peer.control_have,
                             sizeof(Control) - peer.control_have, MSG_DONTWAIT);
    if (got <= 0) {
      if (got < 0 && again(errno)) break;
      lose(peer, peer.out_lost);
      break;
    }
    peer.control_have += static_cast<size_t>(got);
    if (peer.control_have < sizeof(Control)) continue;
    peer.control_have = 0;
    peer.heard = monotonic();
    const Control& told = peer.control;
    const uint32_t reason = told.kind >> 16, from = static_cast<uint32_t>(peer.rank);
    if (told.kind == kPing)
      say(peer, {kPong, begun_, 0, 0});
    else if (told.kind == kPong)
      peer.jobs = told.a;
    else if (told.kind == kLeave)
      peer.leaves = true, lost_left_ = lost_left_ || lost_ == peer.rank;
    else if ((told.kind & 0xFFFF) == kAbort && reason != Failure::kNone && reason < Failure::kReasons)
      return fail({reason, told.a, told.b, told.c});
    else
      return fail({Failure::kForeign, from, Failure::kNoOp, static_cast<uint32_t>(rank_)});
  }
  watch(peer);
}

// A connection has ended.
void Engine::lose(Peer& peer, double& since) {
  since = monotonic(), lost_left_ = peer.leaves, lost_ = peer.rank;
}

void Engine::say(Peer& peer, Control frame) { send(peer.in, &frame, sizeof frame, MSG_NOSIGNAL | MSG_DONTWAIT); }

void Engine::watch(Peer& peer) {
  const auto place = static_cast<uint32_t>(
      std::find_if(peers_.begin(), peers_.end(), [&](auto& other) { return other.get() == &peer; }) - peers_.begin());
  const bool reads = peer.in_lost == 0 && (peer.reading || peer.have < sizeof(Header) || !peer.expected.empty());
  set_events(peer.in, place << 1, reads ? EPOLLIN : 0, peer.in_events);
  const uint32_t out = peer.out_lost != 0 ? 0 : EPOLLIN | (peer.blocked ? EPOLLOUT : 0);
  set_events(peer.out, place << 1 | 1, out, peer.out_events);
}

void Engine::set_events(int fd, uint32_t tag, uint32_t wanted, uint32_t& current) {
  if (wanted == current) return;
  epoll_event event{};
  event.events = wanted, event.data.u32 = tag;
  // not watched at all while nothing is wanted: an ended connection would report itself for ever
  epoll_ctl(epoll_, wanted == 0 ? EPOLL_CTL_DEL : current == 0 ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &event);
  current = wanted;
}

int Engine::timeout() const {
  if (running_.empty() || broken_) return -1;
  for (auto& peer : peers_)
    if (peer->in_lost != 0 || peer->out_lost != 0) return static_cast<int>(kGrace * 250);
  const double idle = monotonic() - progress_;
  for (const double until : {kAsk * deadline_, kSilent * deadline_, kAbsent * deadline_, deadline_ + kMoment})
    if (idle < until) return static_cast<int>(std::min(until - idle, kLook) * 1000) + 1;
  return 1;
}

// The ranks that something is waited for from, the oldest job's first.
std::vector<Engine::Awaited> Engine::waits() const {
  std::vector<Awaited> awaited;
  for (auto& peer : peers_) {
    const bool in = !peer->expected.empty(), out = !peer->outgoing.empty();
    if (!in && !out) continue;
    const Item& item = in ? peer->expected.front() : peer->outgoing.front();
    if (in || item.job->waits[item.at] == 0)
      awaited.push_back({peer.get(), static_cast<uint32_t>(item.job->program->op[item.at]), item.job->number});
  }
  std::sort(awaited.begin(), awaited.end(), [](auto& a, auto& b) { return std::pair(a.job, a.op) < std::pair(b.job, b.op); });
  return awaited;
}

void Engine::check_time() {
  if (running_.empty()) return;
  const double now = monotonic(), idle = now - progress_;
  const auto me = static_cast<uint32_t>(rank_);
  const auto awaited = waits();
  for (auto& [peer, op, job] : awaited) {
    const bool in = !peer->expected.empty(), out = !peer->outgoing.empty();
    const double lost = in && peer->in_lost != 0 ? peer->in_lost : out && peer->out_lost != 0 ? peer->out_lost : now;
    if (now - lost > kGrace)
      return fail({peer->leaves ? Failure::kLeft : Failure::kLost, static_cast<uint32_t>(peer->rank), op, me});
  }
  for (auto& [peer, op, job] : awaited) {
    const auto blame = [&](Failure::Reason reason) { fail({reason, static_cast<uint32_t>(peer->rank), op, me}); };
    if (idle >= kAsk * deadline_ && peer->pinged < progress_) peer->pinged = now, say(*peer, {kPing, 0, 0, 0});
    if (idle >= kSilent * deadline_ && peer->heard < peer->pinged) return blame(Failure::kSilent);
    if (idle >= kAbsent * deadline_ && peer->jobs <= job) return blame(Failure::kAbsent);
  }
  if (idle >= deadline_ + kMoment && !awaited.empty())
    fail({Failure::kStalled, static_cast<uint32_t>(awaited[0].peer->rank), awaited[0].op, me});
}

void Engine::fail(Failure failure) {
  if (std::exchange(broken_, true)) return;
  for (auto& peer : peers_)
    say(*peer, {kAbort | failure.reason << 16, failure.culprit, failure.op, failure.reporter});
  std::lock_guard held(mutex_);
  failure_ = failure;
  for (auto* jobs : {&submitted_, &waiting_, &running_})
    for (auto& job : *jobs) job->done = job->failed = true;
  submitted_.clear();
  ended_.notify_all();
}

}  // namespace execute

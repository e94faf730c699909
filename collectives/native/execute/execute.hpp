// The executor's data path over TCP: one engine per process, one thread, one connection per directed edge.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

namespace execute {

enum class Kind : uint8_t { kOut, kStore, kReduce, kCopy };
enum class Dtype : int { kFloat32, kFloat64, kFloat16, kBfloat16, kInt8, kUint8, kInt16, kInt32, kInt64 };

size_t bytes_of(Dtype dtype);
// to[i] += from[i]; both may start anywhere.
void add(uint8_t* to, const uint8_t* from, size_t count, Dtype dtype);

// What one rank does for one size of message. Operations are numbered in an order in which one thread could run them.
struct Program {
  std::vector<uint8_t> kind;
  std::vector<int32_t> peer;               // rank at the other end; own rank for a copy
  std::vector<int32_t> op;                 // the schedule's number, equal at both ends
  std::vector<int64_t> begin, end, source; // elements; source only of a copy
  std::vector<int32_t> waits;              // how many earlier operations must be complete
  std::vector<int32_t> next_start, next;   // operations that wait for this one
  int64_t elements = 0;                    // the buffer's length
  std::set<int> peers;

  size_t size() const { return kind.size(); }
  bool empty(int32_t at) const { return begin[at] == end[at]; }
};

// Why an engine stopped, told to every rank.
struct Failure {
  enum Reason : uint32_t { kNone, kLost, kSilent, kAbsent, kStalled, kMismatch, kAborted, kLeft, kForeign, kReasons };
  uint32_t reason = kNone;
  uint32_t culprit = 0;   // rank
  uint32_t op = 0;        // that was waited for; kNoOp where none was
  uint32_t reporter = 0;  // rank that saw it
  static constexpr uint32_t kNoOp = 0xFFFFFFFF;
};

struct Job {
  uint32_t number;
  uint64_t call;  // what was called: collective, dtype, size; equal on all ranks
  std::shared_ptr<const Program> program;
  uint8_t* data;
  Dtype dtype;
  std::vector<int32_t> waits;
  size_t left;
  bool done = false, failed = false;  // under the engine's mutex
};

class Engine {
 public:
  // One job after another unless `overlap`; `deadline` in seconds without progress.
  Engine(int rank, double deadline, bool overlap);
  ~Engine() { close(); }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Takes both sockets: data comes on `in` and goes on `out`, control frames the other way round.
  void add_peer(int rank, int in, int out);
  std::shared_ptr<Job> submit(std::shared_ptr<const Program> program, uint8_t* data, Dtype dtype, uint64_t call);
  // True when the job has ended, well or not; false after `seconds`.
  bool wait(const Job& job, double seconds);
  bool failed(const Job& job);
  Failure failure();
  int awaited();  // a rank that the oldest job waits for; -1 where none is
  std::pair<int, bool> lost() const;  // a rank whose connection has ended, or -1; whether it said that it goes
  // Fails all that runs and tells the other ranks: who is to blame, or this rank itself.
  void abort(uint32_t reason = Failure::kAborted, int culprit = -1);
  void close();
  uint64_t sent() const { return sent_; }
  uint64_t received() const { return received_; }

 private:
  struct Header {
    uint32_t job, op;
    uint64_t bytes, call;
  };
  struct Control {
    uint32_t kind;
    uint32_t a, b, c;  // kAbort: Failure's culprit, op, reporter with the reason in the kind's upper half; kPong: jobs begun
  };
  enum : uint32_t { kPing = 1, kPong = 2, kAbort = 3, kLeave = 4 };
  struct Item {
    Job* job;
    int32_t at;
  };
  struct Peer {
    int rank, in, out;
    std::deque<Item> expected, outgoing;
    // receiving
    Header header{};
    size_t have = 0;  // of the header
    bool reading = false;
    uint8_t* cursor = nullptr;
    size_t left = 0;
    std::vector<uint8_t> staged;
    bool direct = false;
    // sending
    Header sending{};
    size_t gone = 0;  // bytes of header and payload that are out
    bool blocked = false;
    // control
    Control control{};
    size_t control_have = 0;
    double pinged = 0, heard = 0;
    uint32_t jobs = 0;   // that it said it has begun
    bool leaves = false; // it said that it goes
    double in_lost = 0, out_lost = 0;  // when the connection ended
    uint32_t in_events = 0, out_events = 0;
  };

  struct Awaited {
    Peer* peer;
    uint32_t op, job;
  };

  void loop();
  void wake();
  void take_commands();
  void start(std::shared_ptr<Job> job);
  void finish(Job& job);
  void settle();
  void ready(Job& job, int32_t at);
  void complete(Job& job, int32_t at);
  void apply(Job& job, int32_t at, const uint8_t* from);
  void read_data(Peer& peer);
  void read_control(Peer& peer);
  void write_data(Peer& peer);
  bool open_frame(Peer& peer);
  void close_frame(Peer& peer);
  void watch(Peer& peer);
  void lose(Peer& peer, double& since);
  void set_events(int fd, uint32_t tag, uint32_t wanted, uint32_t& current);
  void say(Peer& peer, Control frame);
  std::vector<Awaited> waits() const;
  void check_time();
  int timeout() const;
  void fail(Failure failure);
  std::vector<uint8_t> buffer(size_t bytes);

  const int rank_;
  const double deadline_;
  const bool overlap_;
  int epoll_, event_;
  std::thread thread_;

  std::mutex mutex_;  // of what follows, up to the blank line
  std::condition_variable ended_;
  std::deque<std::shared_ptr<Job>> submitted_;
  std::vector<std::array<int, 3>> arrivals_;
  std::set<int> known_;
  uint32_t numbered_ = 0;
  Failure failure_;
  bool stop_ = false, asked_ = false;
  int awaited_ = -1;
  Failure abort_;

  // the thread's own
  std::vector<std::unique_ptr<Peer>> peers_;
  std::unordered_map<int, Peer*> by_rank_;
  std::deque<std::shared_ptr<Job>> waiting_, running_;
  std::map<std::pair<uint32_t, int32_t>, std::vector<uint8_t>> staged_;  // arrived before its turn
  std::vector<std::vector<uint8_t>> pool_;
  std::vector<Item> settled_;  // complete, followers not told yet
  std::vector<Peer*> stirred_; // the head of their outgoing queue may have become ready
  uint32_t begun_ = 0, started_ = 0;
  double progress_ = 0;
  bool broken_ = false;
  std::atomic<uint64_t> sent_ = 0, received_ = 0;
  std::atomic<int> lost_ = -1;
  std::atomic<bool> lost_left_ = false;
};

}  // namespace execute

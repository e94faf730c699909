// What a scheduling policy is: events in, actions out; integer nanoseconds, no clock.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

namespace serving {

using Time = int64_t;  // nanoseconds
using Id = int64_t;
constexpr Time kNever = std::numeric_limits<Time>::max();

// Refused input: a rule, the value, what to do.
struct Refused : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

enum class Kind : uint8_t { kDispatch, kDrop, kPreempt };

// `ids` lie in Actions::ids, from `begin` to the next action's.
struct Action {
  Kind kind;
  int model;
  int gpu;  // -1 for a drop
  size_t begin, end;
};

struct Actions {
  std::vector<Action> actions;
  std::vector<Id> ids;

  void clear() {
    actions.clear();
    ids.clear();
  }
  void dispatch(int model, int gpu, size_t begin) {
    actions.push_back({Kind::kDispatch, model, gpu, begin, ids.size()});
  }
  void preempt(int model, int gpu) { actions.push_back({Kind::kPreempt, model, gpu, ids.size(), ids.size()}); }
  void drop(int model, Id id) {
    ids.push_back(id);
    if (!actions.empty() && actions.back().kind == Kind::kDrop && actions.back().model == model) {
      actions.back().end = ids.size();
    } else {
      actions.push_back({Kind::kDrop, model, -1, ids.size() - 1, ids.size()});
    }
  }
};

// Latency of a batch by its size, in nanoseconds; never falls.
class Profile {
 public:
  explicit Profile(std::vector<Time> latency);

  int largest() const { return static_cast<int>(latency_.size()); }
  // A size beyond the largest takes as long as the largest: no such batch is ever formed.
  Time of(size_t size) const { return latency_[(size < latency_.size() ? size : latency_.size()) - 1]; }
  // Largest batch that takes at most `time`; 0 where none does.
  int within(Time time) const;
  // Intercept of the line through the ends: what a batch costs whatever its size.
  Time fixed() const { return fixed_; }
  // Whether waiting for a larger batch can pay: its fixed cost is that of at least four requests.
  bool gains() const { return fixed_ >= 4 * slope_; }

 private:
  std::vector<Time> latency_;
  Time fixed_, slope_;
};

class Policy {
 public:
  virtual ~Policy() = default;
  virtual void on_request(Id id, int model, Time deadline, Time now, Actions& out) = 0;
  virtual void on_gpu_free(int gpu, Time now, Actions& out) = 0;
  virtual void on_timer(Time now, Actions& out) = 0;
  virtual Time next_timer() const = 0;
  virtual void cancel(Id id, Time now, Actions& out) = 0;
  virtual void add_gpu(int, Time, Actions&) { throw Refused("this policy's GPUs are fixed"); }
  virtual void remove_gpu(int, Time) { throw Refused("this policy's GPUs are fixed"); }
};

}  // namespace serving

// Collectives in stages (halving-doubling, BCube): the cost is the sum over stages of the dearest exchange. A
// tournament over the exchanges of each stage keeps the dearest at hand while hosts are swapped.
#include "order/anneal.hpp"

namespace order {
namespace {

class Tournament {
 public:
  explicit Tournament(int players) {
    while (leaves_ < players) leaves_ *= 2;
    best_.assign(2 * leaves_, 0);
  }
  double best() const { return best_[1]; }
  double at(int player) const { return best_[leaves_ + player]; }
  void set(int player, double value) {
    int node = leaves_ + player;
    best_[node] = value;
    for (node /= 2; node > 0; node /= 2) {
      const double winner = std::max(best_[2 * node], best_[2 * node + 1]);
      if (winner == best_[node]) break;
      best_[node] = winner;
    }
  }
  int winner() const {
    int node = 1;
    while (node < leaves_) node = 2 * node + (best_[2 * node] != best_[node]);
    return node - leaves_;
  }

 private:
  int leaves_ = 1;
  std::vector<double> best_;
};

class StagesKernel {
 public:
  StagesKernel(Matrix cost, Matrix latency, const Stages& stages, const std::vector<int>& host)
      : cost_(cost), latency_(latency), stages_(stages), host_(host), joined_(cost.size) {
    const int count = static_cast<int>(stages.weight.size());
    sum_.assign(count, 0);
    for (int s = 0; s < count; ++s) {
      tournaments_.emplace_back(stages.first[s + 1] - stages.first[s]);
      for (int e = stages.first[s]; e < stages.first[s + 1]; ++e) {
        joined_[stages.left[e]].push_back({s, e}), joined_[stages.right[e]].push_back({s, e});
        update(s, e);
      }
    }
  }

  void touch(int rank) {
    for (const auto& [s, e] : joined_[rank]) update(s, e);
  }

  double total() const {
    double sum = 0;
    for (const auto& tournament : tournaments_) sum += tournament.best();
    return sum;
  }

  double average() const {
    double sum = 0;
    for (size_t s = 0; s < sum_.size(); ++s) sum += sum_[s] / (stages_.first[s + 1] - stages_.first[s]);
    return sum;
  }

  int worst(Random& random) const {
    const int s = random.below(static_cast<int>(tournaments_.size()));
    const int e = stages_.first[s] + tournaments_[s].winner();
    return random.below(2) ? stages_.left[e] : stages_.right[e];
  }

 private:
  void update(int s, int e) {
    const int a = host_[stages_.left[e]], b = host_[stages_.right[e]], player = e - stages_.first[s];
    const double value = latency_(a, b) + stages_.weight[s] * cost_(a, b), old = tournaments_[s].at(player);
    if (value == old) return;
    sum_[s] += value - old;
    tournaments_[s].set(player, value);
  }

  const Matrix cost_, latency_;
  const Stages& stages_;
  const std::vector<int>& host_;
  std::vector<std::vector<std::pair<int, int>>> joined_;  // rank -> (stage, exchange)
  std::vector<Tournament> tournaments_;
  std::vector<double> sum_;
};

}  // namespace

Found search_stages(Matrix cost, Matrix latency, const Stages& stages, std::vector<int> start, uint64_t seed,
                    int64_t rounds, const Late& late) {
  StagesKernel kernel(cost, latency, stages, start);
  return anneal(kernel, start, seed, rounds, 0.005, late);
}

double stages_cost(Matrix cost, Matrix latency, const Stages& stages, const std::vector<int>& order) {
  return StagesKernel(cost, latency, stages, order).total();
}

}  // namespace order

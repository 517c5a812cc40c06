#include "moe/stochastic_balance/stochastic_balance_kernel.h"

#include <algorithm>
#include <vector>

namespace torch_ext::kernels {
namespace {

constexpr double kNone = -HUGE_VAL;

// Keys of all servers for one arrival; minus infinity where there is no edge or, unless `full`, no room left.
TX_CLONES void discounted_keys(const double* probability, const double* weight, const double* room, const int64_t* done,
                               const int64_t* capacity, int64_t servers, double* keys) {
  for (int64_t u = 0; u < servers; ++u) {
    const double key = weight[u] * probability[u] * room[u];
    keys[u] = probability[u] > 0 && done[u] < capacity[u] ? key : kNone;
  }
}

// One server's state during a run.
struct State {
  double* load;
  int64_t* attempts;
  int64_t* done;
  double* room;
};

void all_keys(const BalanceProblem& problem, const double* probability, const double* weight, const State& state,
              double* keys) {
  if (problem.rule == BalanceRule::kDiscount) {
    discounted_keys(probability, weight, state.room, state.done, problem.capacity, problem.servers, keys);
    return;
  }
  for (int64_t u = 0; u < problem.servers; ++u) {
    const bool open = probability[u] > 0 && state.done[u] < problem.capacity[u];
    keys[u] = open ? balance_key(problem.rule, weight[u], probability[u], 1.0, state.load[u], state.attempts[u],
                                 problem.capacity[u])
                   : kNone;
  }
}

int64_t best_of(const double* keys, const double* probability, int64_t servers, bool by_probability) {
  int64_t best = -1;
  double key = kNone;
  for (int64_t u = 0; u < servers; ++u) {
    const bool tie = by_probability && best >= 0 && keys[u] == key && probability[u] > probability[best];
    if (keys[u] > key || tie) {
      best = u;
      key = keys[u];
    }
  }
  return best;
}

// The servers of one arrival into chosen[top_k]; -1 where none is left.
void choose(const BalanceProblem& problem, const double* probability, const double* weight, const State& state,
            double* keys, int32_t* chosen) {
  all_keys(problem, probability, weight, state, keys);
  const bool by_probability = problem.rule == BalanceRule::kLoad;
  int64_t k = 0;
  for (; k < problem.top_k; ++k) {
    const int64_t u = best_of(keys, probability, problem.servers, by_probability);
    if (u < 0) break;
    chosen[k] = static_cast<int32_t>(u);
    keys[u] = kNone;
  }
  std::fill(chosen + k, chosen + problem.top_k, -1);
  if (!problem.spill || k == problem.top_k) return;
  for (int64_t u = 0; u < problem.servers; ++u) keys[u] = probability[u] > 0 ? -state.load[u] : kNone;
  for (int64_t i = 0; i < k; ++i) keys[chosen[i]] = kNone;
  for (; k < problem.top_k; ++k) {
    const int64_t u = best_of(keys, probability, problem.servers, false);
    if (u < 0) break;
    chosen[k] = static_cast<int32_t>(u);
    keys[u] = kNone;
  }
}

void attempt(const BalanceProblem& problem, const State& state, int64_t u, double probability) {
  state.attempts[u] += 1;
  state.load[u] += probability / static_cast<double>(problem.capacity[u]);
  state.room[u] = problem.room(state.load[u]);
}

void run_instance(const BalanceProblem& problem, const BalanceResult& result, int64_t instance, double* keys) {
  const int64_t b = instance / problem.replicates, replicate = instance % problem.replicates;
  const int64_t m = problem.servers, entries = problem.arrivals * problem.top_k;
  const State state{result.load + instance * m, result.attempts + instance * m, result.done + instance * m,
                    result.room + instance * m};
  for (int64_t u = 0; u < m; ++u) state.room[u] = problem.room(state.load[u]);
  core::PhiloxStream stream = balance_stream(problem.seed, b);
  stream.epoch = static_cast<uint32_t>(replicate);
  double value = 0;
  for (int64_t v = 0; v < problem.arrivals; ++v) {
    const double* probability = problem.probability + (b * problem.arrivals + v) * m;
    const double* weight = problem.weight + b * problem.weight_batch + v * problem.weight_arrival;
    int32_t* chosen = result.choice + instance * entries + v * problem.top_k;
    bool* success = result.success + instance * entries + v * problem.top_k;
    choose(problem, probability, weight, state, keys, chosen);
    stream.stream = static_cast<uint32_t>(v);
    for (int64_t k = 0; k < problem.top_k; ++k) {
      const int64_t u = chosen[k];
      success[k] = u >= 0 && balance_chance(stream, k) < probability[u];
      if (u < 0) continue;
      attempt(problem, state, u, probability[u]);
      if (!success[k]) continue;
      state.done[u] += 1;
      value += weight[u];
    }
  }
  result.value[instance] = value;
}

}  // namespace

void stochastic_balance_cpu(const BalanceProblem& problem, const BalanceResult& result, int64_t begin, int64_t end) {
  std::vector<double> keys(static_cast<size_t>(problem.servers));
  for (int64_t i = begin; i < end; ++i) run_instance(problem, result, i, keys.data());
}

int64_t balance_choose(const BalanceProblem& problem, const double* probability, const double* weight,
                       const double* load, const int64_t* attempts, const int64_t* done) {
  const auto m = static_cast<size_t>(problem.servers);
  std::vector<double> keys(m), room(m), loads(load, load + m);
  std::vector<int64_t> tried(attempts, attempts + m), finished(done, done + m);
  for (size_t u = 0; u < m; ++u) room[u] = problem.room(loads[u]);
  int32_t chosen = -1;
  choose(problem, probability, weight, {loads.data(), tried.data(), finished.data(), room.data()}, keys.data(),
         &chosen);
  return chosen;
}

namespace {

// Expected value of what follows arrival v.
double expected_from(const BalanceProblem& problem, const State& state, int64_t v, std::vector<double>& keys) {
  if (v == problem.arrivals) return 0;
  const double* probability = problem.probability + v * problem.servers;
  const double* weight = problem.weight + v * problem.weight_arrival;
  int32_t u = -1;
  choose(problem, probability, weight, state, keys.data(), &u);
  if (u < 0) return expected_from(problem, state, v + 1, keys);
  const double p = probability[u], load = state.load[u], room = state.room[u];
  attempt(problem, state, u, p);
  state.done[u] += 1;
  double value = p * (weight[u] + expected_from(problem, state, v + 1, keys));
  state.done[u] -= 1;
  if (p < 1) value += (1 - p) * expected_from(problem, state, v + 1, keys);
  state.attempts[u] -= 1;
  state.load[u] = load;
  state.room[u] = room;
  return value;
}

}  // namespace

double stochastic_balance_exact_cpu(const BalanceProblem& problem) {
  const auto m = static_cast<size_t>(problem.servers);
  std::vector<double> keys(m), load(m), room(m, problem.room(0.0));
  std::vector<int64_t> attempts(m), done(m);
  return expected_from(problem, {load.data(), attempts.data(), done.data(), room.data()}, 0, keys);
}

double stochastic_optimum_cpu(const double* probability, const double* weight, int64_t arrivals, int64_t servers) {
  const size_t sets = size_t{1} << servers;
  std::vector<double> after(sets, 0.0), now(sets, 0.0);  // value of the arrivals to come, by the set of free servers
  for (int64_t v = arrivals - 1; v >= 0; --v) {
    const double* p = probability + v * servers;
    for (size_t free = 0; free < sets; ++free) {
      double best = after[free];
      for (int64_t u = 0; u < servers; ++u) {
        const size_t bit = size_t{1} << u;
        if ((free & bit) == 0) continue;
        best = std::max(best, p[u] * (weight[u] + after[free & ~bit]) + (1 - p[u]) * after[free]);
      }
      now[free] = best;
    }
    after.swap(now);
  }
  return after[sets - 1];
}

namespace {

// Maximum flow source -> arrivals -> servers -> sink by shortest augmenting paths over the residual graph.
class Flow {
 public:
  Flow(const bool* edges, double probability, const int64_t* capacity, int64_t arrivals, int64_t servers)
      : edges_(edges), arrivals_(arrivals), servers_(servers), along_(static_cast<size_t>(arrivals * servers)) {
    for (int64_t v = 0; v < arrivals; ++v) left_.push_back(probability);
    for (int64_t u = 0; u < servers; ++u) room_.push_back(static_cast<double>(capacity[u]));
  }

  double run() {
    double total = 0;
    for (double step = augment(); step > 0; step = augment()) total += step;
    return total;
  }

 private:
  static constexpr double kTiny = 1e-15;
  double& along(int64_t v, int64_t u) { return along_[static_cast<size_t>(v * servers_ + u)]; }
  static size_t at(int64_t i) { return static_cast<size_t>(i); }

  // Breadth first from the arrivals with supply left to a server with room; returns what was pushed.
  double augment() {
    std::vector<int64_t> server_from(at(servers_), -1), arrival_from(at(arrivals_), -2), queue;
    for (int64_t v = 0; v < arrivals_; ++v) {
      if (left_[at(v)] <= kTiny) continue;
      arrival_from[at(v)] = -1;
      queue.push_back(v);
    }
    for (size_t head = 0; head < queue.size(); ++head) {
      const int64_t v = queue[head];
      for (int64_t u = 0; u < servers_; ++u) {
        if (!edges_[v * servers_ + u] || server_from[at(u)] >= 0) continue;
        server_from[at(u)] = v;
        if (room_[at(u)] > kTiny) return push(u, server_from, arrival_from);
        for (int64_t w = 0; w < arrivals_; ++w) {
          if (arrival_from[at(w)] != -2 || along(w, u) <= kTiny) continue;
          arrival_from[at(w)] = u;
          queue.push_back(w);
        }
      }
    }
    return 0;
  }

  double push(int64_t end, const std::vector<int64_t>& server_from, const std::vector<int64_t>& arrival_from) {
    double amount = room_[at(end)];
    for (int64_t u = end;;) {
      const int64_t v = server_from[at(u)], before = arrival_from[at(v)];
      if (before < 0) {
        amount = std::min(amount, left_[at(v)]);
        break;
      }
      amount = std::min(amount, along(v, before));
      u = before;
    }
    room_[at(end)] -= amount;
    for (int64_t u = end;;) {
      const int64_t v = server_from[at(u)], before = arrival_from[at(v)];
      along(v, u) += amount;
      if (before < 0) {
        left_[at(v)] -= amount;
        return amount;
      }
      along(v, before) -= amount;
      u = before;
    }
  }

  const bool* edges_;
  int64_t arrivals_, servers_;
  std::vector<double> along_, left_, room_;
};

}  // namespace

double fluid_lp_cpu(const bool* edges, double probability, const int64_t* capacity, int64_t arrivals, int64_t servers) {
  return Flow(edges, probability, capacity, arrivals, servers).run();
}

}  // namespace torch_ext::kernels

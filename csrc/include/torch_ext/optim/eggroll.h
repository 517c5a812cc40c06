// EGGROLL: evolution strategies with low-rank perturbations, for models that are not or cannot be differentiated.
//
// Sarkar et al., "Evolution Strategies at the Hyperscale", arXiv:2511.16652. N members evaluate W + s_i sigma E_p, with
// E_p = A_p B_p^T / sqrt(rank) for matrices and full noise for vectors (ops/eggroll.h); one value a member is all that
// comes back:
//
//   z = shaping(f), f = -value (value with maximize)          c_p = z_2p - z_2p+1
//   G = -kappa sum_p c_p E_p                                  kappa: sigma / sqrt(N), 1 / N or 1 / (N sigma)
//   b = momentum b + (G + weight_decay p)                     p = p - lr b
//
// G is the pseudo-gradient of what is minimised. With tell(values, false) it goes to .grad for another optimizer; any
// Adam will do, and is what works best on small networks.
//
//   auto model = torch_ext::nn::eggroll_convert(plain);  // a torch::nn::Sequential; see nn/eggroll.h
//   torch_ext::optim::Eggroll optimizer(model->parameters(), torch_ext::optim::EggrollOptions(0.1).sigma(0.1));
//   optimizer.step([&](const torch_ext::optim::Population& pop) {
//     const auto guard = pop.applied_to(model);
//     const auto y = model->forward(x.expand({pop.size(), -1, -1}));   // [members, rows, classes]
//     return losses(y);                                                // [members]
//   });
//
// Memory: the parameters, momentum (4 bytes an element, 8 for float64) if there is any, G of one parameter at a time
// and a bounded workspace, whatever N is. Nothing random is stored.
#pragma once

#include <torch_ext/optim/base.h>
#include <torch_ext/optim/population.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace torch_ext::optim {

class TORCH_EXT_API EggrollOptions : public OptionsOf<EggrollOptions> {
 public:
  EggrollOptions();
  EggrollOptions(double lr);  // NOLINT(google-explicit-constructor): as torch::optim::SGDOptions

  // Step size, [0, inf). Default 1e-3.
  double lr() const { return get("lr").toDouble(); }
  EggrollOptions& lr(double value) { return assign("lr", value); }
  // Of the average of pseudo-gradients, [0, 1). Default 0.
  double momentum() const { return get("momentum").toDouble(); }
  EggrollOptions& momentum(double value) { return assign("momentum", value); }
  // Added to G times the parameter, [0, inf). Default 0.
  double weight_decay() const { return get("weight_decay").toDouble(); }
  EggrollOptions& weight_decay(double value) { return assign("weight_decay", value); }
  // How the parameters of a group are perturbed: "matrix" and "embedding" (low rank; as [size 0, rest]) or "vector"
  // (full). Default none: two or more dimensions are a matrix, fewer a vector.
  std::optional<std::string> kind() const { return get("kind").toOptional<std::string>(); }
  EggrollOptions& kind(std::optional<std::string> value) { return assign("kind", std::move(value)); }

  // The following are the same for all groups.

  // Size of the perturbations, (0, inf). Default 1e-2.
  double sigma() const { return get("sigma").toDouble(); }
  EggrollOptions& sigma(double value) { return assign("sigma", value); }
  // Of a perturbation of a matrix [m, n], 1 ... min(m, n). Default 1; it hardly matters.
  int64_t rank() const { return get("rank").toInt(); }
  EggrollOptions& rank(int64_t value) { return assign("rank", value); }
  // N, the members of one update, >= 2, even with antithetic pairs. Default 256. The option that matters most.
  int64_t population() const { return get("population").toInt(); }
  EggrollOptions& population(int64_t value) { return assign("population", value); }
  // Members 2p and 2p + 1 see opposite noise. Default true.
  bool antithetic() const { return get("antithetic").toBool(); }
  EggrollOptions& antithetic(bool value) { return assign("antithetic", value); }
  // Consecutive members that were given the same task; for "grouped" and "baseline". Even, divides N. Default 0: none.
  int64_t group_size() const { return get("group_size").toInt(); }
  EggrollOptions& group_size(int64_t value) { return assign("group_size", value); }
  // Updates that see the same noise, >= 0; 0: all of them. Default 1.
  int64_t noise_reuse() const { return get("noise_reuse").toInt(); }
  EggrollOptions& noise_reuse(int64_t value) { return assign("noise_reuse", value); }
  // "zscore" (default)  (f - mean) / sqrt(variance + 1e-5)
  // "grouped"           (f - mean of its group) / sqrt(variance of all + 1e-5)
  // "centered_rank"     rank / (N - 1) - 1/2, ties at their average
  // "sign"              c_p = sign(f_2p - f_2p+1)
  // "raw"               f
  // "softmax"           exp(f / temperature) / sum
  // "baseline"          (f - b) / (deviation in its group + 1e-8), b that of the group's first pair, which has no noise
  // Values that are all equal give a zero update with each of them.
  std::string shaping() const { return get("shaping").toStringRef(); }
  EggrollOptions& shaping(std::string value) { return assign("shaping", std::move(value)); }
  // Of "softmax", (0, inf). Default 1.
  double temperature() const { return get("temperature").toDouble(); }
  EggrollOptions& temperature(double value) { return assign("temperature", value); }
  // Law of the noise: "gaussian" (default), "binomial16", "binomial64", "rademacher". The last three are cheaper, and
  // updates with them do not depend on the order of summation.
  std::string noise() const { return get("noise").toStringRef(); }
  EggrollOptions& noise(std::string value) { return assign("noise", std::move(value)); }
  // kappa: "reference" (default, authors' code) sigma / sqrt(N): with z-scores a step of about lr sigma sqrt(N), so
  // halve lr when N grows fourfold; "paper" 1 / N (their equation 6); "unbiased" 1 / (N sigma): with shaping "raw" the
  // gradient of the smoothed mean value.
  std::string update_scale() const { return get("update_scale").toStringRef(); }
  EggrollOptions& update_scale(std::string value) { return assign("update_scale", std::move(value)); }
  // Values that are infinite or NaN: "error" (default), or "min": they count as the worst finite value.
  std::string nonfinite() const { return get("nonfinite").toStringRef(); }
  EggrollOptions& nonfinite(std::string value) { return assign("nonfinite", std::move(value)); }
  // Members of one call of step()'s closure, even with pairs. Default none: all that this process evaluates. A number
  // makes every call equally large for any number of processes.
  std::optional<int64_t> chunk_members() const { return get("chunk_members").toOptional<int64_t>(); }
  EggrollOptions& chunk_members(std::optional<int64_t> value) { return assign("chunk_members", value); }
  // Key of the noise. Default 0.
  int64_t seed() const { return get("seed").toInt(); }
  EggrollOptions& seed(int64_t value) { return assign("seed", value); }
  // Values are to become larger. Default false.
  bool maximize() const { return get("maximize").toBool(); }
  EggrollOptions& maximize(bool value) { return assign("maximize", value); }
};

class TORCH_EXT_API Eggroll : public OptimizerBase {
 public:
  // Values of the members of `population`, [population.size()]: losses, or with maximize rewards.
  using PopulationClosure = std::function<at::Tensor(const Population& population)>;

  explicit Eggroll(const std::vector<torch::optim::OptimizerParamGroup>& groups, EggrollOptions defaults = {});
  explicit Eggroll(std::vector<at::Tensor> params, EggrollOptions defaults = {});
  Eggroll(Eggroll&&) = default;

  static const Schema& static_schema();

  // Members [begin, end) of the next update; without `end` all that this process has to evaluate (all of them, unless
  // set_shards was called). May be called several times for one update. Parameters that require no gradient are
  // neither perturbed nor updated, nor are empty ones.
  Population ask(int64_t begin = 0, std::optional<int64_t> end = std::nullopt);
  // The update from the values of all members that this process evaluates, in their order, [members] of any real dtype.
  // update = false: no parameter changes, G is left in .grad. Either way the next population sees new noise. Returns
  // the mean of all values (with several processes and "sign", of the own ones), a 0-dim double. Errors: RuntimeError
  // if no population was asked for; ValueError for another number of values, for parameters or options that changed
  // since, and (nonfinite = "error") for values that are not finite. Nothing is changed then.
  at::Tensor tell(const at::Tensor& values, bool update = true);

  // One update: the closure is called for chunk_members members at a time.
  at::Tensor step(const PopulationClosure& closure);
  // The same with a closure that knows nothing of populations: called once for every member, which stands in the
  // parameters meanwhile (Population::member).
  at::Tensor step(LossClosure closure = nullptr) override;
  at::Tensor step(std::nullptr_t closure) = delete;

  // Another sigma in all groups, from the next ask() on.
  void set_sigma(double sigma);
  // Updates so far, skipped ones and those with update = false too.
  int64_t updates() const { return global_value("global_updates"); }

  // Every process evaluates a share of the members; values are gathered (4 bytes each, or with shaping "sign" a fifth
  // of a byte), and each process makes the same update. The members of a process: members().
  void set_shards(ColumnShards shards) { shards_ = std::move(shards); }
  std::pair<int64_t, int64_t> members() const;
  // Each process then computes a share of the rows of G and all gather it. Default false: each computes all of it,
  // which gives the same bits everywhere if all machines multiply matrices in the same way.
  void set_sharded_update(bool sharded) { sharded_update_ = sharded; }
  // RuntimeError unless the parameters have the same bits on all processes.
  void check_parameters() const;

 private:
  void check_state(const at::Tensor& param, const Options& options, const StateTensors& state) const override;
  void state_replaced() override { asked_.reset(); }
  const Options& shared_options() const { return group_options(0); }
  std::vector<PopulationParam> perturbed() const;

  ColumnShards shards_;
  bool sharded_update_ = false;
  // What the population that was asked for was made of.
  struct Asked {
    ops::EggrollNoise noise;
    std::vector<PopulationParam> params;
  };
  std::optional<Asked> asked_;
};

}  // namespace torch_ext::optim

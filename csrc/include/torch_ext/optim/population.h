// Members of a population of perturbed parameters, as optim::Eggroll asks for their values (EGGROLL, arXiv:2511.16652).
//
//   const auto pop = optimizer.ask();
//   const auto guard = pop.applied_to(model);           // Eggroll layers: all members in one pass
//   const auto y = model->forward(x);                   // x, y [pop.size(), ..., features]
//
//   const auto guard = pop.member(3);                   // any module: member 3 stands in the parameters
#pragma once

#include <torch_ext/export.h>
#include <torch_ext/ops/eggroll.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace torch::nn {
class Module;
}  // namespace torch::nn

namespace torch_ext::optim {

class Population;

// A layer that computes what all members of a population do with its parameters; nn/eggroll.h has those of the pack.
class TORCH_EXT_API PopulationLayer {
 public:
  virtual ~PopulationLayer() = default;
  // The parameters that forward() perturbs.
  virtual std::vector<at::Tensor> perturbed() const = 0;
  // ValueError if this layer cannot perturb its parameters in the way that the population asks for.
  virtual void check(const Population& population) const = 0;

  const std::shared_ptr<const Population>& population() const { return population_; }
  void set_population(std::shared_ptr<const Population> population) { population_ = std::move(population); }

 private:
  std::shared_ptr<const Population> population_;
};

// A parameter that the members perturb.
struct PopulationParam {
  at::Tensor param;
  int64_t ordinal;   // running number over all groups of the optimizer; keys its noise
  std::string kind;  // "matrix", "embedding" or "vector"
};

// Members begin() ... begin() + size() - 1. A value: it holds the parameters and a few numbers, no noise.
class TORCH_EXT_API Population {
 public:
  // `noise.member_begin` is the first member. baseline > 0: in every group of so many members the first two are not
  // perturbed. ValueError for ranges that do not fit (see ops::EggrollNoise) and, with pairs, odd bounds.
  Population(ops::EggrollNoise noise, int64_t size, std::vector<PopulationParam> params, int64_t baseline = 0);

  int64_t begin() const { return noise_.member_begin; }
  int64_t size() const { return size_; }
  const ops::EggrollNoise& noise() const { return noise_; }
  int64_t baseline() const { return baseline_; }
  const std::vector<PopulationParam>& params() const { return params_; }

  // Null if the tensor is none of the population's parameters, which then is not perturbed.
  const PopulationParam* find(const at::Tensor& param) const;
  int64_t ordinal(const at::Tensor& param) const;  // -1 if it is not perturbed
  // Rows of a layer's input whose member carries no noise (int64, on the CPU); empty without a baseline.
  at::Tensor unperturbed_rows() const;

  // Takes back what made it when it goes out of scope. Guards end in the reverse order of their beginning.
  class TORCH_EXT_API Guard {
   public:
    explicit Guard(std::function<void()> undo) : undo_(std::move(undo)) {}
    Guard(Guard&& other) noexcept : undo_(std::exchange(other.undo_, nullptr)) {}
    Guard& operator=(Guard&&) = delete;
    ~Guard() {
      if (undo_) undo_();
    }

   private:
    std::function<void()> undo_;
  };

  // While the guard lives, row i of what goes into a layer of these modules is that of member begin() + i.
  // ValueError if some parameter of the population is in no Eggroll layer of the modules (it would be updated without
  // having been perturbed): see nn::eggroll_convert, or use member().
  [[nodiscard]] Guard applied_to(const std::vector<torch::nn::Module*>& modules) const;
  [[nodiscard]] Guard applied_to(torch::nn::Module& module) const { return applied_to(std::vector{&module}); }
  template <typename Holder, typename = decltype(std::declval<const Holder&>().ptr())>
  [[nodiscard]] Guard applied_to(const Holder& holder) const {
    return applied_to(*holder.ptr());
  }

  // While the guard lives, the parameters' own storage holds member begin() + i, i in [0, size()); for modules of any
  // kind. Afterwards they have their old bits. Costs a copy of the parameters.
  [[nodiscard]] Guard member(int64_t i) const;

  // The same in two calls: the copies that restore() puts back.
  std::vector<at::Tensor> perturb(int64_t i) const;
  void restore(const std::vector<at::Tensor>& saved) const;

 private:
  ops::EggrollNoise noise_;
  int64_t size_, baseline_;
  std::vector<PopulationParam> params_;
};

}  // namespace torch_ext::optim

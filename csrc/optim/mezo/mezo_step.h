// One step of MeZO over parameters and their state; both languages call it.
#pragma once

#include <torch_ext/optim/base.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace torch_ext::optim {

// One parameter that takes part.
struct MezoTarget {
  at::Tensor param;
  int64_t ordinal = 0;  // running number over all groups
  double lr = 0, weight_decay = 0;
  at::Tensor step;  // 0-dim float32 on the parameter's device
};

// Which noise: key and number of the step.
struct MezoNoise {
  int64_t seed = 0, epoch = 0;
  double eps = 1e-3;
};

// Adds `scale` times the noise to the parameters, in place, and remembers what restoring them needs.
class TORCH_EXT_API MezoPerturbation {
 public:
  MezoPerturbation(const std::vector<MezoTarget>& targets, const MezoNoise& noise, double scale);
  MezoPerturbation(const MezoPerturbation&) = delete;
  MezoPerturbation& operator=(const MezoPerturbation&) = delete;
  ~MezoPerturbation();  // restores

  void restore();         // the old bits; once
  int64_t bytes() const;  // of what is remembered
  int64_t kept() const;   // elements that are kept as they were

 private:
  void run(int pass);
  struct Record {
    at::Tensor param, mask, counts, offsets, kept;
    int64_t ordinal;
  };
  std::vector<Record> records_;
  MezoNoise noise_;
  double scale_;
  bool restored_ = false;
};

// Errors of parameters that cannot be perturbed.
TORCH_EXT_API void mezo_check_param(const at::Tensor& param, int64_t ordinal);
// Completes a parameter's state in place and moves it to the parameter's device.
TORCH_EXT_API void mezo_init_state(const at::Tensor& param, StateTensors& state);
TORCH_EXT_API void mezo_check_state(const at::Tensor& param, const StateTensors& state);

// Both losses, the parameters restored: (mean, slope), doubles on the first parameter's device; slope negated with
// `maximize`. `closure` is called twice.
struct MezoLosses {
  at::Tensor mean, slope;
};
TORCH_EXT_API MezoLosses mezo_losses(const std::vector<MezoTarget>& targets, const MezoNoise& noise, bool maximize,
                                     const std::function<at::Tensor()>& closure, const ReduceFn& reduce);
// p - lr (slope z + weight_decay p); a slope that is not finite changes nothing but `skipped`.
TORCH_EXT_API void mezo_update(const std::vector<MezoTarget>& targets, const MezoNoise& noise, const at::Tensor& slope,
                               const at::Tensor& skipped);

}  // namespace torch_ext::optim

#include <ATen/ATen.h>
#include <torch_ext/distributed.h>

#include <utility>

#include "core/check.h"

namespace torch_ext {
namespace {

template <typename Group>
void reduce_mean(Group& group, std::vector<at::Tensor>& tensors) {
  const at::NoGradGuard no_grad;
  for (at::Tensor& tensor : tensors) tensor = tensor.to(core::arithmetic_type(tensor.scalar_type()));
  for (const auto& bucket : core::buckets(tensors)) {
    std::vector<at::Tensor> parts;
    std::vector<int64_t> sizes;
    for (const size_t i : bucket) {
      parts.push_back(tensors[i].reshape({-1}));
      sizes.push_back(tensors[i].numel());
    }
    std::vector<at::Tensor> flat{at::cat(parts)};
    group.allreduce(flat)->wait();
    const auto means = flat[0].div_(group.getSize()).split_with_sizes(sizes);
    for (size_t k = 0; k < bucket.size(); ++k) tensors[bucket[k]] = means[k].view(tensors[bucket[k]].sizes());
  }
}

template <typename Group>
optim::ReduceFn make(c10::intrusive_ptr<Group> group) {
  TORCH_CHECK_VALUE(group.defined(), "mean_over: no process group");
  return [group = std::move(group)](std::vector<at::Tensor>& tensors) { reduce_mean(*group, tensors); };
}

}  // namespace

optim::ReduceFn mean_over(c10::intrusive_ptr<c10d::ProcessGroup> group) { return make(std::move(group)); }
optim::ReduceFn mean_over(c10::intrusive_ptr<c10d::Backend> backend) { return make(std::move(backend)); }

}  // namespace torch_ext

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

template <typename Group>
optim::ColumnShards make_shards(c10::intrusive_ptr<Group> group) {
  TORCH_CHECK_VALUE(group.defined(), "shards_over: no process group");
  optim::ColumnShards shards;
  shards.rank = group->getRank();
  shards.count = group->getSize();
  shards.reduce_scatter_mean = [group](const at::Tensor& whole) {
    const at::NoGradGuard no_grad;
    at::Tensor input = whole.contiguous(), own = at::empty({whole.numel() / group->getSize()}, whole.options());
    group->_reduce_scatter_base(own, input)->wait();
    return own.div_(group->getSize());
  };
  shards.all_reduce_sum = [group](at::Tensor& tensor) {
    std::vector<at::Tensor> tensors{tensor};
    group->allreduce(tensors)->wait();
  };
  shards.all_gather = [group](const at::Tensor& own) {
    at::Tensor input = own.contiguous(), whole = at::empty({own.numel() * group->getSize()}, own.options());
    group->_allgather_base(whole, input)->wait();
    return whole;
  };
  return shards;
}

}  // namespace

optim::ReduceFn mean_over(c10::intrusive_ptr<c10d::ProcessGroup> group) { return make(std::move(group)); }
optim::ReduceFn mean_over(c10::intrusive_ptr<c10d::Backend> backend) { return make(std::move(backend)); }

optim::ColumnShards shards_over(c10::intrusive_ptr<c10d::ProcessGroup> group) { return make_shards(std::move(group)); }
optim::ColumnShards shards_over(c10::intrusive_ptr<c10d::Backend> backend) { return make_shards(std::move(backend)); }

}  // namespace torch_ext

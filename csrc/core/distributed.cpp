#include <ATen/ATen.h>
#include <torch_ext/distributed.h>

#include <utility>

#include "core/check.h"

namespace torch_ext {
namespace {

// One all-reduce of each device and dtype; `finish` gets its flat sum.
template <typename Group, typename Finish>
void reduce_flat(Group& group, std::vector<at::Tensor>& tensors, const Finish& finish) {
  for (const auto& bucket : core::buckets(tensors)) {
    std::vector<at::Tensor> parts;
    std::vector<int64_t> sizes;
    for (const size_t i : bucket) {
      parts.push_back(tensors[i].reshape({-1}));
      sizes.push_back(tensors[i].numel());
    }
    std::vector<at::Tensor> flat{at::cat(parts)};
    group.allreduce(flat)->wait();
    finish(flat[0]);
    const auto results = flat[0].split_with_sizes(sizes);
    for (size_t k = 0; k < bucket.size(); ++k) tensors[bucket[k]] = results[k].view(tensors[bucket[k]].sizes());
  }
}

template <typename Group>
void reduce_mean(Group& group, std::vector<at::Tensor>& tensors) {
  const at::NoGradGuard no_grad;
  for (at::Tensor& tensor : tensors) tensor = tensor.to(core::arithmetic_type(tensor.scalar_type()));
  reduce_flat(group, tensors, [&](at::Tensor& sum) { sum.div_(group.getSize()); });
}

template <typename Group>
void reduce_sum(Group& group, std::vector<at::Tensor>& tensors) {
  const at::NoGradGuard no_grad;
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK_TYPE(at::isIntegralType(tensor.scalar_type(), /*includeBool=*/false), "sum_over: tensors must be ",
                     "integers, got ", tensor.scalar_type());
  }
  reduce_flat(group, tensors, [](at::Tensor&) {});
}

template <typename Group>
optim::ReduceFn make_sum(c10::intrusive_ptr<Group> group) {
  TORCH_CHECK_VALUE(group.defined(), "sum_over: no process group");
  return [group = std::move(group)](std::vector<at::Tensor>& tensors) { reduce_sum(*group, tensors); };
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

optim::ReduceFn sum_over(c10::intrusive_ptr<c10d::ProcessGroup> group) { return make_sum(std::move(group)); }
optim::ReduceFn sum_over(c10::intrusive_ptr<c10d::Backend> backend) { return make_sum(std::move(backend)); }

optim::ColumnShards shards_over(c10::intrusive_ptr<c10d::ProcessGroup> group) { return make_shards(std::move(group)); }
optim::ColumnShards shards_over(c10::intrusive_ptr<c10d::Backend> backend) { return make_shards(std::move(backend)); }

}  // namespace torch_ext

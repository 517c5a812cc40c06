#include <torch/torch.h>
#include <torch_ext/nn/snell_linear.h>
#include <torch_ext/ops/snell.h>

#include <cmath>
#include <ostream>
#include <utility>

#include "core/check.h"
#include "ops/snell/snell_layer.h"

namespace torch_ext::nn {
namespace {

constexpr const char* kName = "SnellLinear";

torch::nn::Linear new_linear(const SnellOptions& options) {
  TORCH_CHECK_VALUE(options.in_features() > 0 && options.out_features() > 0, kName,
                    ": in_features and out_features must be positive, got ", options.in_features(), " and ",
                    options.out_features());
  return torch::nn::Linear(
      torch::nn::LinearOptions(options.in_features(), options.out_features()).bias(options.bias()));
}

int64_t random_seed() { return torch::randint(int64_t{1} << 62, {1}, at::kLong).item<int64_t>(); }

std::optional<int64_t> start_seed(const SnellOptions& options) {
  return options.start_from_zero() ? options.seed() : std::nullopt;
}

}  // namespace

void check_snell_options(int64_t in_features, int64_t out_features, int64_t rank, double sparsity, double scale,
                         std::string_view sparsifier, std::string_view grad, double dropout) {
  TORCH_CHECK_VALUE(rank > 0 && rank % 2 == 0, kName, ": rank must be a positive multiple of 2, got ", rank,
                    " (each of the two kernel pieces takes half of it)");
  TORCH_CHECK_VALUE(dropout >= 0 && dropout < 1, kName, ": dropout must be in [0, 1), got ", dropout);
  const auto meta = at::TensorOptions(at::kFloat).device(at::kMeta);
  ops::check_snell(kName, at::empty({2, in_features, rank / 2}, meta), at::empty({2, out_features, rank / 2}, meta),
                   scale, sparsity, sparsifier, grad);
}

void snell_add_(const at::Tensor& weight, const at::Tensor& A, const at::Tensor& B, double scale, double sparsity,
                std::string_view sparsifier, double factor, std::optional<int64_t> start_seed) {
  const at::NoGradGuard no_grad;
  at::Tensor update = ops::snell_merge(A, B, scale, sparsity, sparsifier);
  if (start_seed) {
    const auto [a, b] = snell_init(A, B, *start_seed);
    update.sub_(ops::snell_merge(a, b, scale, sparsity, sparsifier));
  }
  weight.add_(update.t(), factor);
}

SnellLinearImpl::SnellLinearImpl(SnellOptions options) : SnellLinearImpl(new_linear(options), options) {}

SnellLinearImpl::SnellLinearImpl(const torch::nn::Linear& linear, SnellOptions options_)
    : options(std::move(options_)) {
  options.in_features(linear->weight.size(1)).out_features(linear->weight.size(0)).bias(linear->bias.defined());
  check_snell_options(options.in_features(), options.out_features(), options.rank(), options.sparsity(),
                      options.scale(), options.sparsifier(), options.grad(), options.dropout());
  core::dtype_of(linear->weight, "SnellLinear: the layer's weight");
  weight = register_parameter("weight", linear->weight, /*requires_grad=*/false);
  bias = register_parameter("bias", linear->bias, /*requires_grad=*/false);
  initialise();
}

void SnellLinearImpl::initialise() {
  if (!options.seed()) options.seed(random_seed());
  const auto factor = weight.options().dtype(core::arithmetic_type(weight.scalar_type())).requires_grad(false);
  auto [a, b] = snell_init(torch::empty({2, options.in_features(), options.rank() / 2}, factor),
                           torch::empty({2, options.out_features(), options.rank() / 2}, factor), *options.seed());
  lora_in = register_parameter("lora_in", a);
  lora_out = register_parameter("lora_out", b);
}

at::Tensor SnellLinearImpl::forward(const at::Tensor& x) {
  const at::Tensor base = torch::nn::functional::linear(x, weight, bias);
  if (is_merged()) return base;
  at::Tensor inputs = x.to(base.scalar_type());  // what autocast made of it
  inputs = torch::dropout(inputs, options.dropout(), is_training());
  const auto branch = [&](const at::Tensor& a, const at::Tensor& b) {
    return std::get<0>(
        ops::snell_linear(inputs, a, b, options.scale(), options.sparsity(), options.sparsifier(), options.grad()));
  };
  const at::Tensor y = base + branch(lora_in, lora_out);
  const auto seed = start_seed(options);
  if (!seed) return y;
  const auto [a, b] = snell_init(lora_in, lora_out, *seed);
  return y - branch(a, b);
}

void SnellLinearImpl::merge() {
  if (is_merged()) return;
  snell_add_(weight, lora_in, lora_out, options.scale(), sparsity(), options.sparsifier(), 1, start_seed(options));
  merged_in = lora_in.detach().clone();
  merged_out = lora_out.detach().clone();
  merged_sparsity = sparsity();
}

void SnellLinearImpl::unmerge() {
  if (!is_merged()) return;
  snell_add_(weight, merged_in, merged_out, options.scale(), merged_sparsity, options.sparsifier(), -1,
             start_seed(options));
  merged_in = merged_out = at::Tensor();
}

torch::nn::Linear SnellLinearImpl::to_linear() const {
  torch::nn::Linear result(
      torch::nn::LinearOptions(options.in_features(), options.out_features()).bias(bias.defined()));
  result->to(weight.device(), weight.scalar_type());
  const at::NoGradGuard no_grad;
  result->weight.copy_(weight);
  if (bias.defined()) result->bias.copy_(bias);
  if (!is_merged()) {
    snell_add_(result->weight, lora_in, lora_out, options.scale(), sparsity(), options.sparsifier(), 1,
               start_seed(options));
  }
  return result;
}

void SnellLinearImpl::set_sparsity(double sparsity) {
  check_snell_options(options.in_features(), options.out_features(), options.rank(), sparsity, options.scale(),
                      options.sparsifier(), options.grad(), options.dropout());
  options.sparsity(sparsity);
}

void SnellLinearImpl::save(torch::serialize::OutputArchive& archive) const {
  TORCH_CHECK(!is_merged(),
              "SnellLinear: a merged layer is not saved, since its update would count twice: call "
              "unmerge() first, or save what to_linear() returns");
  Module::save(archive);
  archive.write("sparsity", torch::tensor(sparsity(), at::kDouble), /*is_buffer=*/true);
  if (const auto seed = start_seed(options)) {
    archive.write("start_seed", torch::tensor(*seed, at::kLong), /*is_buffer=*/true);
  }
}

void SnellLinearImpl::load(torch::serialize::InputArchive& archive) {
  unmerge();
  Module::load(archive);
  at::Tensor sparsity, seed;
  archive.read("sparsity", sparsity, /*is_buffer=*/true);
  set_sparsity(sparsity.item<double>());
  options.start_from_zero(archive.try_read("start_seed", seed, /*is_buffer=*/true));
  if (options.start_from_zero()) options.seed(seed.item<int64_t>());
}

void SnellLinearImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_ext::nn::SnellLinear(in_features=" << options.in_features()
         << ", out_features=" << options.out_features() << ", rank=" << options.rank() << ", sparsity=" << sparsity()
         << ")";
}

}  // namespace torch_ext::nn

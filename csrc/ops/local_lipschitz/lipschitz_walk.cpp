// From a C++ module to its layers.
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/linear.h>
#include <torch_ext/nn/residual.h>

#include "ops/local_lipschitz/lipschitz_layers.h"

namespace torch_ext::ops {
namespace {

std::string type_name(const torch::nn::Module& module) {
  std::string name = module.name();
  if (const size_t at = name.rfind("::"); at != std::string::npos) name = name.substr(at + 2);
  constexpr std::string_view kImpl = "Impl";
  if (name.size() > kImpl.size() && name.compare(name.size() - kImpl.size(), kImpl.size(), kImpl) == 0) {
    name.resize(name.size() - kImpl.size());
  }
  return name;
}

std::string joined(const std::string& path, const std::string& child) {
  return path.empty() ? child : path + "." + child;
}

class Walk {
 public:
  LipschitzLayers layers;

  int64_t visit(const torch::nn::Module& module, const std::string& path, int64_t input) {
    if (module.as<torch::nn::SequentialImpl>() != nullptr) return visit_children(module, path, input);
    if (const auto* residual = module.as<nn::ResidualImpl>()) {
      const int64_t body = visit(*residual->body, joined(path, "body"), input);
      const bool has_shortcut = !residual->shortcut.is_empty();
      return layers.add(path, body, has_shortcut ? visit(*residual->shortcut, joined(path, "shortcut"), input) : input);
    }
    if (const int64_t value = visit_linear(module, path, input); value >= 0) return value;
    if (const int64_t value = visit_activation(module, path, input); value >= 0) return value;
    if (const auto* flatten = module.as<torch::nn::FlattenImpl>()) {
      return layers.flatten(path, input, flatten->options.start_dim(), flatten->options.end_dim());
    }
    if (module.as<torch::nn::DropoutImpl>() != nullptr || module.as<torch::nn::IdentityImpl>() != nullptr) return input;
    layers.refuse(path, type_name(module));
  }

 private:
  int64_t visit_children(const torch::nn::Module& module, const std::string& path, int64_t input) {
    for (const auto& child : module.named_children()) input = visit(*child.value(), joined(path, child.key()), input);
    return input;
  }

  int64_t visit_linear(const torch::nn::Module& module, const std::string& path, int64_t input) {
    if (const auto* linear = module.as<torch::nn::LinearImpl>()) {
      return layers.linear(path, input, linear->weight, linear->bias);
    }
    if (const auto* conv = module.as<torch::nn::Conv2dImpl>()) return visit_conv(*conv, path, input);
    if (const auto* norm = module.as<torch::nn::BatchNorm1dImpl>()) return visit_norm(*norm, path, input);
    if (const auto* norm = module.as<torch::nn::BatchNorm2dImpl>()) return visit_norm(*norm, path, input);
    return -1;
  }

  int64_t visit_conv(const torch::nn::Conv2dImpl& conv, const std::string& path, int64_t input) {
    const auto& options = conv.options;
    std::vector<int64_t> padding{0, 0};
    if (const auto* sizes = std::get_if<torch::ExpandingArray<2>>(&options.padding())) {
      padding.assign((*sizes)->begin(), (*sizes)->end());
    } else if (std::holds_alternative<torch::enumtype::kSame>(options.padding())) {
      padding = {-1, -1};
    }
    const bool zeros = std::holds_alternative<torch::enumtype::kZeros>(options.padding_mode());
    return layers.conv2d(path, input, conv.weight, conv.bias, at::IntArrayRef(*options.stride()).vec(), padding,
                         at::IntArrayRef(*options.dilation()).vec(), options.groups(), zeros ? "zeros" : "non-zeros");
  }

  template <typename Norm>
  int64_t visit_norm(const Norm& norm, const std::string& path, int64_t input) {
    return layers.batch_norm(path, input, norm.running_mean, norm.running_var, norm.weight, norm.bias,
                             norm.options.eps(), norm.is_training());
  }

  int64_t visit_activation(const torch::nn::Module& module, const std::string& path, int64_t input) {
    const auto simple = [&](const char* kind, double a = 0, double b = 0) {
      return layers.activation(path, input, kind, a, b);
    };
    if (module.as<torch::nn::ReLUImpl>() != nullptr) return simple("relu");
    if (const auto* leaky = module.as<torch::nn::LeakyReLUImpl>()) {
      return simple("leaky_relu", leaky->options.negative_slope());
    }
    if (module.as<torch::nn::TanhImpl>() != nullptr) return simple("tanh");
    if (module.as<torch::nn::SigmoidImpl>() != nullptr) return simple("sigmoid");
    if (const auto* softplus = module.as<torch::nn::SoftplusImpl>()) {
      return simple("softplus", softplus->options.beta(), softplus->options.threshold());
    }
    if (const auto* gelu = module.as<torch::nn::GELUImpl>()) {
      if (gelu->options.approximate() != "none") {
        layers.refuse_setting(path, "is an approximate GELU; use approximate \"none\"");
      }
      return simple("gelu");
    }
    if (module.as<torch::nn::SiLUImpl>() != nullptr) return simple("silu");
    return -1;
  }
};

}  // namespace

LipschitzLayers lipschitz_layers(const torch::nn::Module& model) {
  Walk walk;
  walk.visit(model, "", 0);
  return std::move(walk.layers);
}

}  // namespace torch_ext::ops

"""Run against an installed torch_ext, outside the source tree: it imports, trains, and honours options per group."""

import sys

import torch

import torch_ext

print(sys.version.split()[0], torch.__version__, torch_ext.__file__, torch_ext.build_info())

torch.manual_seed(0)
x = torch.randn(64, 8)
y = x.sum(1, keepdim=True).sin()
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
frozen = [p.detach().clone() for p in model[0].parameters()]
groups = [{"params": model[0].parameters(), "lr": 1e-28}, {"params": model[2].parameters()}]
optimizer = torch_ext.optim.AdaHessian(groups, lr=0.05)
first = torch.nn.functional.mse_loss(model(x), y).item()
for _ in range(20):
    last = optimizer.step(lambda: torch.nn.functional.mse_loss(model(x), y)).item()
assert last < first, (first, last)
assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), frozen, strict=True)), "lr=1e-28 moved a group"
print(f"loss {first:.4f} -> {last:.4f}")

"""The sum of two branches."""

from __future__ import annotations

import torch
from torch import nn

from torch_ext.nn import Residual


def test_sum_of_branches_and_names() -> None:
    body, shortcut = nn.Linear(3, 2), nn.Linear(3, 2)
    x = torch.randn(4, 3)
    module = Residual(body, shortcut)
    assert torch.equal(module(x), body(x) + shortcut(x))
    assert set(module.state_dict()) == {"body.weight", "body.bias", "shortcut.weight", "shortcut.bias"}
    same = nn.Linear(3, 3)
    assert torch.equal(Residual(same)(x), same(x) + x)
    assert set(Residual(same).state_dict()) == {"body.weight", "body.bias"}

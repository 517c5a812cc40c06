"""moe.MoERouter. Test 12 of the acceptance list (arXiv:2512.03915), its part about the module: the bias stays float32,
and what is saved continues to the bit."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from torch_ext import moe


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def test_it_is_a_linear_layer_and_a_route() -> None:
    torch.manual_seed(0)
    router = moe.MoERouter(6, 8, top_k=3, score="softmax", route_scale=2.0)
    torch.manual_seed(0)
    assert torch.equal(router.weight, torch.nn.Linear(6, 8, bias=False).weight)
    router.expert_bias.copy_(draw(8, seed=1))
    x = draw(2, 5, 6)
    got = router(x)
    want = moe.route(x.view(10, 6) @ router.weight.T, router.expert_bias, top_k=3, score="softmax", route_scale=2.0)
    assert torch.equal(got.ids, want.ids)
    torch.testing.assert_close(got.gates, want.gates)
    valid = torch.tensor([[True] * 5, [False] * 5])
    assert (router(x, valid).ids[5:] == -1).all()
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert [name for name, _ in router.named_buffers()] == ["expert_bias"]
    assert "dim=6, num_experts=8, top_k=3, score='softmax'" in repr(router)


def test_12_the_bias_stays_float32_and_the_load_int64() -> None:
    model = torch.nn.Sequential(moe.MoERouter(6, 8))
    router = model[0]
    router.expert_bias.copy_(draw(8))
    router.load += 5
    bias, before = router.expert_bias, router.expert_bias.clone()
    for move in (model.bfloat16, model.half, model.float, lambda: model.to(torch.bfloat16), lambda: model.to("cpu")):
        move()
        assert router.expert_bias is bias  # a balancer holds it
        assert torch.equal(bias, before)
        assert bias.dtype == torch.float32
        assert router.load.dtype == torch.int64
        assert int(router.load.sum()) == 40
    assert router.weight.dtype == torch.bfloat16
    assert router(draw(4, 6).bfloat16()).gates.dtype == torch.float32
    model.double()
    assert router(draw(4, 6).double()).gates.dtype == torch.float64
    assert router.expert_bias.dtype == torch.float32


def test_12_saved_and_loaded_it_continues_to_the_bit() -> None:
    router, other = moe.MoERouter(6, 8), moe.MoERouter(6, 8)
    router.expert_bias.copy_(draw(8))
    file = io.BytesIO()
    torch.save(router.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = draw(20, 6)
    assert all(torch.equal(a, b) for a, b in zip(router(x), other(x), strict=True))
    narrow = {name: tensor.bfloat16() for name, tensor in router.state_dict().items()}
    other.load_state_dict(narrow, assign=True)
    assert other.expert_bias.dtype == torch.float32
    assert "load" not in router.state_dict()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_have_loads_of_their_own(duplicate: object) -> None:
    router = moe.MoERouter(6, 8)
    router.load += 1
    other = duplicate(router)  # type: ignore[operator]
    other.load += 1
    assert int(router.load.sum()) == 8
    assert int(other.load.sum()) == 16


def test_logits_are_float32_under_autocast() -> None:
    router, x = moe.MoERouter(64, 16), draw(30, 64)
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router(x)
    assert torch.equal(plain.ids, cast.ids)
    assert torch.equal(plain.gates, cast.gates)


def test_meta_and_to_empty() -> None:
    router = moe.MoERouter(6, 8, device="meta")
    assert router.load.is_meta
    assert router(torch.empty(3, 6, device="meta")).gates.shape == (3, 2)
    router.to_empty(device="cpu")
    assert router.load.tolist() == [0] * 8
    assert router.expert_bias.device.type == "cpu"
    assert router.expert_bias.dtype == torch.float32


def test_data_parallel_broadcast_does_not_see_the_load() -> None:
    """DistributedDataParallel copies every buffer of process 0 to the others: the loads must not be one."""
    router = moe.MoERouter(6, 8)
    assert not any(tensor is router.load for tensor in router.buffers())


def test_compile() -> None:
    router = moe.MoERouter(6, 8, top_k=3)
    x = draw(12, 6)
    got = torch.compile(router, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(got.ids, router(x).ids)
    got.gates.square().sum().backward()
    assert int(router.load.sum()) == 36


def test_rejections() -> None:
    with pytest.raises(ValueError, match=r"top_k must be in \[1, E = 8\], got 9"):
        moe.MoERouter(6, 8, top_k=9)
    with pytest.raises(ValueError, match="score must be"):
        moe.MoERouter(6, 8, score="tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_groups must divide"):
        moe.MoERouter(6, 8, num_groups=3)
    with pytest.raises(ValueError, match="number of experts must be positive"):
        moe.MoERouter(6, 0)
    with pytest.raises(ValueError, match=r"MoERouter: x must be \[..., dim = 6\], got \[4, 5\]"):
        moe.MoERouter(6, 8)(draw(4, 5))
    with pytest.raises(TypeError, match="MoERouter: x has dtype Long"):
        moe.MoERouter(6, 8)(torch.zeros(4, 6).long())

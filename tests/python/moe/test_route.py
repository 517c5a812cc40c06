"""moe.route against a full sort per token. Numbers are those of the acceptance list of the method (arXiv:2512.03915):
1 selection and gates, 2 NaN and infinity, 3 derivatives, 9 loads are counted exactly once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from torch_ext import moe
from torch_ext.reference.moe import route as reference_route
from torch_ext.reference.moe.route import group_scores, ordered

route = torch.ops.torch_ext.moe_route.default
SCORES = ("sigmoid", "softmax", "sqrtsoftplus", "none", "post_softmax")
MODES = [(score, normalize) for score in SCORES for normalize in (True, False) if normalize or score != "post_softmax"]


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- 1 ---------------------------------------------------------------------------------------------------------------
def draw_case(seed: int) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Logits, bias and options of one random case."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    groups = pick(1, 1, 2, 4)
    experts = groups * pick(1, 2, 8, 9, 16, 37, 64)
    size = experts // groups
    top_groups = pick(*range(1, groups + 1))
    top_k = pick(1, 2, 3, 6, 8, experts)
    top_k = max(1, min(top_k, top_groups * size))
    score, normalize = pick(*MODES)
    dtype = pick(torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
    logits = (normal(pick(1, 5, 33), experts, seed=seed, dtype=torch.float64) * pick(0.5, 2, 5)).to(dtype)
    bias = None if pick(0, 1, 2) == 0 else normal(experts, seed=seed + 1) * pick(0.01, 1, 5) - pick(0.0, 10.0)
    options = {
        "top_k": top_k,
        "score": score,
        "normalize": normalize,
        "route_scale": pick(1.0, 2.5),
        "num_groups": groups,
        "top_groups": top_groups,
        "group_score_k": min(2, size),
    }
    return logits, bias, options


def clear(values: Tensor, count: int) -> Tensor:
    """Rows whose first ``count`` + 1 sorted values are further apart than rounding can blur."""
    top = values.sort(-1, descending=True).values[:, : count + 1]
    gap = top[:, :-1] - top[:, 1:]
    return (gap > 2e-6 * torch.clamp(top[:, :-1].abs(), min=1)).all(-1)


def test_1_ids_and_gates_are_those_of_a_full_sort_in_double_precision() -> None:
    """200 random cases: types, scores, groups, biases up to 5 times a normal number, negative ones."""
    compared = rows = 0
    for seed in range(200):
        logits, bias, options = draw_case(seed)
        got = moe.route(logits, bias, **options)
        want = reference_route(logits.double(), bias, **options)
        keys, groups = want.keys, options["num_groups"]
        sure = torch.ones(len(logits), dtype=torch.bool)
        if groups > 1:
            sums = group_scores(keys, groups, options["group_score_k"])
            if options["top_groups"] < groups:
                sure &= clear(sums, groups - 1)
            kept = torch.zeros_like(sums, dtype=torch.bool).scatter(1, ordered(sums)[:, : options["top_groups"]], True)
            keys = torch.where(kept.repeat_interleave(keys.size(1) // groups, 1), keys, -1e9)
        sure &= clear(keys, options["top_k"])
        assert got.ids.dtype == torch.int32
        assert torch.equal(got.ids[sure], want.ids[sure]), (seed, options)
        # A softmax of selected logits is exact in them; other gates are compared where the ids are the same.
        torch.testing.assert_close(got.gates[sure].double(), want.gates[sure], rtol=5e-6, atol=1e-30)
        assert got.gates.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
        assert int(got.counts.sum()) == got.ids.numel()
        assert torch.equal(got.counts, torch.bincount(got.ids.flatten(), minlength=logits.size(1)).int())
        compared += int(sure.sum())
        rows += len(sure)
    assert compared > 0.9 * rows


def test_1_float64_logits_are_scored_in_float64() -> None:
    logits = normal(64, 40, dtype=torch.float64)
    for score, normalize in MODES:
        got = moe.route(logits, None, top_k=5, score=score, normalize=normalize)
        want = reference_route(logits, None, top_k=5, score=score, normalize=normalize)
        assert torch.equal(got.ids, want.ids)
        torch.testing.assert_close(got.gates, want.gates, rtol=1e-14, atol=0)


def test_1_ties_give_the_lowest_experts() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0], [0.0, -0.0, 0.0, -0.0, 0.0]])
    got = moe.route(logits, None, top_k=4, score="none", normalize=False)
    assert got.ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    grouped = moe.route(torch.zeros(1, 6), None, top_k=2, num_groups=3, top_groups=1)
    assert grouped.ids.tolist() == [[0, 1]]


def test_1_masked_groups_lose_to_negative_keys() -> None:
    """Filling masked groups with 0 would let them win here."""
    logits = torch.tensor([[5.0, 4.0, -9.0, -9.0]])
    bias = torch.full((4,), -7.0)
    got = moe.route(logits, bias, top_k=2, num_groups=2, top_groups=1)
    assert got.ids.tolist() == [[0, 1]]


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(0, 4, 2), (3, 1, 1), (7, 37, 37), (9, 37, 5), (5, 300, 1)])
def test_1_sizes(tokens: int, experts: int, top_k: int) -> None:
    logits = normal(tokens, experts)
    got, want = moe.route(logits, None, top_k=top_k), reference_route(logits.double(), None, top_k=top_k)
    assert torch.equal(got.ids, want.ids)
    assert got.gates.shape == (tokens, top_k)
    assert torch.equal(got.counts, want.counts)
    if top_k == 1:  # not normalised: the gate would always be 1
        torch.testing.assert_close(got.gates.double(), want.scores.max(-1, keepdim=True).values, rtol=1e-6, atol=0)


def test_1_gates_keep_their_precision_under_a_large_bias() -> None:
    """(s + p) - p would lose s."""
    logits = torch.tensor([[-16.0, -17.0, -18.0]], dtype=torch.float32)
    got = moe.route(logits, torch.full((3,), 5.0), top_k=2, normalize=False)
    want = torch.sigmoid(logits.double())[:, :2]
    torch.testing.assert_close(got.gates.double(), want, rtol=1e-6, atol=0)


def test_1_the_bias_selects_and_is_not_in_the_gates() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    got = moe.route(logits, torch.tensor([0.0, 0.0, 9.0]), top_k=2, normalize=False)
    assert got.ids.tolist() == [[2, 0]]
    torch.testing.assert_close(got.gates, torch.sigmoid(torch.tensor([[0.0, 2.0]])), rtol=1e-6, atol=0)


def test_1_post_softmax_without_a_bias_is_softmax_with_normalize() -> None:
    logits = normal(50, 20, scale=3)
    a = moe.route(logits, None, top_k=4, score="softmax")
    b = moe.route(logits, None, top_k=4, score="post_softmax")
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.gates, b.gates)
    torch.testing.assert_close(a.gates.sum(-1), torch.ones(50))


def test_1_deepseek_v3_constants() -> None:
    logits = normal(200, 256)
    bias = normal(256, seed=1, scale=0.1)
    options = {"top_k": 8, "num_groups": 8, "top_groups": 4, "group_score_k": 2, "route_scale": 2.5}
    got, want = moe.route(logits, bias, **options), reference_route(logits.double(), bias, **options)
    same = (got.ids == want.ids).all(-1)
    assert same.float().mean() > 0.99
    assert ((got.ids // 32).unique(dim=-1).size(-1)) <= 8
    assert max(len(set(row)) for row in (got.ids // 32).tolist()) <= 4
    torch.testing.assert_close(got.gates.sum(-1), torch.full((200,), 2.5), rtol=1e-6, atol=0)


def test_cutoff_is_the_next_key_and_the_histogram_counts_distances_to_it() -> None:
    logits, bias, bins = normal(500, 12), normal(12, seed=1, scale=0.2), 40
    bounds = torch.stack([bias.min() - 1, bias.max() + 1])
    for score in ("sigmoid", "softmax"):
        for valid in (None, torch.arange(500) % 3 != 0):
            histogram, load = torch.ones(12, bins, dtype=torch.int64), torch.zeros(12, dtype=torch.int64)
            extra = {"load": load, "histogram": histogram, "histogram_bounds": bounds, "count_in": "forward"}
            got = moe.route(logits, bias, top_k=3, score=score, valid=valid, **extra)
            want = reference_route(logits, bias, top_k=3, score=score, valid=valid)
            real = torch.ones(500, dtype=torch.bool) if valid is None else valid
            torch.testing.assert_close(got.cutoff[real], want.cutoff[real], rtol=1e-6, atol=1e-6)
            distance = (got.cutoff.unsqueeze(-1) - want.scores)[real]
            at = ((distance - bounds[0]) * (bins / (bounds[1] - bounds[0]))).clamp(0, bins - 1)
            expected = torch.stack([torch.bincount(column.long(), minlength=bins) for column in at.T])
            moved = (histogram - 1 - expected).abs().sum()
            assert int((histogram - 1).sum()) == int(real.sum()) * 12
            assert int(moved) <= 8  # a distance may lie within rounding of a bin's edge
            assert torch.equal(load, got.counts.long())


def test_sigmoid_that_underflows_gives_zeros_and_stays_finite() -> None:
    logits = torch.full((2, 6), -200.0, requires_grad=True)
    for score in ("sigmoid", "sqrtsoftplus"):
        got = moe.route(logits, None, top_k=3, score=score)
        assert got.gates.tolist() == [[0.0] * 3] * 2
        (grad,) = torch.autograd.grad(got.gates.sum(), logits)
        assert grad.count_nonzero() == 0


# --- 2 ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("policy", ["propagate", "zero"])
@pytest.mark.parametrize(("score", "normalize"), MODES)
def test_2_nan_and_infinity(score: Any, normalize: bool, policy: Any) -> None:
    """Ids stay distinct and in range, so that dispatch reads nothing that is not there."""
    logits = normal(8, 12)
    logits[0] = torch.nan
    logits[1, 3] = torch.nan
    logits[2, 5] = torch.inf
    logits[3] = torch.inf
    logits[4, 2:] = -torch.inf
    logits[5] = -torch.inf
    logits.requires_grad_()
    valid = torch.ones(8, dtype=torch.bool)
    valid[7] = False
    got = moe.route(logits, None, top_k=4, score=score, normalize=normalize, nan_policy=policy, valid=valid)
    assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 12 for row in got.ids[:7].tolist())
    assert got.ids[7].tolist() == [-1] * 4
    assert got.gates[7].tolist() == [0] * 4
    assert got.ids[0].tolist() == [0, 1, 2, 3]
    if score != "softmax":  # there the whole row is NaN
        assert 3 not in got.ids[1]
    assert int(got.counts.sum()) == 4 * 7
    plan = moe.dispatch_plan(got.ids, 12)
    assert int(plan.offsets[-1]) == 4 * 7
    want = reference_route(logits, None, top_k=4, score=score, normalize=normalize, nan_policy=policy, valid=valid)
    assert torch.equal(got.ids, want.ids)
    torch.testing.assert_close(got.gates, want.gates, rtol=2e-6, atol=1e-30, equal_nan=True)
    assert got.gates[:2].isnan().all() if policy == "propagate" else bool((got.gates[:2] == 0).all())
    got.gates.sum().backward()
    assert logits.grad is not None
    assert logits.grad[6:].isfinite().all()
    assert logits.grad[7].count_nonzero() == 0
    if policy == "zero":
        assert logits.grad[:2].count_nonzero() == 0
    else:
        assert logits.grad[0, 0].isnan()


def test_2_plus_infinity_is_a_legal_logit_of_sigmoid() -> None:
    got = moe.route(torch.tensor([[torch.inf, 0.0, -torch.inf]]), None, top_k=3)
    torch.testing.assert_close(got.gates, torch.tensor([[1.0, 0.5, 0.0]]) / 1.5)


def test_2_all_tokens_masked() -> None:
    logits = normal(5, 8).requires_grad_()
    load = torch.zeros(8, dtype=torch.int64)
    got = moe.route(logits, None, valid=torch.zeros(5, dtype=torch.bool), load=load)
    got.gates.sum().backward()
    assert logits.grad is not None
    assert logits.grad.count_nonzero() == 0
    assert load.count_nonzero() == 0
    assert moe.dispatch_plan(got.ids, 8).offsets.tolist() == [0] * 9


def test_2_a_nan_does_not_let_an_expert_of_another_group_in() -> None:
    logits = torch.tensor([[torch.nan, torch.nan, 9.0, 9.0, 1.0, 1.0]])
    got = moe.route(logits, None, top_k=4, num_groups=3, top_groups=2)
    assert sorted(got.ids[0].tolist()) == [2, 3, 4, 5]
    everything = moe.route(torch.full((1, 6), torch.nan), None, top_k=4, num_groups=3, top_groups=2)
    assert everything.ids.tolist() == [[0, 1, 2, 3]]


# --- 3 ---------------------------------------------------------------------------------------------------------------
def spread_logits(tokens: int, experts: int, seed: int = 0) -> Tensor:
    """No two keys are close, so that a difference quotient never changes the ids."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(experts, generator=generator) for _ in range(tokens)])
    return (0.4 * order.double() - 0.1 * experts).requires_grad_()


DERIVATIVES = [
    *({"score": score, "normalize": normalize, "top_k": 3} for score, normalize in MODES),
    *({"score": score, "top_k": 1} for score in SCORES),
    {"top_k": 3, "num_groups": 2, "top_groups": 1},
    {"top_k": 8, "score": "softmax"},
]


@pytest.mark.parametrize("options", DERIVATIVES, ids=str)
def test_3_gradcheck_and_gradgradcheck(options: dict[str, Any]) -> None:
    logits = spread_logits(5, 8)
    bias = normal(8, scale=0.01)
    valid = torch.tensor([True, True, False, True, True])

    def gates(x: Tensor) -> Tensor:
        return moe.route(x, bias, route_scale=1.7, valid=valid, **options).gates

    assert gradcheck(gates, (logits,))
    assert gradgradcheck(gates, (logits,))


@pytest.mark.parametrize(("score", "normalize"), MODES)
def test_3_gradients_are_those_of_autograd_through_the_reference(score: Any, normalize: bool) -> None:
    """First and second derivatives; logits that are not selected get 0 exactly."""
    logits = normal(40, 30, dtype=torch.float64).requires_grad_()
    weight = normal(40, 6, seed=2, dtype=torch.float64)
    options = {"top_k": 6, "score": score, "normalize": normalize, "route_scale": 2.5}
    got, want = moe.route(logits, None, **options), reference_route(logits, None, **options)
    results = []
    for gates in (got.gates, want.gates):
        loss = (gates**2 * weight).sum()
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), logits, retain_graph=True)
        (plain,) = torch.autograd.grad((gates**2 * weight).sum(), logits)
        results.append((first, second, plain))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    if not (score == "softmax" and not normalize):
        outside = torch.ones(40, 30, dtype=torch.bool).scatter(1, got.ids.long(), False)
        assert results[0][2][outside].count_nonzero() == 0


def test_3_third_derivative() -> None:
    logits = spread_logits(2, 5)

    def nth(gates: Tensor, n: int) -> Tensor:
        value = (gates**2).sum()
        for _ in range(n):
            (grad,) = torch.autograd.grad(value, logits, create_graph=True)
            value = (grad * torch.arange(1.0, 6.0)).sum()
        return value

    for score, normalize in MODES:
        a = nth(moe.route(logits, None, top_k=2, score=score, normalize=normalize).gates, 3)
        b = nth(reference_route(logits, None, top_k=2, score=score, normalize=normalize).gates, 3)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_3_the_bias_gets_no_gradient_and_narrow_logits_get_their_own_dtype() -> None:
    bias = torch.zeros(8, requires_grad=True)
    for dtype in (torch.bfloat16, torch.float16):
        logits = normal(6, 8).to(dtype).requires_grad_()
        got = moe.route(logits, bias)
        got.gates.square().sum().backward()
        assert bias.grad is None
        assert logits.grad is not None
        assert logits.grad.dtype == dtype


def saved_bytes(function: Any) -> int:
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(sizes)


def test_nothing_of_the_size_of_the_logits_is_saved() -> None:
    tokens, experts, top_k = 128, 64, 4
    logits = normal(tokens, experts).requires_grad_()
    for score, normalize in MODES:
        size = saved_bytes(lambda s=score, n=normalize: moe.route(logits, None, top_k=top_k, score=s, normalize=n))
        sparse = tokens * top_k * 8 + experts * 4
        dense = score == "softmax" and not normalize
        assert size == (sparse + 4 * tokens * (experts + 2) if dense else sparse)


# --- 9 ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["plain", "reentrant", "non-reentrant"])
def test_9_loads_are_counted_exactly_once(mode: str) -> None:
    """3 micro-batches of 20 tokens with K = 3: 60 tokens, whatever is recomputed."""
    router = moe.MoERouter(6, 8, top_k=3)
    inputs = [normal(20, 6, seed=i).requires_grad_() for i in range(3)]
    expected = torch.zeros(8, dtype=torch.int64)
    outputs = []
    for x in inputs:
        with torch.no_grad():
            expected += router(x).counts
        assert router.load.sum() == 0  # nothing under no_grad
        call = router if mode == "plain" else lambda x: checkpoint(router, x, use_reentrant=mode == "reentrant")
        outputs.append(call(x)[0].square().sum())
    for loss in outputs:
        loss.backward()
    assert int(router.load.sum()) == 3 * 20 * 3
    assert torch.equal(router.load, expected)
    router.eval()
    router(inputs[0]).gates.sum().backward()
    assert torch.equal(router.load, expected)


def test_9_a_node_that_runs_backward_again_counts_once() -> None:
    logits, load = normal(10, 6).requires_grad_(), torch.zeros(6, dtype=torch.int64)
    gates = moe.route(logits, None, load=load).gates
    loss = gates.square().sum()
    for _ in range(3):
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        torch.autograd.grad(grad.square().sum(), logits, retain_graph=True)
    assert int(load.sum()) == 20


def test_9_ways_of_counting() -> None:
    logits = normal(10, 6).requires_grad_()
    for count_in, in_forward, in_backward in [("backward", 0, 20), ("forward", 20, 20), ("manual", 0, 0)]:
        load = torch.zeros(6, dtype=torch.int64)
        got = moe.route(logits, None, count_in=count_in, load=load)
        assert int(load.sum()) == in_forward
        got.gates.sum().backward()
        assert int(load.sum()) == in_backward
        with torch.no_grad():
            moe.route(logits, None, count_in=count_in, load=load)
        assert int(load.sum()) == in_backward + in_forward
        with torch.inference_mode():
            moe.route(logits, None, count_in=count_in, load=load)
        assert int(load.sum()) == in_backward + 2 * in_forward


def test_the_quantile_histogram_is_counted_with_the_load() -> None:
    router = moe.MoERouter(6, 8, top_k=3)
    router.quantile_histogram = torch.zeros(8, 50, dtype=torch.int64)
    router.quantile_bounds = torch.tensor([-1.0, 1.0])
    x = normal(20, 6)
    loss = router(x).gates.sum() + checkpoint(router, x, use_reentrant=False).gates.sum()
    assert int(router.quantile_histogram.sum()) == 0
    loss.backward()
    assert int(router.quantile_histogram.sum()) == 2 * 20 * 8
    assert int(router.load.sum()) == 2 * 20 * 3


# --- bits ------------------------------------------------------------------------------------------------------------
def test_threads_runs_and_layouts_give_the_same_bits() -> None:
    logits = normal(3000, 48)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for x in (logits, logits.T.contiguous().T, torch.cat([logits, logits], 1)[:, :48]):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            got = moe.route(leaf, None, top_k=5)
            got.gates.square().sum().backward()
            assert leaf.grad is not None
            results.append([got.gates.detach(), got.ids, got.counts, leaf.grad])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Four tokens are selected side by side; one alone, or with padding between, gives the same."""
    logits = normal(21, 70)
    whole = moe.route(logits, None, top_k=4, score="softmax")
    for t in range(21):
        alone = moe.route(logits[t : t + 1], None, top_k=4, score="softmax")
        assert torch.equal(alone.ids[0], whole.ids[t])
        assert torch.equal(alone.gates[0], whole.gates[t])
    valid = torch.arange(21) % 2 == 0
    masked = moe.route(logits, None, top_k=4, score="softmax", valid=valid)
    assert torch.equal(masked.gates[valid], whole.gates[valid])


# --- the operator ----------------------------------------------------------------------------------------------------
OPCHECK = [
    ((normal(9, 8).requires_grad_(), normal(8, seed=1)), {"top_k": 3}),
    ((normal(9, 8).requires_grad_(), None), {"top_k": 2, "score": "softmax", "normalize": False}),
    ((normal(9, 8), None), {"top_k": 2, "num_groups": 2, "top_groups": 1, "valid": torch.arange(9) < 7}),
    ((normal(9, 8).requires_grad_(), None), {"load": torch.zeros(8, dtype=torch.int64)}),
    ((normal(9, 8), None), {"load": torch.zeros(8, dtype=torch.int64), "count_in": "forward"}),
]


@pytest.mark.parametrize(("args", "kwargs"), OPCHECK, ids=range(len(OPCHECK)))
def test_opcheck(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    torch.library.opcheck(route, args, kwargs)


def test_opcheck_of_the_parts() -> None:
    ops = torch.ops.torch_ext
    logits, total = normal(9, 8), torch.zeros(8, dtype=torch.int64)
    gates, ids, counts, cutoff, a, _ = ops.moe_route_forward(
        logits, None, None, 3, "sigmoid", True, 1.0, 1, 1, 1, "zero", True
    )
    torch.library.opcheck(ops.moe_load_add_.default, (total, counts))
    torch.library.opcheck(
        ops.moe_route_backward.default,
        (gates, None, ids, a, None, None, 8, torch.float32, 3, "sigmoid", True, 1.0, "zero"),
    )
    bounds = torch.tensor([-1.0, 1.0])
    torch.library.opcheck(ops.moe_route_histogram.default, (logits, cutoff, None, bounds, 10, "sigmoid"))


def test_compile() -> None:
    logits, bias = normal(12, 8).requires_grad_(), normal(8, seed=1, scale=0.1)

    def loss(x: Tensor, load: Tensor) -> Tensor:
        return (moe.route(x, bias, top_k=3, load=load).gates ** 2).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        load = torch.zeros(8, dtype=torch.int64)
        (grad,) = torch.autograd.grad(function(logits, load), logits)
        results.append((grad, load))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert int(results[0][1].sum()) == 36


# --- what is refused -------------------------------------------------------------------------------------------------
LONG = torch.zeros(6, dtype=torch.int64)
REJECTED: list[tuple[type[Exception], str, Any, Any, dict[str, Any]]] = [
    (ValueError, r"top_k must be in \[1, E = 6\], got 0", normal(4, 6), None, {"top_k": 0}),
    (ValueError, r"top_k must be in \[1, E = 6\], got 7", normal(4, 6), None, {"top_k": 7}),
    (ValueError, "num_groups must divide the number of experts, 6; got 4", normal(4, 6), None, {"num_groups": 4}),
    (ValueError, "num_groups must divide", normal(4, 6), None, {"num_groups": 0}),
    (
        ValueError,
        "the top_groups = 1 groups of 2 experts hold fewer than top_k = 3; raise top_groups",
        normal(4, 6),
        None,
        {"top_k": 3, "num_groups": 3},
    ),
    (
        ValueError,
        r"top_groups must be in \[1, num_groups = 3\]",
        normal(4, 6),
        None,
        {"num_groups": 3, "top_groups": 4},
    ),
    (ValueError, r"group_score_k must be in \[1, 2\]", normal(4, 6), None, {"num_groups": 3, "group_score_k": 3}),
    (ValueError, "score must be 'sigmoid'", normal(4, 6), None, {"score": "relu"}),
    (ValueError, "normalized by definition", normal(4, 6), None, {"score": "post_softmax", "normalize": False}),
    (ValueError, "nan_policy must be", normal(4, 6), None, {"nan_policy": "ignore"}),
    (ValueError, "count_in must be", normal(4, 6), None, {"count_in": "both"}),
    (ValueError, "route_scale must be finite", normal(4, 6), None, {"route_scale": float("nan")}),
    (ValueError, r"logits must be \[T, E\]", normal(4, 6, 1), None, {}),
    (ValueError, "the number of experts must be positive", normal(4, 0), None, {}),
    (TypeError, "logits has dtype Long", torch.zeros(4, 6, dtype=torch.int64), None, {}),
    (TypeError, "bias must be Float, got BFloat16 .*would not move", normal(4, 6), torch.zeros(6).bfloat16(), {}),
    (ValueError, r"bias must be \[E = 6\], got \[5\]", normal(4, 6), torch.zeros(5), {}),
    (ValueError, "bias is on meta, logits on cpu", normal(4, 6), torch.zeros(6, device="meta"), {}),
    (TypeError, "load must be Long", normal(4, 6), None, {"load": torch.zeros(6)}),
    (ValueError, r"load must be \[E = 6\]", normal(4, 6), None, {"load": LONG[:3]}),
    (TypeError, "valid must be bool", normal(4, 6), None, {"valid": torch.ones(4)}),
    (ValueError, r"valid must be \[T = 4\], got \[3\]", normal(4, 6), None, {"valid": torch.ones(3).bool()}),
    (ValueError, "histogram and histogram_bounds go together", normal(4, 6), None, {"histogram": LONG}),
]
BINS = {"histogram": torch.zeros(6, 5, dtype=torch.int64), "histogram_bounds": torch.zeros(2)}
REJECTED += [
    (ValueError, "not defined with groups", normal(4, 6), None, {"num_groups": 3, "top_groups": 2, **BINS}),
    (ValueError, r"\(top_k \+ 1\)-th key", normal(4, 6), None, {"top_k": 6, **BINS}),
    (TypeError, "histogram must be int64", normal(4, 6), None, {**BINS, "histogram": torch.zeros(6, 5)}),
    (ValueError, "histogram_bounds", normal(4, 6), None, {**BINS, "histogram_bounds": torch.zeros(3)}),
]


@pytest.mark.parametrize(("error", "message", "logits", "bias", "options"), REJECTED)
def test_rejections(error: Any, message: str, logits: Tensor, bias: Tensor | None, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        moe.route(logits, bias, **options)


def test_more_entries_than_counts_of_32_bits_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="route them in parts"):
        moe.route(torch.empty(2**29, 8, device="meta"), None, top_k=4)
    ids = torch.empty(2**29, 4, device="meta", dtype=torch.int32)
    with pytest.raises(ValueError, match="dispatch in parts"):
        moe.dispatch_plan(ids, 8)


@pytest.mark.cuda
def test_cuda_gives_the_bits_of_the_cpu() -> None:
    """Scores are made of + - * / and sqrt: ids, counts, gates and gradients are the same."""
    for seed in range(60):
        logits, bias, options = draw_case(seed)
        results = []
        for device in ("cpu", "cuda"):
            leaf = logits.to(device).requires_grad_()
            valid = (torch.arange(len(logits)) % 5 != 4).to(device)
            got = moe.route(leaf, None if bias is None else bias.to(device), valid=valid, **options)
            got.gates.square().sum().backward()
            results.append([t.cpu() for t in (got.gates.detach(), got.ids, got.counts, leaf.grad)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), options

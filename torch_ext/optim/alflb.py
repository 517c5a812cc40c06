"""ALFLB: the auxiliary-loss-free balancer of mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from torch_ext import _C
from torch_ext.moe.router import MoERouter
from torch_ext.optim._base import Closure, Optimizer, ParamsT

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_UNKNOWN = -1


class _Buffer:
    """Stands for a router that is no MoERouter: its bias, a tensor or a buffer of a module, and the loads we keep."""

    def __init__(self, bias: Tensor, owner: nn.Module | None = None, name: str = "") -> None:
        self._bias, self._owner, self._name = bias, owner, name
        self.load = torch.zeros(bias.shape, dtype=torch.int64, device=bias.device)
        self.options: dict[str, Any] = {"top_k": _UNKNOWN}
        self.quantile_histogram: Tensor | None = None
        self.quantile_bounds: Tensor | None = None

    @property
    def expert_bias(self) -> Tensor:
        bias: Tensor = self._bias if self._owner is None else getattr(self._owner, self._name)
        return bias


class _Layer:
    """A bias as a parameter group holds it, and the router that it belongs to."""

    def __init__(self, bias: Tensor, router: MoERouter | _Buffer, name: str | None) -> None:
        self.bias, self.router, self.name = bias, router, name


class ALFLB(Optimizer):
    r"""Moves the bias that routers add to their scores for selection only, so that all experts get the same load.

    Wang et al. (arXiv:2408.15664), DeepSeek-V3 (arXiv:2412.19437), Han and Zhong (arXiv:2512.03915: the rules as
    primal-dual steps). No loss and no gradient is involved. In a layer of E experts, of which each of T tokens selects
    K, :math:`A_e` is the load of expert e over the whole step (all micro-batches and processes), :math:`L = K T / E`,
    p ``[E]`` the bias and n = 1, 2, ... the number of the update:

    .. math::
        u_n &= \mathtt{lr} / n^{\mathtt{lr\_power}}, \quad v_e = (L - A_e) / L \\
        \text{sign:} \quad p_e &\leftarrow p_e + u_n \operatorname{sign}(L - A_e) \quad\text{(in integers)} \\
        \text{proportional:} \quad p_e &\leftarrow p_e + u_n (L - A_e) / T
            \quad\text{(norm "tokens")}, \quad p_e + u_n v_e \quad\text{(norm "load")} \\
        \text{momentum:} \quad d_e &= u_n \tanh(\kappa v_e), \quad
            m \leftarrow \mathtt{momentum}\, m + (1 - \mathtt{momentum}) (d - \bar d), \quad p \leftarrow p + m \\
        \text{quantile:} \quad p_e &\leftarrow \text{the } K/E \text{ quantile over the tokens of (the }
            (K{+}1)\text{-th largest key} - \text{score}_e)

    With ``center`` then p -= mean(p), which changes no selection. ::

        balancer = torch_ext.optim.ALFLB(model)         # every MoERouter in the model
        loss.backward(); opt.step(); balancer.step(); opt.zero_grad()

    :meth:`step` takes the loads that have come in since the last one and clears them; layers without loads stay as they
    are. ``zero_grad`` does nothing. Where something else owns the loop: :meth:`attach`.

    Args:
        params: a module (every :class:`torch_ext.moe.MoERouter` in it), routers, or bias tensors (float32 ``[E]``)
            whose loads come from :meth:`record`; or groups of these.
        lr: step size u in [0, inf) (1e-3, arXiv:2408.15664). 0 freezes the biases. For ``"proportional"`` 0.1 ... 0.3
            (norm "tokens"; with lr_power 1 and data that does not drift 1 ... 3) or 0.02 (norm "load").
        lr_power: u falls as n^-lr_power, in [0, inf). Leave it 0 with a scheduler.
        rule: ``"sign"`` is the published method, ``"proportional"`` balances in tens of steps instead of hundreds,
            ``"quantile"`` has nothing to tune (scores within an interval of length 1: "sigmoid", "softmax"; not with
            groups), ``"momentum"`` averages bounded steps. With softmax scores over many experts lr 1e-3 is large: take
            ``"proportional"`` or ``"quantile"``.
        norm: of ``"proportional"``.
        center: keeps the mean of the bias at 0.
        ema: of ``"quantile"``: weight of the bias before, in [0, 1].
        momentum: of ``"momentum"``: decay of the average, in [0, 1).
        kappa: of ``"momentum"``: slope of the tanh, in (0, inf).
        qb_bins: of ``"quantile"``: bins of the histogram (int64 ``[E, qb_bins]``) that the router fills.
        process_group: sum loads over these processes, all that route different tokens of a layer: one int64 all-reduce.
            Equal to one process with all tokens, to the bit.

    State of a bias: ``step`` (float32) and ``updates`` (int64), n; ``last_load`` (int64 ``[E]``), what the last update
    used; with "momentum" ``momentum_buffer`` (float32 ``[E]``). Loads that no step has taken yet are not saved.

    Raises:
        ValueError: an option is out of range; a module without routers; a bias that is not ``[E]``; the quantile rule
            with K = E.
        TypeError: a bias that is not float32.
    """

    _name = "ALFLB"

    def __init__(
        self,
        params: nn.Module | Iterable[nn.Module] | ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        lr_power: float = 0.0,
        rule: Literal["sign", "proportional", "quantile", "momentum"] = "sign",
        norm: Literal["tokens", "load"] = "tokens",
        center: bool = True,
        ema: float = 0.0,
        momentum: float = 0.5,
        kappa: float = 2.0,
        qb_bins: int = 1000,
        process_group: ProcessGroup | None = None,
    ) -> None:
        options = {
            "lr": lr,
            "lr_power": lr_power,
            "rule": rule,
            "norm": norm,
            "center": center,
            "ema": ema,
            "momentum": momentum,
            "kappa": kappa,
            "qb_bins": qb_bins,
        }
        self._layers: list[_Layer] = []
        super().__init__(self._biases_of(params), options, process_group)
        self._prepare(fresh=True)

    @classmethod
    def from_buffers(cls, model: nn.Module, name: str, **options: Any) -> ALFLB:
        """The balancer of another library's routers: of every buffer called ``name`` anywhere in ``model``.

        Such as ``"e_score_correction_bias"`` of Hugging Face's DeepSeek-V3. Tell it the selected experts with
        :meth:`record`, for example in a forward hook of the router. The buffers must be float32.
        """
        layers: list[_Layer] = []
        for prefix, module in model.named_modules():
            bias = module._buffers.get(name)
            if bias is not None and all(layer.bias is not bias for layer in layers):
                layers.append(_Layer(bias, _Buffer(bias, module, name), prefix or name))
        if not layers:
            raise ValueError(f"ALFLB: the model has no buffer named {name!r}")
        new = cls([layer.bias for layer in layers], **options)
        new._layers = layers
        new._prepare(fresh=True)
        return new

    # --- layers ------------------------------------------------------------------------------------------------------

    def _biases_of(self, params: Any) -> Any:
        """Modules replaced by the biases of their routers; everything else as it is."""
        if isinstance(params, nn.Module):
            params = [params]
        if isinstance(params, (Tensor, str, dict, set)) or not isinstance(params, Iterable):
            return params  # the base class says what is wrong
        result: list[Any] = []
        for item in params:
            if isinstance(item, nn.Module):
                result.extend(self._routers_in(item))
            elif isinstance(item, dict) and "params" in item:
                result.append({**item, "params": self._biases_of(item["params"])})
            else:
                result.append(item)
        return result

    def _routers_in(self, module: nn.Module) -> list[Tensor]:
        routers = [(name, router) for name, router in module.named_modules() if isinstance(router, MoERouter)]
        if not routers:
            raise ValueError(
                "ALFLB: the module has no MoERouter; for the routers of another library take "
                'ALFLB.from_buffers(model, "name of the bias")'
            )
        self._layers.extend(_Layer(router.expert_bias, router, name or None) for name, router in routers)
        return [router.expert_bias for _, router in routers]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of routers or biases; options that it does not name are the defaults."""
        if isinstance(param_group, dict) and "params" in param_group:
            param_group = {**param_group, "params": self._biases_of(param_group["params"])}
        super().add_param_group(param_group)
        for number, bias in enumerate(self.param_groups[-1]["params"]):
            _C.alflb_check_bias(bias, number)
        self._prepare(fresh=False)  # a router of the quantile rule counts from now on

    def _layer_of(self, bias: Tensor) -> _Layer:
        for layer in self._layers:
            if layer.bias is bias:
                return layer
        layer = _Layer(bias, _Buffer(bias), None)
        self._layers.append(layer)
        return layer

    def _follow(self) -> None:
        """A module may have replaced its bias, when it went to another device: state and groups follow."""
        for layer in self._layers:
            now = layer.router.expert_bias
            if now is layer.bias:
                continue
            for group in self.param_groups:
                group["params"] = [now if bias is layer.bias else bias for bias in group["params"]]
            if layer.bias in self.state:
                self.state[now] = self.state.pop(layer.bias)
            layer.bias = now

    def _prepare(self, *, fresh: bool) -> list[_Layer]:
        """The layers in the order of the groups, with loads and histograms where they are missing or elsewhere.

        ``fresh`` also takes the range of the histograms anew from the biases.
        """
        self._follow()
        layers = []
        for group in self.param_groups:
            for bias in group["params"]:
                layer = self._layer_of(bias)
                router = layer.router
                if router.load.device != bias.device:
                    router.load = router.load.to(bias.device)
                histogram = router.quantile_histogram
                shape = (bias.numel(), group["qb_bins"])
                fits = histogram is not None and histogram.device == bias.device and histogram.shape == shape
                if group["rule"] != "quantile":
                    router.quantile_histogram = router.quantile_bounds = None
                elif fresh or not fits:
                    router.quantile_histogram, router.quantile_bounds = _C.alflb_make_histogram(bias, shape[1])
                layers.append(layer)
        return layers

    # --- steps -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Moves every bias by the loads since the last call and clears them.

        Args:
            closure: is called and its result returned; the balancer does not read it.

        A bias that is not finite changes nothing but :attr:`skipped_steps`; the loads are dropped.
        """
        returned: Any = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
            returned = returned.detach() if isinstance(returned, Tensor) else returned
        self._balance(getattr(self, "found_inf", None))
        return returned

    def _balance(self, found_inf: Any) -> None:
        self._check_edited_options()
        process_group = self._group_of_step()
        layers = self._prepare(fresh=False)
        routers = [layer.router for layer in layers]
        if process_group is not None:
            counts = self._counts(routers)
            torch._foreach_copy_(counts, _C.all_reduce_sum(counts, process_group))
        _C.alflb_apply(
            [layer.bias for layer in layers],
            [number for number, group in enumerate(self.param_groups) for _ in group["params"]],
            [router.load for router in routers],
            [router.quantile_histogram for router in routers],
            [router.quantile_bounds for router in routers],
            [router.options["top_k"] for router in routers],
            [self.state[layer.bias] for layer in layers],
            [{**group, "lr": float(group["lr"])} for group in self.param_groups],
            found_inf if isinstance(found_inf, Tensor) else None,
            self._counter("global_skipped"),
        )

    @torch.no_grad()
    def discard(self) -> None:
        """Drops the loads that have come in: for a step that the optimizer skipped. :attr:`skipped_steps` counts it."""
        torch._foreach_zero_(self._counts([layer.router for layer in self._prepare(fresh=False)]))
        self._counter("global_skipped").add_(1)

    @staticmethod
    def _counts(routers: list[MoERouter | _Buffer]) -> list[Tensor]:
        """Everything that a step takes in and clears."""
        histograms = [router.quantile_histogram for router in routers]
        return [*(router.load for router in routers), *(h for h in histograms if h is not None)]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: biases have no gradient, and the loads are the step's to clear."""

    def attach(self, optimizer: torch.optim.Optimizer, *, scaler: Any = None) -> Attachment:
        """Balances after every step of ``optimizer``, so that a trainer's loop needs to know of one optimizer only.

        Args:
            optimizer: any; the balancer runs in its step post hook.
            scaler: the ``torch.amp.GradScaler`` of the loop, if it has one. The loads of a step that it skips are then
                discarded in its ``update()``; without it they would be balanced together with those of the next step.
                (An optimizer to which the scaler passes ``found_inf`` does not need it.)

        Returns:
            a handle with ``remove()``.
        """
        return Attachment(self, optimizer, scaler)

    # --- loads -------------------------------------------------------------------------------------------------------

    def loads(self) -> list[Tensor]:
        """Loads since the last step, int64 ``[E]`` of each bias in the order of the groups. Add to them in place."""
        return [layer.router.load for layer in self._prepare(fresh=False)]

    def record(self, layer: int, ids: Tensor) -> None:
        """Counts selected experts for the bias of this number.

        Args:
            layer: running number of the bias over the groups.
            ids: ``[..., K]`` int32 or int64; negative entries are padding.
        """
        layers = self._prepare(fresh=False)
        if not 0 <= layer < len(layers):
            raise ValueError(f"ALFLB: no layer {layer}, there are {len(layers)}")
        if ids.dim() < 1:
            raise ValueError("record: ids must be [..., K]")
        router = layers[layer].router
        torch.ops.torch_ext.alflb_record_(router.load, ids)
        router.options["top_k"] = ids.size(-1)

    def report(self, pending: bool = False) -> dict[str, dict[str, Any]]:
        """What the loads say, by the name of the layer in its model, else by its number. (Reads the device.)

        Args:
            pending: False: the loads that the last step used. True: those that have come in since.

        Returns:
            per layer ``max_vio`` max A/L - 1, ``min_vio`` min A/L - 1, ``avg_vio`` mean of abs(A/L - 1), ``entropy`` of
            the shares over ln E (1 is balance), ``dead`` experts without a token, ``bias_spread`` max p - min p, and
            ``floor``: the max_vio that a perfect bias leaves on fresh tokens by sampling alone
            (:meth:`sampling_floor`), to compare with. NaN where there are no loads.
        """
        result = {}
        for number, layer in enumerate(self._prepare(fresh=False)):
            load = layer.router.load
            if not pending:
                load = self.state.get(layer.bias, {}).get("last_load", load)
            name = layer.name if layer.name is not None and layer.name not in result else str(number)
            result[name] = _C.load_report(load, layer.bias, layer.router.options["top_k"])
        return result

    @staticmethod
    def sampling_floor(tokens: float, num_experts: int, top_k: int) -> float:
        """The MaxVio that sampling alone leaves, of tokens that select ``top_k`` of ``num_experts`` experts at random.

        From the largest of E normal numbers with the skewness of a binomial one; within 2 % at K tokens / E >= 100.
        """
        return _C.sampling_floor(tokens, num_experts, top_k)

    # --- saving and loading ------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; state keeps its own dtype. The biases themselves are in the model's state_dict."""
        self._follow()
        super().load_state_dict(state_dict)
        self._prepare(fresh=True)

    def _check_state(self, param: Tensor, options: dict[str, Any], state: dict[str, Tensor]) -> None:
        _C.alflb_check_state(param, options, state)

    def __getstate__(self) -> dict[str, Any]:
        """With the routers: a copy or pickle of model and balancer together stays connected."""
        return {**super().__getstate__(), "_layers": self._layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_layers", [])


class Attachment:
    """What :meth:`ALFLB.attach` returns."""

    def __init__(self, balancer: ALFLB, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
        self._balancer, self._scaler, self._stepped = balancer, scaler, False
        self._hook = optimizer.register_step_post_hook(self._after_step)
        if scaler is not None:
            self._update: Callable[..., Any] = scaler.update
            scaler.update = self._after_update

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped = True
        with torch.no_grad():
            self._balancer._balance(getattr(optimizer, "found_inf", None))

    def _after_update(self, *args: Any, **kwargs: Any) -> Any:
        if not self._stepped:
            self._balancer.discard()
        self._stepped = False
        return self._update(*args, **kwargs)

    def remove(self) -> None:
        """Ends the attachment; the optimizer and the scaler are as before."""
        self._hook.remove()
        if self._scaler is not None:
            self._scaler.update = self._update
            self._scaler = None

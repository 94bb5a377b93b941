"""Transformations as optimizers of torch: objects that change parameters in place."""

from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import torch
from torch import Tensor

from .. import _tree
from .._inputs import kind
from .._numerics import Scalar
from .._step import apply_updates, check_lr
from .._transforms._base import GradientTransformation, check_transform

_STATE = "opt_state"  # the key in torch's `state`, whose other keys would be parameters
_OF_GROUP = {"params", "param_names", "lr", "initial_lr", "name"}


def as_optimizer(
    transform: GradientTransformation, params: Iterable[Any], lr: Scalar
) -> torch.optim.Optimizer:
    """Make a `torch.optim.Optimizer` of a transformation.

    u, s' = update(p.grad, s, p);  p ← p − lr·u, at every `step()`

    It serves wherever torch's own optimizers do: in a loop, lr_schedulers, `GradScaler`, Lightning and
    Hugging Face's `Trainer`. The parameters of all groups are one tree, a dict by their names, so that a
    norm is that of all. Groups have an lr of their own, and nothing else. For other differences use
    `partition` or `masked`. A step leaves parameters without a gradient out of the tree, so that neither
    they nor their state change. All parameters share a count of steps.

    `state_dict` holds the transformation's state as a flat dict of tensors, which `torch.load` reads with
    `weights_only=True`. The optimizer can be copied and pickled, as far as the arguments of the
    transformation can.

    Args:
        transform: what to do with the gradients.
        params: tensors, `(name, tensor)` pairs such as `model.named_parameters()`, or dicts of them, each a
            group with an lr of its own. Without names, a parameter's name is its number.
        lr: the learning rate of groups without one, a number >= 0 or a 0-d tensor.

    Returns:
        An optimizer, whose `transform` is the transformation.

    Raises:
        TypeError: transform is no `GradientTransformation`, or a parameter is no tensor of floats; (in
            `step`) a gradient is sparse.
        ValueError: lr is out of range; a group has another option than lr; (in `load_state_dict`) the state
            is that of another transformation or of other parameters.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = gd.interop.as_optimizer(gd.momentum(0.9), [w], lr=0.1)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     (0.5 * w**2).sum().backward()
        ...     optimizer.step()
        >>> w
        Parameter containing:
        tensor([0.7200, 1.4400], requires_grad=True)
    """
    check_transform(transform)
    return TransformOptimizer(transform, params, check_lr(lr))


class TransformOptimizer(torch.optim.Optimizer):
    """The optimizer that `as_optimizer` makes."""

    state: Any  # torch's type has parameters as its only keys

    def __init__(self, transform: GradientTransformation, params: Iterable[Any], lr: Scalar) -> None:
        self.transform = transform
        self._names: tuple[Any, ...] | None = None  # of the parameters that the last step moved
        self._paths: list[str] = []  # of the leaves of its state
        self._structure: Any = None
        super().__init__(params, {"lr": lr})

    def __repr__(self) -> str:
        return super().__repr__().replace(type(self).__name__, f"as_optimizer of {self.transform!r}", 1)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"transform": self.transform}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the state of a copy, or the one that is loaded."""
        if "transform" in state:
            self.transform = state["transform"]
        self._names = None
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with an lr of its own."""
        others = [key for key in param_group if key not in _OF_GROUP]
        if others:
            raise ValueError(
                f"param_groups[{len(self.param_groups)}] has {others[0]!r}, but groups differ in lr alone; "
                f"use gd.partition or gd.masked"
            )
        super().add_param_group(param_group)
        check_lr(self.param_groups[-1]["lr"])
        names = [name for pairs in self._named() for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"two parameters have the name {max(names, key=names.count)!r}; rename one")
        for name, leaf in self._named()[-1]:
            if not leaf.is_floating_point():
                raise TypeError(f"params[{name!r}] is {kind(leaf)}; parameters must be floating point")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of an optimizer of the same transformation and parameters."""
        params = {name: leaf.detach() for pairs in self._named() for name, leaf in pairs}
        known, state = _flat(self.transform.init(params)), state_dict["state"]
        wrong = [key for key in state if key != _STATE]
        wrong += [path for path in state.get(_STATE, ()) if path not in known]
        if wrong:
            raise ValueError(
                f"the state is that of another optimizer, perhaps of torch's own, or of other parameters: "
                f"it has {wrong[0]!r}, but {self.transform!r} has {', '.join(known) or 'none'}"
            )
        names = [group.get("param_names") for group in self.param_groups]
        super().load_state_dict(state_dict)
        # Because torch takes over the saved names in their order, these parameters would get others'.
        for group, of_group in zip(self.param_groups, names, strict=True):
            group.pop("param_names", None)
            if of_group is not None:
                group["param_names"] = of_group

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change the parameters once, and return the loss of the closure if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [
            [(name, leaf) for name, leaf in pairs if leaf.grad is not None] for pairs in self._named()
        ]
        params = {name: leaf.detach() for pairs in groups for name, leaf in pairs}
        grads = {name: _dense(name, leaf.grad) for pairs in groups for name, leaf in pairs}
        if not params:
            return loss
        updates, opt_state = self.transform.update(grads, self._opt_state(params), params)
        self.state[_STATE] = self.state[_STATE] | _flat(_tree.detach(opt_state))
        for pairs, group in zip(groups, self.param_groups, strict=True):
            old, directions = ({name: of_all[name] for name, _ in pairs} for of_all in (params, updates))
            for name, leaf in apply_updates(old, directions, group["lr"]).items():
                params[name].copy_(leaf.detach())
        return loss

    def _named(self) -> list[list[tuple[Any, Tensor]]]:
        """List for every group its parameters with their names."""
        groups, numbers = self.param_groups, count()
        return [
            [(next(numbers) if names is None else names[i], leaf) for i, leaf in enumerate(group["params"])]
            for group, names in [(group, group.get("param_names")) for group in groups]
        ]

    def _opt_state(self, params: dict[Any, Tensor]) -> Any:
        """Give the state of the parameters that move, whose leaves begin when they first do."""
        saved: dict[str, Tensor] = self.state.get(_STATE, {})
        if tuple(params) != self._names:
            fresh = self.transform.init(params)
            start = _flat(fresh)
            keys = tuple(f"[{name!r}]" for name in params)
            for path, leaf in start.items():
                # A vector over all parameters is that of the ones that moved last.
                if self._names is not None and leaf.ndim > 0 and not path.endswith(keys):
                    continue
                if path in saved and saved[path].shape == leaf.shape:
                    start[path] = saved[path].to(leaf)
                elif path in saved and self._names is None:
                    raise ValueError(
                        f"the loaded state has {path} of shape {tuple(saved[path].shape)}, but the "
                        f"parameters need {tuple(leaf.shape)}; load the state of the same parameters"
                    )
            self._names, self._paths, self._structure = tuple(params), [*start], _tree.flatten(fresh)[1]
            self.state[_STATE] = saved = saved | start
        return _tree.unflatten(self._structure, [saved[path] for path in self._paths])


def _flat(opt_state: Any) -> dict[str, Tensor]:
    return {path.lstrip("."): leaf for path, leaf in _tree.named_leaves(opt_state, "")}


def _dense(name: Any, grad: Any) -> Tensor:
    if grad.is_sparse:
        raise TypeError(
            f"the gradient of params[{name!r}] is sparse; make it dense: nn.Embedding(sparse=False)"
        )
    return grad.detach()

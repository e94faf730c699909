"""The exact state of a training run, put back in place: same tensors, same addresses, same random numbers."""

import copy
import random
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn

Where = Literal["device", "cpu", "disk"]


def check_where(where: str) -> None:
    """Raises ValueError unless a snapshot can lie there."""
    if where not in get_args(Where):
        raise ValueError(f"a snapshot lies on 'device', 'cpu' or 'disk', but got {where!r}: choose one of them")


class Stateful(Protocol):
    """A grad scaler, a scheduler, a callback: whatever can say and take back its state."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def local(tensor: Tensor) -> Tensor:
    """This rank's own part of a tensor: the shard of a DTensor (FSDP2), else the tensor's data."""
    part = getattr(tensor, "_local_tensor", tensor)
    assert isinstance(part, Tensor)
    return part.detach()


def reshard(modules: Iterable[nn.Module]) -> None:
    """Frees the gathered weights that FSDP2 modules hold after a forward pass without a backward one.

    While they are gathered, a module's parameters are plain copies: what is read of them is too much, and what is
    written into the shards goes unseen.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # heavy to import, and there when there is such a module
    if fsdp is None:
        return
    for module in {id(m): m for root in modules for m in root.modules()}.values():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


class _Store:
    """Copies of tensors, on the device, in (pinned) host memory, or in an unnamed file."""

    def __init__(self, where: Where) -> None:
        self._where = where
        self._copies: list[Tensor] = []
        self._file: Any = None

    def save(self, tensors: Sequence[Tensor]) -> None:
        if self._where == "disk":
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the snapshot
            self._file.seek(0)
            self._file.truncate()
            torch.save([t.cpu() for t in tensors], self._file)
            return
        if len(self._copies) != len(tensors) or any(
            c.shape != t.shape or c.dtype != t.dtype for c, t in zip(self._copies, tensors, strict=True)
        ):
            self._copies = [self._room(t) for t in tensors]
        for kept, tensor in zip(self._copies, tensors, strict=True):
            kept.copy_(tensor)

    def _room(self, tensor: Tensor) -> Tensor:
        if self._where == "device":
            return torch.empty_like(tensor)
        return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)

    def load(self) -> list[Tensor]:
        if self._where == "disk":
            self._file.seek(0)
            loaded = torch.load(self._file, weights_only=True)
            assert isinstance(loaded, list)
            return loaded
        return self._copies


def rng_state() -> dict[str, Any]:
    """States of the random generators of Python, NumPy, torch and every visible CUDA device, as plain values."""
    version, internal, gauss = random.getstate()
    name, keys, pos, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, [int(k) for k in keys], int(pos), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), pos, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


class Snapshot:
    """The state of modules, optimizers and companions, to be put back any number of times.

    Kept: parameters and all buffers (non-persistent ones too), torchmetrics' states, modules' extra state, the
    optimizers' state and group options, the random generators of this process, and every companion's state dict.
    Restoring copies into the tensors that existed at `save`, so fused and capturable optimizers, compiled graphs and
    CUDA graphs keep their addresses; optimizer state that did not exist yet is removed again. Of an FSDP2 module each
    rank keeps its own shards; nothing is gathered.

    Memory: parameters, buffers and optimizer state once per snapshot (with Adam three times the parameters).

    Args:
        modules: modules, shared parts counted once.
        optimizers: optimizers.
        companions: anything with `state_dict` and `load_state_dict`, e.g. a grad scaler or a scheduler.
        where: "device", "cpu" (pinned for CUDA tensors) or "disk" (a temporary file without a name).
        grads: whether gradients are part of the state (in the midst of an accumulation).
        rng: whether the random generators are.

    Raises:
        ValueError: unknown `where`.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        optimizers: Iterable[torch.optim.Optimizer] = (),
        *,
        companions: Iterable[Stateful] = (),
        where: Where = "device",
        grads: bool = True,
        rng: bool = True,
    ) -> None:
        check_where(where)
        self._modules, self._optimizers = list(modules), list(optimizers)
        self._companions, self._grads, self._rng = list(companions), grads, rng
        self._store = _Store(where)
        self.saved = False

    @torch.no_grad()
    def save(self) -> None:
        """Takes the current state, over what was saved before."""
        reshard(self._modules)
        self._slots = list(self._module_slots())
        self._tensors = [local(holder[name]) for holder, name in self._slots]
        self._owners = [holder[name] for holder, name in self._slots]
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        if self._grads:
            for parameter in self._parameters():
                self._gradients.append((parameter, parameter.grad))
                if parameter.grad is not None:
                    self._tensors.append(local(parameter.grad))
        self._optimizer_states = [self._take_optimizer(o) for o in self._optimizers]
        self._store.save(self._tensors)
        self._others = [(m, _metric_state(m), _extra_state(m)) for m in self._submodules()]
        self._plain = [(m, _plain_state(m)) for m in self._submodules()]
        self._empty = [(m, {n for n, t in m._buffers.items() if t is None}) for m in self._submodules()]
        self._companion_states = [copy.deepcopy(c.state_dict()) for c in self._companions]
        self._rng_state = rng_state() if self._rng else None
        self.saved = True

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the saved state back.

        Raises:
            RuntimeError: nothing was saved.
        """
        if not self.saved:
            raise RuntimeError("a snapshot is restored after save(), but nothing was saved: call save() first")
        reshard(self._modules)
        for tensor, kept in zip(self._tensors, self._store.load(), strict=True):
            tensor.copy_(kept)
        for (holder, name), owner in zip(self._slots, self._owners, strict=True):
            holder[name] = owner
        for parameter, grad in self._gradients:
            parameter.grad = grad
        for optimizer, state in zip(self._optimizers, self._optimizer_states, strict=True):
            self._put_optimizer(optimizer, state)
        for module, metric, extra in self._others:
            for name, value in metric.items():
                setattr(module, name, _cloned(value))
            if extra is not None:
                module.set_extra_state(copy.deepcopy(extra))
        for module, plain in self._plain:
            for name in [n for n, v in vars(module).items() if n not in plain and _is_plain(n, v)]:
                delattr(module, name)
            for name, value in plain.items():
                vars(module)[name] = _cloned(value)
        for module, names in self._empty:
            for name in names:
                module._buffers[name] = None
        for companion, kept_state in zip(self._companions, self._companion_states, strict=True):
            companion.load_state_dict(copy.deepcopy(kept_state))
        if self._rng_state is not None:
            set_rng_state(self._rng_state)

    def _submodules(self) -> list[nn.Module]:
        return list({id(m): m for root in self._modules for m in root.modules()}.values())

    def _parameters(self) -> list[nn.Parameter]:
        return list({id(p): p for root in self._modules for p in root.parameters()}.values())

    def _module_slots(self) -> Iterable[tuple[dict[str, Any], str]]:
        """(holder, name) of every parameter and buffer, each tensor once."""
        seen: set[int] = set()
        for module in self._submodules():
            for holder in (module._parameters, module._buffers):
                for name, tensor in holder.items():
                    if tensor is not None and id(tensor) not in seen:
                        seen.add(id(tensor))
                        yield holder, name

    def _take_optimizer(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """State with every tensor replaced by its number in `_tensors`, and the groups' options."""
        states = {p: {k: self._take(v) for k, v in state.items()} for p, state in optimizer.state.items()}
        groups = [{k: self._take(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        return {"state": states, "groups": groups}

    def _take(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._tensors.append(local(value))
            return _Held(value)
        if isinstance(value, list | tuple | dict):  # nested state (LBFGS) is copied, not kept in place
            return _Copied(_cloned(value))
        return _Copied(copy.deepcopy(value))

    def _put_optimizer(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        for parameter in [p for p in optimizer.state if p not in saved["state"]]:
            del optimizer.state[parameter]
        for parameter, state in saved["state"].items():
            current = optimizer.state[parameter]
            current.clear()
            current.update({k: v.value() for k, v in state.items()})
        for group, options in zip(optimizer.param_groups, saved["groups"], strict=True):
            group.update({k: v.value() for k, v in options.items()})


class _Held:
    """A tensor of the optimizer that stays where it is; its content lies in the store."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def value(self) -> Tensor:
        return self._tensor


class _Copied:
    """A value that is copied out anew at each restore."""

    def __init__(self, kept: Any) -> None:
        self._kept = kept

    def value(self) -> Any:
        return _cloned(self._kept)


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _cloned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_cloned(v) for v in value]
    if type(value) is tuple:
        return tuple(_cloned(v) for v in value)
    return copy.deepcopy(value)


def _metric_state(module: nn.Module) -> dict[str, Any]:
    """A torchmetrics metric's accumulators: they are plain attributes, in no state dict unless persistent."""
    names = getattr(module, "_defaults", None)
    if not isinstance(names, dict) or not hasattr(module, "_reductions"):
        return {}
    bookkeeping = ("_update_count", "_computed", "_forward_cache", "_cache", "_is_synced")
    return {name: _cloned(getattr(module, name)) for name in (*names, *bookkeeping) if hasattr(module, name)}


# Plain attributes larger than this are data, not state.
_MOST_PLAIN = 10_000


def _is_plain(name: str, value: Any, depth: int = 0) -> bool:
    """Whether an attribute is a small counter, list or dict that a step may change."""
    if name == "training" or name.startswith(
        ("_parameters", "_buffers", "_modules", "_non_persistent", "_forward", "_back")
    ):
        return False
    if value is None or isinstance(value, bool | int | float | str):
        return True
    if depth > 3 or not isinstance(value, list | tuple | dict | set | deque) or len(value) > _MOST_PLAIN:
        return False
    items = [*value.values()] if isinstance(value, dict) else [*value]
    return type(value) in (list, tuple, dict, set, deque) and all(
        isinstance(v, Tensor) or _is_plain("", v, depth + 1) for v in items
    )


def _plain_state(module: nn.Module) -> dict[str, Any]:
    """A module's own counters, lists and dicts: in no state dict, and changed by many a training step."""
    return {name: _cloned(value) for name, value in vars(module).items() if _is_plain(name, value)}


def _extra_state(module: nn.Module) -> Any:
    if type(module).get_extra_state is nn.Module.get_extra_state:
        return None
    return copy.deepcopy(module.get_extra_state())


@contextmanager
def unseen(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode without gradients; modes, metrics and random numbers are as before afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    metrics = [(m, state) for m in module.modules() if (state := _metric_state(m))]
    randomness = rng_state()
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, mode in modes:
            child.training = mode
        for metric, state in metrics:
            for name, value in state.items():
                setattr(metric, name, value)
        set_rng_state(randomness)

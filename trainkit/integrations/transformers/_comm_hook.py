"""`CommHook`: a `TrainerCallback` that registers a communication hook on the model that the Trainer has wrapped."""

import weakref
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainkit.collectives import ForestState, forest_hook
from trainkit.collectives.execute import ddp_of
from trainkit.integrations._network import NetworkState, auto_network_hook
from trainkit.switchml import SwitchMLState, switchml_hook

_HOOKS = {ForestState: forest_hook, SwitchMLState: switchml_hook, NetworkState: auto_network_hook}


class CommHook(TrainerCallback):  # type: ignore[misc]
    """Average the gradients of `transformers.Trainer` through a state's hook.

    Args:
        state: a `ForestState`, `SwitchMLState` or `NetworkState`; it is closed when training ends.

    Raises:
        TypeError: it is none of these.

    Example:
        >>> Trainer(model, arguments, train_dataset=data, callbacks=[CommHook(ForestState(topology=network))])
    """

    def __init__(self, state: ForestState | SwitchMLState | NetworkState) -> None:
        hook: Any = next((hook for kind, hook in _HOOKS.items() if isinstance(state, kind)), None)
        if hook is None:
            names = ", ".join(kind.__name__ for kind in _HOOKS)
            raise TypeError(f"a CommHook takes one of {names}, got {type(state).__name__}")
        self._state, self._hook = state, hook
        self._hooked: weakref.WeakSet[Any] = weakref.WeakSet()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Find the DistributedDataParallel around the model, and register.

        Raises:
            ValueError: the Trainer has wrapped the model in something else.
        """
        wrapper = ddp_of(next(model.parameters()))
        if wrapper is None:
            if dist.is_initialized() and dist.get_world_size() > 1:
                raise ValueError(
                    "a CommHook needs DistributedDataParallel around the model: FSDP and DeepSpeed reduce gradients "
                    'themselves (FSDP takes ddp_backend="trainkit")'
                )
            return  # one process: there is nothing to reduce
        self._state.connect()
        if wrapper not in self._hooked:
            wrapper.register_comm_hook(self._state, self._hook)
            self._hooked.add(wrapper)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the connections go."""
        self._state.close()

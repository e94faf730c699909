"""States of one process against a switch, each worked in a thread of its own."""

import threading
from collections.abc import Callable
from typing import Any

from trainkit.switchml import SwitchMLState


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Run the calls at once; their results, exceptions among them."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def joined(switch: str, world: int, **options: Any) -> list[SwitchMLState]:
    states = [SwitchMLState(switch, rank=r, world_size=world, **{"timeout_s": 10, **options}) for r in range(world)]
    for result in together(*(state.connect for state in states)):
        if isinstance(result, Exception):
            raise result
    return states

"""What a switch holds, as plain values: what a description asks for, and the difference to what is there.

Every table of the program matches exactly, so that an entry is a table, its key and what follows from it.
"""

from dataclasses import dataclass

from trainkit.p4._description import Description, mac_text

FLOOD_GROUP = 1
FIRST_GROUP = 2
"""Multicast group of session 0."""

STATIC = ("own_address", "l2", "session")
"""Tables that a description fills. `member` and `receiver` are filled when workers join."""
DYNAMIC = ("member", "receiver")


@dataclass(frozen=True)
class Entry:
    """A table's entry: `key` and `params` in the order of the program."""

    table: str
    key: tuple[int, ...]
    action: str
    params: tuple[int, ...]

    @property
    def place(self) -> tuple[str, tuple[int, ...]]:
        """What no other entry shares."""
        return self.table, self.key

    def __str__(self) -> str:
        return f"{self.table} {_numbers(self.table, self.key)} -> {_numbers(self.action, self.params)}"


@dataclass(frozen=True)
class Group:
    """A multicast group: (port, instance) of each copy."""

    number: int
    copies: frozenset[tuple[int, int]]

    @property
    def place(self) -> tuple[str, tuple[int, ...]]:
        """What no other group shares."""
        return "multicast group", (self.number,)

    def __str__(self) -> str:
        copies = ", ".join(f"port {port} as {instance}" for port, instance in sorted(self.copies))
        return f"multicast group {self.number}: {copies}"


Item = Entry | Group


@dataclass(frozen=True)
class Change:
    """One step from what is there to what is wanted; both given where it is modified."""

    before: Item | None
    after: Item | None

    def __str__(self) -> str:
        if self.before is None:
            return f"+ {self.after}"
        if self.after is None:
            return f"- {self.before}"
        return f"~ {self.before}  =>  {self.after}"

    def undone(self) -> "Change":
        """The step back."""
        return Change(self.after, self.before)


def wanted(description: Description) -> list[Item]:
    """What a description asks a switch to hold."""
    items: list[Item] = [Entry("own_address", (description.ip,), "set_own", (description.mac,))]
    items += [Entry("l2", (worker.mac,), "forward", (worker.port,)) for worker in description.workers]
    items.append(Group(FLOOD_GROUP, frozenset((worker.port, 0) for worker in description.workers)))
    for session in description.sessions:
        group = FIRST_GROUP + session.number
        all_seen = (1 << len(session.workers)) - 1
        parameters = (all_seen, session.base, session.slots, session.elements, group)
        items.append(Entry("session", (session.number,), "set_session", parameters))
        copies = frozenset((worker.port, rank + 1) for rank, worker in enumerate(session.workers))
        items.append(Group(group, copies))
    return items


def difference(there: list[Item], target: list[Item]) -> list[Change]:
    """Steps from `there` to `target`: what goes, what changes, what comes, so that no step needs a later one."""
    old = {item.place: item for item in there}
    new = {item.place: item for item in target}
    gone = [Change(item, None) for place, item in old.items() if place not in new]
    changed = [Change(old[place], item) for place, item in new.items() if place in old and old[place] != item]
    come = [Change(None, item) for place, item in new.items() if place not in old]
    return [*gone, *changed, *come]


def _numbers(name: str, values: tuple[int, ...]) -> str:
    if name in ("l2", "set_own"):
        return mac_text(values[0])
    if name == "own_address":
        return ".".join(str(byte) for byte in values[0].to_bytes(4, "big"))
    return " ".join(map(str, values))

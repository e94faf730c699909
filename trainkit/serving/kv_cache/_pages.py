"""Page numbers, their reference counts, and a radix tree of the prefixes that lie in them.

A node of the tree is one full page: its tokens, under what came before them (SGLang's RadixAttention, arXiv 2312.07104,
section 3, with pages for edges). Requests that begin alike hold the same pages. A page that nobody holds stays until its room
is needed; then the one longest unused goes, from the leaves inwards, since a prefix is of no use without its beginning.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


class OutOfPages(RuntimeError):
    """Every page is held."""


@dataclass(eq=False)
class _Node:
    key: tuple[int, ...]
    page: int
    parent: "_Node | None"
    children: dict[tuple[int, ...], "_Node"] = field(default_factory=dict)
    holders: int = 0


@dataclass(eq=False)
class Held:
    """One request's pages."""

    pages: list[int] = field(default_factory=list)
    nodes: list[_Node] = field(default_factory=list)
    """Of the first so many pages: they are in the tree, and read only."""
    alone: bool = False
    """Whether pages to come stay out of the tree: another request brought the same tokens first."""


class Pages:
    """All pages of a cache.

    Args:
        num_pages: that there are.
        page_size: tokens of a page.

    Raises:
        ValueError: fewer than one of either.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a cache needs a page of a token at least, got {num_pages} pages of {page_size}")
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._root = _Node((), -1, None)
        self._idle: OrderedDict[_Node, None] = OrderedDict()
        """Leaves that nobody holds, the longest unused first."""
        self._unheld = 0

    @property
    def free(self) -> int:
        """Pages that a request can have: unused, or given up for it."""
        return len(self._free) + self._unheld

    def _path(self, tokens: Sequence[int]) -> list[_Node]:
        node, found = self._root, []
        for i in range(0, len(tokens) - self.page_size + 1, self.page_size):
            child = node.children.get(tuple(tokens[i : i + self.page_size]))
            if child is None:
                break
            found.append(child)
            node = child
        return found

    def need(self, tokens: Sequence[int]) -> int:
        """Pages that `open` of these tokens, and holding them all, would take from `free`."""
        path = self._path(tokens[:-1])
        return -(-len(tokens) // self.page_size) - len(path) + sum(node.holders == 0 for node in path)

    def open(self, tokens: Sequence[int]) -> tuple[Held, int]:
        """Hold what is there of a prompt's pages.

        Returns:
            The pages, and how many tokens lie in them: less than all, since the last one's logits must be computed.
        """
        held = Held()
        for node in self._path(tokens[:-1]):
            self._hold(node)
            held.nodes.append(node)
            held.pages.append(node.page)
        return held, len(held.pages) * self.page_size

    def grow(self, held: Held, tokens: int) -> None:
        """Hold pages for so many tokens in all.

        Raises:
            OutOfPages: there are not enough; then nothing has changed.
        """
        more = -(-tokens // self.page_size) - len(held.pages)
        if more > self.free:
            raise OutOfPages(f"{more} more pages asked for, {self.free} of {self.num_pages} can be had")
        for _ in range(more):
            if not self._free:
                self._evict()
            held.pages.append(self._free.pop())

    def keep(self, held: Held, tokens: Sequence[int]) -> None:
        """Let others find the full pages of these tokens, which are all in the cache by now."""
        while not held.alone and (len(held.nodes) + 1) * self.page_size <= len(tokens):
            i = len(held.nodes)
            parent = held.nodes[-1] if held.nodes else self._root
            key = tuple(tokens[i * self.page_size : (i + 1) * self.page_size])
            if key in parent.children:
                held.alone = True
                return
            node = _Node(key, held.pages[i], parent, holders=1)
            parent.children[key] = node
            held.nodes.append(node)

    def close(self, held: Held) -> None:
        """Let go of all pages."""
        self._free += held.pages[len(held.nodes) :]
        for node in reversed(held.nodes):
            node.holders -= 1
            if node.holders == 0:
                self._unheld += 1
                if not node.children:
                    self._idle[node] = None
        held.pages, held.nodes = [], []

    def _hold(self, node: _Node) -> None:
        if node.holders == 0:
            self._unheld -= 1
            self._idle.pop(node, None)
        node.holders += 1

    def _evict(self) -> None:
        node, _ = self._idle.popitem(last=False)
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        self._unheld -= 1
        self._free.append(node.page)
        if parent is not self._root and parent.holders == 0 and not parent.children:
            # Unused for longer than what it led to.
            self._idle[parent] = None
            self._idle.move_to_end(parent, last=False)

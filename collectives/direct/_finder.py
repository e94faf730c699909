"""The finder: the best topologies of a size within a time budget.

Base topologies and their expansions are enumerated as the paper does (arXiv 2202.03356), but every candidate is
evaluated exactly instead of by formula, and most of the time goes to random Cayley digraphs, which are
vertex-transitive: one host tells the cost of all.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from trainkit._files import write_text_atomically
from trainkit.collectives.direct._frontier import Frontier
from trainkit.collectives.direct._search import Explorer, Pool, check_size

FORMAT = "trainkit.topologies"
VERSION = 1


class Progress(NamedTuple):
    """How far a search is."""

    seconds: float
    """Spent so far."""
    tried: int
    """Cayley digraphs tried."""
    frontier: Frontier
    """The best so far."""


def find_topologies(
    nodes: int,
    degree: int,
    *,
    directed: bool = True,
    seconds: float = 60,
    seed: int = 0,
    state: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Frontier:
    """The Pareto frontier, by steps and bandwidth term, of the direct-connect topologies of a size.

    Stops early where a topology meets both lower bounds. Random search covers up to 4096 hosts and degree 12; beyond,
    the catalogue and its expansions answer.

    Args:
        nodes: N, hosts.
        degree: d, ports a host.
        directed: allow links that carry one way only; else every link has one the other way.
        seconds: time budget; the catalogue is always looked through.
        seed: of the random search.
        state: file to go on from and to leave the search in, written as the search goes; a search that goes on
            keeps the seed of its file.
        progress: called about once a second.

    Returns:
        The frontier, fewest steps first; never empty.

    Raises:
        ValueError: no such topology exists, or `state` belongs to another search.

    Example:
        >>> [(one.t_l, str(one.t_b)) for one in find_topologies(5, 4)]
        [(1, '4/5')]
    """
    check_size(nodes, degree, directed=directed)
    begin = time.monotonic()

    def spent() -> float:
        return time.monotonic() - begin

    pool = Pool(nodes, degree, directed=directed, seed=seed)
    file = Path(state) if state is not None else None
    expanded = file is not None and file.exists() and _restore(pool, file)
    explorer = Explorer(directed=directed, seed=seed, late=lambda: spent() > seconds / 2)
    explorer.start(pool)

    told = 0.0

    def tell(*, now: bool = False) -> None:
        nonlocal told
        if now or spent() - told >= 1:
            told = spent()
            if progress is not None:
                progress(Progress(told, pool.tried, pool.frontier))
            if file is not None:
                _save(pool, file, expanded=expanded)

    # A short search first: what it finds makes most expansions not worth evaluating.
    for share in (0.1, 1.0):
        while pool.searchable and not pool.frontier.proven and spent() < share * seconds:
            pool.search()
            tell()
        if not expanded and not pool.frontier.proven:
            expanded = explorer.expand(pool)
    tell(now=True)
    return pool.frontier


def _save(pool: Pool, file: Path, *, expanded: bool) -> None:
    content = {
        "format": FORMAT,
        "version": VERSION,
        "nodes": pool.nodes,
        "degree": pool.degree,
        "directed": pool.directed,
        "seed": pool.seed,
        "batches": pool.batches,
        "tried": pool.tried,
        "expanded": expanded,
        "names": sorted(pool.names()),
    }
    write_text_atomically(file, json.dumps(content, indent=1) + "\n")


def _restore(pool: Pool, file: Path) -> bool:
    """Fill the pool from a file; whether its expansions are done."""
    try:
        content = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{file} is not the state of a topology search (format {FORMAT}, version {VERSION})")
    for key in ("nodes", "degree", "directed"):
        if content.get(key) != getattr(pool, key):
            raise ValueError(f"{file} belongs to a search with {key}={content.get(key)}, not {getattr(pool, key)}")
    try:
        pool.seed, pool.batches, pool.tried = (int(content[key]) for key in ("seed", "batches", "tried"))
        for name in content["names"]:
            pool.add(name)
        return bool(content["expanded"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): remove it to begin anew") from None

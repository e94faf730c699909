"""Schedules that run: the engine against the obvious executor, bit for bit, on random networks and awkward sizes."""

import contextlib
import functools
import itertools
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction

import networkx as nx
import numpy as np
import pytest
import torch
import torch.distributed as dist
from execute_ranks import Engines, engines, processes
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.collectives import Op, Schedule, Topology, allreduce_forest, bfb, forest, ring_schedule
from trainkit.collectives._address import own_address
from trainkit.collectives._native import execute_add, execute_program
from trainkit.collectives.execute import PeerLost, Runner, run_reference
from trainkit.collectives.execute._mesh import Mesh
from trainkit.collectives.execute._nccl import adds_in_place, plan_groups, plan_waves, waves_of
from trainkit.collectives.execute._program import COPY, OUT, compile_rank, cut, rank_order
from trainkit.collectives.execute._tcp import DTYPES, TcpTransport

SIZES = (0, 1, 2, 3, 7, 64, 1001, 4097)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], Engines]]:
    """Engines for any number of ranks, kept."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda size: stack.enter_context(engines(size)))


def some_schedule(random_: random.Random, most: int = 8) -> Schedule:
    """Of a random strongly connected network of 2 to `most` ranks, some of them behind a switch."""
    size = random_.randint(2, most)
    names = [str(i) for i in range(size)]
    way = names[:]
    random_.shuffle(way)
    pairs = set(zip(way, way[1:] + way[:1], strict=True))
    pairs |= {(a, b) for a, b in itertools.permutations(names, 2) if random_.random() < 0.25}
    kind = random_.choice(["forest", "allreduce", "ring", "bfb", "broadcast"])
    if kind == "bfb":
        graph = nx.DiGraph([(int(a), int(b)) for a, b in sorted(pairs)])
        return bfb(graph).schedule(random_.choice(["allgather", "reduce_scatter", "allreduce"]), max_chunks=8)
    links = [(a, b, random_.randint(1, 4)) for a, b in sorted(pairs)]
    nodes = names
    if random_.random() < 0.5:
        nodes = [*names, "switch"]
        links += [link for name in names for link in ((name, "switch", 2), ("switch", name, 2))]
    topology = Topology("random", nodes, names, links)
    chunks = random_.randint(1, 5)
    if kind == "allreduce":
        return allreduce_forest(topology).schedule(chunks)
    if kind == "ring":
        return ring_schedule(topology, random_.choice(["allgather", "reduce_scatter", "allreduce"]))
    if kind == "broadcast":
        return forest(topology, "broadcast", root=random_.choice(names)).schedule(chunks)
    return forest(topology, random_.choice(["allgather", "reduce_scatter"])).schedule(chunks)


def some_buffers(ranks: int, elements: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return [torch.randint(-100, 100, (elements,), generator=numbers).to(dtype) / 3 for _ in range(ranks)]


def check_meaning(schedule: Schedule, before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    """What the collective promises, on integers."""
    total = torch.stack(before).sum(0, dtype=before[0].dtype)
    for rank, buffer in enumerate(after):
        if schedule.collective == "allreduce":
            assert torch.equal(buffer, total)
            continue
        for owner, (start, stop) in enumerate(schedule.shards or [(Fraction(0), Fraction(1))]):
            owner = owner if schedule.root is None else schedule.root
            piece = slice(int(start * len(buffer)), int(stop * len(buffer)))
            if schedule.collective in ("allgather", "broadcast"):
                assert torch.equal(buffer[piece], before[owner][piece])
            elif owner == rank:
                assert torch.equal(buffer[piece], total[piece])


def run_random(ranks: Callable[[int], Engines], seed: int) -> None:
    random_ = random.Random(seed)
    schedule = some_schedule(random_)
    schedule.verify()
    elements, dtype = random_.choice(SIZES), random_.choice(DTYPES)
    buffers = [value.to(dtype) for value in some_buffers(len(schedule.ranks), elements, dtype, seed)]
    before, expected = ([value.clone() for value in buffers] for _ in range(2))
    run_reference(schedule, expected)
    ranks(len(buffers)).run(schedule, buffers)
    for got, want in zip(buffers, expected, strict=True):
        assert torch.equal(got, want), (seed, schedule.name, elements, dtype)
    if not dtype.is_floating_point:
        check_meaning(schedule, before, buffers)


@pytest.mark.parametrize("seed", range(40))
def test_random_networks_and_sizes(ranks: Callable[[int], Engines], seed: int) -> None:
    run_random(ranks, seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_random_networks_and_sizes(ranks: Callable[[int], Engines]) -> None:
    for seed in range(1000, 2000):
        run_random(ranks, seed)


def test_many_at_once_do_not_mix(ranks: Callable[[int], Engines]) -> None:
    schedule = some_schedule(random.Random(2))
    size = len(schedule.ranks)
    rounds = [some_buffers(size, 1000 + at, torch.float32, at) for at in range(12)]
    expected = [[value.clone() for value in buffers] for buffers in rounds]
    programs = [compile_rank(schedule, rank) for rank in range(size)]
    works = [
        ranks(size).transports[rank].start(programs[rank], buffers[rank]) for rank in range(size) for buffers in rounds
    ]
    for work in works:
        work.wait()
    for buffers, wanted in zip(rounds, expected, strict=True):
        run_reference(schedule, wanted)
        assert all(torch.equal(got, want) for got, want in zip(buffers, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_pytorchs(dtype: torch.dtype) -> None:
    numbers = torch.Generator().manual_seed(0)
    width = dtype.itemsize
    bits = torch.randint(0, 256, (2, 40_000 * width), dtype=torch.uint8, generator=numbers)
    a, b = bits[0].view(dtype).clone(), bits[1].view(dtype)
    a[1::2] = b[1::2] * (-1 if dtype.is_floating_point else 1)  # cancellation, and equal exponents
    if width == 2 and dtype.is_floating_point:  # every value to a small one: subnormals, halves to round, infinities
        a = torch.cat([a, torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)])
        b = torch.cat([b, torch.full((1 << 16,), 6.1e-5, dtype=dtype)])
    want = a + b
    execute_add(a.view(torch.uint8).numpy(), b.contiguous().view(torch.uint8).numpy(), DTYPES.index(dtype))
    nan = want.isnan() if dtype.is_floating_point else torch.zeros_like(want, dtype=torch.bool)
    assert torch.equal(a[~nan], want[~nan])
    assert not dtype.is_floating_point or a[nan].isnan().all()


def test_a_step_reads_before_it_writes(ranks: Callable[[int], Engines]) -> None:
    """Two ranks swap the same slice in one step: neither may send what it has just received."""
    ops = [
        Op(0, "reduce", 0, 1, Fraction(0), Fraction(1), ("a", "b")),
        Op(1, "reduce", 1, 0, Fraction(0), Fraction(1), ("b", "a")),
    ]
    swap = Schedule("swap", "allreduce", ("a", "b"), ops, "steps")
    swap.verify()
    buffers = [torch.full((100_000,), 1), torch.full((100_000,), 10)]
    ranks(2).run(swap, buffers)
    assert all((buffer == 11).all() for buffer in buffers)


@pytest.mark.parametrize("seed", range(60))
def test_waves_of_nccl(seed: int) -> None:
    """Groups of sends and receives, replayed: they pair up in order, and the result is the reference's."""
    random_ = random.Random(seed)
    schedule = some_schedule(random_)
    elements = random_.choice(SIZES[1:])
    size = len(schedule.ranks)
    buffers = some_buffers(size, elements, torch.float64, seed)
    expected = [value.clone() for value in buffers]
    run_reference(schedule, expected)
    programs = [compile_rank(schedule, rank) for rank in range(size)]
    waves = waves_of(schedule)
    plans = [plan_waves(program, elements, waves) for program in programs]
    staging = [torch.zeros(2, plan.staging + 1, dtype=torch.float64) for plan in plans]
    place = [0] * size
    late: list[list[tuple[int, object]]] = [[] for _ in range(size)]  # sums still to be done, (wave, ...)

    def sums(rank: int, upto: int) -> None:
        while late[rank] and late[rank][0][0] <= upto:
            number, wave = late[rank].pop(0)
            for first, end, source, staged, adds in wave.applies:  # type: ignore[attr-defined]
                value = (staging[rank][number % 2] if staged else buffers[rank])[source : source + end - first].clone()
                buffers[rank][first:end] = buffers[rank][first:end] + value if adds else value

    while any(at < len(plan.waves) for at, plan in zip(place, plans, strict=True)):
        # as NCCL does: a rank's group ends when all its partners are in theirs
        ready = {}
        for rank, plan in enumerate(plans):
            if place[rank] < len(plan.waves):
                wave = plan.waves[place[rank]]
                ready[rank] = ([peer for peer, *_ in wave.sends], [peer for peer, *_ in wave.receives])
        going = set(ready)
        while True:
            stuck = {
                rank
                for rank in going
                for peer in {*ready[rank][0], *ready[rank][1]}
                if peer not in going
                or ready[peer][1].count(rank) != ready[rank][0].count(peer)
                or ready[peer][0].count(rank) != ready[rank][1].count(peer)
            }
            if not stuck:
                break
            going -= stuck
        assert going, f"seed {seed}: the ranks' groups wait for each other"
        sent = {}
        for rank in sorted(going):
            wave = plans[rank].waves[place[rank]]
            sums(rank, max(wave.after, place[rank] - 2))
            for peer, first, end in wave.sends:
                sent.setdefault((rank, peer), []).append(buffers[rank][first:end].clone())
        for rank in sorted(going):
            wave = plans[rank].waves[place[rank]]
            for peer, first, end, staged in wave.receives:
                target = (
                    buffers[rank][first:end] if staged < 0 else staging[rank][place[rank] % 2][staged:][: end - first]
                )
                value = sent[peer, rank].pop(0)
                assert len(value) == len(target)
                target.copy_(value)
            late[rank].append((place[rank], wave))
            place[rank] += 1
    for rank in range(size):
        sums(rank, place[rank])
    assert all(torch.equal(got, want) for got, want in zip(buffers, expected, strict=True))


@pytest.mark.parametrize("seed", range(60))
def test_waves_of_nccl_between_two(seed: int) -> None:
    """The same groups on both ranks; within one, what happens first makes no difference."""
    random_ = random.Random(seed)
    schedule = some_schedule(random_, most=2)
    while not adds_in_place(schedule):
        schedule = some_schedule(random_, most=2)
    elements = random_.choice(SIZES[1:])
    buffers = some_buffers(2, elements, torch.float64, seed)
    expected = [value.clone() for value in buffers]
    run_reference(schedule, expected)
    waves = waves_of(schedule, in_place=True)
    groups, others = (plan_groups(compile_rank(schedule, rank), elements, waves) for rank in (0, 1))
    assert groups == others
    for group in groups:
        for adds, root, first, end in random_.sample(group, len(group)):
            if adds:
                buffers[root][first:end] += buffers[1 - root][first:end]
            else:
                buffers[1 - root][first:end] = buffers[root][first:end]
    assert all(torch.equal(got, want) for got, want in zip(buffers, expected, strict=True))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 5000), st.sampled_from([1, 8, 32, 64]), st.integers(0, 30))
def test_aligned_borders_still_share_everything_out(elements: int, align: int, seed: int) -> None:
    program = compile_rank(some_schedule(random.Random(seed)), 0)
    begin, end, _ = program.slices(elements, align)
    exact, exact_end, _ = program.slices(elements)
    assert ((begin <= end) & (exact - begin < align) & (begin <= exact) & (end <= exact_end)).all()
    shards = [cut(f.numerator, f.denominator, elements) for shard in program.schedule.shards for f in shard]
    assert all(value % align == 0 or value in (*shards, elements) for value in (*begin, *end))


def test_waits_are_those_of_the_bytes() -> None:
    schedule = some_schedule(random.Random(1))
    for rank in range(len(schedule.ranks)):
        program = compile_rank(schedule, rank)
        assert all(earlier < at for at, before in enumerate(program.waits) for earlier in before)
        written: set[int] = set()
        for at, kind in enumerate(program.kind):
            atoms = set(range(program.first[at], program.last[at]))
            if kind == OUT and atoms & written:
                assert program.waits[at]
            if kind not in (OUT, COPY):
                written |= atoms


def test_another_size_on_one_rank_is_named() -> None:
    schedule = ring_schedule(Topology("pair", list("ab"), list("ab"), [("a", "b", 1), ("b", "a", 1)]))
    with engines(2) as pair:
        works = [
            pair.transports[rank].start(compile_rank(schedule, rank), torch.zeros(1000 + 2 * rank)) for rank in (0, 1)
        ]
        for work in works:
            with pytest.raises(PeerLost, match="called another collective, or with another schedule, size or dtype"):
                work.wait()


def test_a_rank_that_never_comes_is_named() -> None:
    schedule = ring_schedule(Topology("pair", list("ab"), list("ab"), [("a", "b", 1), ("b", "a", 1)]))
    with engines(2, timeout_s=2.0) as pair:
        work = pair.transports[0].start(compile_rank(schedule, 0), torch.zeros(1000))
        with pytest.raises(PeerLost, match=r"rank 1 did not call the collective within 2 s") as raised:
            work.wait()
        assert raised.value.rank == 1 and raised.value.op is not None
        with pytest.raises(PeerLost, match="as rank 0 saw"):  # who comes late is told
            pair.transports[1].start(compile_rank(schedule, 1), torch.zeros(1000)).wait()


def test_strangers_are_turned_away() -> None:
    store = dist.HashStore()
    meshes = [Mesh(store, rank, "127.0.0.1", 10.0) for rank in range(2)]
    host, port = store.get("address/0").decode().split(":")
    noise = [b"GET / HTTP/1.0\r\n\r\n" + b"x" * 64, b"trainkt1" + bytes(16) + bytes((1, 0, 0, 0)) + bytes(4)]
    callers = [socket.create_connection((host, int(port))) for _ in noise]
    for caller, data in zip(callers, noise, strict=True):
        caller.sendall(data)
    made: list[list[tuple[int, int, int]]] = []
    other = threading.Thread(target=lambda: made.append(meshes[1].connect({0})))
    other.start()
    made.append(meshes[0].connect({1}))
    other.join()
    assert sorted(row[0][0] for row in made) == [0, 1]
    for caller in callers:
        with contextlib.suppress(ConnectionResetError):  # closed with bytes unread
            assert caller.recv(1) == b""
    for _, *ends in itertools.chain(*made):
        for end in ends:
            socket.socket(fileno=end).close()
    for one in (*meshes, *callers):
        one.close()


@pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.0\r\n\r\n" + b"x" * 64, b"trainkt2"])
def test_twenty_strangers_keep_nobody_waiting(noise: bytes) -> None:
    """Silent, noisy, or stopping half-way: no healthy rank is blamed, and none waits for them."""
    store = dist.HashStore()
    meshes = [Mesh(store, rank, "127.0.0.1", 20.0) for rank in range(3)]
    with contextlib.ExitStack() as stack:
        for mesh in meshes:
            stack.callback(mesh.close)
        for rank in range(3):
            host, port = store.get(f"address/{rank}").decode().split(":")
            for _ in range(20):
                caller = stack.enter_context(socket.create_connection((host, int(port))))
                caller.sendall(noise)
        made: list[list[tuple[int, int, int]]] = []
        begun = time.monotonic()
        threads = [
            threading.Thread(target=lambda rank=rank: made.append(meshes[rank].connect({0, 1, 2} - {rank})))
            for rank in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(row[0] for rows in made for row in rows) == [0, 0, 1, 1, 2, 2]
        assert time.monotonic() - begun < 2.0
        for _, *ends in itertools.chain(*made):
            for end in ends:
                socket.socket(fileno=end).close()


def _one_store() -> object:
    """A program that waits for ten numbers from rank 1."""
    columns = [([1], np.uint8), ([1], np.int32), ([0], np.int32), ([0], np.int64), ([10], np.int64), ([0], np.int64)]
    arrays = [np.array(value, kind) for value, kind in columns]
    return execute_program(*arrays, np.array([0, 0], np.int32), np.array([], np.int32), 10)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (3 | 99 << 16, "no message of this version"),
        (3, "no message of this version"),
        (77, "no message of this version"),
        (3 | 2 << 16, "rank 7 has been silent"),
        (4, "rank 1 has left: its program ended"),
    ],
)
def test_control_frames_that_nobody_knows_have_names(kind: int, words: str) -> None:
    (incoming, theirs), (outgoing, control) = socket.socketpair(), socket.socketpair()
    for one in (incoming, outgoing):
        one.setblocking(False)
    transport = TcpTransport(Mesh(dist.HashStore(), 0, "127.0.0.1", 5.0), 5.0)
    transport._engine.add_peer(1, incoming.detach(), outgoing.detach())
    buffer = np.zeros(10, np.float32)
    jobs = [transport._engine.submit(_one_store(), buffer.ctypes.data, 10, 0) for _ in range(2)]
    control.sendall(struct.pack("4I", kind, 7, 8, 9))
    if kind == 4:
        theirs.close()
        control.close()
    assert [job.wait() for job in jobs] == [False, False]
    assert words in str(transport.error())
    assert not transport._engine.submit(_one_store(), buffer.ctypes.data, 10, 0).wait()  # nor does a later one hang
    transport.close()
    for one in (theirs, control):
        one.close()


def test_what_nobody_waits_for_is_no_later_collectives_data() -> None:
    """Both ranks broadcast: neither expects what the other sends, and the next collective must not take it."""
    pair = Topology("pair", list("ab"), list("ab"), [("a", "b", 1), ("b", "a", 1)])
    sends = [forest(pair, "broadcast", root=root).schedule(1) for root in "ab"]
    with engines(2) as both:
        works = [both.transports[rank].start(compile_rank(sends[rank], rank), torch.ones(10)) for rank in (0, 1)]
        for work in works:
            with contextlib.suppress(PeerLost):
                work.wait()
        again = [both.transports[rank].start(compile_rank(sends[0], rank), torch.ones(10)) for rank in (0, 1)]
        for work in again:
            with pytest.raises(PeerLost, match="called another collective"):
                work.wait()


def test_a_rank_that_is_not_there_is_named_before_anything_runs() -> None:
    mesh = Mesh(dist.HashStore(), 0, "127.0.0.1", 0.3)
    with pytest.raises(PeerLost, match="rank 1 did not come"):
        mesh.connect({1})
    mesh.close()


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert own_address("lo") == own_address("127.0.0.1") == own_address(None, "127.0.0.1") == "127.0.0.1"
    with pytest.raises(ValueError, match="interface must be a network interface"):
        own_address("nosuchdevice0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth9")
    assert own_address(None, "192.0.2.1") == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuchdevice0")
    with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME must be a network interface"):
        own_address()


def test_wrong_arguments_are_told() -> None:
    schedule = ring_schedule(Topology("pair", list("ab"), list("ab"), [("a", "b", 1), ("b", "a", 1)]))
    with pytest.raises(ValueError, match="init_process_group"):
        Runner()
    with pytest.raises(ValueError, match="transport must be one of"):
        Runner(transport="mpi")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout_s must be seconds above 0"):
        Runner(timeout_s=0)
    with pytest.raises(ValueError, match="is for 2 ranks, the process group has 3"):
        rank_order(schedule, None, 3)
    with pytest.raises(ValueError, match="ranks must give each of a, b"):
        rank_order(schedule, {"a": 0, "b": 0}, 2)
    with pytest.raises(ValueError, match="ranks 0 to 1, got 2"):
        compile_rank(schedule, 2)


def _both_ways(rank: int) -> list[list[int]]:
    names = ["a", "b", "c"]
    topology = Topology("clique", names, names, [(u, v, 1) for u, v in itertools.permutations(names, 2)])
    schedule = allreduce_forest(topology).schedule(3)
    bits = []
    for transport in ("tcp", "gloo"):
        runner = Runner(transport=transport, timeout_s=20.0, ranks={"a": 2, "b": 0, "c": 1})  # type: ignore[arg-type]
        value = torch.randn(1001, generator=torch.Generator().manual_seed(rank))
        for tensor in (value, torch.zeros(0), torch.ones(1)):
            runner.run(schedule, tensor)
        assert tensor.item() == 3
        bits.append(value.view(torch.int32).tolist())
        with pytest.raises(ValueError, match="contiguous"):
            runner.run(schedule, torch.zeros(4, 4).t())
        dist.barrier()
        runner.close()
    return bits


def test_tcp_and_gloo_give_the_same_bits_on_all_ranks() -> None:
    results = processes(_both_ways, 3)
    assert len({str(bits) for both in results.values() for bits in both}) == 1

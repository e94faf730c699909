"""Tuner in a plain loop, plans, the stream, the paper's plan."""

import copy

import pytest
import torch
from torch import nn

from trainkit.autolrs import History, LRSchedule, Options, Tuner
from trainkit.autolrs._plan import plan
from trainkit.autolrs._stream import Stream

torch.set_num_threads(1)

TRUTH = torch.randn(10, 1, generator=torch.Generator().manual_seed(3))


class Loader:
    def __init__(self, length=17):
        self.length, self.at, self.state = length, (0, 0), None

    def __iter__(self):
        epoch, start = self.state if self.state is not None else (self.at[0] + (self.at[1] > 0), 0)
        self.state = None
        for place in range(start, self.length):
            self.at = (epoch, place + 1)
            draw = torch.Generator().manual_seed(epoch * 101 + place)
            x = torch.randn(16, 10, generator=draw)
            yield x, x @ TRUTH + 0.1 * torch.randn(16, 1, generator=draw)

    def state_dict(self):
        return {"epoch": self.at[0], "place": self.at[1]}

    def load_state_dict(self, state):
        self.state = (state["epoch"], state["place"]) if state["place"] < self.length else (state["epoch"] + 1, 0)


def loss_of(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def build(total=200, measured=True, **arguments):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), 1e-8, momentum=0.9)
    used = []

    def train_step(batch):
        used.append((optimizer.param_groups[0]["lr"], float(batch[0].sum())))
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        return loss

    tuner = Tuner(model, optimizer, train_step, total, loss=loss_of if measured else None, count="all", **arguments)
    return model, optimizer, tuner, used


@pytest.mark.parametrize("measured", [True, False], ids=["held-out losses", "training losses"])
def test_a_plain_loop(measured):
    # single training losses do not show in eight steps that 0.1 is too much for the rest of the run
    model, _, tuner, used = build(measured=measured, high=1.0 if measured else 0.03)
    kept = list(tuner.run(Loader()))
    history = tuner.history
    assert [k.step for k in kept] == list(range(history.kept_steps))
    assert history.kept_steps + history.discarded_steps == 200 == len(used)
    assert [k.rate for k in kept] == pytest.approx(tuner.schedule.rates)
    assert loss_of(model.eval(), next(iter(Loader()))) < 1.0 < TRUTH.square().sum()
    assert History.from_dict(history.as_dict()) == history
    assert (history.extra_forwards > 0) == measured


@pytest.mark.parametrize("at", [2, 40, 90])
def test_resume_is_bit_for_bit(at):
    model, _, tuner, _ = build()
    list(tuner.run(Loader()))
    part, optimizer, first, _ = build()
    loader = Loader()
    for kept in first.run(loader):
        if kept.step == at:
            break
    saved = copy.deepcopy((part.state_dict(), optimizer.state_dict(), first.state_dict()))
    again, optimizer, second, _ = build()
    torch.manual_seed(99)
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    assert min(k.step for k in list(second.run(Loader()))) == at + 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert second.schedule.as_dict() == tuner.schedule.as_dict()


def test_resume_refuses_other_arguments_and_lengths():
    _, _, tuner, _ = build()
    list(tuner.run(Loader()))
    _, _, other, _ = build(low=1e-4)
    with pytest.raises(ValueError, match=r"low=1e-05 is now 0\.0001"):
        other.load_state_dict(tuner.state_dict())
    _, _, longer, _ = build(total=300)
    longer.load_state_dict(tuner.state_dict())
    with pytest.raises(ValueError, match="300 steps instead of 200"):
        next(longer.run(Loader()))


def test_an_error_in_a_trial_leaves_the_state_before_the_search():
    model, _, tuner, used = build()
    before = [p.detach().clone() for p in model.parameters()]
    step, tuner.train_step = tuner.train_step, None

    def failing(batch):
        if len(used) == 5:  # the first search has more
            raise RuntimeError("out of memory")
        return step(batch)

    tuner.train_step = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        list(tuner.run(Loader()))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_misuse():
    with pytest.raises(ValueError, match="at least 1, but got 0"):
        build(total=0)
    with pytest.raises(ValueError, match="held_out must have at least one batch"):
        build(held_out=[])
    with pytest.raises(ValueError, match="at least one batch an epoch"):
        next(Stream([]))


def test_stream_looks_ahead_and_remembers():
    stream = Stream([1, 2, 3])
    assert stream.peek(5) == [1, 2, 3, 1, 2]
    assert [next(stream) for _ in range(4)] == [1, 2, 3, 1]
    loader = Loader(3)
    stream = Stream(loader)
    first = next(stream)
    stream.peek(4)
    place = stream.state_dict()
    assert place["loader"]["place"] == 1
    other = Stream(Loader(3))
    other.load_state_dict(place)
    assert torch.equal(next(other)[0], next(stream)[0]) and not torch.equal(first[0], stream.peek(1)[0][0])


@pytest.mark.parametrize("count", ["kept", "all"])
@pytest.mark.parametrize("total", [1, 10, 60, 100, 300, 1000, 5000, 100_000])
@pytest.mark.parametrize("budget", [0.05, 0.35, 0.6])
def test_plans_hold_their_budget_and_end_annealed(count, total, budget):
    made = plan(Options(count=count, budget=budget), total)
    kept = total if count == "kept" else total - made.discards
    assert made.discards <= budget * (kept + made.discards) + 1
    for search, end in zip(made.searches, [*(s.start for s in made.searches), kept][1:], strict=False):
        assert search.start + search.trial_steps <= end and search.trial_steps >= 8
        assert 2 * search.trial_steps <= search.discards <= made.discards
    if made.searches:
        assert made.anneal_start(kept, made.searches[-1].start) < kept
    assert made.warmup_steps == round(0.02 * total)


def test_the_papers_plan():
    made = plan(Options(preset="paper"), 200_000)
    stages = [s.horizon - s.start for s in made.searches]
    assert stages[:5] == [1000, 2000, 4000, 8000, 8000] and not made.anneal and made.warmup_steps == 0
    assert all(s.trial_steps * 10 == s.horizon - s.start and s.candidates == 10 for s in made.searches)


@pytest.mark.parametrize("text", ["[]", "null", '{"format": "trainkit.lr_schedule", "version": 1}'])
def test_malformed_schedule_files_are_refused(tmp_path, text):
    (tmp_path / "lr.json").write_text(text)
    with pytest.raises(ValueError, match=r"LRSchedule\.save"):
        LRSchedule.load(tmp_path / "lr.json")

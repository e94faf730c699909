"""A chip of which nothing but the order of events is modelled: programs, their partitions, and barriers."""

import random
import threading


class Barrier:
    """An mbarrier: complete when all have arrived and all bytes have."""

    def __init__(self):
        self.phase, self.count = 0, 0

    def init(self, count):
        self.count = self.missing = count
        self.bytes = 0

    def settle(self, arrivals, nbytes):
        self.missing -= arrivals
        self.bytes += nbytes
        assert self.missing >= 0, "more arrivals than the barrier counts"
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count


class Strand:
    """One partition of a program (a warpgroup, or the bringing warp), in a thread of its own that runs when it is told to."""

    def __init__(self, chip, program, programs, run):
        self.chip, self.program, self.programs = chip, program, programs
        self.products, self.stores, self.written, self.copies = [], [], [], [[]]
        self.ready = lambda: True
        self.done, self.error = False, None
        self.go, self.back = threading.Lock(), threading.Lock()
        self.go.acquire()
        self.back.acquire()
        threading.Thread(target=self.body, args=(run,), daemon=True).start()

    def body(self, run):
        self.go.acquire()
        try:
            run()
            assert not self.products and not self.stores, "ended with a product or a store under way"
            assert self.copies == [[]], "ended with a copy under way"
        except BaseException as error:
            self.error = error
        self.done = True
        self.back.release()

    def resume(self):
        self.chip.current = self
        self.go.release()
        self.back.acquire()
        if self.error is not None:
            raise self.error

    def pause(self, ready=lambda: True):
        self.ready = ready
        self.back.release()
        self.go.acquire()
        if self.chip.over:
            raise SystemExit


class Chip:
    """Runs programs, a few at a time and started in order, in an order that a seed decides."""

    active = None

    def __init__(self, seed):
        Chip.active = self
        self.random = random.Random(seed)
        self.landing, self.strands, self.current, self.over = [], [], None, False

    def run(self, kernel, args, programs, resident):
        waiting = list(range(programs))
        running = []
        self.turn_barriers, self.renamed = {}, {}
        try:
            while waiting or running:
                while waiting and len(running) < resident:
                    t = waiting.pop(0)
                    running.append(Strand(self, t, programs, lambda: kernel(*args)))
                    self.strands.append(running[-1])
                self.strands = [s for s in self.strands if not s.done]
                running = [s for s in running if not s.done]
                choices = [s for s in self.strands if s.ready()] + self.landing
                assert choices or not running, "deadlock"
                if choices:
                    choice = self.random.choice(choices)
                    if isinstance(choice, Strand):
                        choice.resume()
                    else:
                        self.landing.remove(choice)
                        choice()
            for land in self.landing:
                land()
        finally:
            self.over = True
            for s in self.strands:
                s.go.release()


def pause(ready=lambda: True):
    Chip.active.current.pause(ready)

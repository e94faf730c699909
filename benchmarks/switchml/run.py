"""SwitchML beside gloo over the same links, in alternation: `sudo python benchmarks/switchml/run.py [case ...]`.

Builds a star of network namespaces for each case and prints one row of a table: medians and ranges of the goodput
(bits of the fp32 bucket over seconds of the slowest rank) and the ratio. Needs root, `ip` and `tc`.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import _net

_END = str(Path(__file__).with_name("_end.py"))


def _answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
    out, _ = process.communicate(timeout=600)
    return dict(json.loads(out.strip().splitlines()[-1]))


def measure(
    workers: int,
    nbytes: int,
    *,
    mbit: float | None = None,
    mtu: int = 1500,
    loss: float = 0.0,
    pairs: int = 5,
    token: bool = False,
    jobs: int = 1,
    what: tuple[str, ...] = ("gloo", "ours"),
    core: bool = False,
    kernel: bool = False,
) -> list[dict[str, Any]]:
    """Run one case; an answer a job: seconds of each repetition by name, agreed sizes, counters."""
    with tempfile.NamedTemporaryFile("w") as secret, _net.star(workers, mbit, mtu, loss) as prefix:
        secret.write("benchmark " * 4)
        secret.flush()
        trust = ["--token-file", secret.name] if token else ["--insecure"]
        listen = ["--listen", f"{_net.SWITCH}:0", "--json", "--interval", "1000"]
        if kernel:
            listen += ["--xdp", ",".join(f"p{rank}" for rank in range(workers))]
            for rank in range(workers):  # a veth takes redirected frames where its receiver polls
                _net.inside(f"{prefix}{rank}", str(Path(__file__).with_name("_gro.py")), "eth0").wait()
        switch = _net.inside(f"{prefix}s", "-P", "-m", "trainkit", "switch", *listen, *trust)
        ends: list[list[subprocess.Popen[str]]] = []
        try:
            assert switch.stdout is not None
            address = json.loads(switch.stdout.readline())["address"]
            for job in range(jobs):
                plan = json.dumps(
                    {
                        "workers": workers,
                        "bytes": nbytes,
                        "switch": address,
                        "port": 29511 + job,
                        "pairs": pairs,
                        "session": f"job{job}",
                        "token_file": secret.name if token else None,
                        "what": what,
                        **({"profile": "core", "elements": 352} if core or kernel else {}),
                    }
                )
                ends.append([_net.inside(f"{prefix}{rank}", _END, plan, str(rank)) for rank in range(workers)])
            return [_answer(job[0]) for job in ends]
        finally:
            for process in [switch, *(process for job in ends for process in job)]:
                process.terminate()
                process.wait()


def _rates(seconds: list[float], nbytes: int) -> tuple[float, str]:
    rates = sorted(8e-6 * nbytes / s for s in seconds)
    return statistics.median(rates), f"{statistics.median(rates):.1f} ({rates[0]:.1f} to {rates[-1]:.1f})"


def row(name: str, workers: int, nbytes: int, **case: Any) -> None:
    """Measure a case and print its row."""
    for answer in measure(workers, nbytes, **case):
        ours, ours_text = _rates(answer["ours"], nbytes)
        gloo, gloo_text = _rates(answer["gloo"], nbytes) if answer["gloo"] else (0.0, "")
        ratio = f"{ours / gloo:.2f}" if gloo else ""
        repeats = int(answer["counters"]["retransmissions"])
        sizes = f"{answer['elements']} x {answer['slots']}"
        print(f"| {name} | {ours_text} | {gloo_text} | {ratio} | {sizes} | {repeats} |", flush=True)


def latency() -> None:
    """Milliseconds of a bucket of 4 KB over unshaped links."""
    [answer] = measure(4, 4096, pairs=40)
    for name in ("ours", "gloo"):
        print(f"\n4 KB bucket, n = 4, {name}: median {1e3 * statistics.median(answer[name]):.2f} ms", flush=True)


CASES = {
    "n4": lambda: row("n = 4, 50 Mbit/s, 10 MB", 4, 10_000_000, mbit=50),
    "n4-tag": lambda: row("n = 4, 50 Mbit/s, 10 MB, tag", 4, 10_000_000, mbit=50, token=True),
    "n8": lambda: row("n = 8, 20 Mbit/s, 4 MB, tag", 8, 4_000_000, mbit=20, token=True),
    "loss-0.1": lambda: row("n = 4, 50 Mbit/s, 5 MB, loss 0.1 %", 4, 5_000_000, mbit=50, loss=0.001),
    "loss-1": lambda: row("n = 4, 50 Mbit/s, 5 MB, loss 1 %", 4, 5_000_000, mbit=50, loss=0.01),
    "loss-5": lambda: row("n = 4, 50 Mbit/s, 5 MB, loss 5 %", 4, 5_000_000, mbit=50, loss=0.05),
    "flat-2": lambda: row("n = 2, 10 Mbit/s, 1 MB", 2, 1_000_000, mbit=10, what=("ours",)),
    "flat-4": lambda: row("n = 4, 10 Mbit/s, 1 MB", 4, 1_000_000, mbit=10, what=("ours",)),
    "flat-8": lambda: row("n = 8, 10 Mbit/s, 1 MB", 8, 1_000_000, mbit=10, what=("ours",)),
    "jumbo": lambda: row("n = 4, unshaped, MTU 9000, 40 MB", 4, 40_000_000, mtu=9000),
    "jumbo-tag": lambda: row("n = 4, unshaped, MTU 9000, 40 MB, tag", 4, 40_000_000, mtu=9000, token=True),
    "one-job": lambda: row("n = 2, 50 Mbit/s, 5 MB, alone", 2, 5_000_000, mbit=50, what=("ours",)),
    "two-jobs": lambda: row("n = 2, 50 Mbit/s, 5 MB, one of two jobs", 2, 5_000_000, mbit=50, jobs=2, what=("ours",)),
    "core": lambda: row(
        "n = 4, unshaped, 10 MB, profile core, software switch", 4, 10_000_000, core=True, what=("ours",)
    ),
    "kernel": lambda: row(
        "n = 4, unshaped, 10 MB, profile core, in the kernel", 4, 10_000_000, kernel=True, what=("ours",)
    ),
    "core-50": lambda: row("n = 4, 50 Mbit/s, 10 MB, profile core, software switch", 4, 10_000_000, mbit=50, core=True),
    "kernel-50": lambda: row(
        "n = 4, 50 Mbit/s, 10 MB, profile core, in the kernel", 4, 10_000_000, mbit=50, kernel=True, what=("ours",)
    ),
    "latency": latency,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="SwitchML beside gloo over the same links, in alternation; needs root."
    )
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}; all without one")
    asked = parser.parse_args().cases or list(CASES)
    if unknown := sorted({*asked} - {*CASES}):
        parser.error(f"a case is one of {', '.join(CASES)}; got {', '.join(unknown)}")
    print("| case | ours, Mbit/s a worker | gloo, Mbit/s a worker | ratio | elements x slots | repeats |")
    print("|---|---|---|---|---|---|", flush=True)
    for chosen in asked:
        CASES[chosen]()

"""`trainkit serve` over loopback against LitServe's own batching, on eight GPUs that sleep; open-loop Poisson load.

usage: end_to_end.py [--rates 200,220,240,250] [--seconds 15]
ResNet50's profile slowed 20 times, SLO 500 ms from when the client sends to when it has read the answer. A request that
is late, refused or lost is bad.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path

from trainkit.serving import Profile, goodput

HERE = Path(__file__).resolve().parent
SLOWED, SLO, GPUS = 20.0, 0.5, 8
PROFILE = Profile.linear(1.053 * SLOWED, 5.072 * SLOWED, 32)
PORT = 18_731


async def _one(value, pool, found):
    body = json.dumps({"input": value}).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    begin = time.monotonic()
    while pool and pool[-1][0].at_eof():
        pool.pop()  # the server closes what was idle for 5 s
    try:
        reader, writer = pool.pop() if pool else await asyncio.open_connection("127.0.0.1", PORT)
        writer.write(head.encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length"))
        answer = json.loads(await reader.readexactly(length))
    except (OSError, asyncio.IncompleteReadError):
        found.append((0, time.monotonic() - begin, None))
        return
    pool.append((reader, writer))
    status = int(lines[0].split()[1])
    if status == 200 and answer["output"] != value * value:
        status = -1
    found.append((status, time.monotonic() - begin, answer.get("batch")))


async def offer(rate, seconds, seed):
    """Status, latency and batch of each request of an open-loop Poisson load."""
    rng, pool, found, tasks = random.Random(seed), [], [], []
    begin, at, lag = time.monotonic(), 0.0, 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, begin + at - time.monotonic()))
        lag = max(lag, time.monotonic() - begin - at)
        tasks.append(asyncio.ensure_future(_one(len(tasks), pool, found)))
    await asyncio.gather(*tasks)
    for _, writer in pool:
        writer.close()
    return found, lag


@contextlib.contextmanager
def server(command):
    """The command's server, ready."""
    with open(Path(tempfile.gettempdir()) / "serving-benchmark.log", "w") as log:
        process = subprocess.Popen(command, cwd=HERE, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health") as reply:
                if reply.status == 200:
                    break
            time.sleep(0.1)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def report(name, rate, seconds):
    """Offer the rate and print one row."""
    found, lag = asyncio.run(offer(rate, seconds, seed=int(rate)))
    answered = sorted(latency for status, latency, _ in found if status == 200)
    good = sum(latency <= SLO for latency in answered)
    batches = [batch for status, _, batch in found if status == 200]
    late, count = len(answered) - good, len(found)
    p99 = answered[int(0.99 * len(answered))] * 1e3 if answered else float("nan")
    print(
        f"| {name} | {rate:.0f} | {good / seconds:.1f} | {1 - good / count:.2%} | {late / count:.2%} | {p99:.0f} | "
        f"{sum(batches) / max(1, len(batches)):.1f} | {dict(Counter(s for s, _, _ in found))} | {lag * 1e3:.0f} |",
        flush=True,
    )


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="200,220,240,250")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--margin", default="25ms")
    options = parser.parse_args()
    rates = [float(rate) for rate in options.rates.split(",")]
    print(
        f"simulated goodput {goodput({'m': PROFILE}, GPUS, slo_ms=SLO * 1e3, seconds=200):.1f}, load {os.getloadavg()}"
    )
    print("| server | offered/s | good/s | bad | late | p99 ms | mean batch | statuses | generator's lag ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    profile = Path(tempfile.gettempdir()) / "serving-benchmark-profile.json"
    PROFILE.save(profile)
    ours = [sys.executable, "-m", "trainkit", "serve", f"m={HERE}/_sleeping.py:load", "--profile", str(profile)]
    ours += ["--slo", "500ms", "--devices", ",".join(["cpu"] * GPUS), "--listen", f"127.0.0.1:{PORT}"]
    with server([*ours, "--margin", options.margin]):
        for rate in rates:
            report("trainkit serve", rate, options.seconds)
    for batch, timeout in ((7, 0.0), (7, 0.05), (8, 0.1)):
        with server([sys.executable, "_litserve.py", str(PORT), str(batch), str(timeout)]):
            for rate in rates:
                report(f"LitServe {batch}, {timeout} s", rate, options.seconds)


if __name__ == "__main__":
    main()

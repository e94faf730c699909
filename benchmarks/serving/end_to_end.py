"""`trainkit serve` over loopback against others' batching, on eight GPUs that sleep; open-loop Poisson load.

usage: end_to_end.py [--servers ours,litserve,mosec,bentoml] [--rates 200,240,250] [--seconds 15] [--peers PYTHON]
       SLOWED=60 end_to_end.py --servers ray,ray_batch,ray_capacity --rates 70,80,84
ResNet50's profile slowed 20 times (Ray Serve: 60 times), SLO 25 ms slowed as much, from when the client sends to when it
has read the answer. A request that is late, refused or lost is bad. PYTHON is of an environment with mosec and BentoML.
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
SLOWED, GPUS = float(os.environ.get("SLOWED", "20")), 8
SLO = 0.025 * SLOWED
PROFILE = Profile.linear(1.053 * SLOWED, 5.072 * SLOWED, 32)
PORT = 18_731


async def _one(value, pool, found, shape):
    path, listed = shape
    body = json.dumps({"input": [value] if listed else value}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    begin = time.monotonic()
    while pool and pool[-1][0].at_eof():
        pool.pop()  # the server closes what was idle for 5 s
    try:
        reader, writer = pool.pop() if pool else await asyncio.open_connection("127.0.0.1", PORT)
        writer.write(head.encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length"))
        answer = json.loads(await reader.readexactly(length))
        answer = answer[0] if isinstance(answer, list) else answer
    except (OSError, asyncio.IncompleteReadError):
        found.append((0, time.monotonic() - begin, None))
        return
    pool.append((reader, writer))
    status = int(lines[0].split()[1])
    if status == 200 and answer["output"] != value * value:
        status = -1
    found.append((status, time.monotonic() - begin, answer.get("batch")))


async def offer(rate, seconds, seed, shape=("/predict", False)):
    """Status, latency and batch of each request of an open-loop Poisson load."""
    rng, pool, found, tasks = random.Random(seed), [], [], []
    begin, at, lag = time.monotonic(), 0.0, 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, begin + at - time.monotonic()))
        lag = max(lag, time.monotonic() - begin - at)
        tasks.append(asyncio.ensure_future(_one(len(tasks), pool, found, shape)))
    await asyncio.gather(*tasks)
    for _, writer in pool:
        writer.close()
    return found, lag


@contextlib.contextmanager
def server(command, path="/health", **environment):
    """The command's server, ready."""
    with open(Path(tempfile.gettempdir()) / "serving-benchmark.log", "w") as log:
        process = subprocess.Popen(
            command, cwd=HERE, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **environment}
        )
    try:
        for _ in range(1200):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}") as reply:
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


def report(name, rate, seconds, shape=("/predict", False)):
    """Offer the rate and print one row; what the first two seconds bring is not counted."""
    asyncio.run(offer(rate / 2, 2.0, seed=0, shape=shape))
    found, lag = asyncio.run(offer(rate, seconds, seed=int(rate), shape=shape))
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


def servers(options):
    """(name, command, path that says ready, environment, shape of its requests) by server."""
    profile = Path(tempfile.gettempdir()) / "serving-benchmark-profile.json"
    PROFILE.save(profile)
    ours = [sys.executable, "-m", "trainkit", "serve", f"m={HERE}/_sleeping.py:load", "--profile", str(profile)]
    ours += ["--slo", f"{SLO * 1e3}ms", "--devices", ",".join(["cpu"] * GPUS), "--listen", f"127.0.0.1:{PORT}"]
    ours += ["--margin", options.margin]
    plain, port, threads = ("/predict", False), str(PORT), {"OMP_NUM_THREADS": "1"}
    found = {"ours": [("trainkit serve", ours, "/health", {}, plain)]}
    found["ray"] = [("trainkit serve --ray", [*ours, "--ray", "local"], "/health", {}, plain)]
    found["litserve"] = [
        (f"LitServe {b}, {t} s", [sys.executable, "_litserve.py", port, str(b), str(t)], "/health", threads, plain)
        for b, t in ((6, 0.0), (7, 0.05), (8, 0.1))
    ]
    found["mosec"] = [
        (f"mosec {b}, {t} ms", [options.peers, "_mosec.py", port, str(b), str(t)], "/", threads, ("/inference", False))
        for b, t in ((8, 50), (12, 100), (16, 100))
    ]
    bento = [str(Path(options.peers).parent / "bentoml"), "serve", "_bentoml:Squares", "--port", port]
    found["bentoml"] = [
        (f"BentoML {b}, {t} ms", bento, "/readyz", {"MAX_BATCH": str(b), "LATENCY_MS": str(t)}, ("/predict", True))
        for b, t in ((8, 500), (16, 500), (16, 1000))
    ]
    for key, router in (("ray_batch", "default"), ("ray_capacity", "capacity")):
        found[key] = [
            (
                f"serve.batch {b}, {w} s, {router}",
                [sys.executable, "_ray_batch.py", port, str(b), str(w), router],
                "/predict",
                {},
                plain,
            )
            for b, w in ((7, 0.0), (8, 0.2))
        ]
    return [one for key in options.servers.split(",") for one in found[key]]


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default="ours,litserve")
    parser.add_argument("--rates", default="200,240,250")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--margin", default="40ms")
    parser.add_argument("--peers", default=sys.executable)
    options = parser.parse_args()
    rates = [float(rate) for rate in options.rates.split(",")]
    print(
        f"simulated goodput {goodput({'m': PROFILE}, GPUS, slo_ms=SLO * 1e3, seconds=200):.1f}, load {os.getloadavg()}"
    )
    print("| server | offered/s | good/s | bad | late | p99 ms | mean batch | statuses | generator's lag ms |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name, command, path, environment, shape in servers(options):
        with server(command, path, **environment):
            for rate in rates:
                report(name, rate, options.seconds, shape)


if __name__ == "__main__":
    main()

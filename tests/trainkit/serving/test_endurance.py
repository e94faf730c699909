"""An hour of mixed load: memory stays where it was, and the server serves as on its first day."""

import contextlib
import functools
import json
import os
import random
import resource
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from paths import DATA
from serving_server import TOKEN, Server, serving, serving_texts

pytest.importorskip("litserve", reason="needs the extra serve")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600)]
MINUTES = float(os.environ.get("TRAINKIT_ENDURANCE_MINUTES", "60"))
PAGE = resource.getpagesize()


def resident(server: Server) -> int:
    """Bytes of all processes of the server."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE for pid in server.descendants())


def leave(server: Server, path: str, body: object) -> None:
    """Ask and hang up."""
    data = json.dumps(body)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall((head + data).encode())


def mixed(predicting: Server, texting: Server, seed: int, *, until: float) -> int:
    """Requests of all kinds until then; how many."""
    rng, count = random.Random(seed), 0
    while time.monotonic() < until:
        count += 1
        kind = rng.random()
        time.sleep(0.1 * rng.random())
        with contextlib.suppress(OSError):
            if kind < 0.6:
                assert predicting.predict(3) in (
                    (200, {"output": 9, "batch": b, "gpu": g}) for b in range(17) for g in (0, 1)
                )
            elif kind < 0.65:
                predicting.predict(1, deadline_ms=1 + 60 * rng.random())
            elif kind < 0.7:
                predicting.ask("/predict", b"[" * rng.randrange(100_000))
            elif kind < 0.75:
                leave(predicting, "/predict", {"input": 5})
            elif kind < 0.8:
                leave(texting, "/v1/completions", {"prompt": "{", "max_tokens": 100, "stream": True})
            elif kind < 0.95:
                assert texting.ask("/v1/completions", {"prompt": "a", "max_tokens": 5, "stream": kind < 0.9})[0] in (
                    200,
                    503,
                )
            else:
                texting.ask("/metrics"), predicting.ask("/live/data")
    return count


def test_memory_is_flat(tmp_path: Path) -> None:
    folders = [tmp_path / "predicting", tmp_path / "texting"]
    for folder in folders:
        folder.mkdir()
    begin = time.monotonic()
    with (
        serving(folders[0]) as predicting,
        serving_texts(folders[1], f"abc={DATA}/serving/language.py:load", "--ttft", "2s") as texting,
        ThreadPoolExecutor(8) as pool,
    ):
        seen: list[tuple[float, int]] = []
        total = 0
        while (now := time.monotonic()) - begin < 60 * MINUTES:
            step = now + min(30.0, 6 * MINUTES)
            load = functools.partial(mixed, predicting, texting, until=step)
            total += sum(pool.map(load, range(total, total + 8)))
            seen.append((time.monotonic() - begin, resident(predicting) + resident(texting)))
            print(f"{seen[-1][0]:6.0f} s  {total} requests  {seen[-1][1] / 2**20:.1f} MiB", flush=True)
        warm = seen[len(seen) // 5][1]
        assert seen[-1][1] <= 1.03 * warm
        predicting.wait_until(lambda: "trainkit_serve_open 0.0" in predicting.ask("/metrics")[1])
        texting.wait_until(lambda: "trainkit_serve_language_running 0.0" in texting.ask("/metrics")[1])
        assert predicting.predict(7)[0] == 200

"""A `trainkit serve` process of one test, and requests to it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paths import DATA

from trainkit.serving import Profile

TOKEN = "0123456789abcdef"
MODELS = DATA / "serving" / "sleeping.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """The process and its address."""

    def __init__(self, process: "subprocess.Popen[str]", port: int, folder: Path) -> None:
        self.process, self.port, self.folder = process, port, folder
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, path: str, body: object = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """(status, JSON or text, headers)."""
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Authorization": f"Bearer {TOKEN}", **headers})
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                status, text, got = reply.status, reply.read(), reply.headers
        except urllib.error.HTTPError as error:
            status, text, got = error.code, error.read(), error.headers
        try:
            return status, json.loads(text), dict(got)
        except ValueError:
            return status, text.decode(), dict(got)

    def predict(self, value: object, **more: object) -> tuple[int, Any]:
        return self.ask("/predict", {"input": value, **more})[:2]

    def descendants(self) -> dict[int, int]:
        """Process -> parent, of all below the server."""
        parents = {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        found = {self.process.pid: 0}
        while more := {pid: up for pid, up in parents.items() if up in found and pid not in found}:
            found |= more
        return found

    def gpus_and_scheduler(self) -> tuple[list[int], int]:
        """Process ids of the GPU processes, and of the scheduler, which is their parent."""
        tree = self.descendants()
        spawned = [pid for pid in tree if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        gpus = sorted(pid for pid in spawned if tree[pid] in spawned)
        return gpus, tree[gpus[0]]

    def wait_until(self, what: Any, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline, "it did not come about"
            time.sleep(0.05)

    def healthy(self) -> bool:
        try:
            return self.ask("/health")[0] == 200
        except OSError:
            return False


@contextlib.contextmanager
def serving(
    folder: Path, *words: str, model: str = "squares", profile: Profile | None = None, gpus: int = 2
) -> Iterator[Server]:
    """A server with sleeping GPUs."""
    (profile or Profile.linear(2, 20, 16)).save(folder / "profile.json")
    about = ["--profile", f"{folder}/profile.json", "--slo", "3s", "--margin", "500ms"]
    with serving_texts(folder, f"m={MODELS}:{model}", *about, *words, gpus=gpus) as server:
        yield server


@contextlib.contextmanager
def serving_texts(folder: Path, models: str, *words: str, gpus: int = 2) -> Iterator[Server]:
    """Start `trainkit serve` with any models, wait until it is ready, stop it."""
    (folder / "token").write_text(TOKEN + "\n")
    port = free_port()
    command = [sys.executable, "-m", "trainkit", "serve", models, "--devices", ",".join(["cpu"] * gpus)]
    command += ["--listen", f"127.0.0.1:{port}", "--token-file", f"{folder}/token", *words]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True, start_new_session=True)
    server = Server(process, port, folder)
    try:
        server.wait_until(lambda: server.healthy() or process.poll() is not None)
        assert process.poll() is None, (folder / "log").read_text()
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise

"""What `trainkit doctor` looks at: each part of Trainkit, whether it can run here, and the command that brings it.

Everything that may break is looked at in an interpreter of its own: a package that does not import, or that takes the
interpreter down with it, is a finding.
"""

import functools
import importlib.metadata
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainkit.cli._requirements import DISTRIBUTION, pip_install

# released by somebody who had stolen the project's keys
_COMPROMISED = ("2.6.2", "2.6.3")
_RECEIVE_BUFFER = 4 << 20
_IMPORT_S = 120
_IN_THE_CLONE = "pip install --force-reinstall --no-deps .  # in the clone; needs g++ and libssl-dev"
_GPUS = """
import json, torch
found = []
for index in range(torch.cuda.device_count()):
    device = torch.cuda.get_device_properties(index)
    memory = round(device.total_memory / 2**30, 1)
    found.append({"name": device.name, "memory_gib": memory, "arch": f"sm_{device.major}{device.minor}"})
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpus": found}))
"""


@dataclass(frozen=True)
class Finding:
    """Whether a part of Trainkit can run here."""

    ok: bool
    what: str
    fix: str = ""


def version(package: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def torch_facts() -> dict[str, object]:
    """Version, CUDA version and GPUs of the installed torch; `error` where it is missing or does not import."""
    if version("torch") is None:
        return {"version": None, "cuda": None, "gpus": [], "error": "torch is not installed"}
    said, error = _python(_GPUS)
    if error:
        return {"version": None, "cuda": None, "gpus": [], "error": f"torch does not import: {error}"}
    facts: dict[str, object] = json.loads(said.splitlines()[-1])
    return facts


def findings(parts: Iterable[str]) -> dict[str, Finding]:
    """Look at `parts`, each a name in `LOOKS`; in the same order."""
    looks = {part: LOOKS[part] for part in parts}
    if not {"torch", "kernels"}.isdisjoint(looks):
        torch_facts()  # both threads would start it
    with ThreadPoolExecutor() as pool:
        return dict(zip(looks, pool.map(_looked, looks.values()), strict=True))


def _looked(look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except Exception as error:
        return Finding(False, f"could not be looked at: {type(error).__name__}: {error}")


def _python(code: str) -> tuple[str, str]:
    """Standard output of `code` in an interpreter of its own, and in one line why it failed, "" where it did not."""
    # -P: a source tree in the working directory must not hide installed packages
    words = [sys.executable, "-P", "-c", code]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_IMPORT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return "", f"takes more than {_IMPORT_S} s"
    if done.returncode == 0:
        return done.stdout, ""
    said = done.stderr.strip().splitlines()
    if done.returncode < 0:
        return "", f"takes the interpreter down ({signal.Signals(-done.returncode).name})"
    return "", said[-1] if said else f"exit code {done.returncode}"


def _installation() -> Finding:
    owners = sorted({name for name in _owners() if name != DISTRIBUTION})
    what = f"{DISTRIBUTION} {version(DISTRIBUTION) or '(a source tree, not installed)'}"
    if owners:
        others = " ".join(owners)
        fix = f"pip uninstall {others}, then {_IN_THE_CLONE}"
        return Finding(False, f"{what}, but {others} is installed over the same folder trainkit/", fix)
    return Finding(True, what)


def _owners() -> Iterator[str]:
    """Installed distributions with files in trainkit/, by name."""
    for one in importlib.metadata.distributions():
        if any(path.parts[:1] == ("trainkit",) for path in one.files or ()):
            yield one.metadata["Name"]


def _torch() -> Finding:
    facts = torch_facts()
    if "error" in facts:
        again = "" if version("torch") is None else "--force-reinstall "
        return Finding(False, str(facts["error"]), pip_install("torch").replace("install ", f"install {again}", 1))
    return Finding(True, f"torch {facts['version']}")


def _lightning() -> Finding:
    found = version("pytorch-lightning")
    if found in _COMPROMISED:
        what = f"pytorch-lightning {found}, which was released with stolen keys: take it off now"
        return Finding(False, what, pip_install("pytorch-lightning"))
    return _imports("pytorch-lightning", "pytorch_lightning")


def _native(engine: str) -> Finding:
    _, error = _python(f"import trainkit.{engine}._native")
    return Finding(not error, error or "its native core loads", _IN_THE_CLONE if error else "")


def _receive_buffer() -> Finding:
    path = Path("/proc/sys/net/core/rmem_max")
    limit = int(path.read_text())
    good = limit >= _RECEIVE_BUFFER
    fix = "" if good else f"sudo sysctl -w net.core.rmem_max={_RECEIVE_BUFFER}  # more packets in flight"
    return Finding(good, f"net.core.rmem_max is {limit}", fix)


def _kernels() -> Finding:
    torch = torch_facts()
    if not torch["gpus"]:
        why = torch.get("error") or (
            f"torch was built for CUDA {torch['cuda']}" if torch["cuda"] else "torch is a CPU build"
        )
        return Finding(False, f"no CUDA device ({why}): attention runs in plain PyTorch")
    return _imports("triton", "triton")


def _imports(package: str, module: str) -> Finding:
    found = version(package)
    if found is None:
        return Finding(False, f"{package} is not installed", pip_install(package))
    _, error = _python(f"import {module}")
    what = f"{package} {found} does not import: {error}" if error else f"{package} {found}"
    return Finding(not error, what, pip_install(package) if error else "")


def _programs(*names: str, fix: str) -> Finding:
    missing = [name for name in names if shutil.which(name) is None]
    what = f"{', '.join(missing)} not on PATH" if missing else f"{', '.join(names)} on PATH"
    return Finding(not missing, what, fix if missing else "")


def interfaces() -> list[dict[str, object]]:
    """Network interfaces that the system shows, with state, MTU and, where it is known, Mbit/s."""
    found: list[dict[str, object]] = []
    try:
        links = sorted(Path("/sys/class/net").iterdir())
    except OSError:
        links = []
    for link in links:
        try:
            state, mtu = (link / "operstate").read_text().strip(), int((link / "mtu").read_text())
        except (OSError, ValueError):
            continue
        try:
            speed: int | None = int((link / "speed").read_text())
        except (OSError, ValueError):
            speed = None
        found.append({"name": link.name, "state": state, "mtu": mtu, "mbit_per_s": speed if (speed or 0) > 0 else None})
    return found


LOOKS: dict[str, Callable[[], Finding]] = {
    "installation": _installation,
    "torch": _torch,
    "training": _lightning,
    "switchml": lambda: _native("switchml"),
    "switchml-window": _receive_buffer,
    "collectives": lambda: _native("collectives"),
    "kernels": _kernels,
    "p4": lambda: _imports("p4runtime-shell", "p4.v1.p4runtime_pb2"),
    "p4-lab": lambda: _programs("p4c-bm2-ss", "simple_switch_grpc", fix="install p4c and bmv2 of p4lang"),
    "serving": lambda: _imports("litserve", "litserve"),
    "network-lab": lambda: _programs("ip", "tc", fix="sudo apt install iproute2"),
}
"""Part -> how it is looked at."""

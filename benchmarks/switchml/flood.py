"""Training while a third namespace floods the session: `sudo python benchmarks/switchml/flood.py [PACKETS] [MBIT]`.

Trains under DDP through a switch with a token while PACKETS (default a million) forged, replayed, truncated and
bit-flipped packets arrive from spoofed addresses, then trains the same steps again in peace. Prints one JSON line:
whether every step ended in the same bits, the goodput of both, and what the switch counted. MBIT shapes all links.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _net

_HERE = Path(__file__).parent
_WORKERS = 2


def _line(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    return dict(json.loads(process.stdout.readline()))


def measure(packets: int, mbit: float | None = None) -> dict[str, Any]:
    """Run it all; the answer of rank 0, the attacker's and the switch's."""
    with tempfile.TemporaryDirectory() as folder, _net.star(_WORKERS + 1, mbit) as prefix:
        token, stop = Path(folder, "token"), Path(folder, "stop")
        token.write_text("benchmark " * 4)
        token.chmod(0o600)
        hub = f"{prefix}s"
        listen = ["--listen", f"{_net.SWITCH}:0", "--token-file", str(token), "--json", "--interval", "1000"]
        processes = [_net.inside(hub, "-P", "-m", "trainkit", "switch", *listen)]
        try:
            switch = processes[0]
            plan = {
                "switch": _line(switch)["address"],
                "workers": _WORKERS,
                "token_file": str(token),
                "stop": str(stop),
            }
            for rank in range(_WORKERS):
                end = str(_HERE / "_trainee.py")
                processes.append(_net.inside(f"{prefix}{rank}", end, json.dumps(plan), str(rank)))
            agreed = _line(processes[1])
            attack = json.dumps({"hub": hub, "packets": packets, "slots": agreed["slots"], "tag": 16})
            attacker = _net.inside(f"{prefix}{_WORKERS}", str(_HERE / "_attacker.py"), attack)
            processes.append(attacker)
            _line(attacker)
            done = _line(attacker)
            stop.touch()
            answer = _line(processes[1])
            switch.terminate()
            counters = json.loads((switch.stdout.read() if switch.stdout else "").splitlines()[-1])["counters"]
            rate = round(packets / done["seconds"])
            return {**answer, "attack": done, "attack_packets_a_second": rate, "switch_counters": counters}
        finally:
            for process in processes:
                process.terminate()
                process.wait()


if __name__ == "__main__":
    shaped = float(sys.argv[2]) if len(sys.argv) > 2 else None
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000, shaped)))

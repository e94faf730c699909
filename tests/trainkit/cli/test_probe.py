"""`trainkit probe`: what it promises before it starts, what it refuses, what it leaves behind."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from trainkit.cli._main import main
from trainkit.collectives import Topology


def test_a_dry_run_says_rounds_bytes_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--hosts", "64", "--dry-run", "--json", "--rate", "8Mbps"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ping_rounds"] == 63
    assert facts["load_rounds"] == 126
    assert facts["most_seconds"] < 600
    assert facts["most_bytes_per_host"] == pytest.approx((126 + facts["most_group_rounds"]) * 0.5 * 1e6)
    assert main(["probe", "--hosts", "4", "--dry-run"]) == 0
    assert "4 hosts: 3 rounds of round trips" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "needs --hosts of at least 2, or torchrun around it, got 0"),
        (["--hosts", "2"], "start the probe with torchrun"),
        (["--hosts", "2", "--rendezvous", "nowhere"], "--rendezvous is HOST:PORT with a port from 1 to 65535"),
        (["--hosts", "2", "--rendezvous", "a:1", "--rank", "2"], "rank must be from 0 to 1, got 2"),
        (["--hosts", "2", "--measure", "-1"], "--measure must be seconds above 0"),
        (["--hosts", "2", "--streams", "0"], "--streams must be from 1 to 64, got 0"),
        (["--hosts", "2", "--out", "missing/network.json"], "--out must be a file in a folder that exists"),
        (
            ["--hosts", "2", "--rendezvous", "a:1", "--interface", "nope"],
            "interface must be a network interface with an address, got 'nope'",
        ),
        (["--hosts", "2", "--rendezvous", "a:1", "--topology", "missing.yaml"], "missing.yaml"),
        (["--hosts", "2", "--dry-run", "--rate", "fast"], "a bandwidth is a number"),
    ],
)
def test_refused_input_is_one_line(
    words: list[str],
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert main(["probe", *words]) == 2
    said = capsys.readouterr().err
    assert what in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_short_token_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = tmp_path / "token"
    token.write_text("short")
    assert main(["probe", "--hosts", "2", "--rendezvous", "127.0.0.1:1", "--token-file", str(token)]) == 2
    assert "at least 16 bytes" in capsys.readouterr().err


def test_the_leading_host_writes_table_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    (tmp_path / "declared.yaml").write_text("core: {a: [h0], b: [h1]}")
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    common = ["probe", "--hosts", "2", "--rendezvous", f"127.0.0.1:{port}", "--token-file", str(token)]
    common += ["--warm", "0.01", "--measure", "0.03", "--topology", str(tmp_path / "declared.yaml")]

    def words(rank: int) -> list[str]:
        own = ["--rank", str(rank), "--name", f"h{rank}", "--out", str(tmp_path / f"{rank}.json")]
        return [*common, *own, "--draw", str(tmp_path / f"{rank}.svg")]

    trainkit = str(Path(sys.executable).with_name("trainkit"))
    with subprocess.Popen([trainkit, *words(1)]) as other:
        try:
            assert main(words(0)) == 0
            assert other.wait(60) == 0
        finally:
            other.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "0.svg", "declared.yaml", "token"]
    assert Topology.load(tmp_path / "0.json").compute_nodes == ("h0", "h1")
    said = capsys.readouterr().out
    assert "probed: 2 hosts" in said
    assert f"written: {tmp_path / '0.json'}" in said

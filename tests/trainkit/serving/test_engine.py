"""The server with real processes: answers, refusals, and every way to lose one of its processes."""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from paths import DATA
from serving_server import MODELS, TOKEN, Server, serving

pytest.importorskip("litserve", reason="needs the extra serve")

from trainkit.cli import main
from trainkit.serving import Profile
from trainkit.serving.engine import ModelError, ModelSource, ServeError, ServeOptions, measure

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), "--max-body", "64KiB") as running:
        yield running


def ask_all(server: Server, values: range) -> list[tuple[int, object]]:
    with ThreadPoolExecutor(len(values)) as pool:
        return list(pool.map(server.predict, values))


def test_answers_are_right_and_batched(server: Server) -> None:
    answers = ask_all(server, range(24))
    assert [status for status, _ in answers] == [200] * 24
    assert [body["output"] for _, body in answers] == [n * n for n in range(24)]  # type: ignore[index]
    assert max(body["batch"] for _, body in answers) > 1  # type: ignore[index]
    assert max(body["batch"] for _, body in answers) <= 16  # type: ignore[index]


@pytest.mark.parametrize(
    ("path", "body", "status", "detail"),
    [
        ("/predict", b"{", 400, "must be JSON"),
        ("/predict", b"[" * 50_000, 400, "must be JSON"),
        ("/predict", [1], 400, "must be an object"),
        ("/predict", {"x": 1}, 400, 'key "input"'),
        ("/predict", {"input": 1, "deadline_ms": 0}, 400, "deadline_ms is above 0"),
        ("/predict", {"input": 1, "deadline_ms": "soon"}, 400, "deadline_ms is above 0"),
        ("/predict", {"input": 1, "model": "other"}, 404, "no such model; there are m"),
        ("/v1/models/other:predict", {"input": 1}, 404, "no such model"),
        ("/predict", {"input": "x" * 70_000}, 413, "at most 65536 bytes"),
        ("/predict", {"input": "text"}, 500, "TypeError"),
        ("/predict", {"input": "nan"}, 500, "not JSON"),
    ],
)
def test_refusals(server: Server, path: str, body: object, status: int, detail: str) -> None:
    got, answer, _ = server.ask(path, body)
    assert got == status
    assert detail in str(answer)


def test_a_deadline_that_cannot_be_met(server: Server) -> None:
    status, answer, headers = server.ask("/predict", {"input": 1, "deadline_ms": 10})
    assert (status, headers["retry-after"]) == (503, "1")
    assert "cannot be met" in answer["detail"]


def test_one_bad_input_does_not_spoil_its_batch(server: Server) -> None:
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(server.predict, [1, "bad", 3, 4, 5]))
    assert [status for status, _ in answers] == [200, 500, 200, 200, 200]


def test_what_is_served_and_counted(server: Server) -> None:
    assert server.ask("/v1/models")[1]["models"] == {"m": {"slo_ms": 3000.0, "max_batch": 16}}
    assert server.predict(3)[0] == 200
    text = server.ask("/metrics")[1]
    assert 'trainkit_serve_requests_total{model="m",outcome="200"}' in text
    assert "trainkit_serve_gpus 2.0" in text


def counted(server: Server, outcome: str) -> float:
    lines = [line for line in server.ask("/metrics")[1].splitlines() if f'outcome="{outcome}"' in line]
    return sum(float(line.split()[-1]) for line in lines if line.startswith("trainkit_serve_requests_total"))


def all_up(server: Server) -> bool:
    """Both GPU processes have loaded; the scheduler says so with each answer."""
    return server.predict(2)[0] == 200 and "trainkit_serve_gpus 2.0" in server.ask("/metrics")[1]


def test_clients_that_leave_are_cancelled(server: Server) -> None:
    """What waited for them never runs: it would kill its GPU process."""
    body = json.dumps({"input": "die"})
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n"
    gpus, _ = server.gpus_and_scheduler()
    with ThreadPoolExecutor(2) as pool:
        busy = []
        for left in (1, 0):
            busy.append(pool.submit(server.predict, "long"))
            # a short deadline is refused by the scheduler, whose answers carry how many GPUs are idle
            server.wait_until(
                lambda left=left: (
                    server.predict(1, deadline_ms=5)[0] == 503
                    and f"trainkit_serve_idle {left}.0" in server.ask("/metrics")[1]
                )
            )
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall((head + body).encode())
        server.wait_until(lambda: counted(server, "499") == 10)
        assert [one.result()[0] for one in busy] == [200, 200]
    assert server.predict(7)[0] == 200
    assert server.gpus_and_scheduler()[0] == gpus


def test_a_killed_gpu_process_loses_no_request(server: Server) -> None:
    """Its requests run again within their deadline, and a new process takes its place."""
    with ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(server.predict, n) for n in range(24)]
        gpus, _ = server.gpus_and_scheduler()
        time.sleep(0.02)
        os.kill(gpus[0], signal.SIGKILL)
        said = [answer.result() for answer in answers]
    assert [status for status, _ in said] == [200] * 24
    assert [body["output"] for _, body in said] == [n * n for n in range(24)]
    server.wait_until(lambda: all_up(server))


def test_a_request_that_kills_is_not_run_for_ever(server: Server) -> None:
    status, _ = server.predict("die")
    assert status in (500, 503)  # two deaths, or no time for the second run
    server.wait_until(lambda: all_up(server))


def test_reload_loses_no_request(server: Server) -> None:
    before = set(server.gpus_and_scheduler()[0])
    status, body, _ = server.ask("/admin/reload", {})
    assert (status, body) == (202, {"reloading": 2})
    statuses: list[int] = []

    def renewed() -> bool:
        statuses.append(server.predict(1)[0])
        now = set(server.gpus_and_scheduler()[0])
        return len(now) == 2 and not now & before

    server.wait_until(renewed)
    assert set(statuses) == {200}


def test_a_killed_scheduler_leaves_no_connection_hanging(server: Server) -> None:
    gpus, scheduler = server.gpus_and_scheduler()
    with ThreadPoolExecutor(8) as pool:
        begin = time.monotonic()
        answers = [pool.submit(server.predict, "long") for n in range(8)]  # two run, six wait
        time.sleep(0.5)
        os.kill(scheduler, signal.SIGKILL)
        said = [answer.result() for answer in answers]
    assert time.monotonic() - begin < 3 + 5
    assert {status for status, _ in said} <= {200, 503}
    assert any("did not answer" in str(body) for _, body in said)
    # the orphans leave, and a new scheduler brings new ones
    server.wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in gpus))
    server.wait_until(lambda: server.predict(5) == (200, {"output": 25, "batch": 1, "gpu": 0}))


def test_a_token_is_asked_for(server: Server) -> None:
    for path, body in (("/predict", {"input": 2}), ("/metrics", None), ("/admin/reload", {})):
        for wrong in ("", "Bearer 0123456789abcdee", "Bearer \xe4"):
            assert server.ask(path, body, Authorization=wrong)[0] == 401


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str, model: str = "squares") -> str:
    Profile.linear(2, 20, 16).save(tmp_path / "p.json")
    common = ["serve", f"m={MODELS}:{model}", "--profile", f"{tmp_path}/p.json", "--slo", "1s"]
    assert main([*common, *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_what_cannot_start_says_so_in_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "is reached by others: give --token-file" in refused(capsys, tmp_path, "--listen", "0.0.0.0:8080")
    assert "port is from 1024" in refused(capsys, tmp_path, "--listen", "127.0.0.1:80")
    assert "listens on 127.0.0.1, 0.0.0.0 or ::" in refused(capsys, tmp_path, "--listen", "example.org:8080")
    assert "--listen is HOST:PORT" in refused(capsys, tmp_path, "--listen", "80")
    assert "objective is at least one request's latency" in refused(capsys, tmp_path, "--slo", "20ms")
    (tmp_path / "short").write_text("x")
    assert "at least 16 ASCII" in refused(capsys, tmp_path, "--token-file", str(tmp_path / "short"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = refused(capsys, tmp_path, "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert "Address already in use; choose --port" in said


def test_a_model_that_does_not_load_ends_the_start(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="broken does not load: OSError: weights are missing"),
        serving(tmp_path, model="broken"),
    ):
        pass


def test_options_hold_together() -> None:
    source, profile = ModelSource.parse("a:b"), Profile([1])
    with pytest.raises(ServeError, match="every model needs a profile"):
        ServeOptions({"a": source}, {"b": profile}, {"a": 10.0})


def test_a_lightning_checkpoint_is_served(tmp_path: Path) -> None:
    import pytorch_lightning as pl
    import torch

    source = ModelSource.parse(f"{DATA}/serving/doubler.py:Doubler")
    module = source._attribute()()
    module.scale.data.fill_(5.0)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "d.ckpt")
    predict = ModelSource(source.where, tmp_path / "d.ckpt").load("cpu")
    assert predict([[1.0, 2.0], [3.0, 4.0]]) == [[5.0, 10.0], [15.0, 20.0]]
    with pytest.raises(ValueError, match="nested lists of one shape"):
        predict([[1.0], [1.0, 2.0]])
    (named,) = ModelSource.parse(f"{DATA}/serving/doubler.py:Named").load("cpu")([{"x": [1.0, 2.0]}])
    assert named == {"sum": 3.0, "pair": [2.0, [1.0, 2.0]]}
    torch.save({}, tmp_path / "no.ckpt")
    with pytest.raises(ModelError, match="Doubler does not load: KeyError"):
        ModelSource(source.where, tmp_path / "no.ckpt").load("cpu")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("model", "module:attribute"),
        ("no_such_module:f", "does not load: ModuleNotFoundError"),
        ("os:nothing", "no 'nothing'"),
    ],
)
def test_models_that_are_none(text: str, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        ModelSource.parse(text).load("cpu")


def test_a_profile_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{MODELS}:squares", "--input", "3", "--out", f"{tmp_path}/p.json", "--max-batch", "10", "--repeat", "2"]
    assert main(["serve", "profile", *words]) == 0
    assert "batch    8" in capsys.readouterr().out
    found = Profile.load(tmp_path / "p.json")
    assert found.max_batch == 10
    assert all(latency >= (20 + 2 * size) * 1e6 for size, latency in enumerate(found.latency_ns, 1))
    assert found.about["repeat"] == 2


def test_sizes_between_measured_ones_count_as_the_next_larger() -> None:
    seen: list[int] = []
    import sys
    import types

    module = types.ModuleType("_counting")
    module.load = lambda device: lambda inputs: (seen.append(len(inputs)), list(inputs))[1]  # type: ignore[attr-defined]
    sys.modules["_counting"] = module
    found = measure(ModelSource.parse("_counting:load"), 1, max_batch=40, repeat=1)
    assert found.max_batch == 40
    assert sorted(set(seen))[:9] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert found.latency_ns[36] == found.latency_ns[39] or 37 in seen


def test_open_requests_are_answered_before_the_end(tmp_path: Path) -> None:
    """Also the very first ones of a server."""
    with serving(tmp_path) as fresh, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(fresh.predict, "long") for n in range(2)]
        fresh.wait_until(lambda: "trainkit_serve_open 2.0" in fresh.ask("/metrics")[1])
        fresh.process.send_signal(signal.SIGTERM)
        said = [answer.result() for answer in answers]
        assert [(status, body["output"]) for status, body in said] == [(200, "long")] * 2
        assert fresh.process.wait(20) == 0

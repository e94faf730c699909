"""Completions with a real server: whole and streamed, stopped, refused, cancelled, and without one of its processes."""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from paths import DATA, ROOT
from serving_server import TOKEN, Server, serving_texts

pytest.importorskip("litserve", reason="needs the extra serve")

from trainkit.serving.engine import ModelSource, Objective
from trainkit.serving.engine._completions import Ask, held
from trainkit.serving.engine._language import _Replica, _Text

pytestmark = pytest.mark.timeout(180)
MODEL = f"abc={DATA}/serving/language.py:load"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_texts(tmp_path_factory.mktemp("server"), MODEL, "--ttft", "2s", "--tpot", "1s", "--json") as running:
        yield running


def complete(server: Server, prompt: object, **more: object) -> tuple[int, dict[str, object]]:
    return server.ask("/v1/completions", {"prompt": prompt, **more})[:2]


def texts(body: dict[str, object]) -> list[tuple[str, str]]:
    return [(choice["text"], choice["finish_reason"]) for choice in body["choices"]]  # type: ignore[attr-defined]


def events(server: Server, body: dict[str, object]) -> list[object]:
    """Data of the server-sent events of an answer, as text where it is no JSON."""
    found = []
    for line in server.ask("/v1/completions", {**body, "stream": True})[1].split("\n\n"):
        data = line.removeprefix("data: ")
        found += [json.loads(data)] if data.startswith("{") else [data] if data else []
    return found


def test_a_text_goes_on(server: Server) -> None:
    status, body = complete(server, "xa", max_tokens=5, temperature=0)
    assert status == 200
    assert texts(body) == [("bcdef", "length")]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}
    assert (body["object"], body["model"]) == ("text_completion", "abc")


def test_it_ends_by_itself_or_by_a_text(server: Server) -> None:
    assert texts(complete(server, "x", max_tokens=50)[1]) == [("yz", "stop")]
    assert texts(complete(server, "a", max_tokens=50, stop="fg")[1]) == [("bcde", "stop")]
    assert texts(complete(server, "a", max_tokens=5, stop=["fgx", "q"])[1]) == [("bcdef", "length")]


def test_prompts_of_several_kinds(server: Server) -> None:
    assert texts(complete(server, [97, 98], max_tokens=2)[1]) == [("cd", "length")]
    assert texts(complete(server, ["a", "m", [107]], max_tokens=2)[1]) == [
        ("bc", "length"), ("no", "length"), ("lm", "length")
    ]  # fmt: skip


def test_pieces_are_whole_characters_and_add_up(server: Server) -> None:
    *pieces, usage, done = events(
        server, {"prompt": "A", "max_tokens": 6, "stream_options": {"include_usage": True}, "stop": "DEZ"}
    )
    assert done == "[DONE]"
    said = [choice["text"] for piece in pieces for choice in piece["choices"]]  # type: ignore[index]
    assert "".join(said) == "éBCDE"
    assert said[0] == "é"
    assert usage["usage"]["completion_tokens"] == 6  # type: ignore[index]
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"  # type: ignore[index]


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ({"prompt": "a", "n": 2}, 400, "n is not offered"),
        ({"prompt": "a", "logprobs": 1}, 400, "logprobs is not offered"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens is a whole number"),
        ({"prompt": "a", "temperature": "hot"}, 400, "temperature is a number"),
        ({"prompt": "a", "stop": [1]}, 400, "stop is a text"),
        ({"prompt": "a", "colour": "red"}, 400, "no parameter 'colour'"),
        ({"prompt": {}}, 400, "prompt is a text"),
        ({"prompt": ""}, 400, "at least one token"),
        ({"prompt": "a", "max_tokens": 900}, 400, "at most 256, got 901"),
        ({"prompt": "a", "model": "other"}, 404, "no such model; there are abc"),
    ],
)
def test_refusals(server: Server, body: object, status: int, detail: str) -> None:
    got, answer, _ = server.ask("/v1/completions", body)
    assert got == status
    assert detail in answer["detail"]


def test_a_refusal_of_a_stream_has_its_status(server: Server) -> None:
    assert server.ask("/v1/completions", {"prompt": "", "stream": True})[0] == 400
    assert server.ask("/predict", {"input": 1})[0] == 404
    assert server.ask("/v1/completions", {"prompt": "a"}, Authorization="")[0] == 401


def state(server: Server, name: str) -> float:
    lines = server.ask("/metrics")[1].splitlines()
    return float(next(line for line in lines if line.startswith(f"trainkit_serve_{name} ")).split()[1])


def counted(server: Server, outcome: str) -> float:
    lines = [line for line in server.ask("/metrics")[1].splitlines() if f'outcome="{outcome}"' in line]
    return sum(float(line.split()[-1]) for line in lines if line.startswith("trainkit_serve_requests_total"))


def test_many_share_the_steps(server: Server) -> None:
    """Twenty texts of twelve tokens on two processes: one after the other they would take 240 steps."""
    with ThreadPoolExecutor(20) as pool:
        said = list(pool.map(lambda n: complete(server, "a", max_tokens=12), range(20)))
    assert [texts(body) for _, body in said] == [[("bcdefghijklm", "length")]] * 20
    server.wait_until(lambda: state(server, "language_running") == 0)
    assert state(server, "language_free_pages") == state(server, "language_pages") == 32


def test_clients_that_leave_free_their_pages(server: Server) -> None:
    body = json.dumps({"prompt": "{", "max_tokens": 200, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        assert b"200 OK" in client.recv(4096)
        server.wait_until(lambda: state(server, "language_running") == 1)
    server.wait_until(lambda: counted(server, "499") == 1)
    server.wait_until(lambda: state(server, "language_running") == 0)


def test_a_first_token_that_cannot_come_in_time(tmp_path: Path) -> None:
    """Pages for two long texts: of four, two wait past their TTFT and are told so, the others are whole."""
    with serving_texts(tmp_path, MODEL, "--ttft", "200ms", gpus=1) as small, ThreadPoolExecutor(4) as pool:
        said = list(pool.map(lambda n: complete(small, " ", max_tokens=90), range(4)))
        assert sorted(status for status, _ in said) == [200, 200, 503, 503]
        assert any("first token cannot come in time" in str(body) for _, body in said)


def test_a_killed_process_and_a_reload(server: Server) -> None:
    """What had begun ends with an error, what had not goes elsewhere; afterwards all is as before."""
    processes, _ = server.gpus_and_scheduler()
    with ThreadPoolExecutor(1) as pool:
        streamed = pool.submit(events, server, {"prompt": "{", "max_tokens": 200})
        server.wait_until(lambda: state(server, "language_running") == 1)
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
        *_, failed, done = streamed.result()
    assert failed["error"]["code"] == 500  # type: ignore[index]
    assert done == "[DONE]"
    server.wait_until(lambda: state(server, "language_processes") == 2)
    assert texts(complete(server, "a", max_tokens=1)[1]) == [("b", "length")]
    before = set(server.gpus_and_scheduler()[0])
    assert server.ask("/admin/reload", {})[:2] == (202, {"reloading": 2})
    statuses = []

    def renewed() -> bool:
        statuses.append(complete(server, "a", max_tokens=1)[0])
        return not set(server.gpus_and_scheduler()[0]) & before

    server.wait_until(renewed)
    assert set(statuses) == {200}


def test_logs_are_json(server: Server) -> None:
    lines = [json.loads(line) for line in (server.folder / "log").read_text().splitlines()]
    assert any(line["message"] == "ready: 2 processes" for line in lines)
    assert any("died" in line["message"] and line["level"] == "warning" for line in lines)


@pytest.mark.slow
def test_the_demo_gpt_goes_on_greedily(tmp_path: Path) -> None:
    """A checkpoint of a demo run behind the real engine: the likeliest byte each time, as the model alone says."""
    import torch

    from trainkit.demo import SIZES, Config
    from trainkit.demo._model import GPT

    torch.manual_seed(3)
    model = GPT(SIZES["tiny"], vocab=256, rate=1e-3).eval()
    for weight in model.parameters():
        weight.data.mul_(3.0)  # so that bytes differ
    Config("tiny", 1, "cpu", 240, 256, 0, 60).save(tmp_path)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "autolrs.ckpt")
    source = ModelSource.parse(f"{ROOT}/examples/serve_gpt.py:load@{tmp_path}/autolrs.ckpt")
    replica = _Replica(source.load_language("cpu"), Objective(ttft_ms=60_000.0))
    prompts = ["a", "def f(x):" * 3]
    for key, prompt in enumerate(prompts):
        ask = Ask(prompt, 5, 0.0, 1.0, None, 0.0, None, ())
        replica.take(("complete", key, ask, time.monotonic_ns() + 10**11))
    replica.admit()
    texts = {key: one.text for key, one in replica.running.items()}
    while replica.running:
        replica.step()
    for key, prompt in enumerate(prompts):
        tokens = list(prompt.encode())
        with torch.no_grad():
            for _ in range(5):
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert texts[key].tokens == tokens[len(prompt) :]
    assert replica.state["free_pages"] == replica.state["pages"]


def test_what_may_begin_a_stop_text_is_held() -> None:
    assert [held(text, ["abc"]) for text in ("xa", "xab", "ax", "")] == [1, 2, 0, 0]


def test_bytes_that_never_become_a_character_are_shown() -> None:
    text = _Text(lambda tokens: bytes(tokens).decode("utf-8", "replace"), [])
    said = ""
    for token in [0xC3, 0xC3, 0xC3, 0xC3, 0xC3, 0x41]:
        text.tokens.append(token)
        said += text.take(end=False)[0]
    assert said == "\ufffd" * 5 + "A"

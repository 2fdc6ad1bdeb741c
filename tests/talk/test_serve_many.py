"""`serve` with many clients at once: nobody waits for what another does, and no failure reaches a second client."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import varied_model
from server_process import GREEDY, Served, dictating, errors, everything, expected, question, served

from qlora_dpo.talk.engine import Engine, GenerationRequest, ReplyFailed, RequestQueue
from qlora_dpo.talk.sampling import SamplingParams
from qlora_dpo.talk.stop_strings import StopStringFilter

openai = pytest.importorskip("openai", reason="the openai client is in the dev extra")

LONG = SamplingParams(temperature=0, max_new_tokens=900, seed=0)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


def stream_open(server: Served, **more: Any) -> socket.socket:
    """A connection on which a stream has been asked for."""
    wire = server.connected()
    body = json.dumps(question(stream=True, **more)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    wire.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    return wire


def until(true: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_client_that_leaves_ends_its_reply_streamed_or_not(caplog: pytest.LogCaptureFixture) -> None:
    with served(LONG) as server:
        engine = server.service.engine
        forwards: list[float] = []
        engine.model.register_forward_pre_hook(lambda *_: forwards.append(time.monotonic()))
        for streamed in (True, False):
            forwards.clear()
            wire = stream_open(server) if streamed else server.connected()
            if not streamed:
                body = json.dumps(question()).encode()
                head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
                wire.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            until(lambda: len(forwards) > 3)
            wire.close()
            time.sleep(0.5)
            count = len(forwards)
            time.sleep(0.3)
            assert len(forwards) == count < 800
        assert errors(caplog) == []


def test_short_replies_do_not_wait_for_the_end_of_long_ones() -> None:
    with served(LONG) as server:
        wires = [stream_open(server, max_tokens=300) for _ in range(3)]
        began = time.monotonic()
        assert server.chat(max_tokens=2)[0] == 200
        short = time.monotonic() - began
        for wire in wires:
            while b"[DONE]" not in wire.recv(65536):
                pass
            wire.close()
        assert short < (time.monotonic() - began) / 3


def test_one_more_than_the_line_holds_is_told_to_come_again() -> None:
    with served(LONG, waiting=2, engine={"max_concurrent": 1}) as server:
        wires = [stream_open(server)]
        assert wires[0].recv(100).startswith(b"HTTP/1.1 200")
        wires += [stream_open(server), stream_open(server)]
        until(lambda: len(server.service.engine.queue) == 2)
        status, answer = server.chat()
        assert (status, answer["error"]["message"]) == (429, "too many questions are waiting; ask again in a moment")
        for wire in wires:
            wire.close()
        # those who left make room
        until(lambda: server.chat(max_tokens=1)[0] == 200)


def test_a_reply_that_takes_too_long_is_cut_off_and_a_question_that_waits_too_long_given_back() -> None:
    with served(LONG, engine={"max_concurrent": 1, "timeout_seconds": 0.4}) as server:
        wire = stream_open(server)
        assert wire.recv(100).startswith(b"HTTP/1.1 200")
        assert server.chat()[0] in (200, 503)
        assert b'"finish_reason": "length"' in everything_of_stream(wire)
        assert server.chat(max_tokens=1)[0] == 200


def everything_of_stream(wire: socket.socket) -> bytes:
    raw = b""
    while b"[DONE]" not in raw:
        raw += wire.recv(65536)
    wire.close()
    return raw


def test_fifty_clients_of_all_kinds_at_once_harm_nobody(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    want = {text: expected(server, "tuned", text)[0] for text in ("rice?", "birds?", "a cat", "the park")}
    wrong: list[Any] = []

    def well_behaved(number: int) -> None:
        text = list(want)[number % 4]
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=5) as own:
            chunks = own.chat.completions.create(**question(text), stream=True)
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        if said != want[text]:
            wrong.append((text, said))

    def leaves_early(number: int) -> None:
        wire = stream_open(server)
        wire.recv(200)
        wire.close()

    def never_reads(number: int) -> None:
        wire = stream_open(server)
        time.sleep(2)
        wire.close()

    def too_large(number: int) -> None:
        server.ask("POST", "/v1/chat/completions", b"x" * 2**21)

    def broken(number: int) -> None:
        server.ask("POST", "/v1/chat/completions", b'{"model": ')
        with server.connected() as wire:
            wire.sendall(b"\x00\xff GET nonsense\r\n\r\n")
            everything(wire)

    kinds = [well_behaved, leaves_early, never_reads, too_large, broken]
    threads = [threading.Thread(target=kinds[number % 5], args=(number // 5,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (wrong, errors(caplog)) == ([], [])
    assert not any(thread.is_alive() for thread in threads)


def test_a_failure_in_the_model_is_told_and_the_next_question_answered(caplog: pytest.LogCaptureFixture) -> None:
    with served() as server:
        before = server.chat()

        def fail(*_: object) -> None:
            hook.remove()
            raise RuntimeError("a kernel failed")

        hook = server.service.engine.model.register_forward_pre_hook(fail)
        status, answer = server.chat()
        assert (status, answer["error"]["message"]) == (500, "the reply failed; the server's terminal says why")
        assert errors(caplog) == ["a reply failed: RuntimeError: a kernel failed"]
        assert server.chat()[1]["choices"] == before[1]["choices"]


def test_a_broken_model_is_not_the_clients_fault(caplog: pytest.LogCaptureFixture) -> None:
    with served() as server:
        server.service.engine.model.get_base_model().lm_head.register_forward_hook(
            lambda *given: given[-1] * float("nan")
        )
        status, answer = server.chat()
    told = "the model's output is not a number; its weights or its compute dtype are broken"
    assert (status, answer["error"]["message"]) == (500, told)
    assert errors(caplog) == [f"a reply failed: {told}"]


def test_a_template_that_refuses_the_turns_is_the_clients_400(server: Served) -> None:
    own = server.service.engine.tokenizer
    before, own.chat_template = own.chat_template, "{{ raise_exception('turns must alternate') }}"
    try:
        status, answer = server.chat()
    finally:
        own.chat_template = before
    told = "the model's chat template refuses this conversation: turns must alternate"
    assert (status, answer["error"]["message"]) == (400, told)


def test_escapes_of_the_model_reach_no_client() -> None:
    with served(LONG, model=dictating("a\x1b[31mred\x1b]0;title\x07\u202e\x9b2Jb<script>")) as server:
        status, answer = server.chat()
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "aredb<script>")


def test_those_who_wait_when_the_server_ends_are_told() -> None:
    told: list[Any] = []
    line = RequestQueue()
    engine = Engine(varied_model.qwen2(), tiny.tokenizer(), None, line)  # type: ignore[arg-type]
    asked = GenerationRequest("model", [{"role": "user", "content": "rice?"}], GREEDY, True, (), told.append)
    line.try_put(asked)
    stopping = threading.Event()
    stopping.set()
    engine.run(stopping)
    assert told == [ReplyFailed(503, "the server is shutting down", "shutting_down")]
    assert not line.try_put(asked)


@pytest.mark.parametrize("stop", ["xyz", "y", "bx", "aaab", "zzz", "nothing"])
def test_however_text_is_split_it_ends_at_the_stop_string(stop: str) -> None:
    text = "aaabxyxyzzz"
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            held = StopStringFilter((stop,))
            parts = [held.feed(part) for part in (text[:first], text[first:second], text[second:])]
            assert "".join(parts) + held.flush() == text.partition(stop)[0]
            assert held.found == (stop in text)


def test_of_several_stop_strings_the_first_in_the_text_counts() -> None:
    held = StopStringFilter(("yz", "bx"))
    assert [held.feed(piece) for piece in ("aab", "cyb", "xyz")] == ["aa", "bcy", ""]

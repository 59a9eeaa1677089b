"""The client for servers: whatever they do, a call ends with an answer, or with a sentence that says why."""

import email.utils
import gzip
import itertools
import re
import socket
import ssl
import subprocess
import threading
import time

import pytest

from lib import endpoint
from lib.endpoint import Endpoint, Refused, Unavailable, each
from lib.options import UserError
from tests.fake_endpoint import FakeEndpoint, RawEndpoint
from tests.fuzz_servers import fuzz

LONG = 20  # seconds that a test waits for what must happen


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "BACK_OFF", 0.01)
    monkeypatch.setattr(endpoint, "PAUSE", 0.05)


def client(*fakes: FakeEndpoint, path: str = "", **options) -> Endpoint:
    return Endpoint(",".join(fake.url + path for fake in fakes), **{"timeout": 1.0, "say": None} | options)


def test_a_chat_is_a_text_and_its_cost():
    with FakeEndpoint(reply=lambda request: f" {request['messages'][-1]['content']}! ") as fake:
        messages = [{"role": "user", "content": "Grüße, 世界"}]
        text, usage = client(fake, path="/v1#qwen").chat(messages, temperature=0.5, seed=3)
    assert (text, usage) == ("Grüße, 世界!", {"prompt_tokens": 5, "completion_tokens": 7})
    assert fake.calls == [{"model": "qwen", "messages": messages, "temperature": 0.5, "seed": 3}]


@pytest.mark.parametrize("path", ["/classify", "/pooling", "/score", ""])
def test_the_score_of_every_kind_of_reward_server_is_read(path):
    with FakeEndpoint(score=lambda request: -1.25 if request["input"] == "a text" else 0.0) as fake:
        assert client(fake, path=path).score("a text") == -1.25
    assert fake.calls == [{"input": "a text", "use_activation": False}]


SCORES = {
    "number a token": ({"data": [{"data": [[3.0], [0.5]]}]}, 0.5), "whole": ({"score": 2}, 2.0),
    "null": ({"score": None}, None), "text": ({"score": "0.5"}, None), "bool": ({"score": True}, None),
    "nan": ({"score": float("nan")}, None), "list": ([1.0], None), "empty": ({"data": []}, None),
    "two classes": ({"data": [{"probs": [0.1, 0.9]}]}, None), "no object": (7, None),
    "embedding": ({"data": [{"data": [0.1, 0.2]}]}, None), "no number": ({"data": [{"data": []}]}, None)}


@pytest.mark.parametrize("answer, score", SCORES.values(), ids=SCORES)
def test_what_is_no_score_is_an_unusable_answer_and_no_zero(monkeypatch, answer, score):
    monkeypatch.setattr(Endpoint, "post", lambda *_: answer)
    ask = Endpoint("http://nowhere", attempts=2, say=None).score
    if score is None:
        with pytest.raises(Unavailable, match="http://nowhere: an unusable answer"):
            ask("text")
    else:
        assert ask("text") == score


@pytest.mark.parametrize("how", ["429", "500", "503", "broken", "wrong", "cut", "hang"])
def test_what_fails_once_is_asked_again(how):
    with FakeEndpoint(lambda number, _: how if number == 0 else "ok", score=lambda _: 2.5) as fake:
        assert client(fake, timeout=0.2).score("text") == 2.5
    assert len(fake.calls) == 2


@pytest.mark.parametrize("how", ["429", "500", "broken", "wrong", "cut", "hang", "dead"])
def test_another_server_is_asked_where_one_fails(how):
    """And it is asked less than the one that works."""
    with FakeEndpoint(lambda *_: how) as bad, FakeEndpoint(score=lambda _: 2.5) as good:
        if how == "dead":
            bad.stop()
        asked = client(bad, good, timeout=0.2)
        assert [asked.score(str(i)) for i in range(8)] == [2.5] * 8
        assert not asked.down() and len(good.calls) == 8
        if how in ("500", "cut", "hang"):
            assert len(bad.calls) == 1, "a server that is down is left alone"


@pytest.mark.parametrize("how, said", [
    ("429", "429"), ("500", "500"), ("broken", "unusable answer"), ("wrong", "unusable answer"),
    ("cut", "IncompleteRead"), ("hang", "timed out"), ("dead", "refused")])
def test_what_fails_for_good_is_one_sentence_that_names_server_and_reason(how, said):
    with FakeEndpoint(lambda *_: how) as fake:
        if how == "dead":
            fake.stop()
        asked = client(fake, timeout=0.1, attempts=3)
        with pytest.raises(Unavailable) as error:
            asked.score("text")
        assert fake.url in str(error.value) and said in str(error.value) and "\n" not in str(error.value)
        assert len(fake.calls) == 3 * (how != "dead")
        assert bool(asked.down()) == (how in ("500", "cut", "hang", "dead")), "who answers is not down"


@pytest.mark.parametrize("how", ["300", "400", "401", "404", "302"])
def test_what_is_refused_is_not_asked_again_and_the_key_is_not_shown(how, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with FakeEndpoint(lambda *_: how) as fake:
        with pytest.raises(Refused) as error:
            client(fake, say=print).score("text")
    assert len(fake.calls) == 1 and error.value.status == int(how)
    assert fake.headers[0]["Authorization"] == "Bearer sk-secret"
    assert f"{fake.url} answered {how}" in str(error.value) and "Bearer ***" in str(error.value)


def test_a_key_with_a_line_break_is_stripped_or_refused_and_not_shown(monkeypatch):
    """As a file's last line has one."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    with FakeEndpoint(score=lambda _: 2.5) as fake:
        assert client(fake).score("text") == 2.5
    assert fake.headers[0]["Authorization"] == "Bearer sk-secret"
    for key in ("sk-secret\nb", "sk-secret é"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match="the key in OPENAI_API_KEY has characters") as error:
            client(fake)
        assert "secret" not in str(error.value)


def test_a_server_that_says_when_is_not_asked_before(monkeypatch):
    with FakeEndpoint(lambda number, _: "429" if number == 0 else "ok", retry_after="1") as fake:
        start = time.monotonic()
        client(fake).score("text")
        assert time.monotonic() - start >= 1
    told = [email.utils.formatdate(time.time() + 30), "7", "", "soon", "-3", "1e9", "99999999"]
    e = [endpoint.retry_after({"Retry-After": value}) for value in told]
    assert 28 < e[0] <= 30 and e[1:] == [7, 0, 0, 0, 0, endpoint.LONGEST_REST]


def test_back_off_doubles(monkeypatch):
    rests = []
    server = Endpoint("http://a", attempts=6, say=None)  # alone: another test's may still be waiting
    monkeypatch.setattr(server, "report", lambda url, rest=0.0, down="": rests.append(rest))
    monkeypatch.setattr(server, "post", lambda *_: None)
    with pytest.raises(Unavailable):
        server.score("text")
    assert all(0.5 <= rest / (0.01 * 2**k) <= 1.5 for k, rest in enumerate(rests)) and len(rests) == 6


def test_a_call_that_waits_for_a_server_gives_up_once_nobody_listens():
    with FakeEndpoint() as fake:
        pass  # and is gone
    waiting, failed = threading.Event(), []

    def call():
        try:
            asked.chat([])
        except Unavailable as e:
            failed.append(e)

    asked = client(fake, say=lambda _: waiting.set())
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    assert waiting.wait(LONG)
    asked.say = None
    thread.join(LONG)
    assert failed and not thread.is_alive()


def test_where_all_servers_are_down_calls_wait_and_one_finds_out_when_they_are_back(monkeypatch):
    said = []
    with FakeEndpoint(score=lambda _: 2.5) as fake:
        fake.stop()
        asked = client(fake, say=said.append)
        back = each(asked.score, range(16), 16)
        threading.Timer(0.5, fake.start).start()
        assert sorted(back) == [(i, 2.5, None) for i in range(16)]
        assert len(said) == 1 and fake.url in said[0] and "since" in said[0] and "refused" in said[0]
        assert [c["input"] for c in fake.calls].count(endpoint.HELLO) == 1 and len(fake.calls) == 17
        assert not asked.down()


def test_a_server_that_failed_once_is_asked_at_once_where_the_others_fail_too():
    with FakeEndpoint(lambda number, _: "500" if number == 0 else "ok", score=lambda _: 2.5) as good:
        with FakeEndpoint() as dies:
            asked, start = client(good, dies), time.monotonic()
            while not good.calls:
                asked.score("text")
        assert [asked.score("text") for _ in range(4)] == [2.5] * 4 and time.monotonic() - start < 5


def test_a_request_that_a_server_fails_on_stops_no_other():
    """It answers the rest, so the call ends: to wait for it would be for ever."""
    with FakeEndpoint(lambda _, request: "500" if request["input"] == "poison" else "ok") as fake:
        asked = client(fake, say=lambda text: None, attempts=2)
        with pytest.raises(Unavailable, match="500"):
            asked.score("poison")
        assert not asked.down()


@pytest.mark.parametrize("urls", ["", "gpu1:80", "ftp://gpu1", "http://", "http://a,b", "http://a:port",
                                  "http://[::1"])
def test_an_address_that_cannot_be_is_named(urls):
    shown = repr(urls.split(",")[-1])
    with pytest.raises(UserError, match=re.escape(f"{shown} is no address of a server: write http://HOST")):
        Endpoint(urls)


@pytest.mark.parametrize("urls", ["http://me:sk-1@gpu1", "http://gpu1/v1?key=sk-1", "http://gpu1,http://sk-1@b",
                                  "http://me:sk-1,sk-1@gpu1", "http://me:sk-1#sk-1@gpu1/v1", "https://a?sk-1#m",
                                  "http://me:1,sk-1@gpu1"])
def test_a_password_or_a_query_in_an_address_is_refused_and_not_shown(urls):
    with pytest.raises(UserError, match="one with @ or [?] is no address of a server") as error:
        Endpoint(urls)
    assert "sk-1" not in str(error.value)


def test_each_calls_so_many_at_a_time_and_hands_back_calls_that_failed():
    at_once, most, lock = 0, 0, threading.Lock()

    def call(i):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.01)
        with lock:
            at_once -= 1
        if i in (5, 6):
            raise Unavailable("not now") if i == 5 else Refused("not this")
        return 10 - i

    back = {item: (result, error) for item, result, error in each(call, iter(range(20)), 4)}
    assert most == 4 and back.keys() == set(range(20))
    assert [i for i, (_, error) in back.items() if error] in ([5, 6], [6, 5]) and back[7] == (3, None)
    assert isinstance(back[5][1], Unavailable) and isinstance(back[6][1], Refused)


@pytest.mark.parametrize("status", [0, 401, 403, 404])
def test_each_raises_what_concerns_every_call(status):
    """A mistake in the code, a full disk; and a key that is wrong, which is wrong for all."""
    error = Refused("no") if status else ZeroDivisionError("no")
    error.status = status

    def call(i):
        raise error

    with pytest.raises(type(error), match="no"):
        next(each(call, range(9), 2))


def test_who_walks_away_from_each_lets_nothing_more_begin():
    begun, go_on = [], threading.Event()

    def call(i):
        begun.append(i)
        if i >= 2:
            go_on.wait(LONG)

    back = each(call, range(100), 2)
    next(back)
    next(back)
    while len(begun) < 4:
        time.sleep(0.001)
    back.close()
    go_on.set()
    time.sleep(0.1)
    assert sorted(begun) == [0, 1, 2, 3]


def test_calls_keep_to_a_rate_repeated_ones_included():
    with FakeEndpoint(lambda i, _: "500" if i == 1 else "ok") as fake:
        server, start = Endpoint(fake.url, rate=1200), time.monotonic()
        list(each(lambda _: server.chat([]), range(8), 8))
        assert len(fake.calls) == 9 and time.monotonic() - start >= 8 * 0.05


# ---------------------------------------------------------------------- malformed responses


def response(body: str | bytes, *headers: str, status: str = "200 OK") -> bytes:
    body = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status}", *(headers or [f"Content-Length: {len(body)}"]), "", ""]
    return "\r\n".join(lines).encode() + body


def chat(text: str = '"text"', usage: str = "{}") -> bytes:
    return response(f'{{"choices": [{{"message": {{"content": {text}}}}}], "usage": {usage}}}')


def forever(*parts):
    return itertools.cycle(parts)


GOOD = response('{"score": 2.5, "choices": [{"message": {"content": "text"}}]}')
MANY = b"x" * 2**16
SCRIPTS = {  # what a server sends; numbers are seconds that it waits
    "a byte now and then": (part for i in itertools.count() for part in (GOOD[i % len(GOOD):][:1], 0.05)),
    "a header now and then": itertools.chain([b"HTTP/1.1 200 OK\r\n"], forever(b"a: b\r\n", 0.05)),
    "a byte of the body now and then": itertools.chain([response("", "a: b")], forever(b" ", 0.05)),
    "a byte of a chunk now and then": itertools.chain(
        [response("", "Transfer-Encoding: chunked")], forever(b"1\r\n \r\n", 0.05)),
    "an error's body now and then": itertools.chain(
        [response("", "a: b", status="400 Bad")], forever(b" ", 0.05)),
    "nothing": [5],
    "an endless body": itertools.chain([response("", "a: b")], forever(MANY)),
    "an endless body of an error": itertools.chain([response("", "a: b", status="400 Bad")], forever(MANY)),
    "endless chunks": itertools.chain(
        [response("", "Transfer-Encoding: chunked")], forever(b"1\r\n \r\n" * 99)),
    "endless 100 Continue": forever(b"HTTP/1.1 100 Continue\r\n\r\n" * 99),
    "an endless status line": forever(MANY),
    "an endless trailer": itertools.chain(
        [response("0\r\n", "Transfer-Encoding: chunked")], forever(b"a: b\r\n" * 99)),
    "a length of 1e15": [response(GOOD, f"Content-Length: {10**15}")],
    "a length of 1e30": [response(GOOD, f"Content-Length: {10**30}")],
    "a chunk of 16^9999": [response("f" * 9999 + "\r\n", "Transfer-Encoding: chunked"), GOOD],
    "a chunk of 16^70000": [response("f" * 70000 + "\r\n", "Transfer-Encoding: chunked"), GOOD],
    "a chunk of -1": [response("-1\r\n", "Transfer-Encoding: chunked"), GOOD],
    "a score of 400 digits": [response(f'{{"score": {"9" * 400}}}')],
    "a score of 5000 digits": [response(f'{{"score": {"9" * 5000}}}')],
    "a score of 1e300": [response('{"score": 1e300}')],  # would end a run as an invalid reward
    "a score of 1e999": [response('{"score": 1e999}')],
    "a score of NaN": [response('{"score": NaN}')],
    "NaN beside the score": [response('{"score": 1, "loss": NaN}')],
    "-Infinity in a chat": [response('{"score": -Infinity}')],
    "JSON 100,000 deep": [response("[" * 100_000)],
    "objects 100,000 deep": [response('{"score":' * 100_000)],
    "invalid UTF-8": [response(b'{"score": 1, "a": "\xff"}')],
    "a list": [response("[2.5]")],
    "a number": [response("2.5")],
    "null": [response("null")],
    "an empty body": [response("")],
    "gzip": [response(gzip.compress(b'{"score": 2.5}'), "Content-Encoding: gzip")],
    "HTTP/0.9": [b'{"score": 2.5}'],
    "garbage": [bytes(range(256)) * 9],
    "half a status line": [b"HTTP/1.1 2"],
    "no reason phrase and no more": [b"HTTP/1.1 200"],
    "a status of 5000 digits": [response("{}", status="9" * 5000)],
    "a status of 99": [response(GOOD, status="99 Low")],
    "switching protocols": [response(GOOD, status="101 Switching")],
    "a header of 1 MB": [response("{}", "a: " + "b" * 10**6)],
    "10,000 headers": [response("{}", *["a: b"] * 10_000)],
    "a strange Retry-After": [
        response("{}", "Retry-After: Mon, 99 Jan 99999999999 00:00:00 GMT", status="500 No")],
    "a reset": [],
}
CHATS = {
    "a lone surrogate": chat(r'"\ud800"'), "text that is a list": chat('["a"]'), "a number": chat("5"),
    "no choices": response('{"choices": []}'), "usage: a list": chat(usage="[1]"),
    "usage: text": chat(usage='"7"'), "usage: NaN": chat(usage='{"completion_tokens": NaN}'),
    **{f"usage of {n}": chat(usage=f'{{"completion_tokens": {n}}}')
       for n in ('"7"', -1, 7.0, "true", '{"n": 7}', "[7]", 10**30, "9" * 5000, 1e999, r'"\ud800"')}}


@pytest.mark.parametrize("script, kind", [(script, "score") for script in SCRIPTS.values()] +
                         [([answer], "chat") for answer in CHATS.values()], ids=[*SCRIPTS, *CHATS])
def test_a_malformed_response_is_a_failed_call_and_the_next_one_works(script, kind):
    with RawEndpoint(lambda number, _: script if number == 0 else [GOOD]) as raw:
        asked, start = Endpoint(raw.url, timeout=0.3, attempts=1, say=None), time.monotonic()
        call = (lambda: asked.score("text")) if kind == "score" else (lambda: asked.chat([])[0])
        with pytest.raises(Unavailable, match=raw.url) as error:
            call()
        assert time.monotonic() - start < 20, "a call ends with its timeout"
        assert str(error.value).isprintable() and len(str(error.value)) < 400
        assert call() == (2.5 if kind == "score" else "text") and not asked.down()


@pytest.mark.parametrize("usage, read", [
    ("null", {}), ("{}", {}), ('{"prompt_tokens": null, "completion_tokens": 0}', {"completion_tokens": 0}),
    ('{"prompt_tokens": 5, "total_tokens": -1, "details": {"a": [1.5, "\\ud800"]}}', {"prompt_tokens": 5})])
def test_of_a_usage_only_the_two_counts_are_read(usage, read):
    with RawEndpoint(lambda *_: [chat(usage=usage)]) as raw:
        assert Endpoint(raw.url, attempts=1, say=None).chat([]) == ("text", read)


@pytest.mark.parametrize("good", [
    response(b'7\r\n{"score\r\n7;a=b\r\n": 2.5}\r\n0\r\na: b\r\n\r\n', "Transfer-Encoding: chunked"),
    response('{"score": 2.5}', "a: b"), b"HTTP/1.1 100 Continue\r\n\r\n" + GOOD, GOOD.replace(b"1.1", b"1.0"),
    response('{"score": 2.5}', status="201 Made"), response(GOOD[GOOD.index(b"{"):] + b" " * 10**7)],
    ids=["chunks", "no length", "100 Continue", "HTTP/1.0", "201", "10 MB"])
def test_every_good_response_is_read(good):
    with RawEndpoint(lambda *_: [good, 0.1]) as raw:
        assert Endpoint(raw.url, attempts=1, say=None).score("text") == 2.5


def test_a_request_that_is_not_read_and_addresses_that_do_not_answer_fail_in_time(monkeypatch):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as silent:
        port, start = silent.getsockname()[1], time.monotonic()
        asked = Endpoint(f"http://127.0.0.1:{port}", timeout=1.0, attempts=1, say=None)
        with pytest.raises(Unavailable, match="timed out"):
            asked.score("text" * 5 * 10**6)
        answers = socket.getaddrinfo("127.0.0.1", port, type=socket.SOCK_STREAM)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers * 4)
        assert time.monotonic() - start < 20
        start = time.monotonic()  # one connection waits to be accepted: no other can be made
        with pytest.raises(Unavailable, match="timed out"):
            asked.score("text")
        assert time.monotonic() - start < 3.5, "four addresses have the timeout together"


@pytest.fixture
def tls(tmp_path, monkeypatch):
    """A context of a server at 127.0.0.1 whose certificate is trusted."""
    done = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=tmp_path, capture_output=True)
    if done.returncode:
        pytest.skip("openssl makes no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    return context


def test_over_https_a_call_ends_in_time_too(tls):
    body = itertools.chain([response("", "a: b")], forever(b" ", 0.05))
    scripts = [[GOOD], forever(b"H", 0.05), body, [GOOD]]
    with RawEndpoint(lambda number, _: scripts[number], tls) as raw:
        asked, start = Endpoint(raw.url, timeout=2.0, attempts=1, say=None), time.monotonic()
        assert asked.score("text" * 10**5) == 2.5
        for _ in range(2):
            with pytest.raises(Unavailable, match="timed out"):
                asked.score("text")
        assert asked.score("text") == 2.5 and time.monotonic() - start < 40


def test_a_proxy_of_the_environment_is_used(monkeypatch):
    requests = []
    with RawEndpoint(lambda _, request: requests.append(request) or [GOOD]) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        assert Endpoint("http://gpu.invalid/v1", attempts=1, say=None).score("text") == 2.5
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert Endpoint(f"{proxy.url}/v2", attempts=1, say=None).score("text") == 2.5
    assert [r.split()[1] for r in requests] == [b"http://gpu.invalid/v1", b"/v2"]


@pytest.mark.parametrize("echo", [
    b"HTTP/1.1 400 %b\r\n\r\n", b"HTTP/1.1 503 %b\r\n\r\n", b"%b\r\n", b"HTTP/1.1 %b\r\n",
    b"%b/1.1 200 OK\r\n\r\n", b"HTTP/%b 200 OK\r\n\r\n",
    b"HTTP/1.1 500 No\r\n\r\n\0\xff{%b\x1b[2J", b"HTTP/1.1 200 OK\r\n\r\n%b",
    b'HTTP/1.1 200 OK\r\n\r\n{"score": "%b"}', b'HTTP/1.1 200 OK\r\n\r\n{"score": 1, "score": "\\ud800%b"}',
    b'HTTP/1.1 200 OK\r\n\r\n{"data": [{"probs": {"%b": 1}}]}'])
def test_a_key_that_comes_back_is_masked_wherever_it_stands(echo, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with RawEndpoint(lambda _, r: [echo % re.search(rb"Bearer (\S+)", r)[1]]) as raw:
        asked = Endpoint(raw.url, attempts=1, say=None)
        with pytest.raises((Unavailable, Refused)) as error:
            asked.score("text")
    for said in (str(error.value), asked.down()):
        assert "secret" not in said and said.isprintable()


def test_servers_made_up_at_random_raise_nothing_else_and_hang_no_call():
    counts = fuzz(40, 7)
    assert counts["tracebacks"] == counts["hangs"] == [] and counts["score"] and counts["failed"]
    assert sum(counts[name] for name in ("score", "refused", "failed")) == 40

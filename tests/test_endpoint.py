"""The client for servers: whatever they do, a call ends with an answer, or with a sentence that says why."""

import email.utils
import threading
import time

import pytest

from lib import endpoint
from lib.endpoint import Endpoint, Refused, Unavailable, each
from tests.fake_endpoint import FakeEndpoint

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


@pytest.mark.parametrize("how", ["400", "401", "404", "302"])
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
        with pytest.raises(ValueError, match="the key in OPENAI_API_KEY has characters") as error:
            client(fake)
        assert "secret" not in str(error.value)


def test_a_server_that_says_when_is_not_asked_before(monkeypatch):
    with FakeEndpoint(lambda number, _: "429" if number == 0 else "ok", retry_after="1") as fake:
        start = time.monotonic()
        client(fake).score("text")
        assert time.monotonic() - start >= 1
    told = [email.utils.formatdate(time.time() + 30), "7", "", "soon", "-3", "1e9", "99999999"]
    e = [endpoint.retry_after(type("E", (), {"headers": {"Retry-After": value}})) for value in told]
    assert 28 < e[0] <= 30 and e[1:] == [7, 0, 0, 0, 0, endpoint.LONGEST_REST]


def test_back_off_doubles(monkeypatch):
    rests = []
    server = Endpoint("http://a", attempts=6, say=None)  # alone: another test's may still be waiting
    monkeypatch.setattr(server, "report", lambda url, rest=0.0, down="": rests.append(rest))
    monkeypatch.setattr(server, "post", lambda *_: None)
    with pytest.raises(Unavailable):
        server.score("text")
    assert all(0.5 <= rest / (0.01 * 2**k) <= 1.5 for k, rest in enumerate(rests)) and len(rests) == 6


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


@pytest.mark.parametrize("urls", ["", "gpu1:80", "ftp://gpu1", "http://", "http://me:sk-1@gpu1", "http://a,b",
                                  "http://a:port", "http://[::1"])
def test_an_address_that_cannot_be_is_named(urls):
    with pytest.raises(ValueError, match="is no address of a server: write http://") as error:
        Endpoint(urls)
    assert "sk-1" not in str(error.value)


def test_each_calls_so_many_at_a_time_and_hands_back_what_is_raised():
    at_once, most, lock = 0, 0, threading.Lock()

    def call(i):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.01)
        with lock:
            at_once -= 1
        return 10 // (i - 5)

    back = {item: (result, error) for item, result, error in each(call, iter(range(20)), 4)}
    assert most == 4 and back.keys() == set(range(20))
    assert [i for i, (_, error) in back.items() if error] == [5] and back[7] == (5, None)
    assert isinstance(back[5][1], ZeroDivisionError)


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

"""Asking models that run elsewhere, over HTTP, on the standard library: chats with any server that
speaks OpenAI's protocol, scores from the server of a reward model.

An endpoint is one or more servers of one model, asked in turn. Where one is busy (429), fails (5xx, a
refused or cut connection, a timeout) or answers nonsense, another is asked, and itself again only after an
exponential back-off with jitter, or what a Retry-After says. Where none answers any more, calls wait.
"""

import email.utils
import http.client
import json
import math
import os
import queue
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator

from lib.options import UserError

ADDRESS = re.compile(r"https?://([^\s/?#@:\[\]]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?(/[^\s#@]*)?(#\S+)?")
BUSY = (408, 425, 429)
BACK_OFF = 0.5  # seconds after a call's first failure, doubled by each
AVOID = 30.0  # seconds for which a server that failed is not asked while another may be
LONGEST_REST = 600.0  # that a Retry-After can have
PAUSE = 1.0  # between attempts to find a server again
HELLO = "Hello"  # what finds out whether a server is back


class Refused(UserError):
    """A server understood a request and refused it, with `status` (4xx): asking again would not help."""
    status = 0

    @property
    def hopeless(self) -> bool:
        """Whether all calls would be refused: the key, the address or the name of the model is wrong."""
        return self.status in (401, 403, 404)


class Unavailable(ConnectionError):
    """No server gave a usable answer, though asked repeatedly."""


class StayHere(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: followed, it would turn POST into GET and show the key to another host."""
    def redirect_request(self, *_):
        return None


class Endpoint:
    """urls: comma-separated http(s)://HOST:PORT/PATH, with #MODEL after those that want a model's name.
        Raises ValueError.
    timeout: seconds without a byte after which a call has failed. attempts: of a call, over all servers.
    key: the environment variable that holds the API key, which no message shows.
    say: told every 30 s which servers are down, while calls wait for them; without it calls do not wait.
    rate: calls a minute at most, repeated ones included, of all servers together; 0: any number.
    """
    def __init__(self, urls: str, timeout: float = 60.0, attempts: int = 4, key: str = "OPENAI_API_KEY",
                 say: Callable[[str], None] | None = print, rate: float = 0.0):
        self.urls = list(dict.fromkeys(url.strip() for url in urls.split(",") if url.strip()))
        for url in self.urls or [urls]:
            if not ADDRESS.fullmatch(url):
                raise ValueError(f"{url.rpartition('@')[2]!r} is no address of a server: write "
                                 f"http://HOST:PORT/PATH, without a password; a key is read from {key}")
        self.timeout, self.attempts, self.say = timeout, max(attempts, len(self.urls)), say
        self.key, self.opener = os.environ.get(key, "").strip(), urllib.request.build_opener(StayHere)
        if not (self.key.isascii() and self.key.isprintable()):  # http.client's error would show it
            raise ValueError(f"the key in {key} has characters that no HTTP header can have")
        self.lock, self.asking, self.turn = threading.Lock(), threading.Lock(), 0
        self.gap, self.free = 60.0 / rate if rate else 0.0, 0.0  # time.monotonic() of the next call's turn
        self.rests: dict[str, float] = {}  # url: time.monotonic() before which it is not asked at all,
        self.avoid: dict[str, float] = {}  # and before which another is asked, if one may be
        self.failing: dict[str, tuple[float, str]] = {}  # url: time.time() of its first failure, why

    def chat(self, messages: list[dict], **options) -> tuple[str, dict]:
        """POST URL/chat/completions: the text, and its `usage` (prompt_tokens, completion_tokens, ...; {}
        if untold). The options (temperature, max_tokens, seed, ...) join the request."""
        def read(answer):
            text = answer["choices"][0]["message"]["content"]
            return "" if text is None else text.strip(), answer.get("usage") or {}

        hello = {"messages": [{"role": "user", "content": HELLO}], "max_tokens": 1}
        return self.ask("/chat/completions", {"messages": messages, **options}, read, hello)

    def score(self, text: str) -> float:
        """POST URL with {"input": text, "use_activation": false}: the score, before any sigmoid, from
        {"score": x}, {"data": [{"probs": [x]}]} (vLLM's /classify) or {"data": [{"data": [x]}]} (its
        /pooling; of [[x], ...], a number a token, the last)."""
        def read(answer):
            value = answer.get("score")
            if value is None:
                (item,) = answer["data"]
                value = item["probs"] if "probs" in item else item["data"]
                (value,) = value[-1] if isinstance(value[-1], list) else value
            if isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"a score of {value}")
            return float(value)

        return self.ask("", {"input": text, "use_activation": False}, read,
                        {"input": HELLO, "use_activation": False})

    def down(self) -> str:
        """Each server, since when it fails and why, if all do; else empty. Who answers anything but 5xx is
        not down."""
        with self.lock:
            return "" if len(self.failing) < len(self.urls) else "; ".join(
                f"{url} since {time.strftime('%H:%M:%S', time.localtime(since))} ({why})"
                for url, (since, why) in self.failing.items())

    def ask(self, path: str, body: dict, read: Callable, hello: dict):
        """read(answer), an object of JSON; where it raises, the answer was unusable. Raises Refused or
        Unavailable."""
        for last in (False, True):
            try:
                return self.attempt(path, body, read, self.attempts)
            except Unavailable:
                if not self.say or not self.down():
                    raise
                self.wait(path, hello, read)
                if last:  # they answer, but fail on this request
                    raise

    def wait(self, path: str, hello: dict, read: Callable):
        """Until a server is back. One thread asks, the others wait for it."""
        with self.asking:
            said = -math.inf
            while why := self.down():
                if time.monotonic() - said >= 30:
                    self.say(f"waiting, because no server answers: {why}")
                    said = time.monotonic()
                time.sleep(PAUSE)
                try:
                    self.attempt(path, hello, read, len(self.urls))
                except (Refused, Unavailable):
                    pass

    def attempt(self, path: str, body: dict, read: Callable, attempts: int):
        reasons = {}
        for attempt in range(attempts):
            url, rest, down = self.choose(), 0.0, False
            try:
                value = read(self.post(url, path, body))
                self.report(url)
                return value
            except urllib.error.HTTPError as e:
                reasons[url], rest, down = f"{e.code} {self.reason(e)}", retry_after(e), e.code >= 500
                if not down and e.code not in BUSY:
                    self.report(url)
                    refused = Refused(f"{url} answered {reasons[url]}")
                    refused.status = e.code
                    raise refused from None
            except (OSError, http.client.HTTPException) as e:
                reasons[url], down = str(getattr(e, "reason", "") or e) or type(e).__name__, True
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
                reasons[url] = f"an unusable answer ({type(e).__name__}: {str(e)[:100]})"
            back_off = BACK_OFF * 2**attempt * random.uniform(0.5, 1.5)
            self.report(url, max(back_off, rest), reasons[url] if down else "")
        raise Unavailable("; ".join(f"{url}: {why}" for url, why in reasons.items()))

    def choose(self) -> str:
        """The next server in turn that may be asked, or the one that may first; returns when it may."""
        with self.lock:
            self.turn, now = (self.turn + 1) % len(self.urls), time.monotonic()
            order = self.urls[self.turn:] + self.urls[:self.turn]
            url = min(order, key=lambda url: max(now, self.rests.get(url, 0.0), self.avoid.get(url, 0.0)))
            if url in self.failing:
                self.avoid[url] = now + self.timeout  # this call finds out whether it is back
            rest = self.rests.get(url, 0.0) - now
        time.sleep(max(0.0, rest))
        return url

    def report(self, url: str, rest: float = 0.0, down: str = ""):
        with self.lock:
            self.rests[url], self.avoid[url] = time.monotonic() + rest, 0.0
            if down:
                self.failing[url] = self.failing.get(url, (time.time(),))[0], down
                self.avoid[url] = time.monotonic() + AVOID
            else:
                self.failing.pop(url, None)

    def post(self, url: str, path: str, body: dict):
        address, _, model = url.partition("#")
        body = json.dumps({"model": model} | body if model else body).encode()
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(address.rstrip("/") + path if path else address, body, headers)
        with self.lock:
            wait = max(0.0, self.free - time.monotonic())
            self.free = time.monotonic() + wait + self.gap
        time.sleep(wait)
        with self.opener.open(request, timeout=self.timeout) as response:
            return json.loads(response.read())

    def reason(self, e: urllib.error.HTTPError) -> str:
        """What the server says, without the key, which some repeat."""
        try:
            text = " ".join(e.read().decode(errors="replace").split())
        except (OSError, http.client.HTTPException):
            text = ""
        return ((text.replace(self.key, "***") if self.key else text) or str(e.reason))[:300]


def model_names(urls: str) -> str:
    """What the servers are told to run, wherever they are; of a path or URL without #MODEL itself."""
    return ",".join(sorted({url.strip().rpartition("#")[2] for url in urls.split(",")}))


def retry_after(e: urllib.error.HTTPError) -> float:
    """Seconds, told as a number or as a date; 0 where nothing is told."""
    value = e.headers.get("Retry-After", "0")
    try:
        rest = float(value) if value.strip().isdigit() else (
            email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
    return min(max(rest, 0.0), LONGEST_REST)


class Pool:
    """Daemon threads that make calls, as a context: what `submit` is given comes back through `done` as
    (key, value, None) or (key, None, exception), in the order in which calls return.

    Those of concurrent.futures are joined when the interpreter exits: one that hangs would keep the process
    for ever. After the context no further call begins; one that is under way keeps its thread until it
    returns.
    """

    def __init__(self, call: Callable, threads: int):
        self.call, self.threads, self.closed = call, threads, False
        self.todo, self.done = queue.SimpleQueue(), queue.SimpleQueue()

    def __enter__(self):
        for _ in range(self.threads):
            threading.Thread(target=self.work, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.closed = True
        for _ in range(self.threads):
            self.todo.put(None)

    def submit(self, key, *arguments):
        self.todo.put((key, arguments))

    def work(self):
        while (task := self.todo.get()) and not self.closed:
            key, arguments = task
            try:
                self.done.put((key, self.call(*arguments), None))
            except BaseException as e:  # asyncio's CancelledError is no Exception
                self.done.put((key, None, e))


def each(call: Callable, items: Iterable, threads: int) -> Iterator[tuple]:
    """(item, call(item), None) or (item, None, exception) of each item, in the order in which calls return.
    What must not be lost where the reader walks away, `call` has to keep."""
    with Pool(call, threads) as pool:
        items = list(items)
        for item in items:
            pool.submit(item, item)
        for _ in items:
            yield pool.done.get()

"""HTTP calls to models on servers, by the standard library: chats with OpenAI-compatible servers, scores from
servers of reward models.

An endpoint is one or more servers of one model, asked in turn. After a busy answer (429), a failure (5xx, a
refused or cut connection, a timeout) or a malformed answer another server is asked, and the same one only
after an exponential back-off with jitter, or after its Retry-After. While no server answers, calls wait.
"""

import email.utils
import http.client
import io
import json
import math
import os
import queue
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from lib.options import UserError

ADDRESS = re.compile(r"https?://([^\s/?#@:\[\]]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?(/[^\s?#@]*)?(#\S+)?")
BUSY = (408, 425, 429)
HOPELESS = (401, 403, 404)  # every call would get it: the key, the address or the model's name is wrong
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)  # answer
LARGEST = 2**24  # bytes of a response, headers included
BACK_OFF = 0.5  # seconds after a call's first failure, doubled by each
AVOID = 30.0  # seconds for which other servers are preferred to one that failed
LONGEST_REST = 600.0  # seconds; a longer Retry-After is cut to it
PAUSE = 1.0  # seconds between attempts to find a server again
HELLO = "Hello"  # the request that checks whether a server is back


class Refused(UserError):
    """A server refused a request with `status` 3xx or 4xx, and would refuse it again."""
    status = 0


class Unavailable(ConnectionError):
    """No server gave a usable answer in any attempt."""


class BoundedReader(io.RawIOBase):
    """Reads at most LARGEST bytes from a socket before `deadline`. Raises OSError."""
    def __init__(self, sock, deadline: float):
        self.sock, self.file, self.deadline, self.room = sock, sock.makefile("rb", 0), deadline, LARGEST

    def makefile(self, _) -> io.BufferedReader:  # called by http.client.HTTPResponse
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if (left := self.deadline - time.monotonic()) <= 0:
            raise TimeoutError("timed out")
        self.sock.settimeout(left)
        n = self.file.readinto(buffer)
        self.room -= n
        if self.room < 0:
            raise OSError(f"a response of more than {LARGEST} bytes")
        return n

    def close(self):
        self.file.close()
        super().close()


class DeadlineHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Applies a request's timeout to the whole call. A socket's timeout is for each operation, so that a
    server that sends a byte now and then would hold the thread for ever."""
    def do_open(self, kind, request, **options):
        deadline = time.monotonic() + request.timeout

        class Connection(kind):
            def connect(self):  # tries each of the host's addresses, with self.timeout for each
                self.timeout /= len(socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM))
                super().connect()
                self.sock.settimeout(max(0.001, deadline - time.monotonic()))  # for sending the request

            def response_class(self, sock, **options):
                return http.client.HTTPResponse(BoundedReader(sock, deadline), **options)

        return super().do_open(Connection, request, **options)


class Endpoint:
    """urls: comma-separated http(s)://HOST:PORT/PATH, with #MODEL if the server needs a model's name.
    timeout: seconds for a whole call, from connecting to the last byte. attempts: per call, over all servers.
    key: the environment variable that holds the API key, which no message shows.
    say: called every 30 s with the servers that are down while calls wait; without it calls do not wait.
    rate: largest number of calls per minute, with retries, over all servers; 0: no limit.

    Proxies are those of the environment (http_proxy, https_proxy, no_proxy). Raises UserError.
    """
    def __init__(self, urls: str, timeout: float = 60.0, attempts: int = 4, key: str = "OPENAI_API_KEY",
                 say: Callable[[str], None] | None = print, rate: float = 0.0):
        self.urls = list(dict.fromkeys(url.strip() for url in urls.split(",") if url.strip()))
        for url in self.urls or [urls]:
            if not ADDRESS.fullmatch(url):
                shown = "one with @ or ?" if re.search("[@?]", urls) else repr(url)  # commas split passwords
                raise UserError(f"{shown} is no address of a server: write http://HOST:PORT/PATH, without a "
                                f"password or a query; a key is read from {key}")
        self.timeout, self.attempts, self.say = timeout, max(attempts, len(self.urls)), say
        self.opener = urllib.request.OpenerDirector()  # follows no redirect: another host would see the key
        for handler in (urllib.request.ProxyHandler(), DeadlineHandler()):
            self.opener.add_handler(handler)
        self.key = os.environ.get(key, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):  # http.client's error would show it
            raise UserError(f"the key in {key} has characters that no HTTP header can have: correct it")
        self.lock, self.asking, self.turn = threading.Lock(), threading.Lock(), 0
        self.gap = 60.0 / rate if rate else 0.0  # seconds between calls
        self.free = 0.0  # time.monotonic() before which no call begins
        self.rests: dict[str, float] = {}  # url: time.monotonic() before which it is not asked
        self.avoid: dict[str, float] = {}  # url: time.monotonic() before which others are preferred
        self.failing: dict[str, tuple[float, str]] = {}  # url: time.time() and reason of the first failure

    def chat(self, messages: list[dict], **options) -> tuple[str, dict]:
        """POST URL/chat/completions with the options (temperature, max_tokens, seed, ...). Returns the text
        and, if the server reports them, the prompt_tokens and completion_tokens of its `usage`."""
        def read(answer):
            text = answer["choices"][0]["message"]["content"]
            text = "" if text is None else text.strip()
            text.encode()  # raises UnicodeEncodeError for a lone surrogate, which no file can hold
            reported = answer.get("usage") or {}
            usage = {name: reported[name] for name in ("prompt_tokens", "completion_tokens")
                     if reported.get(name) is not None}
            if not all(type(n) is int and 0 <= n < 2**53 for n in usage.values()):
                raise ValueError(f"a usage of {usage}")
            return text, usage

        hello = {"messages": [{"role": "user", "content": HELLO}], "max_tokens": 1}
        return self.ask("/chat/completions", {"messages": messages, **options}, read, hello)

    def score(self, text: str) -> float:
        """POST URL with {"input": text, "use_activation": false}. Returns the score, before any sigmoid, from
        {"score": x}, {"data": [{"probs": [x]}]} (vLLM's /classify) or {"data": [{"data": [x]}]} (its
        /pooling; the last of [[x], ...], a number per token)."""
        def read(answer):
            value = answer.get("score")
            if value is None:
                (item,) = answer["data"]
                value = item["probs"] if "probs" in item else item["data"]
                (value,) = value[-1] if isinstance(value[-1], list) else value
            if isinstance(value, bool) or not abs(value) < 1e38:  # see scoring.LARGEST
                raise ValueError(f"a score of {value}")
            return float(value)

        return self.ask("", {"input": text, "use_activation": False}, read,
                        {"input": HELLO, "use_activation": False})

    def down(self) -> str:
        """If all servers are down, each with the time and reason of its failure; else empty. A server with
        any non-5xx response counts as up."""
        with self.lock:
            return "" if len(self.failing) < len(self.urls) else "; ".join(
                f"{url} since {time.strftime('%H:%M:%S', time.localtime(since))} ({why})"
                for url, (since, why) in self.failing.items())

    def ask(self, path: str, body: dict, read: Callable, hello: dict):
        """Returns read(answer) for the JSON of a server's answer; the call has failed if `read` raises.
        hello: the request that checks whether a server is back. Raises Refused or Unavailable."""
        for last in (False, True):
            try:
                return self.attempt(path, body, read, self.attempts)
            except Unavailable:
                if not self.say or not self.down():
                    raise
                self.wait(path, hello, read)
                if last:  # the servers answer, but fail on this request
                    raise

    def wait(self, path: str, hello: dict, read: Callable):
        """Returns once a server is back, or `say` is None. One thread asks; the others wait for it."""
        with self.asking:
            said = -math.inf
            while (why := self.down()) and (say := self.say):
                if time.monotonic() - said >= 30:
                    say(f"waiting, because no server answers: {why}")
                    said = time.monotonic()
                time.sleep(PAUSE)
                with suppress(Refused, Unavailable):
                    self.attempt(path, hello, read, len(self.urls))

    def attempt(self, path: str, body: dict, read: Callable, attempts: int):
        reasons = {}
        for attempt in range(attempts):
            url, rest, down = self.choose(), 0.0, False
            try:
                value = read(self.post(url, path, body))
                self.report(url)
                return value
            except urllib.error.HTTPError as e:
                why, rest, down = f"{e.code} {e.reason}", retry_after(e.headers), e.code >= 500
                if 300 <= e.code < 500 and e.code not in BUSY:
                    self.report(url)
                    refused = Refused(f"{url} answered {self.printable(why)}")
                    refused.status = e.code
                    raise refused from None
            except (OSError, http.client.HTTPException) as e:
                why, down = str(getattr(e, "reason", "") or e) or type(e).__name__, True
            except MALFORMED as e:
                why = f"an unusable answer ({type(e).__name__}: {e})"
            reasons[url] = self.printable(why)
            back_off = BACK_OFF * 2**attempt * random.uniform(0.5, 1.5)
            self.report(url, max(back_off, rest), reasons[url] if down else "")
        raise Unavailable("; ".join(f"{url}: {why}" for url, why in reasons.items()))

    def choose(self) -> str:
        """Returns the next server in turn that may be asked. If none may, waits for the first."""
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
        """Notes the result of a call. rest: seconds before the next. down: why the server has failed."""
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
            content = b"".join(iter(lambda: response.read(2**16), b""))  # allocates no more than is received
            if response.length:
                raise http.client.IncompleteRead(content, response.length)
        if not 200 <= response.status < 300:
            raise urllib.error.HTTPError(url, response.status, content.decode(errors="replace").strip()
                                         or response.reason, response.headers, None)
        return json.loads(content, parse_constant=int)  # int raises ValueError for NaN and Infinity

    def printable(self, text: str) -> str:
        """A server's message or an error, on one line and without the key, which some servers repeat."""
        text = (text.replace(self.key, "***") if self.key else text)[:1000]
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]


def model_names(urls: str) -> str:
    """The names of the servers' models. A path, or a URL without #MODEL, is its own name."""
    return ",".join(sorted({url.strip().rpartition("#")[2] for url in urls.split(",")}))


def retry_after(headers) -> float:
    """Seconds of a Retry-After header, a number or a date; 0 without one."""
    value = headers.get("Retry-After", "0")
    try:
        rest = float(value) if value.strip().isdigit() else (
            email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except MALFORMED:
        return 0.0
    return min(max(rest, 0.0), LONGEST_REST)


class Pool:
    """Context manager of daemon threads that make calls. Each call of `submit` puts (key, value, None) or
    (key, None, exception) into `done`, in the order in which calls return. After the context no call begins.

    Threads of concurrent.futures are joined at exit, where one that hangs would keep the process for ever.
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
    """Yields (item, call(item), None), or (item, None, error) if it raised Refused or Unavailable, in the
    order in which calls return. Raises any other exception, and a Refused with a HOPELESS status. `call` must
    save results itself that may not be lost if the caller stops early."""
    with Pool(call, threads) as pool:
        items = list(items)
        for item in items:
            pool.submit(item, item)
        for _ in items:
            item, value, error = pool.done.get()
            local = error is not None and not isinstance(error, (Refused, Unavailable))
            if local or getattr(error, "status", 0) in HOPELESS:
                raise error
            yield item, value, error

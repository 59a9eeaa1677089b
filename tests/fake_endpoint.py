"""Servers that misbehave as told: one of chats after OpenAI's protocol and scores, one of any bytes."""

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeEndpoint:
    """As a context it runs, in threads; `stop` and `start` let it die and come back at the same address.

    behave(number of the call, request) -> how it is answered: "ok", "slow" (after a second), "hang" (until
        the server stops), "broken" (half of the JSON), "wrong" (other keys), "cut" (the connection, in the
        middle of the answer), or a status, "429", "500", "400", "302" (elsewhere), ...
    reply(request) -> the text of a chat. score(request) -> the score. retry_after: sent with each error.
    calls: all requests as they came, also those that were answered badly; headers: theirs.
    """

    def __init__(self, behave: Callable = lambda number, request: "ok",
                 reply: Callable = lambda request: "", score: Callable = lambda request: 0.0,
                 retry_after: str = ""):
        self.behave, self.reply, self.score, self.retry_after = behave, reply, score, retry_after
        self.calls, self.headers, self.lock, self.port, self.released = [], [], threading.Lock(), 0, None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        class Handler(BaseHTTPRequestHandler):
            do_POST = lambda handler: self.answer(handler)  # noqa: E731
            log_message = lambda *_: None  # noqa: E731

        class Server(ThreadingHTTPServer):
            daemon_threads, block_on_close = True, False
            request_queue_size = 128  # with socketserver's 5 some of 16 calls at once wait for another SYN
            handle_error = lambda *_: None  # noqa: E731  # that the client went away

        self.released = threading.Event()
        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        if self.released.is_set():
            return
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler):
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            number = len(self.calls)
            self.calls.append(request)
            self.headers.append(dict(handler.headers))
        how = self.behave(number, request)
        if how == "hang":
            self.released.wait()
            handler.close_connection = True
            return
        if how == "slow":
            time.sleep(1)
        status = int(how) if how.isdigit() else 200
        if status != 200:
            answer = {"error": {"message": f"fake {how}, key {handler.headers['Authorization']}"}}
        elif how == "wrong":
            answer = {"something": "else", "data": [{"data": "text"}]}
        elif handler.path.endswith("/chat/completions"):
            answer = {"choices": [{"message": {"role": "assistant", "content": self.reply(request)}}],
                      "usage": {"prompt_tokens": 5, "completion_tokens": 7}}
        elif handler.path.endswith("/classify"):
            answer = {"data": [{"label": None, "probs": [self.score(request)], "num_classes": 1}]}
        elif handler.path.endswith("/pooling"):
            answer = {"data": [{"object": "pooling", "data": [self.score(request)]}]}
        else:
            answer = {"score": self.score(request)}
        body = json.dumps(answer).encode()
        sent = body[:len(body) // 2] if how in ("broken", "cut") else body
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body if how == "cut" else sent)))
        if self.retry_after and status != 200:
            handler.send_header("Retry-After", self.retry_after)
        if status == 302:
            handler.send_header("Location", f"{self.url}/elsewhere")
        handler.end_headers()
        handler.wfile.write(sent)


class RawEndpoint:
    """A server that sends any bytes at any time, in threads, as a context.

    script(number of the call, request) -> an iterable of bytes, which are sent, and of seconds to wait; then
        the connection is closed. The request is all that came, as bytes.
    tls: an ssl.SSLContext.
    """

    def __init__(self, script: Callable, tls=None):
        self.script, self.tls, self.calls = script, tls, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http{'s' * bool(tls)}://127.0.0.1:{self.listener.getsockname()[1]}"

    def __enter__(self):
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self.listener.close()

    def accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self.listener.accept()
                self.calls += 1
                threading.Thread(target=self.answer, args=(connection, self.calls - 1), daemon=True).start()

    def answer(self, connection: socket.socket, number: int):
        with contextlib.suppress(OSError):  # the client went away
            connection.settimeout(10)
            connection = self.tls.wrap_socket(connection, server_side=True) if self.tls else connection
            with connection:
                request = b""
                while True:
                    head, _, body = request.partition(b"\r\n\r\n")
                    length = re.search(rb"Content-Length: (\d+)", head)
                    if length and len(body) >= int(length[1]):
                        break
                    if not (more := connection.recv(2**16)):
                        return
                    request += more
                for part in self.script(number, request):
                    if isinstance(part, bytes):
                        connection.sendall(part)
                    else:
                        time.sleep(part)

"""A server that misbehaves as it is told to: chats after OpenAI's protocol, scores at any other path."""

import json
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

"""Servers made up at random: what they send is a good response, changed in bytes, headers, JSON or timing.

    python -m tests.fuzz_servers [NUMBER [SEED]]
"""

import json
import random
import sys
import time

from lib.endpoint import Endpoint, Refused, Unavailable, each
from tests.fake_endpoint import RawEndpoint

TIMEOUT, HANG = 1.0, 5.0  # seconds that a call may take, and after which it hangs
GOOD = {"score": 2.5, "choices": [{"message": {"role": "assistant", "content": "A text. 世界"}}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 0}}}
VALUES = ["null", "true", "false", "0", "-1", "2.5", "1e300", "1e999", "-1e999", "NaN", "Infinity", "-0",
          "-Infinity", "9" * 400, "9" * 5000, '""', '"a"', r'"\ud800"', r'"\u0000"', '"\x1b[2J"', "[]", "{}",
          "[[1.5]]", "[" * 5000 + "]" * 5000, "[" * 100_000, '{"a":' * 3000, '[{"probs": [1]}]',
          '[{"data": [[1], []]}]']
HEADERS = ["Content-Length: -1", f"Content-Length: {10**15}", f"Content-Length: {10**30}",
           "Content-Length: 3", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip", "Set-Cookie: a=b",
           "Content-Encoding: gzip", "Connection: keep-alive", "Connection: upgrade", "Location: http://[",
           "Location: ?", "Retry-After: 1e9", "Retry-After: Thu", "Retry-After: " + "9" * 5000,
           "Retry-After: Mon, 01 Jan 0001 00:00:00 -0000", "a: " + "b" * 70_000, ": ", "no colon", " folded",
           "a: \xff\x00", "Content-Type: text/html; charset=?", "\r\n".join(["a: b"] * 50),
           "\r\n".join(["a: b"] * 5000), "Content-Length: x"]
STATUSES = ["200 OK", "200", "204 Empty", "206 Part", "100 Continue", "101 Switch", "301 Moved", "400 Bad",
            "401 No", "408 Late", "429 Busy", "500 Error", "503 Down", "600 Odd", "999 Odd", "0", "-5",
            "20", "x"]
SIZES = ["%x"] * 20 + ["%X;a=b"] * 3 + ["0x%x", "-%x", "%x0", "f" * 9000 + "%x", ""]  # of a chunk
CHANGES = ["json", "header", "status", "chunks", "bytes", "timing"]


def change_json(body: str, rng: random.Random) -> str:
    """Puts an odd value in the place of one of the object's."""
    paths = ["score", "choices", "usage", "message", "content", "prompt_tokens", "completion_tokens"]
    name = rng.choice(paths)
    marked = json.dumps(json.loads(body, object_hook=lambda o: o | ({name: "MARK"} if name in o else {})))
    return marked.replace('"MARK"', rng.choice(VALUES))


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice([0, 1, 1, 2, 10]))
        put = rng.choice([b"", rng.randbytes(rng.randint(1, 3)), data[at:end] * 2, b"\r\n", b"\r\n\r\n"])
        data[at:end] = put
    return bytes(data[:rng.randrange(len(data) + 1)] if rng.random() < 0.2 else data)


def chunked(body: bytes, rng: random.Random) -> bytes:
    sizes = rng.choices(SIZES, k=3)
    parts = [body[i * len(body) // 3:(i + 1) * len(body) // 3] for i in range(3)]
    sent = [(size % len(part) if "%" in size else size).encode() + b"\r\n" + part + b"\r\n"
            for size, part in zip(sizes, parts)]
    return b"".join(sent) + rng.choice([b"0\r\n\r\n", b"", b"0\r\na: b\r\n\r\n", b"0\r\n"])


def make_script(rng: random.Random) -> list:
    """What a server sends: bytes, and seconds that it waits."""
    body, status, headers = json.dumps(GOOD), "200 OK", []
    changes = rng.sample(CHANGES, rng.choice([0, 1, 1, 1, 2, 3]))
    if "json" in changes:
        body = change_json(body, rng)
    if "status" in changes:
        status = rng.choice(STATUSES)
    body = body.encode()
    if "chunks" in changes:
        body, headers = chunked(body, rng), ["Transfer-Encoding: chunked"]
    elif rng.random() < 0.7:
        headers = [f"Content-Length: {len(body)}"]
    if "header" in changes:
        headers[rng.randint(0, len(headers)):] = rng.choices(HEADERS, k=rng.choice([1, 1, 2]))
    head = "\r\n".join([f"HTTP/1.{rng.randint(0, 1)} {status}", *headers, "", ""]).encode("latin-1")
    data = change_bytes(head + body, rng) if "bytes" in changes else head + body
    if "timing" not in changes:
        return [data]
    kind = rng.choice(["pieces", "drip", "stall", "repeat", "late"])
    if kind == "drip":
        return [part for i in range(len(data)) for part in (data[i:i + 1], 0.2)][:60]
    if kind == "repeat":
        return [data] + [rng.choice([data, head, data[-20:], b"\r\n"]), 0.0001] * 50_000
    cut = rng.randrange(len(data) + 1)
    return {"pieces": [data[:cut], rng.uniform(0, 0.5), data[cut:]], "stall": [data[:cut], 12],
            "late": [rng.uniform(0, 1.5), data]}[kind]


def ask(script: list, kind: str) -> tuple[str, str]:
    """How a call of that server ends, and an exception that it must not raise."""
    with RawEndpoint(lambda *_: script) as raw:
        server, start = Endpoint(raw.url, TIMEOUT, attempts=1, say=None), time.monotonic()
        try:
            if kind == "score":
                how = "score" if isinstance(server.score("text"), float) else "no float"
            else:
                text, usage = server.chat([{"role": "user", "content": "text"}])
                json.dumps([text, usage], ensure_ascii=False, allow_nan=False).encode()
                how = "score" if all(type(n) is int and n >= 0 for n in usage.values()) else "no usage"
        except Refused as e:
            how = "refused" if str(e).isprintable() else repr(e)
        except Unavailable as e:
            how = "failed" if str(e).isprintable() else repr(e)
        except BaseException as e:
            how = repr(e)
        return "hang" if time.monotonic() - start > HANG else how, kind


def fuzz(number: int, seed: int) -> dict:
    """Asks `number` servers, each once: counts of {"score", "refused", "failed"}, and lists of "tracebacks",
    what else was raised or returned, and of "hangs"."""
    rngs = [random.Random(f"{seed} {i}") for i in range(number)]
    scripts = [(make_script(rng), rng.choice(["score", "chat"])) for rng in rngs]
    ends = {}

    def call(i: int):
        ends[i] = ask(*scripts[i])

    list(each(call, range(number), 16))
    found = {name: sum(how == name for how, _ in ends.values()) for name in ("score", "refused", "failed")}
    odd = [f"server {i} of seed {seed}, {kind}: {how}" for i, (how, kind) in ends.items() if how not in found]
    hangs = [line for line in odd if line.endswith(": hang")]
    return found | {"tracebacks": [line for line in odd if line not in hangs], "hangs": hangs}


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    print(json.dumps(fuzz(*numbers, *(100, 0)[len(numbers):]), indent=1))

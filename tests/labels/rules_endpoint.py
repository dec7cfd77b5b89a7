"""An OpenAI-compatible endpoint that answers by known rules: `python -m tests.labels.rules_endpoint --port 8011`.

It is no language model. With `--tokens-of RUN` it counts tokens as that run's language model does. The name of the
model that is asked says how it answers:

- `marked-words`: as an explainer it names the word that is marked most often, as a judge it looks for a label's words
  in the text, or in the marks. What is right by such rules can be planted.
- `hostile`: every label means harm to whoever shows it.
- `wrong`: as `marked-words`, but every label is of a word that stands nowhere.
- `yes`, `no`: the judge always says so.
- `malformed`, `refusal`, `empty`, `huge`, `thinking`: every answer is like that.
- `unreadable`, `cut`, `slow`: what comes is no answer, breaks off, or drips.
- `busy`: every question is answered only when it is asked a second time, with 429 before.
- `particular`: takes neither a temperature nor `max_tokens`.
- `unknown-model`, `forbidden`, `broken`: 404, 401 and 500.
- `logprobs`: a simulation's numbers come with log-probabilities.

`POST .../embeddings` answers, for every model but those that fail as above, with vectors by known rules: each word has
a direction of its own, and the words of one of CONCEPTS share another, in which most of their length lies. Its own
failures are `one-less`, `text`, `nan`, `endless`, `zero`, `ragged`, `twice` and `wider`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORD = re.compile(r"[^\W\d_]+|\d+")
NOWHERE = "zyzzyva"
CONCEPTS = (("money", "dollar", "tax", "gold"), ("war", "army", "navy"), ("fruit", "apple", "banana", "cherry"))
DIMENSIONS = 64
HOSTILE = "<script>alert(1)</script>\n| `x` [y](javascript:z) ![](http://w) \u202e"


class RulesEndpoint(ThreadingHTTPServer):
    """The endpoint; `asked` counts its questions, `most_at_once` how many it had at a time."""

    daemon_threads = True

    def __init__(self, port: int = 0, count: Callable[[str], int] = lambda text: len(text) // 4 + 1):
        super().__init__(("127.0.0.1", port), _Handler)
        self.count = count
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.embedded: list[str] = []
        """Texts whose vectors were asked for."""
        self.most_texts = 1 << 30
        """Texts of a request for vectors above which it is refused."""
        self.seen: Counter[str] = Counter()
        self.at_once = self.most_at_once = 0
        self.delay, self.forbidden, self.thought = 0.0, "", "<think>Is it [0]?</think>"
        self.lock = threading.Condition()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def wait_for(self, questions: int) -> None:
        """Until so many questions have come."""
        with self.lock:
            assert self.lock.wait_for(lambda: len(self.asked) >= questions, 60)

    def __enter__(self) -> RulesEndpoint:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()


def data_of(prompt: str) -> list[dict[str, Any]]:
    """The objects between the lines BEGIN DATA and END DATA."""
    lines = prompt.split("\n")
    return [json.loads(line) for line in lines[lines.index("BEGIN DATA") + 1 : lines.index("END DATA")]]


def kind_of(prompt: str) -> str:
    if prompt.startswith("You name"):
        return "explain"
    return "simulate" if "how active is" in prompt else "fuzz" if "marked tokens those" in prompt else "detect"


def words(text: str) -> list[str]:
    return [word.casefold() for word in WORD.findall(text)]


def marked_words(text: str) -> list[str]:
    return [word for part in re.findall(r"<<(.*?)>>", text, re.DOTALL) for word in words(part)]


def label_of(rows: list[dict[str, Any]]) -> str:
    """The marked word that most contexts share and no silent one has."""
    counts = Counter(word for row in rows if "active" in row for word in dict.fromkeys(marked_words(row["active"])))
    silent = {word for row in rows if "silent" in row for word in words(row["silent"])}
    found = [word for word, _ in counts.most_common() if word not in silent] or [w for w, _ in counts.most_common(1)]
    return f"the word {found[0]}" if found else "nothing that is a word"


def judged(kind: str, rows: list[dict[str, Any]]) -> list[int]:
    """What the rules say of a label's contexts or tokens: its words, but for those of `label_of` itself."""
    meant = set(words(rows[0]["label"])) - {"the", "word"}
    if kind == "simulate":
        return [10 * bool(meant & set(words(row["token"]))) for row in rows[1:]]
    look = marked_words if kind == "fuzz" else words
    return [int(bool(meant & set(look(row["context"])))) for row in rows[1:]]


def vector_of(text: str) -> list[float]:
    """The sum of the directions of its words."""
    found = [0.0] * DIMENSIONS
    for word in words(text):
        own = int.from_bytes(hashlib.sha256(word.encode()).digest()[:2], "big") % (DIMENSIONS - len(CONCEPTS))
        found[len(CONCEPTS) + own] += 1.0
        for concept, meant in enumerate(CONCEPTS):
            found[concept] += 3.0 * (word in meant)
    return found if any(found) else [1.0] * DIMENSIONS


def vectors_of(how: str, texts: list[str]) -> list[dict[str, Any]]:
    """The `data` of an answer, as the model does it, in any order."""
    vectors: list[Any] = [vector_of(text) for text in texts]
    wrong = {"nan": float("nan"), "endless": 1e400, "text": "1.0"}
    if how in wrong:
        vectors[-1][3] = wrong[how]
    elif how == "zero":
        vectors[-1] = [0.0] * DIMENSIONS
    elif how == "ragged":
        vectors[-1].append(1.0)
    elif how == "wider":
        vectors = [[*vector, 0.0] for vector in vectors]
    rows = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
    if how == "twice":
        rows[-1]["index"] = 0
    return rows[:0:-1] if how == "one-less" else rows[::-1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RulesEndpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append(body)
            server.headers.append(dict(self.headers))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            prompt = body["messages"][0]["content"] if "messages" in body else json.dumps(body["input"])
            server.embedded += body.get("input", [])
            server.seen[prompt] += 1
            again = server.seen[prompt] > 1
            server.lock.notify_all()
        time.sleep(server.delay)
        try:
            self._answer(body, prompt, again)
        finally:
            with server.lock:
                server.at_once -= 1

    def _answer(self, body: dict[str, Any], prompt: str, again: bool) -> None:
        how = body["model"]
        refusals = {"unknown-model": 404, "forbidden": 401, "broken": 500, "too-long": 400}
        if how in refusals:
            return self._send(refusals[how], json.dumps({"error": {"message": f"no <b>{how}</b>"}}).encode())
        if self.server.forbidden and f"<< {self.server.forbidden}>>" in prompt:
            return self._send(403, b'{"error": "flagged"}')
        if how == "particular" and (wrong := [name for name in ("temperature", "max_tokens") if name in body]):
            more = " use max_completion_tokens" if "max_tokens" in wrong else ""
            return self._send(400, json.dumps({"error": {"message": f"{wrong[0]} is not supported;{more}"}}).encode())
        if how == "busy" and not again:
            return self._send(429, b"{}", {"Retry-After": "0"})
        if how == "unreadable":
            return self._send(200, b"<html>gateway</html>")
        if self.path.endswith("/embeddings"):
            if len(body["input"]) > self.server.most_texts:
                return self._send(413, b'{"error": "too many texts"}')
            if self.server.forbidden in body["input"]:
                return self._send(400, b'{"error": "a text is too long"}')
            usage = {"prompt_tokens": sum(map(self.server.count, body["input"]))}
            return self._whole(how, {"data": vectors_of(how, body["input"]), "usage": usage})
        text, logprobs = self._text(how, prompt)
        answer: dict[str, Any] = {
            "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": self.server.count(prompt), "completion_tokens": self.server.count(text)},
        }
        if logprobs and body.get("logprobs"):
            answer["choices"][0]["logprobs"] = {"content": logprobs}
        self._whole(how, answer)

    def _whole(self, how: str, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        if how == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif how == "slow":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            for byte in content:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.02)
        else:
            self._send(200, content)

    def _text(self, how: str, prompt: str) -> tuple[str, list[dict[str, Any]] | None]:
        fixed = {
            "malformed": 'It is [1, 2 and {"label": 7}', "empty": " ",
            "refusal": "I'm sorry, but I can't help with that.",
            "huge": "[" + "1," * 50_000 + "1]",
        }  # fmt: skip
        if how in fixed:
            return fixed[how], None
        kind, rows = kind_of(prompt), data_of(prompt)
        if kind == "explain":
            label = {"wrong": f"the word {NOWHERE}", "hostile": HOSTILE}.get(how) or label_of(rows)
            text = json.dumps({"label": label})
            return (f"{self.server.thought}\n```json\n{text}\n```", None) if how == "thinking" else (text, None)
        said = [int(how == "yes")] * (len(rows) - 1) if how in ("yes", "no") else judged(kind, rows)
        logprobs = [
            {"token": str(n), "bytes": [48], "top_logprobs": [
                {"token": str(n), "logprob": -0.1}, {"token": "5", "logprob": -2.4}, {"token": "x", "logprob": -3.0},
            ]}
            for n in said
        ]  # fmt: skip
        return json.dumps(said), logprobs if how == "logprobs" else None

    def _send(self, status: int, content: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Nothing: tests would be full of it."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8011)
    parser.add_argument("--tokens-of", metavar="RUN")
    arguments = parser.parse_args()
    server = RulesEndpoint(arguments.port)
    if arguments.tokens_of:
        from mtc.language_model import load_tokenizer  # 5 s, which those who import the rules need not wait
        from mtc.storage import open_run

        tokenizer = load_tokenizer(open_run(arguments.tokens_of).config().model)
        server.count = lambda text: len(tokenizer.encode(text))
    print(f"answers at {server.url}", flush=True)
    server.serve_forever()

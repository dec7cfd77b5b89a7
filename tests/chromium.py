"""A headless Chromium for tests, spoken to over its debugging pipe: no driver package is needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT_S = 60
_WAIT = """new Promise((done, fail) => {
  const end = performance.now() + LIMIT;
  (function look() {
    if (document.readyState === "complete" && (CONDITION)) done();
    else if (performance.now() > end) fail(new Error("never true"));
    else requestAnimationFrame(look);
  })();
})"""
_MIDDLE = """(() => {
  const element = document.querySelector(SELECTOR);
  element.scrollIntoView({ block: "center" });
  const box = element.getClientRects()[0], at = [box.x + box.width / 2, box.y + box.height / 2];
  return element.contains(document.elementFromPoint(...at)) ? at : null;
})()"""


def find() -> str | None:
    """The browser's path, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab; `events` are all that it said, by method."""

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers = commands, answers
        self._buffer, self._count, self._session = b"", 0, ""
        self.events: list[tuple[str, dict[str, Any]]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Run a command of the DevTools protocol; raises RuntimeError with the browser's message if it fails."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def open(self, url: str, width: int, height: int, scheme: str) -> None:
        """Load a page at a window size and in a colour scheme; returns when it has loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._load("about:blank")  # a change of the part after # alone would not load the page again
        self._load(url)

    def _load(self, url: str) -> None:
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self._read()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Return once the page has loaded, styles and all, and a JavaScript expression is true, looked at with every
        frame, on the next page too if need be."""
        script = _WAIT.replace("LIMIT", str(TIMEOUT_S * 500)).replace("CONDITION", expression)
        while True:
            try:
                self.evaluate(script)
                return
            except RuntimeError as error:
                if not re.search("navigated|context", str(error)):
                    raise AssertionError(f"not so after {TIMEOUT_S // 2} s: {expression}: {error}") from None

    def click(self, selector: str) -> None:
        """A mouse click in the middle of an element, which must be visible there."""
        where = self.evaluate(_MIDDLE.replace("SELECTOR", json.dumps(selector)))
        assert where is not None, f"{selector} is covered by something else"
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Text into whatever has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        """A key by its name and Windows key code; modifiers: 1 Alt, 2 Control, 8 Shift."""
        text = {"text": "\r"} if key == "Enter" and not modifiers else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                modifiers=modifiers, **(text if kind == "keyDown" else {}),
            )  # fmt: skip

    def screenshot(self, whole: bool = False) -> bytes:
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], TIMEOUT_S)
            if not ready:
                raise RuntimeError(f"the browser has not answered for {TIMEOUT_S} s")
            part = os.read(self._answers, 1 << 20)
            if not part:
                raise RuntimeError("the browser is gone")
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(message)
        if "method" in answer:
            self.events.append((answer["method"], answer["params"]))
        return answer


def _away(end: int) -> int:
    """The same pipe's end under a number that is not 3 or 4."""
    moved = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(end)
    return moved


@contextmanager
def browser(path: str) -> Iterator[Page]:
    """A browser with one tab, which ends with the block."""
    command_end, commands, answers, answer_end = (_away(end) for end in (*os.pipe(), *os.pipe()))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:  # its helpers may still be writing
        process = subprocess.Popen(
            # The shell gives the pipes the numbers 3 and 4, which the browser expects; sh knows no numbers above 9.
            ["bash", "-c", f'exec 3<&{command_end} 4>&{answer_end}; exec "$@"', "bash", path, "--headless=new",
             "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--hide-scrollbars", f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(command_end, answer_end), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(command_end)
        os.close(answer_end)
        try:
            yield Page(commands, answers)
        finally:
            os.close(commands)
            process.terminate()
            process.wait()
            os.close(answers)

"""A headless Chromium that a test works with: it clicks, waits, and sees every request and message.

It is spoken to in Chromium's own protocol over two pipes, which needs no further package.
"""

import base64
import contextlib
import json
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from scripts.chromium import make_command

_PATIENCE = 120.0  # seconds, on a machine that may be busy


class Tab:
    """One page of a browser.

    Attributes:
        requests: addresses that the page has asked for, but for those within itself.
        complaints: what it wrote to the console as a warning or error, and exceptions.
    """

    def __init__(self, to_browser: int, from_browser: int):
        self._out, self._in = to_browser, from_browser
        self._buffer = b""
        self._answers: dict[int, dict[str, Any]] = {}
        self._number = 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log", "DOM"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Give a command of Chromium's protocol and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _PATIENCE
        while self._number not in self._answers:
            assert time.monotonic() < deadline, f"no answer to {method}"
            self._read(1.0)
        answer = self._answers.pop(self._number)
        assert "error" not in answer, f"{method}: {answer}"
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self, seconds: float) -> None:
        if not select.select([self._in], [], [], seconds)[0]:
            return
        self._buffer += os.read(self._in, 2**20)
        *messages, self._buffer = self._buffer.split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._note(message["method"], message["params"])

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("data:", "blob:")):
                self.requests.append(url)
        elif method == "Network.webSocketCreated":
            self.requests.append(params["url"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            said = [str(x.get("value", x.get("description"))) for x in params["args"]]
            self.complaints.append(" ".join(said))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url')}")

    def show(self, *, width: int, height: int = 1000, dark: bool = False) -> None:
        """Give the window a size and the reader a taste."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Wait until an expression is true (an element is, too); returns its value."""
        deadline = time.monotonic() + _PATIENCE
        while (value := self.ask(expression)) in (None, False, 0, ""):
            complaints = "\n".join(self.complaints)
            assert time.monotonic() < deadline, f"never true: {expression}\n{complaints}"
            self._read(0.1)
        return value

    def click(self, x: float, y: float) -> None:
        """Press the mouse on a point of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, element: str) -> None:
        """Wait for an element, given as an expression, and press the mouse on its middle."""
        self.wait(element)
        x, y = self.ask(
            f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center'}});"
            "const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self.click(x, y)

    def upload(self, selector: str, file: pathlib.Path) -> None:
        """Choose a file in an input."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def shoot(self, file: pathlib.Path) -> None:
        """Write a picture of the whole page."""
        taken = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(taken["data"]))


# The browser reads its commands from file 3 and answers on 4.
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


@contextlib.contextmanager
def open_tab() -> Iterator[Tab]:
    """A tab of a new browser, which is closed at the end."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [sys.executable, "-I", "-c", _START, str(to_read), str(from_write)]
        command += make_command(profile, "--remote-debugging-pipe", "about:blank")
        process = subprocess.Popen(
            command, pass_fds=(to_read, from_write), stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(from_write)
        try:
            yield Tab(to_write, from_read)
        finally:
            process.terminate()
            process.wait()
            os.close(to_write)
            os.close(from_read)

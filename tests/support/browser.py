"""A headless Chromium over its debugging pipe: a page is opened in it, and what it met on the way is kept."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from select import select
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT_SECONDS = 60
HEIGHT = 900
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions")
DOMAINS = ("Page", "Network", "Runtime", "Log")
OVERFLOWING = """[...document.querySelectorAll('body *')].filter(e => {
  if (e.closest('.at')) return false;  // readings: hidden until the pointer is there
  for (let p = e.parentElement; p; p = p.parentElement)
    if (['auto', 'hidden', 'scroll'].includes(getComputedStyle(p).overflowX) && p !== document.body) return false;
  const box = e.getBoundingClientRect();
  return box.width > 0 && (box.right > document.documentElement.clientWidth + 1 || box.left < -1);
}).map(e => `${e.tagName}.${e.getAttribute('class')}: ${e.textContent.slice(0, 60)}`)"""


@dataclass
class Page:
    """`requests`: what it asked for, itself included. `complaints`: of the console, of the log, exceptions."""

    send: Any
    events: list[dict[str, Any]]
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def evaluate(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def overflowing(self) -> list[str]:
        """Elements that stand out of the window, those in a box that scrolls left out."""
        found: list[str] = self.evaluate(OVERFLOWING)
        return found

    def hover(self, x: float, y: float) -> None:
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path) -> None:
        picture = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))

    def settle(self) -> None:
        """Take in what has happened so far."""
        for event in self.events:
            name, facts = event["method"], event["params"]
            if name == "Network.requestWillBeSent":
                self.requests.append(facts["request"]["url"])
            if name in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(facts))
        self.events.clear()


Opener = Callable[..., Page]


@contextmanager
def browser(folder: Path) -> Iterator[Opener]:
    """A browser that keeps its files in `folder`. Gives `open_page(path, width, dark=False)`."""
    assert BROWSER is not None
    mine_in, its_out = os.pipe()
    its_in, mine_out = os.pipe()
    command = [BROWSER, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", "about:blank"]
    # The pipe's ends must be 3 and 4 in the browser.
    shell = ["bash", "-c", f'exec 3<&{its_in} 4>&{its_out}; exec "$@"', "bash", *command]
    process = subprocess.Popen(shell, pass_fds=(its_in, its_out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    os.close(its_in)
    os.close(its_out)
    try:
        yield partial(_open_page, _Pipe(mine_in, mine_out))
    finally:
        process.kill()
        process.wait()
        os.close(mine_in)
        os.close(mine_out)


def _open_page(pipe: "_Pipe", path: Path, width: int, dark: bool = False) -> Page:
    """The page at `path` in a window of that width, once it has loaded."""
    target = pipe.call("Target.createTarget", None, url="about:blank")["targetId"]
    session = pipe.call("Target.attachToTarget", None, targetId=target, flatten=True)["sessionId"]
    send = partial(_send, pipe, session)
    pipe.events.clear()
    for domain in DOMAINS:
        send(f"{domain}.enable")
    send("Emulation.setDeviceMetricsOverride", width=width, height=HEIGHT, deviceScaleFactor=1, mobile=width < 500)
    send(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    )
    send("Page.navigate", url=path.as_uri())
    pipe.wait_for("Page.loadEventFired")
    page = Page(send, pipe.events)
    page.wait_for_save()
    return page


def _send(pipe: "_Pipe", session: str, method: str, **parameters: Any) -> Any:
    return pipe.call(method, session, **parameters)


class _Pipe:
    """Messages end with a zero byte."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self.incoming, self.outgoing = incoming, outgoing
        self.number = 0
        self.rest = b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None, **parameters: Any) -> Any:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self.outgoing, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.number:
            self.events += [answer] if "method" in answer else []
        assert "error" not in answer, answer
        return answer["result"]

    def wait_for(self, name: str) -> None:
        while not any(event["method"] == name for event in self.events):
            self.events.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            assert select([self.incoming], [], [], TIMEOUT_SECONDS)[0], "the browser says nothing"
            read = os.read(self.incoming, 1 << 20)
            assert read, "the browser is gone"
            self.rest += read
        message, _, self.rest = self.rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

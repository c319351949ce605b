"""A page in headless Chromium, driven as a person would: keys, clicks, and what is on the screen afterwards."""

import base64
import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from websockets.sync.client import connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
_KEYS = {"Tab": 9, "Enter": 13, " ": 32}
_PATIENCE = 45.0


class Browser:
    """Chromium with one page, by its DevTools protocol.

    Args:
        folder: Where it may write.

    Attributes:
        said: What the page has written on the console, and what has gone wrong in it.
    """

    def __init__(self, folder: Path) -> None:
        switches = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run")
        user = folder / "user"
        command = [str(CHROMIUM), *switches, f"--user-data-dir={user}", "about:blank"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self.said: list[str] = []
        self._count = 0
        end = time.monotonic() + _PATIENCE
        while not (user / "DevToolsActivePort").is_file() or not (user / "DevToolsActivePort").read_text():
            assert time.monotonic() < end, "the browser does not come up"
            time.sleep(0.05)
        port = (user / "DevToolsActivePort").read_text().split()[0]
        [page] = [one for one in httpx.get(f"http://127.0.0.1:{port}/json/list").json() if one["type"] == "page"]
        self._open = ExitStack()
        self._socket = self._open.enter_context(connect(page["webSocketDebuggerUrl"], max_size=None))
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Do something of the protocol, and return the answer."""
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while (told := json.loads(self._socket.recv(_PATIENCE))).get("id") != self._count:
            if told["method"] == "Log.entryAdded":
                self.said.append(told["params"]["entry"]["text"])
            elif told["method"] == "Runtime.exceptionThrown":
                self.said.append(str(told["params"]["exceptionDetails"]))
        assert "error" not in told, told
        result: dict[str, Any] = told["result"]
        return result

    def open(self, url: str) -> None:
        """Go to a page."""
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def value(self, script: str) -> Any:
        """Return what a script comes to in the page."""
        done = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until a script is true."""
        end = time.monotonic() + _PATIENCE
        while not self.value(f"Boolean({script})"):
            assert time.monotonic() < end, (
                f"it never came: {script}\n{self.said}\n{self.value('document.body.innerText')}"
            )
            time.sleep(0.03)

    def type(self, text: str) -> None:
        """Write where the focus is."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, *, control: bool = False) -> None:
        """Press one key."""
        code = _KEYS[key]
        held = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 2 if control else 0}
        text = {"Enter": "\r", " ": " "}.get(key)
        self.send("Input.dispatchKeyEvent", type="keyDown", **held, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **held)

    def tab_to(self, name: str) -> None:
        """Press Tab until what has that name for a screen reader has the focus."""
        for _ in range(60):
            self.press("Tab")
            if self.focused()["name"] == name:
                return
        raise AssertionError(f"the keyboard does not come to {name}")

    def controls(self) -> list[dict[str, str]]:
        """Return role and name of whatever can be worked with, as a screen reader has them."""
        nodes = self.send("Accessibility.getFullAXTree")["nodes"]
        return [_described(node) for node in nodes if not node["ignored"] and "focusable" in _properties(node)]

    def focused(self) -> dict[str, str]:
        """Return role and name of what has the focus."""
        held = self.send("Runtime.evaluate", expression="document.activeElement")["result"]["objectId"]
        return _described(self.send("Accessibility.getPartialAXTree", objectId=held, fetchRelatives=False)["nodes"][0])

    def screenshot(self, path: Path, width: int, height: int, scheme: str) -> None:
        """Write what is to be seen in a window of some size, in a light or a dark scheme."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        time.sleep(0.5)
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


def _properties(node: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one["value"].get("value") for one in node.get("properties", ())}


def _described(node: dict[str, Any]) -> dict[str, str]:
    return {part: node.get(part, {}).get("value", "") for part in ("role", "name")}

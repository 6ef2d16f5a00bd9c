"""A headless Chromium for tests, spoken to in the DevTools protocol over two pipes.

`--remote-debugging-pipe` needs no port and no library: JSON texts, each ended by a zero
byte, go in at descriptor 3 and come out at 4.
"""

import itertools
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATH = next(filter(None, map(shutil.which, NAMES)), None)

_OPTIONS = (
    *("--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"),
    *("--no-first-run", "--disable-dev-shm-usage", "--disable-extensions"),
    *("--disable-background-networking", "--hide-scrollbars"),
)
_PATIENCE = 30  # seconds for one answer
_TEXTS = {"Enter": "\r"}
_CODES = {"Tab": 9}  # of keys that do nothing without one


class Chromium:
    """One browser with one page.

    Attributes:
      events: everything that the page reported since it was opened.
    """

    def __init__(self, folder):
        ends = [folder / "in", folder / "out"]
        for end in ends:
            os.mkfifo(end)
        # Both ways, so that opening waits for nobody.
        self._in, self._out = (os.open(end, os.O_RDWR) for end in ends)
        script = 'exec "$0" "$@" 3<"$IN" 4>"$OUT"'
        profile = f"--user-data-dir={folder / 'profile'}"
        self._process = subprocess.Popen(
            ["sh", "-c", script, PATH, *_OPTIONS, profile, "about:blank"],
            env=os.environ | {"IN": str(ends[0]), "OUT": str(ends[1])},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._rest, self._ids, self.events = b"", itertools.count(1), []
        self._session = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def close(self):
        self._session = None
        self.send("Browser.close")
        self._process.wait(_PATIENCE)
        os.close(self._in)
        os.close(self._out)

    def send(self, method, **params):
        """The result of a command."""
        message = {"id": next(self._ids), "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._in, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == message["id"]:
                assert "error" not in found, found["error"]
                return found["result"]
            self.events.append(found)

    def _read(self):
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._out], [], [], _PATIENCE)
            assert ready, "Chromium does not answer"
            self._rest += os.read(self._out, 1 << 16)
        text, self._rest = self._rest.split(b"\0", 1)
        return json.loads(text)

    def open(self, path, width=1280, height=900, scheme="light"):
        """Shows a file, as a reader's system with that colour scheme does."""
        self.events.clear()
        size = {"width": width, "height": height}
        self.send(
            "Emulation.setDeviceMetricsOverride",
            **{**size, "deviceScaleFactor": 1, "mobile": False},
        )
        self.scheme(scheme)
        self.send("Page.navigate", url=path.as_uri())
        self.until("document.readyState === 'complete'")

    def scheme(self, name, media=""):
        """Takes the reader's system for a dark or a light one, or for paper."""
        feature = {"name": "prefers-color-scheme", "value": name}
        self.send("Emulation.setEmulatedMedia", media=media, features=[feature])

    def run(self, script):
        """The value of an expression of the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script):
        end = time.monotonic() + _PATIENCE
        while not self.run(script):
            assert time.monotonic() < end, script
            time.sleep(0.02)

    def key(self, name):
        """Presses a key."""
        text = _TEXTS.get(name, name if len(name) == 1 else "")
        press = {"type": "keyDown", "key": name, "code": name}
        press |= {"windowsVirtualKeyCode": _CODES.get(name, 0)}
        press |= {"text": text} if text else {}
        self.send("Input.dispatchKeyEvent", **press)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=name, code=name)

    def mouse(self, what, x, y):
        """Does one of "move", "press", "drag", "release" or "click" at a place."""
        kinds = {"move": ["Moved"], "press": ["Pressed"], "drag": ["Moved"]}
        kinds |= {"release": ["Released"], "click": ["Pressed", "Released"]}
        held = {} if what == "move" else {"button": "left", "clickCount": 1}
        held |= {"buttons": 1} if what == "drag" else {}
        for kind in kinds[what]:
            event = {"type": f"mouse{kind}", "x": x, "y": y}
            self.send("Input.dispatchMouseEvent", **event, **held)

"""A headless Chromium, by its driver's own protocol (W3C WebDriver): no package is needed."""

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from running import free_port


class Browser:
    """To be closed; skips the test where there is no Chromium."""

    def __init__(self):
        if not (driver := shutil.which("chromedriver")) or not shutil.which("chromium"):
            pytest.skip("needs chromium and its driver (Debian: apt-get install chromium chromium-driver)")
        self.url = f"http://127.0.0.1:{free_port()}"
        port = f"--port={self.url.rpartition(':')[2]}"
        self.process = subprocess.Popen([driver, port], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._start()
        except BaseException:
            self.process.terminate()
            raise

    def _start(self) -> None:
        for _ in range(200):
            try:
                self._call("GET", "/status")
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        flags = ["--headless=new", "--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required"]
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # it has none for root
        wanted = {"goog:chromeOptions": {"args": flags}, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.url += f"/session/{session['sessionId']}"

    def _call(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def open(self, path) -> None:
        self._call("POST", "/url", {"url": path.as_uri()})

    def run(self, script: str):
        """What a script's `return` gives; a promise is awaited."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def press(self, *keys: str) -> None:
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def log(self, kind: str) -> list[dict]:
        """New entries of the `browser` (errors) or `performance` (requests) log."""
        return self._call("POST", "/se/log", {"type": kind})

    def devtools(self, command: str, **parameters):
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def close(self) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait(timeout=30)

"""Driver of Debian's Chromium by its devtools protocol: contexts with cookies of their own, keys, and what a page asked for."""

import asyncio
import json
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions", "--disable-background-networking")
SECONDS = 60.0
GONE = ("Inspected target navigated or closed", "Cannot find context with specified id", "Execution context was destroyed")


class Navigated(Exception):
    """The page in which an expression ran has given way to another."""


class Browser:
    """A running browser, which no network but this machine's own addresses reaches."""

    def __init__(self) -> None:
        # helper processes may write to it for a moment after the first one has ended
        self.folder = tempfile.TemporaryDirectory(prefix="studio-browser-", ignore_cleanup_errors=True)
        rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        command = [str(CHROMIUM), *FLAGS, rules, "--remote-debugging-port=0", f"--user-data-dir={self.folder.name}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file, end = Path(self.folder.name) / "DevToolsActivePort", time.monotonic() + SECONDS
        while not (port_file.is_file() and len(port_file.read_text().split()) == 2):
            assert time.monotonic() < end and self.process.poll() is None, "chromium does not start"
            time.sleep(0.05)
        port, path = port_file.read_text().split()
        self.events: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._run(self._connect(f"ws://127.0.0.1:{port}{path}"))

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(SECONDS)

    async def _connect(self, url: str) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(url, max_msg_size=0)
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                self._waiting.pop(said["id"]).set_result(said)
            else:
                self.events[said.get("sessionId", "")].append(said)

    async def _call(self, method: str, session: str, params: dict[str, Any]) -> Any:
        self._number += 1
        self._waiting[self._number] = future = self._loop.create_future()
        body = {"id": self._number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        await self._socket.send_str(json.dumps(body))
        said = await future
        if any(gone in said.get("error", {}).get("message", "") for gone in GONE):
            raise Navigated(method)
        assert "error" not in said, (method, said)
        return said["result"]

    def call(self, method: str, session: str = "", **params: Any) -> Any:
        return self._run(self._call(method, session, params))

    def page(
        self, url: str, cookie: str = "", *, like: "Page | None" = None, width: int = 1280, height: int = 900, dark: bool = False
    ) -> "Page":
        """A page in a context of its own, or in that of another page (a second tab)."""
        context = like.context if like else self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, context)
        for domain in ("Page", "Network", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        if cookie:
            name, _, value = cookie.partition("=")
            page.call("Network.setCookie", name=name, value=value, url=url, httpOnly=True, sameSite="Strict")
        page.call("Page.navigate", url=url)
        return page

    def close(self) -> None:
        self._run(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.process.terminate()
        self.process.wait(SECONDS)
        self.folder.cleanup()


class Page:
    """A page of a browser."""

    def __init__(self, browser: Browser, session: str, context: str):
        self.browser, self.session, self.context = browser, session, context

    def call(self, method: str, **params: Any) -> Any:
        return self.browser.call(method, self.session, **params)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; promises are awaited."""
        said = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in said, (expression, said["exceptionDetails"])
        return said["result"].get("value")

    def reload(self) -> None:
        """Load the page anew, and wait until the one before is gone: it may look like the new one."""
        self.js("window.before = true")
        self.call("Page.reload")
        self.wait("!window.before && document.readyState === 'complete'")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + SECONDS
        tried = f"(() => {{ try {{ return Boolean({expression}) }} catch {{ return false }} }})()"  # a page may have no body yet
        while not self._holds(tried):
            assert time.monotonic() < end, (expression, self.js("document.body.innerText"), self.said("Runtime.exceptionThrown"))
            time.sleep(0.02)

    def _holds(self, expression: str) -> bool:
        try:
            return bool(self.js(expression))
        except Navigated:  # the page to wait for is the next one
            return False

    def text(self) -> str:
        return str(self.js("document.body.innerText"))

    def press(self, key: str) -> None:
        """Press a key, as a keyboard does."""
        more = {"Enter": {"text": "\r", "windowsVirtualKeyCode": 13}, "Tab": {"windowsVirtualKeyCode": 9}}
        given = more.get(key, {"text": key} if len(key) == 1 else {})
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **given)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def said(self, method: str) -> list[dict[str, Any]]:
        """Events of a kind."""
        return [event["params"] for event in list(self.browser.events[self.session]) if event["method"] == method]

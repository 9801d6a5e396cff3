"""The HTTP server in a thread; and the page in a real browser: Debian's Chromium, headless, driven by Playwright.

The browser's tests are skipped where it or Playwright is missing.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.chat import ChatFormat
from llama.config import LlamaConfig
from llama.generation import Doctor
from llama.model import Llama
from llama.sampling import SamplingParams
from llama.tokenizer import Tokenizer
from tests.web.page_server import PageServer
from tests.web.running import Running, start

ROOT = Path(__file__).resolve().parents[2]
AXE = "4.14.1"  # axe-core's version: its rules decide what passes
# As root Chromium has no sandbox of its own; the rest keeps it from looking for hosts that are not the test's.
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="session")
def doctor(small_tokenizer: Tokenizer) -> Doctor:
    """A random model of 2 layers."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(32, 2, 4, 2, 48, small_tokenizer.vocab_size, max_seq_len=256)).eval()
    params = SamplingParams(temperature=0.0, repetition_penalty=1.0)
    return Doctor("tiny", model, small_tokenizer, ChatFormat("dialogue", ""), params, 20)


@pytest.fixture
def serve(doctor: Doctor) -> Iterator[Callable[..., Running]]:
    """Starts servers, which are stopped at the end."""
    started: list[Running] = []

    def begin(*args: Any, **options: Any) -> Running:
        started.append(start(options.pop("doctor", doctor), *args, **options))
        return started[-1]

    yield begin
    for running in started:
        running.stop()
        running.server.should_exit = running.server.force_exit = True
    for running in started:
        running.thread.join(20)
        assert not running.thread.is_alive()


# Not for the whole session: while Playwright runs, its thread has an event loop, and no other test may start one.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Debian's chromium (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[PageServer]:
    with PageServer() as server:
        yield server


@pytest.fixture
def page(browser: Any, server: PageServer) -> Iterator[Any]:
    """The page, opened, in a browser that has never seen it. What it complains about on its console fails the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: line.type == "error" and complaints.append(line.text))
    page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}") or dialog.dismiss())
    page.goto(server.url)
    page.get_by_role("button", name="Send").wait_for()
    yield page
    context.close()
    # A refusal and a cut connection are the test's own, and the browser notes them.
    assert [c for c in complaints if "Failed to load resource" not in c] == []


@pytest.fixture(scope="module")
def axe(browser: Any) -> str:
    """axe-core's source, fetched once from the npm registry into .cache/."""
    folder = ROOT / ".cache" / f"axe-{AXE}"
    source = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not source.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("needs npm to fetch axe-core")
        command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), f"axe-core@{AXE}"]
        if subprocess.run(command, capture_output=True, timeout=120).returncode:
            pytest.skip("needs axe-core, and npm could not fetch it")
    return source.read_text(encoding="utf-8")

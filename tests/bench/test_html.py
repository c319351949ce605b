"""The page, in a real browser: it shows everything without an error and without asking anybody for anything."""

import shutil
import subprocess
from pathlib import Path

import pytest

from cvx_deploy.bench.html import page
from cvx_deploy.bench.markdown import report
from tests.bench.results import results

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")


def opened(text: str, folder: Path) -> tuple[str, list[str]]:
    """Return the document that Chromium makes of a page, and what is on its console."""
    place = folder / "bench.html"
    place.write_text(text, encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={folder}/user"]
    command = [str(BROWSER), *words, "--virtual-time-budget=2000", "--dump-dom", place.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
def test_page_loads_without_a_word_on_the_console(tmp_path: Path) -> None:
    document, console = opened(page(results()), tmp_path)
    assert console == []
    assert document.count("<svg ") == 3
    assert "onnxruntime" in document


@needs_browser
@pytest.mark.parametrize("addition", ['<img src="http://localhost/x.png">', "<script>alert(1)</script>"])
def test_browser_refuses_a_page_that_asks_for_more(tmp_path: Path, addition: str) -> None:
    _, console = opened(page(results()).replace("</body>", f"{addition}</body>"), tmp_path)
    assert console


def test_every_value_is_escaped() -> None:
    assert "a CPU &lt;of some kind&gt;" in page(results())
    assert "<of some kind>" not in page(results())


def test_markdown_says_what_was_not_measured_and_how_the_rest_was() -> None:
    text = report(results())
    assert "- fp8: measured beside engines for GPUs only" in text
    assert "- seconds: a clock" in text
    assert "| onnxruntime | 1.1 s (1 to 1.2) | 2.00 (2.00 to 2.00) | 4 s | 3,273 |" in text

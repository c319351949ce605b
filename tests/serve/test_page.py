"""The page, in a real browser: from a prompt to a playing video by keyboard, named for a screen reader, and closed."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from cvx_deploy.serve.api import PAGE
from cvx_deploy.serve.keys import add_key
from tests.serve.browser import Browser, needs_browser
from tests.serve.conftest import PROMPT, Server, Still, until
from tests.serve.test_refusals import picture

CARD = "document.querySelector('.card')"
VIDEO = f"{CARD}.querySelector('video')"
SEEN = """
window.seen = [];
new MutationObserver(() => {
  const state = document.querySelector('.card .state')?.textContent;
  const shown = document.querySelector('.card .preview:not([hidden])')?.src.slice(0, 15) ?? '';
  window.seen.push(`${state} ${shown}`);
}).observe(document.getElementById('gallery'), {subtree: true, childList: true, characterData: true, attributes: true});
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as running:
        yield running


@contextmanager
def listening(still: Still) -> Iterator[str]:
    """Serve an application whose jobs wait for ever, and give its address."""
    server = uvicorn.Server(uvicorn.Config(still.client.app, port=0, log_config=None, lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://localhost:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def opened(browser: Browser, url: str) -> None:
    browser.said.clear()
    browser.open(url)
    browser.wait("document.querySelectorAll('#model option').length === 2")


def text(browser: Browser, selector: str) -> str:
    found: str = browser.value(f"document.querySelector({selector!r}).textContent")
    return found


@needs_browser
def test_the_whole_way_from_a_prompt_to_a_playing_video_by_keyboard(browser: Browser, server: Server) -> None:
    opened(browser, server.url)
    browser.value(SEEN)
    assert browser.focused()["name"] == "Prompt"
    browser.type(PROMPT)
    browser.tab_to("Seed")
    browser.type("7")
    browser.tab_to("Advanced")
    browser.press("Enter")
    browser.tab_to("Steps")
    browser.type("6")
    browser.press("Enter", control=True)
    browser.wait(f"{CARD} && {VIDEO}.currentTime > 0 && !{VIDEO}.paused && {VIDEO}.videoWidth === 48")
    seen = browser.value("window.seen")
    assert any(re.match(r"Step \d+ of 6 $", one) for one in seen), seen
    assert "Frame 9 of 9 data:image/jpeg" in seen
    assert text(browser, "#live") == f"Ready: {PROMPT}"
    assert "6 steps · seed 7" in text(browser, ".card .facts")

    browser.tab_to("Again, new seed")
    browser.press("Enter")
    facts = f"{CARD}.querySelector('.facts').textContent"  # a server that others used has other videos below
    browser.wait(f"!{facts}.endsWith('seed 7') && {VIDEO}.currentTime > 0")
    assert "6 steps" in text(browser, ".card .facts")
    assert not text(browser, ".card .facts").endswith("seed 7")
    for _ in range(2):
        browser.value(f"{CARD}.querySelector('.delete').focus()")
        browser.press("Enter")
        assert text(browser, ".card .delete") == "Delete for good?"
        count = browser.value("document.querySelectorAll('.card').length")
        browser.press("Enter")
        browser.wait(f"document.querySelectorAll('.card').length === {count} - 1")
        assert browser.value("document.activeElement !== document.body"), "the keyboard is not lost"
    assert browser.said == []


@needs_browser
def test_a_key_lets_in_stays_in_the_tab_and_can_be_forgotten(browser: Browser, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    key = add_key(keys, "alice")
    still = Still(tmp_path, keys)
    with listening(still) as url:
        browser.open(url)
        browser.wait("!document.getElementById('unlock').hidden")
        assert browser.focused()["name"] == "API key"
        browser.type("wrong")
        browser.press("Enter")
        browser.wait("document.getElementById('key-failure').textContent === 'That key is not valid here.'")
        browser.type(key)
        browser.press("Enter")
        browser.wait("!document.querySelector('main').hidden")
        assert browser.value("[localStorage.length, document.cookie, location.href]") == [0, "", f"{url}/"]
        opened(browser, url)
        browser.wait("document.activeElement.id === 'prompt'")
        browser.type(PROMPT)
        browser.tab_to("Make the video")
        browser.press("Enter")
        browser.wait(f"{CARD}?.querySelector('.state').textContent === 'Waiting, it is next'")
        browser.value(f"{CARD}.querySelector('.cancel').focus()")
        browser.press("Enter")
        browser.wait(f"{CARD}.querySelector('.state').textContent === 'Cancelled'")
        assert browser.focused()["name"] == "Again, new seed"
        browser.value("document.getElementById('forget').click()")
        browser.wait("document.querySelector('main').hidden && !document.querySelector('.card')")
        assert browser.value("sessionStorage.length") == 0
    assert still.store.counts()["cancelled"] == 1
    still.store.close()


@needs_browser
def test_an_image_is_asked_for_and_sent_where_the_model_starts_from_one(
    browser: Browser, still: Still, tmp_path: Path
) -> None:
    (tmp_path / "first.png").write_bytes(picture())
    with listening(still) as url:
        opened(browser, url)
        assert not [one for one in browser.controls() if one["name"].startswith("First frame")]
        browser.value("document.getElementById('model').value = 'mini-i2v'")
        browser.value("document.getElementById('model').dispatchEvent(new Event('change'))")
        browser.value("document.getElementById('prompt').focus()")
        browser.type(PROMPT)
        browser.press("Enter", control=True)
        browser.wait("document.getElementById('failure').textContent.startsWith('First frame: ')")
        assert browser.value("document.activeElement.id") == "image"
        node = browser.send("DOM.getDocument")["root"]["nodeId"]
        image = browser.send("DOM.querySelector", nodeId=node, selector="#image")["nodeId"]
        browser.send("DOM.setFileInputFiles", nodeId=image, files=[str(tmp_path / "first.png")])
        browser.wait("document.getElementById('image-preview').naturalWidth === 64")
        browser.value("document.getElementById('ask').requestSubmit()")
        browser.wait("document.querySelectorAll('.card').length > 0")
        assert text(browser, "#failure") == ""
    [job] = still.store.page("", None, 5, ascending=True)
    assert job.spec.source == "image"


@needs_browser
def test_a_video_of_the_gallery_is_edited_by_keyboard_and_one_from_the_disk_is_sent(
    browser: Browser, server: Server, still: Still, tmp_path: Path
) -> None:
    asked = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 4}
    first = httpx.post(f"{server.url}/v1/videos/sync", json=asked, timeout=90)
    (tmp_path / "clip.mp4").write_bytes(first.content)
    opened(browser, server.url)
    browser.wait(f"{CARD} && !{CARD}.querySelector('.edit').hidden")
    assert not [one for one in browser.controls() if one["name"] == "Strength"], "nothing to start from yet"
    browser.value(f"{CARD}.querySelector('.edit').focus()")
    browser.press("Enter")
    assert browser.focused()["name"] == "Prompt"
    assert browser.value("document.getElementById('prompt').value") == PROMPT
    browser.type("a blue square")
    browser.tab_to("Strength")
    browser.type("0.5")
    browser.value("document.getElementById('steps').value = '4'")
    browser.press("Enter", control=True)
    browser.wait(f"{CARD}.querySelector('h3').textContent === 'a blue square' && {VIDEO}.currentTime > 0")
    edited = httpx.get(f"{server.url}/v1/videos?limit=1").json()["data"][0]["id"]
    body = {**asked, "prompt": "a blue square", "strength": 0.5, "video": {"id": first.headers["x-video-id"]}}
    seed = {"seed": httpx.get(f"{server.url}/v1/videos/{edited}").json()["seed"]}
    again = httpx.post(f"{server.url}/v1/videos/edits", json={**body, **seed}).json()["id"]
    until(lambda: httpx.get(f"{server.url}/v1/videos/{again}").json()["status"] == "completed")
    one, other = (httpx.get(f"{server.url}/v1/videos/{each}/content").content for each in (edited, again))
    assert one == other, "it is the edit that was asked for"
    browser.value("document.getElementById('untake').click()")
    assert browser.focused()["name"].startswith("Start from a video")
    assert browser.value("document.getElementById('strength').disabled")

    with listening(still) as url:
        opened(browser, url)
        browser.type(PROMPT)
        node = browser.send("DOM.getDocument")["root"]["nodeId"]
        clip = browser.send("DOM.querySelector", nodeId=node, selector="#clip")["nodeId"]
        browser.send("DOM.setFileInputFiles", nodeId=clip, files=[str(tmp_path / "clip.mp4")])
        browser.wait("!document.getElementById('strength').disabled")
        browser.value("document.getElementById('ask').requestSubmit()")
        browser.wait("document.querySelectorAll('.card').length > 0")
        assert text(browser, "#failure") == ""
        browser.value("document.getElementById('model').value = 'mini-i2v'")
        browser.value("document.getElementById('model').dispatchEvent(new Event('change'))")
        assert not [one for one in browser.controls() if one["name"] == "Strength"], "this model starts from an image"
    [job] = still.store.page("", None, 5, ascending=True)
    assert (job.spec.source, job.spec.strength) == ("video", None)


@needs_browser
def test_what_the_server_refuses_is_said_at_its_field(browser: Browser, still: Still) -> None:
    with listening(still) as url:
        opened(browser, url)
        browser.type("  ")
        browser.tab_to("Seed")
        browser.press("Enter", control=True)
        browser.wait("document.getElementById('failure').textContent === 'Prompt is empty. Say what is to be seen.'")
        assert browser.focused()["name"] == "Prompt"
        assert browser.value("document.activeElement.getAttribute('aria-invalid')") == "true"
        browser.value("document.getElementById('seed').value = '9'.repeat(30)")
        browser.type(PROMPT)
        browser.press("Enter", control=True)
        browser.wait("document.getElementById('failure').textContent.endsWith('Use one from 0 to 4294967295.')")
        assert not browser.value("document.activeElement.hasAttribute('aria-invalid')")
    assert still.store.counts()["queued"] == 0


@needs_browser
def test_everything_that_can_be_worked_with_has_a_name(browser: Browser, still: Still) -> None:
    still.client.post("/v1/videos", json={"prompt": PROMPT})
    with listening(still) as url:
        opened(browser, url)
        browser.wait(f"{CARD} !== null")
        browser.value("document.querySelector('details').open = true")
        controls = [one for one in browser.controls() if one["role"] != "RootWebArea"]
        names = {one["name"] for one in controls}
        assert {"Prompt", "Model", "Size", "Seed", "Steps", "Guidance", "Length", "Speed", "Cancel"} <= names
        assert "" not in names
        browser.value("document.querySelector('label[for=seed]').remove()")
        browser.value("document.getElementById('seed').placeholder = ''")
        assert "" in {one["name"] for one in browser.controls()}, "the twin: one without a label is found"


@needs_browser
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_window(browser: Browser, still: Still, tmp_path: Path, width: int) -> None:
    still.client.post("/v1/videos", json={"prompt": "a" * 400})
    wider = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    with listening(still) as url:
        opened(browser, url)
        browser.wait(f"{CARD} !== null")
        browser.screenshot(tmp_path / "page.png", width, 800, "dark")
        assert not browser.value(wider)
        browser.value("document.querySelector('h1').style.width = '3000px'")
        browser.value("document.querySelector('h1').style.flex = 'none'")
        assert browser.value(wider), "the twin"
        browser.send("Emulation.clearDeviceMetricsOverride")


@needs_browser
@pytest.mark.parametrize(
    "addition",
    ["document.head.append(s)", "s.textContent = '', s.src = 'http://localhost:1/x.js', document.head.append(s)"],
)
def test_the_browser_refuses_a_script_of_somebody_else(browser: Browser, still: Still, addition: str) -> None:
    with listening(still) as url:
        opened(browser, url)
        assert not any("Content Security Policy" in one for one in browser.said)
        browser.value(f"const s = document.createElement('script'); s.textContent = 'window.bad = 1'; {addition}")
        browser.wait("true")
        assert browser.value("window.bad ?? 0") == 0
        assert any("Content Security Policy" in one for one in browser.said)


def test_the_page_is_served_without_a_key_closed_and_from_here_alone(tmp_path: Path) -> None:
    add_key(tmp_path / "keys.txt", "alice")
    still = Still(tmp_path, tmp_path / "keys.txt")
    for path in ("/", *(f"/{file.name}" for file in PAGE.iterdir())):
        answer = still.client.get(path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert not re.search(r"""https?://(?!www\.w3\.org/2000/svg")""", answer.text), path
    for path in ("/none.js", "/../api.py", "/%2e%2e/api.py", "/page"):
        assert still.client.get(path).status_code == 404, path
    still.store.close()

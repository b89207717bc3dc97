"""Take docs/app.png: the page with its settings open, after a run of two images by the demo model.

    python docs/take_app_image.py            # needs playwright and chromium

It also prints the clicks and seconds to the first image, to the next seed, and to inpainting it.
"""

import shutil
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from ldm.commands.main import main

ROOT = Path(__file__).parents[1]
PROMPT = "a 3d emoji of a red apple on a blue background"


def serve(folder: str) -> str:
    """Serve the app with the demo model in a thread; return its address."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    argv = ["app", "--models", str(ROOT / "checkpoints"), "--outdir", folder, "--port", str(port)]
    threading.Thread(target=main, args=[argv], daemon=True).start()
    address = f"http://127.0.0.1:{port}"
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return address
        except OSError:
            time.sleep(0.1)


def generate(page: Page) -> None:
    """Click Generate, and wait for the end of the run."""
    page.evaluate("document.querySelector('#progress .message').textContent = ''")
    page.locator("#generate").click()
    page.locator("#progress").get_by_text("done: ").wait_for()


def report(action: str, clicks: int, start: float) -> None:
    sys.stderr.write(f"{action}: {clicks} click(s), {time.monotonic() - start:.1f} s\n")


with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
    browser = driver.chromium.launch(
        executable_path=shutil.which("chromium"), args=["--no-sandbox"]
    )
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(serve(folder))
    is_ready = "window.ldmIsRestored && document.querySelector('#size input').value > 0"
    page.wait_for_function(is_ready)
    start = time.monotonic()
    page.keyboard.type(PROMPT)  # the prompt has the focus
    generate(page)
    report("first image", 1, start)
    start = time.monotonic()
    generate(page)
    report("the same at another seed", 1, start)
    batch_size = page.locator("#settings").get_by_label("Batch size").first
    batch_size.fill("2")
    batch_size.press("Tab")
    page.locator("#settings").get_by_label("Seed").first.fill("7")
    generate(page)
    page.locator("#gallery").get_by_text("seed 7").first.wait_for()
    page.locator("#gallery .thumbnail-small").nth(3).wait_for()
    page.mouse.move(5, 5)
    page.wait_for_timeout(1000)
    page.screenshot(path=ROOT / "docs/app.png", full_page=True)
    start = time.monotonic()
    page.locator("#send-inpaint").click()
    editor = page.locator("#tab-inpaint")
    editor.get_by_role("button", name="Brush", exact=True).first.click()
    page.wait_for_timeout(1000)
    box = editor.locator("canvas").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 20, box["y"] + box["height"] / 2, steps=3)
    page.mouse.up()
    page.wait_for_timeout(500)
    generate(page)
    report("inpainting it (send, brush, stroke, generate)", 4, start)
    browser.close()

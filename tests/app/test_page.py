"""The page in a real browser: Debian's chromium, driven by playwright."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from threading import Thread

import pytest

import ldm
from ldm.commands.main import main
from ldm.imaging.metadata import read_info
from picturehelp import pixels, random_lora

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 60  # seconds; a busy machine is slow
PROMPT = "a flat emoji of a red apple on a blue background"

pytestmark = pytest.mark.flaky(reruns=2)  # a browser has a clock of its own


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """(address, output folder) of an app with the demo model, a LoRA, and a file that is none."""
    pytest.importorskip("gradio", reason="needs gradio: pip install 'ldm-revived[app]'")
    folder = tmp_path_factory.mktemp("app")
    models, outdir = folder / "models", folder / "out"
    models.mkdir()
    shutil.copy(ROOT / "checkpoints/demo.safetensors", models)
    (models / "page.ckpt").write_text("<html>")
    lora = random_lora(folder / "style.safetensors", ldm.load(), 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--models", models, "--outdir", outdir, "--port", port, "--lora", f"{lora}:0.25"]
    thread = Thread(target=main, args=[["app", *map(str, flags)]], daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{port}"
    for _ in range(10 * PATIENCE):
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return address, outdir
        assert thread.is_alive()
        time.sleep(0.1)
    raise TimeoutError


@pytest.fixture(scope="module")
def page(app):
    """The page, loaded once; it notes which hosts it asks."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox"] if sys.platform == "linux" and os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(1000 * PATIENCE)
        page.hosts = set()
        page.on("request", lambda request: page.hosts.add(request.url.split("/")[2]))
        with page.expect_response(re.compile("/queue/data")):  # the lists of models come
            page.goto(app[0])
        page.wait_for_timeout(1000)
        yield page
        browser.close()


@pytest.fixture(scope="module")
def image(page):
    """An image made from text, the newest on the page."""
    fill_in(opened(page, "txt2img", "txt2img"))
    finish(page, "txt2img", "finished")


def opened(page, task, label):
    page.get_by_role("tab", name=label, exact=True).click()
    return page.locator(f"#tab-{task}")


def fill_in(area, prompt=PROMPT, **settings):
    """Type a prompt, and numbers by their labels."""
    area.locator("textarea").first.fill(prompt)
    settings = {"Sampling steps": 1, "Batch size": 1, "Batch count": 1, "Seed": 7} | settings
    for label, value in settings.items():
        field = area.get_by_label(label).first
        if not field.is_visible():
            area.get_by_role("button", name="Generation settings").click()
            area.page.wait_for_timeout(500)  # fields that have just appeared are set once more
        field.fill(str(value))
        field.press("Tab")


def finish(page, task, pattern):
    """Press the button of a task, when the last message is gone; return the next that fits."""
    page.evaluate("document.querySelector('#live .message, #live .failed').textContent = ''")
    page.locator(f"#go-{task}").click()
    return wait_for_message(page, pattern)


def wait_for_message(page, pattern):
    message = page.locator("#live").get_by_text(re.compile(pattern))
    message.wait_for()
    return message.inner_text()


def wait_for_value(page, selector, text):
    page.locator(selector).wait_for()
    script = "([selector, text]) => document.querySelector(selector)?.value.includes(text)"
    page.wait_for_function(script, arg=[selector, text])


def newest(outdir):
    return max((outdir / "samples").glob("*.png"), key=lambda path: path.name)


def test_a_prompt_is_typed_and_its_image_is_downloaded_as_it_was_saved(app, page, image):
    page.locator("#gallery").get_by_text("seed 7").first.wait_for()
    info = read_info(newest(app[1]))
    assert (info["seed"], info["steps"], info["task"]) == (7, 1, "txt2img")
    with page.expect_download() as download:
        page.locator("#gallery [aria-label='Download']").first.click()
    assert Path(download.value.path()).read_bytes() == newest(app[1]).read_bytes()
    assert page.hosts == {app[0].removeprefix("http://")}


def test_an_image_is_sent_to_another_tab_and_inpainted_where_a_mask_is_drawn(app, page, image):
    before = pixels(newest(app[1]))
    page.locator("#send-inpaint").click()
    area = page.locator("#tab-inpaint")
    area.get_by_role("button", name="Brush", exact=True).first.click()
    page.wait_for_timeout(1000)  # till the image lies on the canvas
    box = area.locator("canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 20, y + 20, steps=3)
    page.mouse.up()
    page.wait_for_timeout(500)
    fill_in(area, "a flat emoji of a green apple on a blue background")
    finish(page, "inpaint", "finished")
    changed = (before != pixels(newest(app[1]))).any(-1)
    assert read_info(newest(app[1]))["task"] == "inpaint"
    assert 0 < changed.mean() < 0.5
    assert not changed[:16].any()
    assert not changed[-16:].any()


def test_an_image_is_made_again_from_what_it_says(page, image):
    page.locator("#send-replay").click()
    wait_for_value(page, "#facts textarea", "Seed: 7")
    assert finish(page, "replay", "identical|differ|made") == "identical"


def test_a_run_is_stopped_between_two_steps_and_the_next_one_has_a_lora(app, page):
    area = opened(page, "txt2img", "txt2img")
    fill_in(area, **{"Sampling steps": 150, "Batch count": 8})
    finish(page, "txt2img", "step [0-9]+ of 150")
    page.locator("#cancel").click()
    assert "0 of 8 images are finished" in wait_for_message(page, "stopped|finished in")
    lora = area.get_by_label("LoRA")
    lora.fill("style:-0.5")
    lora.press("Enter")
    fill_in(area)
    finish(page, "txt2img", "finished")
    assert [lora["weight"] for lora in read_info(newest(app[1]))["loras"]] == [-0.5]
    area.locator(".token-remove").first.click()


def test_a_bad_upload_is_one_line_and_no_traceback(page, tmp_path):
    (tmp_path / "holiday.png").write_text("<html>not found</html>")
    area = opened(page, "img2img", "img2img")
    with page.expect_response(re.compile("/upload")):
        area.locator("input[type=file]").first.set_input_files(tmp_path / "holiday.png")
    page.wait_for_timeout(500)
    message = finish(page, "img2img", "holiday")
    assert message == "`holiday.png` is a web page, not an image"


def test_a_checkpoint_is_inspected_and_what_is_none_is_named(page):
    area = opened(page, "inspect", "Checkpoint info")
    area.get_by_text("is a web page, probably a failed download").first.wait_for()
    page.locator("#go-inspect").click()
    wait_for_value(page, "#report textarea", "predicts")


def test_no_file_outside_the_output_folder_is_served(app):
    paths = ["/etc/passwd", "../../../../etc/passwd", "checkpoints/demo.safetensors",
             "scripts/app.py", "http://127.0.0.1:1/", "file:///etc/passwd"]  # fmt: skip
    for path in paths:
        for route in ("gradio_api/file=", "gradio_api/file/", "file="):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{app[0]}/{route}{path}")
            refused.value.close()
            assert refused.value.code in (400, 403, 404)


@pytest.mark.parametrize("auth", [[], ["--auth", "me"]])
def test_other_machines_are_not_let_in_without_a_password(capsys, auth):
    assert main(["app", "--listen", *auth]) == 1
    assert "--listen needs a login: --auth USER:PASSWORD" in capsys.readouterr().err


def test_help_needs_neither_torch_nor_gradio():
    code = "import sys, ldm.commands.app; print({'torch', 'gradio', 'PIL'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == "set()", out.stderr

"""The page in a real browser: Debian's chromium, driven by playwright."""

import contextlib
import gc
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import ldm
from imagehelp import read_pixels, write_random_lora
from ldm.app.backend import Backend
from ldm.app.library import Library
from ldm.app.limits import Limits
from ldm.app.progress import Progress
from ldm.commands.main import main
from ldm.generate.groups import ModelOptions
from ldm.imaging.metadata import read_info
from ldm.imaging.output import OutputFolder

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TIMEOUT = 60  # seconds; a busy machine is slow
LONG_RUN_STEPS = 150  # of a run that a test stops
PROMPT = "a flat emoji of a red apple on a blue background"
PARAMETERS = f"{PROMPT}\nSteps: 1, Sampler: DDIM, CFG scale: 3, Seed: 7, Size: 128x128"

# Records every message of a run with the width of its progress bar.
RECORD_STATUSES = """
window.statuses = [];
new MutationObserver(() => {
  const message = document.querySelector("#progress .message")?.textContent;
  const width = document.querySelector("#progress .bar div")?.style.width || "0%";
  if (message && window.statuses.at(-1)?.[0] !== message) window.statuses.push([message, width]);
}).observe(document, { subtree: true, childList: true, characterData: true });
"""


class RunningApp(NamedTuple):
    address: str
    models: Path
    outdir: Path


SLOW = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # event loops of gradio


@pytest.fixture(scope="module")
def slow_steps():
    """Slow down every step of a long run, so that tests can watch it."""
    on_step = Progress.on_step

    def wait(progress, step, steps, x, denoised):
        time.sleep(0.04 if steps == LONG_RUN_STEPS else 0)
        on_step(progress, step, steps, x, denoised)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "on_step", wait)
        yield


@pytest.fixture(scope="module")
def app(tmp_path_factory, slow_steps):
    """A running app with the demo models and a LoRA."""
    pytest.importorskip("gradio", reason="needs gradio: pip install 'ldm-revived[app]'")
    folder = tmp_path_factory.mktemp("app")
    models, outdir = folder / "models", folder / "out"
    (models / "loras").mkdir(parents=True)
    for name in ("demo", "demo-upscaler"):
        shutil.copy(ROOT / f"checkpoints/{name}.safetensors", models)
    (models / "page.ckpt").write_text("<html>")
    write_random_lora(models / "loras/style.safetensors", ldm.load(), 0)
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        _, port = free_socket.getsockname()
    flags = ["--models", models, "--outdir", outdir, "--port", port]
    thread = Thread(target=main, args=[["app", *map(str, flags)]], daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{port}"
    for _ in range(10 * TIMEOUT):
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            gc.collect()  # now, while the warnings of gradio's unclosed loops are ignored
            return RunningApp(address, models, outdir)
        assert thread.is_alive()
        time.sleep(0.1)
    raise TimeoutError


@pytest.fixture(scope="module")
def page(app):
    """The page with an image of seed 7; `page.urls` records its requests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox"] if sys.platform == "linux" and os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        size = {"width": 1400, "height": 1000}
        page = browser.new_page(viewport=size, reduced_motion="reduce")
        page.set_default_timeout(1000 * TIMEOUT)
        page.add_init_script(RECORD_STATUSES)
        page.urls = []
        page.on("request", lambda request: page.urls.append(request.url))
        visit(page, app.address)
        assert page.evaluate("document.activeElement.closest('#prompt') !== null")
        for name in ("send-img2img", "send-inpaint", "send-upscale", "reuse-all"):
            assert page.locator(f"#{name}").is_disabled()  # there is no image yet
        assert read_setting(page, "Batch size") == "1"
        fill(page, prompt=PROMPT)
        page.locator("#prompt textarea").press("Control+Enter")
        wait_for_message(page, "done: 1 image")
        yield page
        browser.close()


@pytest.fixture(autouse=True)
def reset_form(request):
    """Start every test at the first tab, with one sampling step."""
    if "page" in request.fixturenames:
        page = request.getfixturevalue("page")
        page.set_viewport_size({"width": 1400, "height": 1000})
        open_tab(page, "txt2img")
        fill(page, prompt=PROMPT)


def visit(page, address=None):
    page.goto(address) if address else page.reload()
    page.wait_for_function("window.ldmIsRestored")
    # Wait for lists and defaults, which would replace what a test types.
    page.wait_for_function("document.querySelector('#checkpoint input').value")
    page.wait_for_function("document.querySelector('#size input').value > 0")


def fill(page, prompt=None, **settings):
    """Type a prompt, and settings by their labels."""
    if prompt is not None:
        page.locator("#prompt textarea").fill(prompt)
    defaults = {"Sampling steps": 1, "Batch size": 1, "Batch count": 1, "Seed": 7}
    settings = {**defaults, "Width": 128, "Height": 128, **settings}
    for label, value in settings.items():
        field = page.locator("#settings").get_by_label(label).first
        if field.input_value() != str(value):
            field.fill(str(value))
            field.press("Tab")


def read_setting(page, label):
    return page.locator("#settings").get_by_label(label).first.input_value()


def open_tab(page, name):
    page.locator(f"#tab-{name}-button").click()
    return page.locator(f"#tab-{name}")


def generate(page, pattern="done"):
    """Press Generate; return the next message that matches."""
    clear_messages(page)
    page.locator("#generate").click()
    return wait_for_message(page, pattern)


def clear_messages(page):
    messages = "document.querySelectorAll('#progress .message')"
    page.evaluate(f"{messages}.forEach(e => e.textContent = ''); window.statuses = []")


def wait_for_message(page, pattern):
    message = page.locator("#status").get_by_text(re.compile(pattern)).first
    message.wait_for()
    return message.inner_text()


def stop(page):
    """Press Stop; return the last message."""
    page.locator("#stop").click()
    page.wait_for_function("document.querySelector('#stop').disabled")
    return wait_for_message(page, "stopped (at step|between steps)")


def wait_for_value(page, selector, text):
    page.locator(selector).wait_for()
    script = "([selector, text]) => document.querySelector(selector)?.value.includes(text)"
    page.wait_for_function(script, arg=[selector, text])


def list_statuses(page):
    return page.evaluate("window.statuses")


def find_newest_image(app):
    return max((app.outdir / "samples").glob("*.png"), key=lambda path: path.name)


def is_in_window(page, selector):
    box = page.locator(selector).first.bounding_box()
    return box["y"] >= 0 and box["y"] + box["height"] <= page.viewport_size["height"]


def test_an_image_of_a_typed_prompt_is_downloaded_as_it_was_saved(app, page):
    page.locator("#gallery").get_by_text("seed 7").first.wait_for()
    info = read_info(find_newest_image(app))
    assert (info["seed"], info["steps"], info["task"]) == (7, 1, "txt2img")
    with page.expect_download() as download:
        page.locator("#gallery [aria-label='Download']").first.click()
    assert Path(download.value.path()).read_bytes() == find_newest_image(app).read_bytes()
    assert {url.split("/")[2] for url in page.urls} == {app.address.removeprefix("http://")}
    assert "Watermark: none" in page.locator("#parameters textarea").input_value()
    with page.expect_download() as download:
        page.locator("#download-all").click()
    names = zipfile.ZipFile(download.value.path()).namelist()
    assert f"samples/{find_newest_image(app).name}" in names


@pytest.mark.parametrize(
    ("label", "value", "message"),
    [
        ("Height", "4096", "height must be 8 to 2048, got 4096"),
        pytest.param("Width", "99999", "width 99999 is not a positive multiple of 8", marks=SLOW),
        pytest.param("Seed", "five", "seed: `five` is not a whole number", marks=SLOW),
        pytest.param("Seed", "3735928559", "done", marks=SLOW),
    ],
)
def test_a_number_out_of_range_is_one_line_and_the_page_stays_usable(page, label, value, message):
    fill(page, **{label: value})
    generate(page, message)
    assert page.locator("#generate").is_enabled()


@pytest.mark.slow
def test_errors_are_visible_wherever_the_page_is_scrolled_to(page):
    page.set_viewport_size({"width": 1366, "height": 768})
    open_tab(page, "img2img")
    page.mouse.wheel(0, 600)
    page.wait_for_timeout(200)
    page.locator("#settings").get_by_label("Seed").press("Control+Enter")
    wait_for_message(page, "No input image")
    assert is_in_window(page, "#error .alert")


def test_form_gallery_and_run_survive_a_reload(app, page):
    """Images are in the order of their seeds; unfinished ones are kept."""
    settings = {"Sampling steps": LONG_RUN_STEPS, "Batch size": 2, "Batch count": 4, "Seed": 11}
    fill(page, "a fox", **settings, Width=64, Height=64)
    generate(page, "image 1–2 of 8, step [0-9]+ of 150")
    page.locator("#generate").click()
    page.locator("#queue li").wait_for()
    visit(page)
    assert page.locator("#prompt textarea").input_value() == "a fox"
    assert read_setting(page, "Sampling steps") == "150"
    wait_for_message(page, "step [0-9]+ of 150")
    page.locator("#queue li").wait_for()
    page.locator("#clear").click()
    page.locator("#queue li").wait_for(state="detached")
    assert "of 8 images are finished, 2 unfinished" in stop(page)
    assert "stopping after this step" in [message for message, _ in list_statuses(page)]
    wait_for_value(page, "#parameters textarea", "Seed: 11")
    assert read_info(find_newest_image(app))["unfinished"] >= 1
    page.locator("#gallery .thumbnail-small").nth(2).wait_for()


@pytest.mark.slow
def test_a_queued_run_of_another_browser_is_removed_at_once(app, page):
    fill(page, **{"Sampling steps": LONG_RUN_STEPS, "Batch count": 8})
    generate(page, "step [0-9]+ of 150")
    with contextlib.closing(page.context.browser.new_page()) as other:
        other.set_default_timeout(1000 * TIMEOUT)
        visit(other, app.address)
        fill(other, "a fox")
        generate(other, "queued, 1 ahead")
        other.locator("#stop").click()
        wait_for_message(other, "removed from the queue")
    assert "of 8 images are finished" in stop(page)


def test_tokens_are_counted_and_truncated_text_is_named(page):
    count = page.locator("#prompt-tokens")
    count.get_by_text("11/30").wait_for()
    fill(page, "<lora:style:0.8> (blue:1.4)")
    assert "A1111's syntax for weights is read as plain text: `(blue:1.4) …`" in generate(page)
    wait_for_value(page, "#parameters textarea", "<lora:style:0.8>")
    fill(page, "red " * 30 + "green apple")
    count.get_by_text("32/30, truncated: green apple …").wait_for()


def test_a_pasted_number_beyond_its_slider_is_used(app, page):
    fill(page, PARAMETERS.replace("scale: 3", "scale: 40") + ", Version: ldm 0.1.0")
    page.locator("#paste").click()
    wait_for_value(page, "input[aria-label='number input for CFG scale']", "40")
    generate(page)
    assert read_info(find_newest_image(app))["scale"] == 40
    fill(page, **{"CFG scale": 2})


@pytest.mark.slow
def test_a_slider_says_when_it_changes_a_number(page):
    fill(page, **{"Sampling steps": 500})
    note = page.locator("#browser-note")
    note.get_by_text("Sampling steps: 1 to 150 are allowed, 500 became 150").wait_for()
    fill(page)
    assert note.inner_text() == ""


@pytest.mark.slow
def test_samplers_are_selected_from_a_list_and_show_their_own_noise_options(page):
    page.locator("#settings").get_by_text("Advanced").click()
    eta = page.get_by_label("Eta", exact=True).first
    churn = page.get_by_label("Sigma churn").first
    eta.wait_for()
    sampler = page.locator("#settings").get_by_label("Sampling method")
    assert sampler.get_attribute("readonly") is not None
    for name in ("Euler", "DDIM"):
        sampler.click()
        page.get_by_role("option", name=name, exact=True).click()
        eta.wait_for(state="detached" if name == "Euler" else "visible")
        churn.wait_for(state="visible" if name == "Euler" else "detached")
    page.locator("#settings").get_by_text("Advanced").click()


@pytest.mark.slow
def test_loras_are_offered_where_they_fit_and_none_is_selected_at_first(app, page):
    """A tab without a suitable model names those that it needs, and those that are available."""
    assert page.locator("#lora .token").count() == 0
    page.locator("#lora input").click()
    page.get_by_role("option", name="style").click()
    weight = page.get_by_label("Weight of style").first
    weight.fill("-0.5")
    weight.press("Tab")
    fill(page, Width=64, Height=64)
    generate(page)
    assert [lora["weight"] for lora in read_info(find_newest_image(app))["loras"]] == [-0.5]
    assert "<lora:style:-0.5>" in page.locator("#parameters textarea").input_value()
    weight.fill("1")
    weight.press("Tab")
    page.locator("#reuse-all").click()
    wait_for_value(page, "input[aria-label='number input for Weight of style']", "-0.5")
    page.locator("#send-upscale").click()
    note = page.locator("#checkpoint-error .alert")
    note.wait_for()
    assert "Upscale needs an upscaling model" in note.inner_text()
    page.get_by_role("radio", name="demo-upscaler.safetensors").click()
    page.locator("#lora").wait_for(state="hidden")
    generate(page)
    info = read_info(find_newest_image(app))
    assert (info["task"], info["size"], info["loras"]) == ("upscale", [256, 256], [])
    open_tab(page, "depth2img")
    page.locator("#checkpoint-error").get_by_text("`ldm download sd-v2-depth`").wait_for()
    page.locator("#checkpoint input").click()
    page.get_by_role("option", name="demo.safetensors", exact=True).click()
    page.locator("#lora").wait_for()


@pytest.mark.slow
def test_an_image_of_another_program_fills_the_form(page, tmp_path):
    text = (
        "a red fox\nNegative prompt: blurry\nSteps: 3, Sampler: Euler a, Schedule type: Karras,"
        " CFG scale: 4, Seed: 3735928559, Size: 64x64"
    )
    data = PngInfo()
    data.add_text("parameters", text)
    Image.new("RGB", (64, 64)).save(tmp_path / "a1111.png", pnginfo=data)
    area = open_tab(page, "replay")
    assert page.locator("#go-replay").is_disabled()
    area.locator("input[type=file]").set_input_files(tmp_path / "a1111.png")
    wait_for_value(page, "#file-parameters textarea", "Seed: 3735928559")
    page.locator("#go-replay").click()
    wait_for_message(page, "made by another program")
    page.locator("#file-send-txt2img").click()
    wait_for_value(page, "#prompt textarea", "a red fox")
    values = [read_setting(page, name) for name in ("Sampling method", "Schedule type", "Seed")]
    assert values == ["Euler a", "Karras", "3735928559"]
    assert page.get_by_label("Prompt syntax").input_value() == "A1111"
    open_tab(page, "replay")
    area.get_by_label("Remove Image").click()
    page.wait_for_function("!document.querySelector('#file-parameters textarea').value")
    open_tab(page, "txt2img")
    page.locator("#prompt textarea").fill(PARAMETERS)
    page.locator("#paste").click()
    wait_for_value(page, "#prompt textarea", PROMPT)
    page.wait_for_function("!document.querySelector('#prompt textarea').value.includes('Steps')")
    values = [read_setting(page, name) for name in ("Sampling method", "Schedule type", "Width")]
    assert values == ["DDIM", "DDIM uniform", "128"]


@pytest.mark.slow
def test_a_large_photo_is_resized_to_the_size_of_the_model(app, page, tmp_path):
    Image.new("RGB", (3000, 2000), "red").save(tmp_path / "photo.png")
    area = open_tab(page, "img2img")
    area.locator("input[type=file]").first.set_input_files(tmp_path / "photo.png")
    page.wait_for_function("document.querySelector('#size input').value == '192'")
    fill(page, Height=192)
    area.get_by_label("Pad").check()
    generate(page)
    info = read_info(find_newest_image(app))
    assert (info["size"], info["resize_mode"]) == ([192, 128], "pad")


def test_an_image_is_reproduced_from_its_metadata(page):
    generate(page)
    page.locator("#send-replay").click()
    wait_for_value(page, "#file-parameters textarea", "Seed: 7")
    page.locator("#go-replay").click()
    assert wait_for_message(page, "^(identical|.*differ|.*made).*") == "identical"


@pytest.mark.slow
def test_the_image_is_large_with_the_preview_over_it_and_the_bar_agrees_with_the_message(page):
    page.set_viewport_size({"width": 1920, "height": 1080})
    page.mouse.wheel(0, -5000)
    fill(page, **{"Sampling steps": LONG_RUN_STEPS, "Batch count": 2})
    generate(page, "step [0-9]+ of 150")
    preview = page.locator("#preview img")
    preview.wait_for()
    image = page.locator("#gallery .media-button img").first.bounding_box()
    box = preview.bounding_box()
    wait_for_message(page, "step [1-9][0-9] of 150")
    stop(page)
    assert image["height"] >= 0.69 * 1080
    assert image["width"] >= 0.69 * 1080
    assert image["y"] + image["height"] <= 1080
    assert abs(box["y"] - image["y"]) < 4
    assert abs(box["x"] + box["width"] / 2 - image["x"] - image["width"] / 2) < 4
    bars = [(int(match[1]), float(width.rstrip("%"))) for text, width in list_statuses(page)
            if (match := re.match("image 1 of 2, step ([0-9]+) of 150", text))]  # fmt: skip
    assert max(step for step, _ in bars) >= 10
    for step, percent in bars:
        assert abs(percent - step / 3) <= 0.7  # a step may end while the message is written


@pytest.mark.slow
def test_a_phone_has_all_tabs_and_the_output_before_the_settings(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(300)
    boxes = [tab.bounding_box() for tab in page.get_by_role("tab").all()]
    assert len(boxes) == 8
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
    order = ["#prompt", "#generate", "#gallery", "#settings"]
    tops = [page.locator(name).bounding_box()["y"] for name in order]
    assert tops == sorted(tops)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.slow
def test_files_added_while_the_app_runs_are_found(app, page):
    (app.models / "people").mkdir()
    shutil.copy(app.models / "demo.safetensors", app.models / "people/copy.safetensors")
    page.locator("#prompt textarea").fill("kept")
    page.locator("#refresh").click()
    page.locator("#checkpoint input").click()
    page.get_by_role("option", name="people/copy.safetensors").wait_for()
    page.keyboard.press("Escape")
    assert page.locator("#prompt textarea").input_value() == "kept"
    area = open_tab(page, "inspect")
    area.get_by_text("is a web page, probably a failed download").first.wait_for()
    page.locator("#go-inspect").click()
    wait_for_value(page, "#report textarea", "predicts")
    report = page.locator("#report textarea").input_value()
    assert "family      a text-to-image model" in report
    assert "MB" in report
    assert str(app.models) not in report


@pytest.mark.slow
def test_a_bad_upload_is_one_line_and_no_traceback(page, tmp_path):
    (tmp_path / "holiday.png").write_text("<html>not found</html>")
    area = open_tab(page, "img2img")
    with page.expect_response(re.compile("/upload")):
        area.locator("input[type=file]").first.set_input_files(tmp_path / "holiday.png")
    page.wait_for_timeout(500)
    assert generate(page, "holiday") == "`holiday.png` is a web page, not an image"
    area.get_by_label("Remove Image").first.click()


@pytest.mark.slow  # the editor, once its tab was open, keeps a core busy
def test_an_image_is_sent_with_its_prompt_and_inpainted_where_a_mask_is_drawn(app, page, tmp_path):
    (tmp_path / "holiday.png").write_text("<html>not found</html>")
    area = open_tab(page, "inpaint")
    area.locator("input[type=file]").first.set_input_files(tmp_path / "holiday.png")
    wait_for_message(page, "`holiday.png` is not an image that the browser can show")
    open_tab(page, "txt2img")
    generate(page)
    before = read_pixels(find_newest_image(app))
    page.locator("#prompt textarea").fill("something else")
    page.locator("#send-inpaint").click()
    wait_for_value(page, "#prompt textarea", PROMPT)
    area = page.locator("#tab-inpaint")
    area.get_by_role("button", name="Brush", exact=True).first.click()
    page.wait_for_timeout(1000)  # until the image is on the canvas
    box = area.locator("canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 20, y + 20, steps=3)
    page.mouse.up()
    page.wait_for_timeout(500)
    page.urls.clear()
    generate(page)
    page.wait_for_timeout(500)
    assert sum("/upload" in url for url in page.urls) == 3  # image, layer, both: sent once
    changed = (before != read_pixels(find_newest_image(app))).any(-1)
    assert read_info(find_newest_image(app))["task"] == "inpaint"
    assert 0 < changed.mean() < 0.5
    assert not changed[:16].any()
    assert not changed[-16:].any()


@pytest.mark.parametrize("is_multi_user", [False, True])
def test_visitors_of_a_multi_user_app_see_no_older_images(tmp_path, is_multi_user):
    page = pytest.importorskip("ldm.app.page", reason="needs gradio")
    OutputFolder(tmp_path).save_sample(Image.new("RGB", (8, 8)), {"seed": 7})
    backend = Backend(Library(tmp_path), tmp_path, ModelOptions(), Limits())
    jobs = page.Page(backend, is_multi_user=is_multi_user).jobs
    seeds = [info["seed"] for info in jobs.list_infos("me")]
    assert seeds == ([] if is_multi_user else [7])


def test_no_file_outside_the_output_folder_is_served(app):
    paths = ["/etc/passwd", "../../../../etc/passwd", "checkpoints/demo.safetensors",
             "scripts/app.py", "http://127.0.0.1:1/", "file:///etc/passwd"]  # fmt: skip
    for path in paths:
        for route in ("gradio_api/file=", "gradio_api/file/", "file="):
            with pytest.raises(urllib.error.HTTPError) as http_error:
                urllib.request.urlopen(f"{app.address}/{route}{path}")
            http_error.value.close()
            assert http_error.value.code in (400, 403, 404)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--listen"], "--listen needs a login: --auth USER:PASSWORD"),
        (["--listen", "--auth", "me"], "--listen needs a login: --auth USER:PASSWORD"),
        (["--listen", "--auth", "me:", "--models", "none"],
         "--listen needs a login: --auth USER:PASSWORD"),
        (["--auth", "me"], "the login must be USER:PASSWORD (--auth)"),
        *((["--models", str(Path(__file__).parent), flag, "none"], f"`none` ({flag})")
          for flag in ("--models", "--preview", "--lora")),
    ],
)  # fmt: skip
def test_flags_that_the_app_cannot_start_with_are_errors_in_one_line(run_ldm, flags, message):
    status, _, err = run_ldm("app", *flags)
    assert status == 1
    assert err.endswith(f"{message}\n")


@pytest.mark.parametrize(("flag", "value"), [("--max-steps", "0"), ("--memory", "-1")])
def test_limits_of_the_app_must_be_positive(run_ldm, flag, value):
    status, _, err = run_ldm("app", f"{flag}={value}")
    assert status == 2
    assert f"argument {flag}: `{value}` is not a" in err


def test_help_needs_neither_torch_nor_gradio():
    code = "import sys, ldm.commands.app; print({'torch', 'gradio', 'PIL'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == "set()", out.stderr

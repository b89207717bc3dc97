"""Backend and forms: what the app does, without its page, on tiny models of every family."""

import re
import shutil
import time
import zipfile
from functools import partial
from pathlib import Path

import gradio as gr
import pytest
import torch
from PIL import Image

import ldm
from checkerhelp import write_safety_checker
from imagehelp import ONE_IMAGE_FLAGS, read_pixels, write_random_lora
from imaging.badimages import HUGE_PNG
from ldm.app.backend import Backend
from ldm.app.form import TaskForm
from ldm.app.form_events import FormEvents
from ldm.app.jobs import Jobs
from ldm.app.library import Library
from ldm.app.limits import Limits
from ldm.app.page import Page
from ldm.app.progress import Progress
from ldm.app.view import format_info, read_file_info, render_preview, render_progress
from ldm.commands.main import main
from ldm.generate.groups import ModelOptions
from ldm.generate.tasks import PAGE_TASKS, TASKS
from ldm.imaging.metadata import format_parameters, parse_parameters, read_info, write_png
from ldm.imaging.output import OutputFolder
from ldm.loading.addons.embeddings import write_embeddings
from ldm.loading.config import format_yaml
from ldm.loading.files.checkpoint import read_checkpoint, write_checkpoint
from ldm.loading.load import save_model
from ldm.nets.tiny_autoencoder import TinyDecoder
from ldm.runtime.errors import ArgumentError
from loading.tinyfamilies import write_family
from quick import slow_except
from tinyupscaler import build_tiny_upscaler, make_tiny_config

MODELS = {"txt2img": "base_v", "img2img": "base_eps", "inpaint": "inpaint", "depth2img": "depth",
          "upscale": "upscale", "unclip": "unclip"}  # fmt: skip
LIMITS = Limits(max_side=256, max_steps=20, max_batch_size=2, max_batches=2)
MODEL_OPTIONS = ModelOptions(device="cpu", precision="full")


@pytest.fixture(scope="module")
def backend(families, tmp_path_factory):
    return make_backend(families, tmp_path_factory.mktemp("app"))


def make_backend(families, outdir, **options):
    library = Library(families["base_v"].ckpt.parent, **options)
    return Backend(library, outdir, MODEL_OPTIONS, LIMITS)


def copy_model(files, folder):
    """Copy the checkpoint and YAML of a tiny model into a new folder of models."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(file, folder)


@pytest.fixture
def make_request(photo):
    """Builds a request from the form of a task, with changes to its defaults."""

    def make_request(backend, task, model=None, **changes):
        form = TaskForm(TASKS[task], LIMITS)
        inputs = {"steps": 2, "seed": "5", "prompt": "a fox", "strength": 1.0}
        inputs |= {"init_img": str(photo), "sketch": make_sketch(photo, (8, 8, 30, 40))}
        if task == "unclip":
            inputs["init_img"] = [(str(photo), None)]
        if task == "upscale":
            inputs["init_img"] = str(photo.with_name("small.png"))
            with Image.open(photo) as image:
                image.resize((16, 16)).save(inputs["init_img"])
        if task in ("txt2img", "unclip"):
            inputs |= {"width": 64, "height": 64}
        values = {name: field.kwargs.get("value") for name, field in form.fields.items()}
        values |= {name: inputs[name] for name in inputs.keys() & values.keys()} | changes
        values = form.parse(values, backend.uploads)
        return backend.build_request(TASKS[task], model or f"{MODELS[task]}.safetensors", values)

    return make_request


@pytest.fixture
def run(make_request):
    """Runs a task as a job; returns its progress at the end."""

    def run(backend, task, model=None, **changes):
        def work(progress):
            return backend.generate(make_request(backend, task, model, **changes), progress)

        return run_job(work)

    return run


def make_sketch(photo, box=None):
    """Make the uploads of the image editor: the image, and a layer with a painted box."""
    with Image.open(photo) as image:
        layer = Image.new("RGBA", image.size)
    if box is not None:
        layer.paste((255, 0, 0, 255), box)
    path = photo.with_name("empty.png" if box is None else "layer.png")
    layer.save(path)
    return [(str(photo), None), (str(path), None)]


def run_job(work, jobs=None):
    """Run a job of the user `me`; return its progress at the end."""
    job = (jobs or Jobs(1)).submit("me", "", work)
    while not job.has_ended:
        time.sleep(0.01)
    return job.progress


def replay(backend, path):
    return run_job(lambda progress: backend.replay(path, progress)).message


def test_each_task_is_offered_the_models_that_serve_it(backend):
    offered = {task: backend.library.list_models(task) for task in PAGE_TASKS}
    text = ["base_eps.safetensors", "base_v.safetensors"]
    assert offered == {
        "txt2img": text,
        "img2img": text,
        "inpaint": [*text, "inpaint.safetensors"],
        "depth2img": ["depth.safetensors"],
        "upscale": ["upscale.safetensors"],
        "unclip": ["unclip.safetensors"],
    }


@pytest.mark.parametrize("task", slow_except(PAGE_TASKS, "txt2img", "inpaint"))
def test_every_task_makes_images_that_replay_identically(backend, families, run, task):
    progress = run(backend, task)
    assert not progress.has_failed, progress.message
    path = progress.infos[0]["path"]
    assert Path(path).parent == backend.outdir / "samples"
    assert read_info(path)["task"] == task
    assert replay(backend, path) == "identical"
    if task == "inpaint":  # the command replays it, too
        assert main(["replay", path, "--ckpt", str(families["inpaint"].ckpt)]) == 0


def test_config_and_replayed_image_select_the_ema_weights(ema_model, run, tmp_path):
    backend = Backend(Library(ema_model.ckpt.parent), tmp_path, MODEL_OPTIONS, LIMITS)
    image = run(backend, "txt2img").infos[0]
    assert image["ema"]
    size = ["--H=64", "--W=64", f"--outdir={tmp_path / 'raw'}", "--no-ema"]
    assert main(["txt2img", *ema_model.flags, *ONE_IMAGE_FLAGS, *size]) == 0
    for path in (image["path"], tmp_path / "raw/samples/00000.png"):
        assert replay(backend, path) == "identical"


@pytest.mark.filterwarnings("ignore::ldm.prompts.PromptWarning")  # as `ldm app` does
def test_large_seeds_are_exact_and_a_truncated_prompt_is_in_the_message(backend, run):
    seed = str(2**64 - 1)  # more than a number of JavaScript holds exactly
    progress = run(backend, "txt2img", prompt="very " * 80, seed=seed)
    warning = "; a prompt is longer than 75 tokens: `very very very very …` is left"
    assert warning in progress.message
    assert progress.infos[0]["seed"] == 2**64 - 1
    assert replay(backend, progress.infos[0]["path"]) == "identical"


def test_a_replay_reads_the_prompt_in_the_syntax_of_the_image(backend, run):
    image = run(backend, "txt2img", prompt="a (fox:1.4)", syntax="a1111").infos[0]
    assert replay(backend, image["path"]) == "identical"


def test_a_selected_vae_decodes_and_is_found_by_its_hash_on_replay(families, run, tmp_path):
    (tmp_path / "vae").mkdir()
    copy_model(families["base_v"], tmp_path)
    state = read_checkpoint(families["base_v"].ckpt).state_dict
    write_checkpoint(tmp_path / "vae/other.ckpt", {name: v + 0.1 for name, v in state.items()})
    backend = Backend(Library(tmp_path), tmp_path / "out", MODEL_OPTIONS, LIMITS)
    plain, other = (run(backend, "txt2img", vae=vae).infos[0] for vae in ("", "other"))
    assert other["vae"]["path"] == "other.ckpt"
    assert (read_pixels(plain["path"]) != read_pixels(other["path"])).any()
    assert replay(backend, other["path"]) == "identical"
    progress = run(backend, "txt2img", vae="../base_v")
    assert "unknown VAE `../base_v`" in progress.message


@pytest.mark.slow
def test_a_safety_checker_is_selected_by_name_and_reports_its_action(families, run, tmp_path):
    (tmp_path / "safety_checker").mkdir()
    copy_model(families["base_v"], tmp_path)
    checker = write_safety_checker(tmp_path / "safety_checker/sd1.safetensors")
    backend = Backend(Library(tmp_path), tmp_path / "out", MODEL_OPTIONS, LIMITS)
    options = {"safety_checker": "sd1", "unsafe": "black", "sld": "max"}
    progress = run(backend, "txt2img", **options)
    assert "image 0 is flagged by concept 2" in progress.message
    assert "replaced by black" in progress.message
    assert not read_pixels(progress.infos[0]["path"]).any()
    assert progress.infos[0]["sld"] == "max"
    assert replay(backend, progress.infos[0]["path"]) == "identical"
    progress = run(backend, "txt2img", **options | {"unsafe": "drop"})
    assert [image["path"] for image in progress.infos] == [None]
    progress = run(backend, "txt2img", safety_checker=str(checker))
    assert "unknown safety checker" in progress.message


def test_the_token_of_an_embedding_counts_once_for_each_vector(backend, families, tmp_path):
    width = ldm.load(*families["base_v"]).conditioner.text.width
    write_embeddings(tmp_path / "cat.safetensors", {"cat": torch.randn(3, width)})
    with_embeddings = make_backend(families, tmp_path, embeddings=[str(tmp_path)])
    assert backend.library.count_tokens("base_v.safetensors", "a cat") == (2, 75, "")
    assert with_embeddings.library.count_tokens("base_v.safetensors", "a cat") == (4, 75, "")
    assert backend.library.count_tokens("absent.safetensors", "a cat") == (0, 0, "")
    long = "a (cat:1.2) BREAK " + "very " * 80
    assert backend.library.count_tokens("base_v.safetensors", long, "a1111") == (82, 225, "")
    assert backend.library.count_tokens("base_v.safetensors", "(a", "compel") == (0, 0, "")


def test_pixels_outside_the_painted_mask_stay(backend, run, photo):
    progress = run(backend, "inpaint", model="base_v.safetensors")
    same = (read_pixels(progress.infos[0]["path"]) == read_pixels(photo)).all(-1)
    same[8:40, 8:30] = True
    assert same.all()


def test_an_estimated_depth_map_can_be_used_as_input(backend, make_request, run):
    progress = Progress()
    backend.estimate_depth(make_request(backend, "depth2img"), progress)
    depth_map = progress.infos[0]["path"]
    with Image.open(depth_map) as image:
        assert image.mode.startswith("I")
    progress = run(backend, "depth2img", depth_map=depth_map)
    assert progress.infos[0]["inputs"]["depth_map"], progress.message


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("txt2img", {"steps": 21}, "steps must be 1 to 20, got 21"),
        ("txt2img", {"n_samples": 3}, "n_samples must be 1 to 2, got 3"),
        ("txt2img", {"width": 4096}, "width must be 8 to 256, got 4096"),
        ("txt2img", {"height": 68}, "height 68 is not a positive multiple of 8"),
        ("txt2img", {"prompt": "x" * 3000}, "longer than 2000 characters"),
        ("img2img", {"source_prompt": "x" * 3000}, "longer than 2000 characters"),
        ("txt2img", {"sampler": "dmp"}, "unknown sampler `dmp`"),
        ("inpaint", {"sketch": None}, "No input image"),
        ("unclip", {"init_img": None}, "No input image"),
        ("unclip", {"weight": "2; 1"}, "is not a number"),
        ("txt2img", {"seed": "five"}, "seed: `five` is not a whole number"),
        ("txt2img", {"sigmas": "five"}, "sigmas: `five` is not a list of numbers"),
        ("txt2img", {"sigmas": " ".join(map(str, range(22, -1, -1)))}, "steps must be 1 to 20"),
    ],
)  # fmt: skip
def test_invalid_and_excessive_values_are_errors_in_one_line(backend, run, task, changes, message):
    progress = run(backend, task, **changes)
    assert progress.has_failed
    assert message in progress.message


def test_an_empty_mask_is_refused(backend, run, photo):
    progress = run(backend, "inpaint", sketch=make_sketch(photo))
    assert progress.message == "The mask is empty. Draw over the area to repaint."


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "an empty file"), (b"<html>", "a web page"), ("cut", "damaged"), (HUGE_PNG, "pixels")],
)
def test_bad_uploads_are_named_without_the_path(backend, run, photo, tmp_path, content, reason):
    bad = tmp_path / "holiday.png"
    bad.write_bytes(photo.read_bytes()[:2000] if content == "cut" else content)
    progress = run(backend, "img2img", init_img=str(bad))
    assert read_file_info(str(bad)) == ({}, progress.message)
    assert re.match("`holiday.png` (is|has) ", progress.message)
    assert reason in progress.message
    assert "\n" not in progress.message


def test_the_error_for_a_too_large_image_says_how_to_resize_it(backend, run, tmp_path):
    Image.new("RGB", (300, 200)).save(tmp_path / "large.png")
    large = {"init_img": str(tmp_path / "large.png")}
    message = run(backend, "img2img", **large).message
    assert "300x200 is too large, sides up to 256 are allowed: set width or height" in message
    assert not run(backend, "img2img", **large, width=64).has_failed


@pytest.mark.parametrize(
    "name", [None, "../base_v.safetensors", "inpaint.safetensors", "absent.safetensors"]
)
def test_only_models_of_the_folder_that_fit_the_task_are_accepted(backend, name):
    available = "base_eps.safetensors, base_v.safetensors"
    with pytest.raises(ValueError, match=f"txt2img needs a text.*; available: {available}"):
        backend.build_request(TASKS["txt2img"], name, {})


FORGERIES = [
    ({"checkpoint": "/etc/passwd"}, "no model `/etc/passwd`"),
    ({"inputs": {"init_img": [{"path": "/etc/passwd", "sha256": "0" * 64}]}}, "upload it"),
    ({"request": {"overrides": ["model.params.x=1"]}}, "use `ldm replay`"),
    (
        {"loras": [{"path": "/etc/passwd", "weight": 1, "hash": ""}]},
        "LoRA `passwd`, which is not here: put it into the folder `loras` in the models folder",
    ),
    ({"embeddings": [{"path": "/etc/passwd", "hash": ""}]}, "`passwd`, which is not here"),
    (
        {"refiner": {"path": "/etc/passwd", "hash": ""}},
        "refiner `passwd`, which is not here: put it into the models folder",
    ),
    ({"request": {"steps": 10**9}}, "steps must be"),
    ({"request": {"seed": None}}, "seed: a value is missing"),
    ({"request": {"steps": None}, "steps": 10**9}, "steps must be"),
    ({"request": 5}, "the request in it is damaged"),
    ({"rows": 10**9}, "n_samples must be"),
    ({"earlier": [10**9]}, "n_samples must be"),
    ({"request": {"height": 8192}}, "height must be 8 to 256, got 8192"),
]


IMAGE_PATHS: dict[str, str] = {}  # by task: an image that `replay_forged` copies


def change_info(info, changes):
    request = changes.get("request")
    if isinstance(request, dict):
        changes = changes | {"request": info["request"] | request}
    return info | changes


@pytest.fixture
def replay_forged(backend, run, tmp_path):
    """Replays an image of a task with changed metadata; returns the message."""

    def replay_forged(task, **changes):
        if task not in IMAGE_PATHS:
            IMAGE_PATHS[task] = run(backend, task).infos[0]["path"]
        path = IMAGE_PATHS[task]
        with Image.open(path) as image:
            write_png(tmp_path / "forged.png", image, change_info(read_info(path), changes))
        return replay(backend, tmp_path / "forged.png")

    return replay_forged


@pytest.mark.parametrize(("changes", "message"), FORGERIES)
def test_forged_metadata_reads_no_file_and_exceeds_no_limit(replay_forged, changes, message):
    assert message in replay_forged("txt2img", **changes)


@pytest.mark.parametrize("option", ["save_depth", "midas"])
def test_metadata_cannot_name_a_file_to_write_or_load(backend, replay_forged, photo, option):
    upload = Path(backend.uploads.add(photo))
    content = upload.read_bytes()
    inputs = {option: [{"path": str(upload), "sha256": upload.stem}]}
    assert f"with a file as `{option}`" in replay_forged("depth2img", inputs=inputs)
    assert upload.read_bytes() == content


def test_a_config_named_in_metadata_is_not_read(replay_forged):
    assert replay_forged("txt2img", config="/etc/passwd") == "identical"


def test_images_of_other_programs_are_not_replayed(backend, photo):
    assert "contains no generation parameters" in replay(backend, photo)


@pytest.mark.slow
def test_selected_loras_change_the_image_and_are_found_by_hash_on_replay(families, run, tmp_path):
    model = ldm.load(*families["base_v"])
    lora = write_random_lora(tmp_path / "1.safetensors", model, 1)
    backend = make_backend(families, tmp_path / "out", loras=[(str(lora), 0.5)])
    assert backend.library.list_compatible_loras("base_v.safetensors") == ["1"]
    assert backend.library.list_compatible_loras("upscale.safetensors") == []
    styled, plain = (run(backend, "txt2img", lora=loras).infos[0] for loras in (["1:0.8"], []))
    assert [(lora["path"], lora["weight"]) for lora in styled["loras"]] == [("1.safetensors", 0.8)]
    recorded = [styled["request"][key] for key in ("lora", "ckpt", "outdir")]
    assert recorded == [[["1.safetensors", 0.8]], "base_v.safetensors", "out"]
    assert (read_pixels(styled["path"]) != read_pixels(plain["path"])).any()
    assert backend._model_cache.count == 1
    flags = ["--ckpt", str(families["base_v"].ckpt), "--lora", f"{lora}:0.8"]
    assert main(["replay", styled["path"], *flags]) == 0
    moved = [(str(lora.rename(tmp_path / "moved.safetensors")), 1.0)]
    backend = make_backend(families, tmp_path / "out", loras=moved)
    assert replay(backend, styled["path"]) == replay(backend, plain["path"]) == "identical"


@pytest.mark.parametrize(
    ("loras", "prompt", "selected"),
    [
        ([], "a fox", [[]]),
        ([("b.pt", -0.5), ("a.pt", 1.0)], "a fox", [["b", "a"], -0.5, 1.0]),
        ([("a.pt", "0.5:1"), ("b.pt", 5.0), ("c.pt", 0.8)],
         "a fox <lora:a:0.5:1> <lora:b:5.0> <lora:c:0.8>", [[]]),
    ],
)  # fmt: skip
def test_reused_loras_fill_sliders_or_the_prompt(families, tmp_path, loras, prompt, selected):
    """`c` is missing: its tag in the prompt leads to an error that names it."""
    available = [(str(tmp_path / f"{name}.pt"), 1.0) for name in "ab"]
    for path, _ in available:
        Path(path).touch()
    events = FormEvents(make_backend(families, tmp_path / "out", loras=available))
    recorded = [{"path": path, "weight": weight} for path, weight in loras]
    info = {"prompt": "a fox", "seed": 1, "loras": recorded}
    fields = list(events.forms["txt2img"].common_fields)
    filled = events.fill_fields(info, "base_v.safetensors", {})
    assert filled[fields.index("prompt")] == prompt
    assert filled[len(fields) :][: len(selected)] == selected
    text = format_parameters({**info, "ldm": "1.0", "steps": 2, "size": [64, 64]})
    pasted = events.paste_parameters(text, None, "base_v.safetensors", {})
    assert pasted[fields.index("prompt")] == prompt
    assert pasted[len(fields) :] == filled[len(fields) :]
    unchanged = events.fill_fields(None, None, {})[len(fields) :]
    from_other_program = events.fill_fields({"prompt": "a fox"}, None, {})
    assert from_other_program[len(fields) :] == unchanged
    assert (
        events.send_image("upscale", info, "upscale.safetensors", {})[len(fields) : -1] == unchanged
    )


def test_a_lora_of_another_family_is_refused_before_loading(families, run, tmp_path, monkeypatch):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    state = {f"{name}.lora_down.weight": torch.ones(2, 2048)}
    state[f"{name}.lora_up.weight"] = torch.ones(320, 2)
    write_checkpoint(tmp_path / "xl.safetensors", state)
    loras = [(str(tmp_path / "xl.safetensors"), 1.0)]
    backend = make_backend(families, tmp_path / "out", loras=loras)
    monkeypatch.setattr("ldm.app.model_cache.ModelCache.__call__", pytest.fail)
    for changes in ({"lora": ["xl:1"]}, {"prompt": "a fox <lora:xl:1>"}):
        message = run(backend, "txt2img", **changes).message
        assert "`xl.safetensors` is a LoRA for Stable Diffusion XL, the model is" in message


@pytest.mark.parametrize(
    ("selected", "message"),
    [
        (["/etc/passwd"], "no LoRA `/etc/passwd`; available: style"),
        (["style:1000"], "`style` must be -10 to 10, got 1000"),
        (["style:nan"], "no LoRA `style:nan`"),
        (["style", "style:0.5"], "`style` is selected twice"),
        ([1], "no LoRA `1`"),
        (["style"], "`style.pt` is"),
    ],
)
def test_only_offered_loras_are_accepted(families, run, tmp_path, selected, message):
    (tmp_path / "style.pt").write_bytes(b"<html>")
    backend = make_backend(families, tmp_path / "out", loras=[(str(tmp_path / "style.pt"), 1)])
    progress = run(backend, "txt2img", lora=selected)
    assert message in progress.message
    assert str(tmp_path) not in progress.message


def test_an_unknown_lora_is_reported_without_the_folder_of_the_server(backend, run):
    progress = run(backend, "txt2img", lora=["style:1"])
    assert "no LoRA `style`; available: none" in progress.message
    assert str(backend.library.folder) not in progress.message


def test_prompts_name_loras_and_wildcards_of_the_models_folder(families, run, tmp_path):
    folder = tmp_path / "models"
    copy_model(families["base_v"], folder)
    for name in ("wildcards", "loras"):
        (folder / name).mkdir()
    (folder / "wildcards/animal.txt").write_text("fox\nhare")
    lora = write_random_lora(folder / "loras/style.safetensors", ldm.load(*families["base_v"]), 1)
    backend = Backend(Library(folder), tmp_path / "out", MODEL_OPTIONS, LIMITS)
    prompt = "a {red|blue} __animal__ <lora:style:0.5:1>"
    info = run(backend, "txt2img", prompt=prompt, dynamic_prompts=True).infos[0]
    assert re.fullmatch("a (red|blue) (fox|hare)", info["prompt"])
    assert [(file["path"], file["weight"]) for file in info["loras"]] == [(lora.name, "0.5:1")]
    assert replay(backend, info["path"]) == "identical"
    assert backend.library.count_tokens("base_v.safetensors", "a fox <lora:style:1>")[0] == 2
    progress = run(backend, "txt2img", prompt="a <lora:stlye:1>")
    assert progress.message == "unknown LoRA `stlye`, did you mean `style`? choose one of style"


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        ([("absent.pt", 1)], "no file `absent.pt`"),
        ([("a/x.pt", 1), ("b/x.pt", 1)], "have the same name"),
    ],
)
def test_missing_and_ambiguous_loras_are_refused_at_the_start(families, tmp_path, loras, message):
    with pytest.raises((ValueError, OSError), match=message):
        make_backend(families, tmp_path, loras=loras)


@pytest.mark.slow
def test_a_replay_uses_the_embeddings_of_the_image(backend, families, run, tmp_path):
    width = ldm.load(*families["base_v"]).conditioner.text.width
    with_embeddings = make_backend(families, tmp_path / "out", embeddings=[str(tmp_path)])
    write_embeddings(tmp_path / "cat.safetensors", {"cat": torch.randn(2, width)})
    plain = run(backend, "txt2img", prompt="a cat").infos[0]["path"]
    embedded = run(with_embeddings, "txt2img", prompt="a cat").infos[0]["path"]
    assert (read_pixels(plain) != read_pixels(embedded)).any()
    assert replay(with_embeddings, plain) == replay(with_embeddings, embedded) == "identical"
    write_embeddings(tmp_path / "cat.safetensors", {"cat": torch.randn(2, width)})
    assert "`cat.safetensors`, which is not here" in replay(with_embeddings, embedded)


def test_a_checkpoint_is_inspected_by_its_name_only(backend):
    assert "family" in backend.library.inspect("base_v.safetensors")
    assert backend.library.inspect("../../etc/passwd") == "select a checkpoint"


def test_progress_is_html_in_which_user_input_is_escaped():
    progress = Progress(message="<script>", preview=Image.new("RGB", (4, 4)))
    assert "&lt;script&gt;" in render_progress(progress)
    assert "data:image/png;base64," in render_preview(progress)
    assert format_info({}) == "No generation parameters found"


def test_settings_that_are_not_understood_are_listed(backend):
    text = 'a fox\nSteps: 20, Sampler: Euler, Seed: 1, ENSD: 31337, Lora hashes: "a: 1", VAE: x.pt'
    expected = "Not understood: ENSD: 31337, VAE: x.pt"
    assert format_info(parse_parameters(text)).splitlines()[-1] == expected
    *_, error, _ = FormEvents(backend).paste_parameters(text, None, None, {})
    assert expected in error


def test_previews_use_taesd_if_a_file_of_it_fits(tmp_path):
    (tmp_path / "vae_approx").mkdir()
    state = {name: 0.1 * torch.randn(v.shape) for name, v in TinyDecoder().state_dict().items()}
    torch.save(state, tmp_path / "vae_approx/taesd_decoder.pth")
    model, z = ldm.load(), torch.zeros(1, 4, 2, 2)
    library = Library(tmp_path)
    assert library.make_previewer(model)(z).shape == (1, 3, 16, 16)
    (tmp_path / "vae_approx/taesd_decoder.pth").rename(tmp_path / "taesdxl_decoder.pth")
    library = Library(tmp_path, previews=[tmp_path / "taesdxl_decoder.pth"])
    assert library.make_previewer(model)(z).shape == (1, 3, 2, 2)


@pytest.fixture
def upscaler_backend(families, tmp_path):
    """A backend with a model and an x2 latent upscaler."""
    folder = tmp_path / "models"
    copy_model(families["base_eps"], folder)
    config = {"ldm.config": format_yaml(make_tiny_config())}
    save_model(build_tiny_upscaler(), folder / "x2.safetensors", config)
    return Backend(Library(folder), tmp_path / "out", MODEL_OPTIONS, LIMITS)


def test_a_model_keeps_its_loras_beside_an_upscaler(families, upscaler_backend, run, tmp_path):
    model = ldm.load(*families["base_eps"])
    (tmp_path / "models/lora").mkdir()
    write_random_lora(tmp_path / "models/lora/style.safetensors", model, 1)
    changes = {"upscaler": "x2.safetensors", "upscaler_steps": "1", "lora": ["style:0.8"]}
    progress = run(upscaler_backend, "txt2img", "base_eps.safetensors", **changes)
    assert [lora["weight"] for lora in progress.infos[0]["loras"]] == [0.8]


@pytest.mark.slow
def test_an_image_of_an_upscaler_fills_the_form_and_replays(upscaler_backend, make_request):
    backend = upscaler_backend
    changes = {"upscaler": "x2.safetensors", "upscaler_steps": "2", "upscaler_scale": "0"}
    request = partial(make_request, backend, "txt2img", "base_eps.safetensors")
    progress = Progress()
    backend.generate(request(**changes), progress)
    info = progress.infos[0]
    with Image.open(info["path"]) as image:
        assert image.size == (128, 128)
    events = FormEvents(backend)
    fields = events.forms["txt2img"].common_fields
    filled = dict(zip(fields, events.fill_fields(info, None, {}), strict=False))
    assert filled.items() >= (changes | {"upscaler_scale": "0.0", "width": 64}).items()
    assert backend.replay(info["path"], Progress()) == "identical"
    without_upscaler = request(**changes | {"upscaler": ""})
    assert without_upscaler.upscaling == TASKS["txt2img"].build_request().upscaling
    with pytest.raises(ArgumentError, match="unknown upscaler"):
        request(upscaler="../secret.ckpt")


def test_images_are_packed_unless_one_was_deleted(tmp_path):
    backend = Backend(Library(tmp_path), tmp_path, MODEL_OPTIONS, LIMITS)
    events = Page(backend).job_events
    paths = [OutputFolder(tmp_path).save_sample(Image.new("RGB", (8, 8)), {}) for _ in range(2)]
    infos = [{"path": str(path)} for path in paths]
    with zipfile.ZipFile(events.pack_images(infos)) as archive:
        assert archive.namelist() == ["samples/00000.png", "samples/00001.png"]
    paths[1].unlink()
    with pytest.raises(gr.Error) as caught:
        events.pack_images(infos)
    assert caught.value.message == f"{paths[1]}: No such file or directory"
    assert len([*(tmp_path / "served").iterdir()]) == 1


@pytest.mark.slow
def test_a_finished_run_with_depth_is_shown_as_a_relief(make_request, tmp_path, monkeypatch):
    pytest.importorskip("trimesh")
    (tmp_path / "models").mkdir()
    write_family("ldm3d-4c", tmp_path / "models/ldm3d-4c.safetensors")
    backend = Backend(Library(tmp_path / "models"), tmp_path / "out", MODEL_OPTIONS, LIMITS)
    events = Page(backend).job_events
    assert events.jobs.list_infos("me") == []
    request = make_request(backend, "txt2img", "ldm3d-4c.safetensors")
    progress = run_job(lambda progress: backend.generate(request, progress), events.jobs)
    assert not progress.has_failed, progress.message
    gallery = events._update_gallery("me")
    names = [Path(info["path"]).name for info in gallery["infos"]]
    assert names == ["00000.png", "00000_depth.png"]
    update = events.show_relief(gallery["selected_info"])
    assert update["label"] == f"Relief of {2 * 63 * 63:,} triangles: drag to turn"
    assert Path(update["value"]).read_bytes()[:4] == b"glTF"
    Path(gallery["infos"][0]["path"]).unlink()
    assert "no image `" in events.show_relief(gallery["selected_info"])["label"]
    monkeypatch.setattr("ldm.imaging.mesh.find_spec", lambda name: None)
    assert "trimesh" in events.show_relief(gallery["selected_info"])["label"]
    assert events.show_relief(None)["visible"] == "hidden"

"""ldm.studio and ldm.page: what the app does, without its page, on tiny models of every family."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from picturehelp import pixels, random_lora
from PIL import Image

import ldm
from ldm.app import form
from ldm.app.progress import Live, follow
from ldm.app.studio import Limits, Studio
from ldm.generate import flags
from ldm.imaging.metadata import read_info, write_png
from ldm.loading.addons.embeddings import write_embeddings
from scripts import depth2img, img2img, inpaint, replay, txt2img, unclip, upscale

SCRIPTS = {"txt2img": txt2img, "img2img": img2img, "inpaint": inpaint, "depth2img": depth2img,
           "upscale": upscale, "unclip": unclip}  # fmt: skip
MODELS = {"txt2img": "base_v", "img2img": "base_eps", "inpaint": "inpaint", "depth2img": "depth",
          "upscale": "upscale", "unclip": "unclip"}  # fmt: skip
LIMITS = Limits(side=256, steps=20, batch=2, batches=2)


@pytest.fixture
def studio(files, tmp_path):
    given = Namespace(device="cpu", precision="full", attention=None, embedding=[])
    return Studio(Path(files["base_v"][1]).parent, tmp_path / "out", given, LIMITS)


@pytest.fixture
def answers(photo):
    """What a user fills in for a task; the defaults of the page otherwise."""

    def answers(task, **changes):
        names = f"{form.TASKS[task][1]} {form.SAMPLING}".split()
        settings = {name: form.table(LIMITS)[name][1] for name in names}
        filled = {name: setting.get("value") for name, setting in settings.items()}
        filled |= {"steps": 2, "n_samples": 1, "seed": 5, "sampler": "ddim", "spacing": form.OWN}
        filled |= {"prompt": "a fox", "negative_prompt": "", "weight": "", "strength": 1.0}
        filled |= {"mask_grow": 0, "mask_blur": 0, "depth_inverted": False, "init_img": str(photo)}
        filled |= {"pictures": [(str(photo), None)], "sketch": sketch(photo, (8, 8, 30, 40))}
        if task in ("txt2img", "unclip"):
            filled |= {"W": 64, "H": 64}
        return {name: filled[name] for name in names} | changes

    return answers


def sketch(photo, box):
    """What the editor gives for a picture with a box painted over."""
    with Image.open(photo) as file:
        picture = file.convert("RGB")
    layer = Image.new("RGBA", picture.size)
    if box is not None:
        layer.paste((255, 0, 0, 255), box)
    return {"background": picture, "layers": [layer], "composite": picture}


def run(studio, task, answers, model=None):
    """The run of a task, when it has ended."""

    def work(live):
        values = form.told(answers, studio.uploads)
        name = model or f"{MODELS[task]}.ckpt"
        return studio.generate(
            studio.flags(flags.parse(SCRIPTS[task].PARSER, []), name, values), live
        )

    return [*follow(Live(), work)][-1]


def replayed(studio, path):
    parsed = flags.parse(replay.PARSER, [str(path)])
    return [*follow(Live(), lambda live: studio.replay(parsed, live))][-1]


def test_each_task_is_offered_the_models_that_serve_it(studio):
    offered = {task: studio.names(task) for task in SCRIPTS}
    text = ["base_eps.ckpt", "base_v.ckpt"]
    assert offered == {
        "txt2img": text,
        "img2img": text,
        "inpaint": [*text, "inpaint.ckpt"],
        "depth2img": ["depth.ckpt"],
        "upscale": ["upscale.ckpt"],
        "unclip": ["unclip.ckpt"],
    }


@pytest.mark.parametrize("task", SCRIPTS)
def test_every_task_makes_pictures_that_the_script_and_the_app_make_again(
    studio, files, answers, capsys, task
):
    live = run(studio, task, answers(task))
    assert not live.failed, live.message
    path = live.made[0]["path"]
    assert path == str(studio.outdir / "samples/00000.png")
    assert read_info(path)["task"] == task
    assert replay.main([path, "--ckpt", files[MODELS[task]][1]]) == 0
    assert replayed(studio, path).message == "identical"


def test_known_pixels_of_a_sketch_stay(studio, answers, photo):
    live = run(studio, "inpaint", answers("inpaint"), model="base_v.ckpt")
    same = (pixels(live.made[0]["path"]) == pixels(photo)).all(-1)
    same[8:40, 8:30] = True
    assert same.all()


def test_an_estimated_depth_map_is_taken_back(studio, answers):
    args = form.told(answers("depth2img"), studio.uploads)
    parsed, live = flags.parse(depth2img.PARSER, []), Live()
    studio.depth(studio.flags(parsed, "depth.ckpt", args), live)
    map_ = live.made[0]["path"]
    with Image.open(map_) as picture:
        assert picture.mode.startswith("I")
    live = run(studio, "depth2img", answers("depth2img", depth_map=map_))
    assert live.made[0]["inputs"]["depth_map"], live.message


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("txt2img", {"steps": 21}, "`steps` is 21, 1 to 20 are allowed"),
        ("txt2img", {"n_samples": 3}, "`n_samples` is 3, 1 to 2 are allowed"),
        ("txt2img", {"W": 4096}, "`W` is 4096, 8 to 256 are allowed"),
        ("txt2img", {"H": 68}, "must be multiples of 8, got 64 x 68"),
        ("txt2img", {"prompt": "x" * 3000}, "prompts may have 2000 characters"),
        ("txt2img", {"sampler": "dmp"}, "unknown sampler `dmp`"),
        ("inpaint", {"sketch": None}, "there is no picture"),
        ("unclip", {"pictures": None}, "there is no picture"),
        ("unclip", {"weight": "2; 1"}, "are not weights"),
        ("unclip", {"weight": "2, 1"}, "2 weights were given for 1"),
        ("upscale", {"noise_on_picture": 400}, "noise levels are 0"),
    ],
)
def test_what_asks_for_too_much_or_makes_no_sense_is_one_line(
    studio, answers, task, changes, message
):
    live = run(studio, task, answers(task, **changes))
    assert live.failed
    assert message in live.message


def test_an_empty_sketch_says_what_to_do(studio, answers, photo):
    live = run(studio, "inpaint", answers("inpaint", sketch=sketch(photo, None)))
    assert live.message.startswith("nothing is painted over")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "an empty file"), (b"<html>", "a web page"), ("cut", "damaged"), ("huge", "pixels")],
)
def test_bad_uploads_are_named_in_one_line_without_the_path(
    studio, answers, photo, tmp_path, content, reason
):
    bad = tmp_path / "holiday.png"
    if content == "huge":
        Image.new("1", (20_000, 20_000)).save(bad)
    else:
        bad.write_bytes(photo.read_bytes()[:2000] if content == "cut" else content)
    live = run(studio, "img2img", answers("img2img", init_img=str(bad)))
    assert re.match("`holiday.png` (is|has) ", live.message)
    assert reason in live.message
    assert "\n" not in live.message


def test_too_large_a_picture_says_how_to_scale_it(studio, answers, tmp_path):
    Image.new("RGB", (300, 200)).save(tmp_path / "large.png")
    large = {"init_img": str(tmp_path / "large.png")}
    live = run(studio, "img2img", answers("img2img", **large))
    assert "300x200, sides up to 256 are allowed: set width or height" in live.message
    assert not run(studio, "img2img", answers("img2img", **large, W=64)).failed


@pytest.mark.parametrize("name", [None, "../base_v.ckpt", "inpaint.ckpt", "absent.ckpt"])
def test_models_are_those_of_the_folder_that_serve_the_task(studio, answers, name):
    def work(live):
        return studio.flags(flags.parse(txt2img.PARSER, []), name, answers("txt2img"))

    live = [*follow(Live(), work)][-1]
    assert "for txt2img; there is: base_eps.ckpt, base_v.ckpt" in live.message


LIES = [
    ({"checkpoint": "/etc/passwd"}, "no model `/etc/passwd`"),
    ({"inputs": {"init_img": [{"path": "/etc/passwd", "sha256": "0" * 64}]}}, "upload it"),
    ({"overrides": ["model.params.x=1"]}, "use scripts/replay.py"),
    ({"loras": [{"path": "/etc/passwd", "weight": 1, "hash": ""}]}, "`passwd`, which is not here"),
    ({"embeddings": [{"path": "/etc/passwd", "hash": ""}]}, "`passwd`, which is not here"),
    ({"steps": 10**9}, "`steps` is"),
    ({"rows": 10**9}, "`n_samples` is"),
    ({"fit": [8192, 8192]}, "`H` is 8192"),
]


@pytest.mark.parametrize(("lie", "message"), LIES)
def test_a_picture_that_lies_about_its_making_reads_no_file_and_takes_no_time(
    studio, answers, tmp_path, lie, message
):
    path = run(studio, "img2img", answers("img2img")).made[0]["path"]
    with Image.open(path) as picture:
        write_png(tmp_path / "lie.png", picture, read_info(path) | lie)
    live = replayed(studio, tmp_path / "lie.png")
    assert live.failed
    assert message in live.message


def test_a_config_that_a_picture_names_is_not_read(studio, answers, tmp_path):
    path = run(studio, "txt2img", answers("txt2img")).made[0]["path"]
    with Image.open(path) as picture:
        write_png(tmp_path / "lie.png", picture, read_info(path) | {"config": "/etc/passwd"})
    assert replayed(studio, tmp_path / "lie.png").message == "identical"


def test_pictures_of_other_programs_are_not_replayed(studio, photo):
    assert "does not say how it was made" in replayed(studio, photo).message


def test_models_stay_in_memory_between_tasks(studio, answers):
    run(studio, "txt2img", answers("txt2img"))
    run(studio, "img2img", answers("img2img"), model="base_v.ckpt")
    assert studio._pool.count == 1
    run(studio, "inpaint", answers("inpaint"))
    assert studio._pool.count == 2


def test_chosen_loras_change_the_picture_and_are_found_again_by_content(
    studio, files, answers, tmp_path, capsys
):
    model = ldm.load(files["base_v"][3], files["base_v"][1])
    given = [(str(random_lora(tmp_path / f"{n}.safetensors", model, n)), 0.5) for n in (1, 2)]
    studio = Studio(studio.folder, studio.outdir, studio.given, LIMITS, loras=given)
    assert form.table(LIMITS, studio.offered)["lora"][1]["value"] == ["1:0.5", "2:0.5"]
    with_one, plain = (
        run(studio, "txt2img", answers("txt2img", lora=lora)).made[0] for lora in (["1:0.8"], [])
    )
    assert [(lora["path"], lora["weight"]) for lora in with_one["loras"]] == [
        ("1.safetensors", 0.8)
    ]
    assert (pixels(with_one["path"]) != pixels(plain["path"])).any()
    assert studio._pool.count == 2
    words = ["--ckpt", files["base_v"][1], "--lora", f"{given[0][0]}:0.8"]
    assert replay.main([with_one["path"], *words]) == 0
    moved = [(str(Path(given[0][0]).rename(tmp_path / "moved.safetensors")), 1.0)]
    studio = Studio(studio.folder, studio.outdir, studio.given, LIMITS, loras=moved)
    assert replayed(studio, with_one["path"]).message == "identical"
    assert replayed(studio, plain["path"]).message == "identical"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["/etc/passwd"], "no LoRA `/etc/passwd`; there is: style"),
        (["style:1000"], "of weight 1000: -10 to 10"),
        (["style:nan"], "of weight nan: -10 to 10"),
        (["style", "style:0.5"], "`style` was chosen twice"),
        ([1], "no LoRA `1`"),
        (["style"], "`style.pt` is"),
    ],
)
def test_loras_are_those_that_were_offered(studio, answers, tmp_path, chosen, message):
    (tmp_path / "style.pt").write_bytes(b"<html>")
    loras = [(str(tmp_path / "style.pt"), 1)]
    studio = Studio(studio.folder, studio.outdir, studio.given, LIMITS, loras=loras)
    live = run(studio, "txt2img", answers("txt2img", lora=chosen))
    assert message in live.message
    assert str(tmp_path) not in live.message


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        ([("absent.pt", 1)], "no file `absent.pt`"),
        ([("a/x.pt", 1), ("b/x.pt", 1)], "have the same name"),
    ],
)
def test_loras_are_there_when_the_app_starts(studio, loras, message):
    with pytest.raises((ValueError, OSError), match=message):
        Studio(studio.folder, studio.outdir, studio.given, LIMITS, loras=loras)


def test_a_picture_is_made_again_with_the_words_it_was_made_with(studio, files, answers, tmp_path):
    width = ldm.load(files["base_v"][3], files["base_v"][1]).conditioner.text.width
    word, given = tmp_path / "cat.safetensors", Namespace(**vars(studio.given))
    given.embedding = [str(tmp_path)]
    taught = Studio(studio.folder, studio.outdir, given, LIMITS)
    path = run(studio, "txt2img", answers("txt2img", prompt="a cat")).made[0]["path"]
    write_embeddings(word, {"cat": torch.randn(2, width)})
    with_word = run(taught, "txt2img", answers("txt2img", prompt="a cat")).made[0]["path"]
    assert (pixels(path) != pixels(with_word)).any()
    for shown in (path, with_word):
        assert replayed(taught, shown).message == "identical"
    write_embeddings(word, {"cat": torch.randn(2, width)})
    assert "`cat.safetensors`, which is not here" in replayed(taught, with_word).message


def test_a_checkpoint_is_inspected_by_its_name_only(studio):
    assert "family" in studio.inspect("base_v.ckpt")
    assert studio.inspect("../../etc/passwd") == "choose a checkpoint"


def test_a_run_is_html_without_what_users_write(studio):
    shown = form.show(Live(message="<script>", preview=Image.new("RGB", (4, 4))))
    assert "&lt;script&gt;" in shown
    assert "data:image/png;base64," in shown
    assert json.dumps(form.about({})) == '"it does not say how it was made"'

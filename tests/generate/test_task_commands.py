"""The commands that take images, on tiny models."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from goldfile import load_golden
from imagehelp import ONE_IMAGE_FLAGS, assert_pixels_close, read_pixels
from ldm.app.form import get_field_values
from ldm.encoders.depth import MiDaSDepth
from ldm.generate.command_line import parse_request
from ldm.generate.defaults import resolve_sampling
from ldm.generate.tasks import TASKS
from ldm.generate.tasks.images import load_input_image
from ldm.imaging.metadata import read_info
from ldm.loading.build import build_on_meta
from ldm.loading.files.checkpoint import write_checkpoint
from ldm.loading.weight_names import restore_names
from ldm.nets.karlo import Prior
from loading.tinyfamilies import make_small_config
from quick import slow_except

# Command, model, flags, size (height, width); "MAP" and "CKPT" stand for files.
CASES = [
    ("img2img", "base_v", ["--n_samples", "2", "--strength", "0.5"], (70, 60)),
    ("img2img", "base_v", ["--H", "64", "--W", "96"], (64, 96)),
    ("img2img", "base_v", ["--legacy", "--n_iter", "2"], "multiple of 64"),
    ("inpaint", "inpaint", ["--mask-box", "8,8,30,40", "--mask-blur", "2", "--mask-grow", "3"],
     (70, 60)),
    ("inpaint", "inpaint", ["--mask-box", "8,8,30,40", "--legacy"], "multiple of 64"),
    ("inpaint", "base_v", ["--mask-box", "8,8,30,40", "--no-composite"], (70, 60)),
    ("depth2img", "depth", ["--n_samples", "2"], (70, 60)),
    pytest.param("depth2img", "depth",
                 ["--depth-map", "MAP", "--depth-inverted", "--midas", "CKPT"], (70, 60),
                 marks=pytest.mark.slow),
    ("upscale", "upscale", ["--noise-level", "5", "--tile", "64", "--H", "24", "--W", "24"],
     (96, 96)),
    ("unclip", "unclip", ["--H", "64", "--W", "64", "--noise_level", "7"], (64, 64)),
]  # fmt: skip


@pytest.mark.parametrize(("command", "name", "flags", "size"), CASES)
def test_an_image_is_made_and_replayed(run, run_ldm, families, photo, command, name, flags, size):
    if size == "multiple of 64":  # to which --legacy reduces sizes
        Image.open(photo).resize((70, 75)).save(photo)
        size = (64, 64)
    flags = [{"MAP": photo, "CKPT": families[name].ckpt}.get(flag, flag) for flag in flags]
    out = run(command, name, "--init-img", photo, "--prompt", "a fox", *flags).paths
    assert read_pixels(out[-1]).shape == (*size, 3)
    info = read_info(out[-1])
    assert info["task"] == command
    assert info["inputs"]["init_img"][0]["path"] == str(photo)
    assert run_ldm("replay", out[-1]).is_identical


def test_replay_names_a_missing_or_changed_input(run, run_ldm, photo):
    path = run("img2img", "base_v", "--init-img", photo).out[0]
    Image.new("RGB", (60, 70)).save(photo)
    assert "photo.png` has changed since this image was made" in run_ldm("replay", path).err
    photo.unlink()
    assert "photo.png`, which is missing" in run_ldm("replay", path).err


@pytest.mark.parametrize("name", ["s08", "s05_v", "resize", "eta1", "from_file"])
def test_legacy_img2img_gives_the_recorded_images(run, tmp_path, name):
    golden = load_golden("e2e_img2img")
    info = golden.info(name)
    options, flags = dict(info["options"]), ["--legacy", "--no-watermark"]
    Image.fromarray(golden.inputs(name)["init_image"].numpy()).save(tmp_path / "init.png")
    if lines := options.pop("from_file", None):
        (tmp_path / "prompts.txt").write_text("\n".join(lines))
        flags += ["--from-file", tmp_path / "prompts.txt"]
    for key, value in options.items():
        flags += [f"--{key}", value]
    _, out, _ = run("img2img", info["model"], "--init-img", tmp_path / "init.png", *flags)
    pixels = np.stack([read_pixels(path) for path in out])
    assert_pixels_close(pixels, golden.outputs(name)["images"])


@pytest.mark.parametrize(
    ("task", "filter_name"),
    [("img2img", "LANCZOS"), ("inpaint", "BICUBIC"), ("depth2img", "BICUBIC")],
)
def test_legacy_reduces_images_by_the_filter_of_each_script(photo, task, filter_name):
    image = Image.open(photo).resize((70, 75))
    image.save(photo)
    request = parse_request(TASKS[task], ["--init-img", str(photo), "--legacy"])
    expected = image.resize((64, 64), Image.Resampling[filter_name])
    assert np.array_equal(load_input_image(request), expected)


def test_pixels_outside_the_mask_are_not_watermarked(run, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (256, 264, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    box = ["--mask-box", "100,100,180,180", "--steps", "1"]
    _, out, err = run("inpaint", "inpaint", "--init-img", tmp_path / "large.png", *box)
    assert "too small for a watermark" not in err
    same = (read_pixels(out[0]) == noise).all(-1)
    assert same[:100].all()
    assert same[180:].all()
    assert same[:, :100].all()
    assert not same[100:180, 100:180].all()


def test_masks_from_transparency_a_file_and_a_box_give_the_same_image(run, tmp_path, photo):
    mask = Image.new("L", (60, 70))
    mask.paste(255, (10, 10, 40, 50))
    mask.save(tmp_path / "mask.png")
    with Image.open(photo) as image:
        image.putalpha(Image.eval(mask, lambda v: 255 - v))
        image.save(tmp_path / "holed.png")
    by_file = run("inpaint", "inpaint", "--init-img", photo, "--mask", tmp_path / "mask.png").out
    by_alpha = run("inpaint", "inpaint", "--init-img", tmp_path / "holed.png").out
    by_box = run("inpaint", "inpaint", "--init-img", photo, "--mask-box", "10,10,40,50").out
    assert (read_pixels(by_file[0]) == read_pixels(by_box[0])).all()
    assert (read_pixels(by_file[0]) == read_pixels(by_alpha[0])).all()


def test_a_folder_of_images_and_masks_is_inpainted(run, tmp_path, photo):
    for image, mask in (("one.png", "one_mask.png"), ("two.JPG", "two_mask.png"),
                        ("three.webp", "three_mask.bmp")):  # fmt: skip
        Image.open(photo).convert("RGB").save(tmp_path / image)
        Image.new("L", (60, 70), 255).save(tmp_path / mask)
    status, out, _ = run("inpaint", "inpaint", "--indir", tmp_path, "--n_samples", "2")
    names = ["one.png", "one-1.png", "three.png", "three-1.png", "two.png", "two-1.png"]
    assert (status, out) == (0, [str(tmp_path / "out" / name) for name in names])
    assert run("inpaint", "inpaint", "--indir", tmp_path / "out").status == 1
    (tmp_path / "two.JPG").unlink()
    assert "no image `two` for the mask" in run("inpaint", "inpaint", "--indir", tmp_path).err
    flags = ("--indir", tmp_path, "--mask", tmp_path / "one_mask.png")
    assert "leave out mask (--mask)" in run("inpaint", "inpaint", *flags).err


def test_a_folder_of_images_is_an_input_of_img2img(run, run_ldm, tmp_path, photo):
    Image.open(photo).save(tmp_path / "other.png")
    status, out, err = run("img2img", "base_v", "--indir", tmp_path)
    names = ["other.png", "photo.png"]
    assert (status, out) == (0, [str(tmp_path / "out" / name) for name in names]), err
    _, (command,), _ = run_ldm("replay", out[0], "--show-command")
    assert "--init-img=" in command
    assert "--indir" not in command


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "name", "flags"),
    [
        ("txt2img", "base_v", ["--H", "64", "--W", "64"]),
        ("img2img", "base_v", ["--ddim-inversion", "--source-prompt", "a"]),
    ],
)
def test_options_of_sampling_are_recorded_and_replayed(run, run_ldm, photo, task, name, flags):
    sampling = ["--guidance-rescale", "0.5", "--guidance-interval", "0.2,9", "--unet-tile", "32"]
    image = [] if task == "txt2img" else ["--init-img", photo]
    out = run(task, name, *flags, *sampling, *image).paths
    info = read_info(out[0])
    request, form = info["request"], get_field_values(info)
    assert (request["rescale"], request["unet_tile"]) == (0.5, 32)
    assert request["guidance_interval"] == [0.2, 9.0]
    assert (form["rescale"], form["guidance_interval"]) == (0.5, "0.2,9.0")
    assert run_ldm("replay", out[0]).is_identical


@pytest.mark.parametrize(
    ("task", "name", "flags", "message"),
    [
        ("depth2img", "depth", ["--depth-inverted"], "depth_inverted needs depth_map: ignored"),
        ("unclip", "unclip", ["--prior-scale", "2"], "prior_scale needs prior: ignored"),
        ("img2img", "base_v", ["--source-prompt", "a"], "source_prompt needs inversion: ignored"),
        ("img2img", "base_v", ["--n_iter", "2", "--fixed_code", "--ddim-inversion"],
         "DDIM inversion computes the initial noise: fixed_code is ignored"),
        ("upscale", "upscale", ["--H", "16", "--W", "16", "--noise-kind", "fake"],
         "`upscale.safetensors` is an upscaling model: noise_kind is ignored"),
    ],
)  # fmt: skip
def test_options_without_effect_are_warned_of(run, photo, task, name, flags, message):
    status, _, err = run(task, name, "--init-img", photo, "--steps", "1", *flags)
    assert status == 0, err
    assert message in err.splitlines()


@pytest.mark.parametrize("rank", slow_except((0, 1), 0))
def test_processes_share_the_images_of_a_folder(run, tmp_path, photo, monkeypatch, rank):
    for name in ("one", "three", "two"):
        Image.open(photo).save(tmp_path / f"{name}.png")
        Image.new("L", (60, 70), 255).save(tmp_path / f"{name}_mask.png")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, out, err = run("inpaint", "inpaint", "--indir", tmp_path, "--steps", "1")
    names = ["one.png", "two.png"] if rank == 0 else ["three.png"]
    assert out == [str(tmp_path / "out" / name) for name in names], err


@pytest.mark.slow
def test_a_depth_map_is_cropped_like_its_image(tmp_path):
    ramp = np.linspace(0, 255, 128, dtype=np.uint8)[None].repeat(64, 0)
    Image.fromarray(ramp).save(tmp_path / "depth.png")
    Image.fromarray(ramp).convert("RGB").save(tmp_path / "image.png")
    flags = ["--init-img", str(tmp_path / "image.png"), "--depth-map", str(tmp_path / "depth.png")]
    request = parse_request(TASKS["depth2img"], [*flags, "--H", "64", "--W", "64"])
    prepared = request.task.prepare(request)
    image = (prepared.image[:, :1] + 1) / 2
    torch.testing.assert_close(prepared.depth, image, rtol=0, atol=0.02)  # 8 bits: observed 0.004


def test_depth_is_estimated_once_and_saved(run, run_ldm, tmp_path, photo, monkeypatch):
    depth_map, estimate, calls = tmp_path / "depth.png", MiDaSDepth.estimate, []

    def record_call(self, image):
        calls.append(image)
        return estimate(self, image)

    monkeypatch.setattr(MiDaSDepth, "estimate", record_call)
    flags = ["--init-img", photo, "--save-depth", depth_map, "--n_iter", "2"]
    out = run("depth2img", "depth", *flags).paths
    assert len(calls) == 1
    with Image.open(depth_map) as saved:
        assert saved.mode.startswith("I")
    flags = ["--init-img", photo, "--depth-map", depth_map]
    from_map = run("depth2img", "depth", *flags).out
    inverted = run("depth2img", "depth", *flags, "--depth-inverted").out
    assert np.abs(read_pixels(out[0]) - read_pixels(from_map[0])).mean() < 5
    assert np.abs(read_pixels(out[0]) - read_pixels(inverted[0])).mean() > 5
    depth_map.unlink()
    assert run_ldm("replay", out[0]).is_identical
    assert not depth_map.exists()  # metadata of an image must not choose a file to write


def test_several_images_are_mixed(run, photo, tmp_path):
    Image.new("RGB", (50, 50), "red").save(tmp_path / "red.png")
    flags = ["--image", photo, "--image", tmp_path / "red.png", "--H", "64", "--W", "64"]
    flags += ["--weight", 3, "--weight", 1, "--noise-level", 0, "--noise-level", 90]
    out = run("unclip", "unclip", *flags, "--mix-noise-level", 5).paths
    info = read_info(out[0])
    assert (info["weight"], info["noise_level"], info["mix_noise_level"]) == ([3, 1], [0, 90], 5)


def write_random_model(folder, config):
    """Write a model with random weights; return the flags that name it."""
    torch.manual_seed(0)
    model = ldm.instantiate(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    write_checkpoint(folder / "x.ckpt", restore_names(model.state_dict()))
    (folder / "x.yaml").write_text(json.dumps({"model": config}))
    return ["--ckpt", str(folder / "x.ckpt"), "--config", str(folder / "x.yaml")]


@pytest.fixture
def unclip_l(tmp_path):
    """Flags that name an unCLIP-L, next to the two files that it needs from Karlo."""
    golden = load_golden("e2e_unclip")
    config = json.loads(json.dumps(golden.meta["config_unclip"]))
    params, arch = config["params"], golden.meta["tiny_arch"]
    params["cond_stage_config"]["params"]["arch"] = arch
    target = "ldm.modules.encoders.modules.ClipImageEmbedder"
    params["embedder_config"] = {"target": target, "params": {"model": arch}}
    params["noise_aug_config"]["params"]["clip_stats_path"] = "karlo_models/stats.th"
    torch.save((torch.zeros(1, 32), torch.ones(1, 32)), tmp_path / "stats.th")
    prior = Prior(clip_dim=32, xf_width=64, xf_layers=1)
    torch.save({"state_dict": prior.state_dict()}, tmp_path / "prior.ckpt")
    return write_random_model(tmp_path, config)


@pytest.fixture
def unclip(tmp_path, run_ldm):
    """Runs unclip at 64x64; see `run_ldm`."""
    size = ["--H", 64, "--W", 64, "--outdir", tmp_path / "out"]
    return partial(run_ldm, "unclip", *ONE_IMAGE_FLAGS, *size)


def test_an_image_is_made_by_the_prior(unclip_l, unclip, run_ldm, tmp_path, photo):
    flags = [*unclip_l, "--prior", tmp_path / "prior.ckpt", "--prompt", "a fox"]
    prior_flags = ["--prior-steps", "3", "--prior-scale", "2.5"]
    status, out, err = unclip(*flags, "--n_samples", "2", *prior_flags)
    assert status == 0, err
    assert (read_pixels(out[0]) != read_pixels(out[1])).any()
    info = read_info(out[1])
    assert (info["prior_steps"], info["prior_scale"]) == (3, 2.5)
    assert run_ldm("replay", out[1]).is_identical
    assert "in 2 … 1000, got 1 (--prior-steps)" in unclip(*flags, "--prior-steps", "1").err
    out = unclip(*flags, "--image", photo, "--weight", "1", "--weight", "2").paths
    (prior,) = read_info(out[0])["inputs"]["prior"]
    assert prior["path"] == str(tmp_path / "prior.ckpt")


@pytest.mark.slow
def test_missing_clip_statistics_are_named_and_may_be_passed(unclip_l, unclip, tmp_path, photo):
    (tmp_path / "stats.th").rename(tmp_path / "elsewhere.th")
    error = unclip(*unclip_l, "--image", photo).error
    assert "`karlo_models/stats.th`, are missing: put the file beside the checkpoint" in error
    stats = ["--clip-stats", tmp_path / "elsewhere.th"]
    assert unclip(*unclip_l, "--image", photo, *stats).status == 0
    model = ldm.load(unclip_l[3], unclip_l[1], clip_stats=tmp_path / "elsewhere.th")
    ldm.loading.load.save_model(model, tmp_path / "x.ckpt")
    (tmp_path / "elsewhere.th").unlink()
    assert unclip(*unclip_l, "--image", photo).status == 0


def test_unclip_without_image_and_prior_is_refused_in_one_line(unclip_l, unclip):
    assert "an image or a prior is missing (--image)" in unclip(*unclip_l).err


@pytest.mark.parametrize(
    ("family", "sampling"),
    [("unclip-h", (20, 10.0)), ("unclip-l", (20, 10.0)), ("variations", (50, 3.0))],
)
def test_variations_have_the_default_steps_and_scale_of_their_original(family, sampling):
    model = build_on_meta(make_small_config(family))
    resolved = resolve_sampling(TASKS["unclip"].build_request(), model.defaults)
    assert (resolved.steps, resolved.scale) == sampling


@pytest.mark.slow
def test_image_variations_of_sd_1_are_made_without_text(unclip, run_ldm, tmp_path, photo):
    golden = load_golden("e2e_img2img")
    config = json.loads(json.dumps(golden.meta["config_base_eps"]))
    config["params"]["cond_stage_config"] = {
        "target": "ldm.modules.encoders.modules.FrozenCLIPImageEmbedder",
        "params": {"model": golden.meta["tiny_arch"]},
    }
    flags = ["--image", photo, "--n_samples", "2", "--prompt", "a fox"]
    status, out, err = unclip(*write_random_model(tmp_path, config), *flags)
    assert status == 0, err
    assert "is an image variation model: prompt is ignored" in err
    assert len(out) == 2
    assert read_info(out[1])["scale"] == 3
    assert run_ldm("replay", out[1]).is_identical


@pytest.mark.parametrize(
    ("task", "name", "correct"),
    [("txt2img", "inpaint", "inpaint"), ("inpaint", "upscale", "upscale"),
     pytest.param("img2img", "depth", "depth2img", marks=pytest.mark.slow),
     pytest.param("upscale", "unclip", "unclip", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_model_of_another_family_is_refused_in_one_line(run, photo, task, name, correct):
    flags = [] if task == "txt2img" else ["--init-img", photo]
    flags += ["--mask-box", "1,1,9,9"] if task == "inpaint" else []
    error = run(task, name, *flags).error
    assert error.endswith(f"model: use `{correct}` (ldm {correct}, scripts/{correct}.py)")


@pytest.mark.slow
def test_the_upscaler_decodes_in_float32_whatever_its_precision(run, families, photo):
    model = ldm.load(*families["upscale"], dtype=torch.float16)
    assert model.dtype == torch.float16
    assert next(model.autoencoder.parameters()).dtype == torch.float32
    flags = ["--init-img", photo, "--H", "16", "--W", "16", "--steps", "1", "--precision", "fp16"]
    out = run("upscale", "upscale", *flags).paths
    assert read_info(out[0])["dtype"] == "float16"


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("img2img", ["--init-img", "nope.png"], "no image `nope.png` (--init-img)"),
        ("inpaint", ["--mask", "nope.png"], "no image `nope.png` (--mask)"),
        ("inpaint", ["--mask", "PHOTO", "--mask-box", "0,0,8,8"], "not both (--mask-box)"),
        ("inpaint", ["--mask-box", "0,0,8,8", "--mask-blur", "-1"], "`-1` is not a number >= 0"),
        ("depth2img", ["--save-depth", "no/x.png"], "no folder `no` to save `x.png` in (--save-d"),
        ("unclip", ["--prior", "nope.ckpt"], "no checkpoint `nope.ckpt` (--prior)"),
        ("unclip", ["--weight=1", "--weight=2"],
         "2 values of weight were given for 1 images (--we"),
        ("unclip", ["--noise-level=1", "--noise-level=2"], "for 1 images (--noise-level)"),
        ("img2img", ["--indir", "FOLDER"],
         "give an image or a folder of images, not both (--indir)"),
    ],
)  # fmt: skip
def test_missing_or_conflicting_inputs_are_refused(task, flags, message, photo, run_ldm):
    flags = [{"PHOTO": photo, "FOLDER": photo.parent}.get(flag, flag) for flag in flags]
    status, _, err = run_ldm(task, "--init-img", photo, *flags)
    assert status
    assert message in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("task", "name", "flag"),
    [("depth2img", "depth", "--midas"), ("unclip", "unclip", "--clip-stats")],
)
def test_a_missing_midas_or_statistics_file_is_named_with_its_flag(run, photo, task, name, flag):
    error = run(task, name, "--init-img", photo, flag, "nope.pt").error
    assert error.endswith(f"nope.pt`) ({flag})")

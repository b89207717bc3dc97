"""`ldm txt2img` on a tiny model, as a user runs it."""

import io
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imagehelp import assert_pixels_close, read_pixels
from ldm import pipelines
from ldm.imaging.metadata import read_info
from ldm.imaging.watermark import detect_watermarks
from ldm.loading.config import instantiate
from ldm.loading.files.checkpoint import write_checkpoint
from quick import slow_except

QUICK_CASES = ["plms", "dpm", "fixed_code_iter2", "from_file_repeat"]
CASES = [*QUICK_CASES, "ddim_v_eta1", "ddim", "scale1", "niter2", "from_file"]


@pytest.mark.parametrize("name", slow_except(CASES, *QUICK_CASES))
def test_legacy_command_lines_give_the_recorded_images(golden, families, tmp_path, run_ldm, name):
    info = golden.info(name)
    options, flags = dict(info["options"]), families[info["model"]].flags
    flags += ["--legacy", "--no-watermark", "--outdir", tmp_path]
    if lines := options.pop("from_file"):
        (tmp_path / "prompts.txt").write_text("\n".join(lines))
        flags += ["--from-file", tmp_path / "prompts.txt"]
    for key, value in options.items():
        if value is not False:
            flags += [f"--{key}"] if value is True else [f"--{key}", value]
    *images, grid = run_ldm("txt2img", *flags).paths
    pixels = np.stack([read_pixels(path) for path in images])
    assert_pixels_close(pixels, golden.outputs(name)["images"])
    assert_pixels_close(read_pixels(grid), golden.outputs(name)["grid"])


def test_images_and_grid_are_saved_and_listed_on_stdout(txt2img, tmp_path):
    status, out, err = txt2img("--prompt", "a fox", "--n_samples", "2", "--n_rows", "1")
    assert status == 0
    names = ["samples/00000.png", "samples/00001.png", "grid-0000.png"]
    assert out == [str(tmp_path / "out" / name) for name in names]
    assert read_pixels(out[0]).shape == (64, 64, 3)
    assert read_pixels(out[2]).shape == (134, 68, 3)
    assert "Your samples are ready and waiting for you here" in err
    assert err.count("too small for a watermark") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "2000"], "steps must be in 1 … 1000"),
        (["--steps", "60", "--sampler", "lcm"], "steps must be in 1 … 50 with"),
        (["--steps", "27", "--legacy", "steps"], "the original fails at 27 steps: its last times"),
    ],
)
def test_impossible_step_counts_are_refused_before_loading(txt2img, flags, message):
    status, out, err = txt2img(*flags)
    assert (status, out) == (1, [])
    assert message in err
    assert "running on" not in err


def test_numbers_continue_and_nothing_is_overwritten(txt2img):
    first = txt2img("--n_samples", "2", "--skip_grid").out
    before = Path(first[1]).read_bytes()
    Path(first[0]).unlink()
    second = txt2img("--seed", "7").out
    assert [Path(path).name for path in second] == ["00002.png", "grid-0000.png"]
    assert Path(first[1]).read_bytes() == before


def test_json_has_one_line_per_image(txt2img):
    flags = ["--prompt", "a fox", "--negative-prompt", "red"]
    _, out, _ = txt2img(*flags, "--n_samples", 2, "--json")
    images = [json.loads(line) for line in out]
    assert [image["seed"] for image in images] == [42, 43]
    for image in images:
        assert (image["prompt"], image["negative_prompt"]) == ("a fox", "red")
        assert read_info(image.pop("path")).items() >= image.items()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --seed x", "prompts.txt:1: seed: `x` is not a whole number"),
        ("a --seed", "prompts.txt:1: --seed needs a value"),
        ("a --steps 0", "prompts.txt:1: steps: `0` is not a positive whole number"),
        ("a --seed 1 --foo 2", "prompts.txt:1: `--foo` is not an option that a line may set"),
        ("a --t 0.5", "prompts.txt:1: `--t` is not an option that a line may set"),
        ("a --w 100", "prompts.txt:1: width 100 is not a positive multiple of 8"),
        ("a --ss eulr", "prompts.txt:1: unknown sampler `eulr`, did you mean `euler`?"),
        ("a --negative-prompt 'b", "prompts.txt:1: missing closing quote"),
        ("", "prompts.txt is empty"),
    ],
)
def test_errors_in_a_prompt_file_name_its_line(txt2img, tmp_path, line, message):
    (tmp_path / "prompts.txt").write_text(line)
    status, out, err = txt2img("--from-file", tmp_path / "prompts.txt")
    assert (status, out) == (1, [])
    assert message in err
    assert err.count("\n") == 1


def test_seeds_increase_modulo_2_to_the_64(txt2img, run_ldm):
    _, out, _ = txt2img("--seed", str(2**64 - 1), "--n_samples", "2", "--skip_grid")
    assert [read_info(path)["seed"] for path in out] == [2**64 - 1, 0]
    assert run_ldm("replay", out[1]).is_identical


def test_a_tilde_is_expanded_to_the_home_folder(txt2img, tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a fox", "utf-16")
    flags = ["--outdir=~/images", "--from-file=~/prompts.txt", "--skip_grid"]
    assert txt2img(*flags).out == [str(tmp_path / "images/samples/00000.png")]


def test_skip_save_saves_nothing_and_json_is_written_to_any_console(txt2img, tmp_path, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), "cp1252", newline="\n")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert txt2img("--prompt", "狐狸", "--json", "--skip_save", "--skip_grid").status == 0
    stdout.seek(0)
    info = json.loads(stdout.read())
    assert (info["prompt"], info["path"]) == ("狐狸", None)
    assert not list((tmp_path / "out").rglob("*.png"))


def test_a_truncated_prompt_and_the_syntax_for_weights_are_warned_of_once(txt2img):
    prompt = "very " * 74 + "quick brown (foxes:1.2) and more"
    err = txt2img("--prompt", prompt, "--n_iter", "2", "--skip_save", "--skip_grid").err
    assert err.count("longer than 75 tokens: `brown (foxes:1.2) and more …` is left out") == 1
    assert err.count("A1111's syntax for weights is read as plain text: `very very") == 1


def test_an_image_depends_on_its_seed_and_not_on_its_batch(txt2img):
    def make_images(*flags):
        _, out, _ = txt2img(*flags, "--skip_grid", "--ddim_eta", "0.5")
        return np.stack([read_pixels(path) for path in out])

    assert np.abs(make_images("--n_samples", "3") - make_images("--n_iter", "3")).max() <= 1


@pytest.mark.slow
def test_fixed_code_starts_every_batch_from_the_same_noise(txt2img):
    def make_images(*flags):
        _, out, _ = txt2img(
            "--n_samples", "2", "--n_iter", "2", "--skip_grid", "--fixed_code", *flags
        )
        return [read_pixels(path) for path in out]

    first, second, third, _ = make_images()
    assert (first == third).all()
    assert (first != second).any()
    first, _, third, _ = make_images("--eta", "1")
    assert (first != third).any()


TORCHRUN, SLURM = ("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")


@pytest.mark.parametrize(
    "variables", slow_except((TORCHRUN, SLURM), TORCHRUN), ids=["torchrun", "slurm"]
)
def test_processes_share_a_run(txt2img, tmp_path, monkeypatch, variables):
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\nfour\nfive")
    flags = ["--from-file", tmp_path / "prompts.txt", "--n_samples", "2", "--skip_grid"]
    expected = [read_pixels(path).tobytes() for path in txt2img(*flags).out]
    shared = []
    for rank in range(2):
        for name, value in zip(variables, (rank, 2), strict=True):
            monkeypatch.setenv(name, str(value))
        _, out, err = txt2img(*flags)
        assert f"rank {rank} of 2 processes: {2 - rank} of 3 batches" in err
        shared += [read_pixels(path).tobytes() for path in out]
    assert sorted(shared) == sorted(expected)
    status, _, err = txt2img("--legacy")
    assert (status, "run a single process" in err) == (1, True)


def fail_at_batch(monkeypatch, number: int, error: BaseException) -> None:
    """Let the pipeline fail at a batch, counted from 1."""
    batches, generate = itertools.count(1), pipelines.txt2img

    def fail(*args, **kwargs):
        if next(batches) == number:
            raise error
        return generate(*args, **kwargs)

    monkeypatch.setattr(pipelines, "txt2img", fail)


def test_finished_images_survive_an_interruption(txt2img, monkeypatch):
    fail_at_batch(monkeypatch, 3, KeyboardInterrupt())
    status, out, err = txt2img("--n_iter", "5")
    assert status == 130
    assert [Path(path).name for path in out] == ["00000.png", "00001.png", "grid-0000.png"]
    assert "interrupted" in err


def test_a_batch_with_nan_in_half_precision_is_repeated_in_float32(txt2img, monkeypatch):
    fail_at_batch(monkeypatch, 1, pipelines.NonFinite("the VAE"))
    status, out, err = txt2img("--precision", "bf16", "--json")
    assert status == 0
    assert "the VAE returned values that are not finite in bfloat16: continuing in float32" in err
    assert json.loads(out[0])["dtype"] == "float32"


def test_nan_in_float32_is_an_error_that_names_the_stage(txt2img, monkeypatch):
    fail_at_batch(monkeypatch, 1, pipelines.NonFinite("the UNet"))
    assert "error: the UNet returned values that are not finite" in txt2img().error


def test_out_of_memory_suggests_flags(txt2img, monkeypatch):
    fail_at_batch(monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory. Tried to …\n…"))
    assert "--n_samples 1, --vae-tile, a smaller --H and --W" in txt2img().error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ckpt", "missing.ckpt"], "no checkpoint `missing.ckpt` (--ckpt)"),
        (["--ckpt", ""], "the path of a checkpoint is empty (--ckpt)"),
        (["--upscaler", ""], "the path of a checkpoint is empty (--upscaler)"),
        (["--upscaler", "missing.pt"], "no checkpoint `missing.pt` (--upscaler)"),
        (["--config", "missing.yaml"], "missing.yaml`) (--config)"),
        (["--attention", "xformers"], "attention backend `xformers` needs `pip install"),
        (["--vae", "missing.ckpt"], "no checkpoint `missing.ckpt` (--vae)"),
        (["--embedding", "missing.pt"], "no checkpoint `missing.pt` (--embedding)"),
        (["--lora", "missing.pt:0.5"], "error: no checkpoint `missing.pt` (--lora)"),
        (["--from-file", "missing.txt"], "no file `missing.txt` (--from-file)"),
        (["--from-file", "."], "no file `.` (--from-file)"),
        (["--outdir", __file__], "test_txt2img.py` is not a folder (--outdir)"),
        (["--device", "toaster"], "device `toaster` is not available here, choose one of"),
        (["model.params.typo=1"], "typo"),
    ],
)
def test_errors_are_one_line(txt2img, flags, message):
    status, out, err = txt2img(*flags)
    (error,) = err.splitlines()
    assert (status, out) == (1, [])
    assert message in error


def test_a_component_with_its_config_is_refused(run_ldm, tmp_path):
    ddconfig = {"z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1],
                "num_res_blocks": 1, "resolution": 32, "attn_resolutions": []}  # fmt: skip
    params = {"embed_dim": 4, "ddconfig": ddconfig}
    config = {"model": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}}
    path = tmp_path / "autoencoder.ckpt"
    write_checkpoint(path, instantiate(config).state_dict(), {"ldm.config": json.dumps(config)})
    flags = ["--ckpt", path, "--outdir", tmp_path / "out"]
    error = run_ldm("txt2img", *flags, "--precision", "bf16").error  # which is not cached
    assert error.endswith("a whole model of `ldm.load`, got AutoencoderKL (--ckpt)")


def test_verbose_shows_the_traceback(txt2img):
    assert "Traceback" in txt2img("--ckpt", "missing.ckpt", "--verbose").err


def test_flags_without_effect_are_accepted_with_one_warning(txt2img):
    flags = ["--torchscript", "--ipex", "--C", "4", "--f", "4", "--dpm", "--ddim_eta", "0.5"]
    flags += ["--clip-skip", "2"]
    status, out, err = txt2img(*flags)
    assert status == 0
    assert "`dpm` is deterministic: eta 0.5 is ignored" in err
    assert "eta" not in read_info(out[0])
    assert err.count("`torchscript` has no effect") == err.count("`ipex` has no effect") == 1
    assert "`f` 4 is ignored: the model has 8" in err
    assert "`C`" not in err
    assert err.count("clip_skip 2 is ignored: it is for Stable Diffusion 1, which `base_v") == 1


def test_a_prompt_next_to_a_prompt_file_is_ignored_with_a_warning(txt2img, tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox")
    flags = ["--from-file", tmp_path / "prompts.txt", "--skip_save", "--skip_grid"]
    assert "prompt is ignored" in txt2img(*flags, "--prompt", "a cat").err
    assert "prompt is ignored" not in txt2img(*flags).err


def test_large_images_are_watermarked(txt2img):
    def find_watermark(*flags):
        _, out, _ = txt2img("--H", "256", "--W", "256", "--steps", "1", "--scale", "1", *flags)
        with Image.open(out[0]) as image:
            best = detect_watermarks(image)[0]
        return best.payload, best.method, best.verdict, read_info(out[0])["watermark"]

    assert find_watermark() == ("SDV2", "dwtDctSvd", "found", "dwtDctSvd")
    assert find_watermark("--no-watermark")[2:] == ("absent", None)
    assert find_watermark("--legacy", "watermark")[3] == "dwtDct"

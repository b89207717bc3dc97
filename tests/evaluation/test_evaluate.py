"""`ldm evaluate` on a tiny model: images, resumed runs, refusals, scores."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from imagehelp import read_pixels
from ldm.commands.main import main
from ldm.evaluation.generate import Setting, wait_for_images
from ldm.evaluation.prompts import draw_prompts, read_prompts
from ldm.evaluation.report import format_table, save_figure, save_results
from ldm.evaluation.score import ImageSet, find_image_sets, read_features, score_sets
from ldm.generate.tasks import TASKS
from ldm.imaging.metadata import read_info
from ldm.imaging.reading import list_images
from ldm.runtime.errors import ArgumentError, FileFormatError

PROMPTS = ["a cat", "a dog", "a red apple", "a fish", "a cow"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(PROMPTS) + "\n\n", "utf-8")
    return path


@pytest.fixture
def run(tiny_model, tmp_path, prompts, run_ldm):
    """Runs `ldm evaluate`; see `run_ldm`."""

    def run(*flags):
        arguments = [*tiny_model.flags, "--steps", "2", "--scales", "1,3", "--H", "64", "--W", "64"]
        arguments += ["--precision", "full", "--outdir", str(tmp_path / "out"), "--n_samples", "2"]
        if "--images" not in flags and "--prompts" not in flags:
            arguments += ["--generate", "--prompts", str(prompts)]
        return run_ldm("evaluate", *arguments, *flags)

    return run


class MeanColors:
    """The mean color of an image as features and as a score, in place of networks."""

    num_features = 3

    def describe(self):
        return {"name": "mean color"}

    def extract_features(self, images):
        means = [np.asarray(image).mean(axis=(0, 1)) for image in images]
        return torch.from_numpy(np.stack(means) / 255)

    def score(self, images, prompts):
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        return self.extract_features(images)[:, 0] + lengths


def test_every_scale_has_all_images_from_the_same_noise(run, tiny_model, tmp_path):
    status, _, err = run()
    assert status == 0
    assert "no reference images" in err
    assert "no weights of CLIP given, and `open-clip-g` is not on this machine" in err
    folder = next((tmp_path / "out").glob("base_v-ddim-2"))
    for scale in (1.0, 3.0):
        infos = [read_info(path) for path in list_images(folder / f"scale-{scale:g}")]
        assert [info["prompt"] for info in infos] == PROMPTS
        assert [info["seed"] for info in infos] == [42, 43, 44, 45, 46]
        assert {info["scale"] for info in infos} == {scale}
        assert {info["watermark"] for info in infos} == {None}
    assert main(["replay", *tiny_model.flags, str(folder / "scale-3/00002.png")]) == 0


def test_an_interrupted_run_makes_only_the_missing_images(run, tmp_path):
    run("--scales", "3")
    folder = tmp_path / "out/base_v-ddim-2/scale-3"
    before = {path: path.stat().st_mtime_ns for path in list_images(folder)}
    missing = folder / "00003.png"
    expected = read_pixels(missing)
    missing.unlink()
    assert run("--scales", "3").status == 0
    after = {path: path.stat().st_mtime_ns for path in list_images(folder)}
    assert {path for path in after if before[path] != after[path]} == {missing}
    assert np.abs(read_pixels(missing) - expected).max() <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "1"], "has images with seed 42, not 1: choose another folder (--seed)"),
        (["--negative-prompt", "x"], "has images with negative_prompt "),
        (["--prompts", "other.txt", "--generate"], "has images of other prompts"),
    ],
)
def test_a_folder_of_other_options_is_refused(run, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("a house\n")
    run("--scales", "3")
    assert message in run("--scales", "3", *flags).error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint_hash": "0123456789"},
         "another model of this name: choose another folder (--outdir)"),
        ({"removed": 1}, "has images with removed 1, not None: choose another folder"),
    ],
)  # fmt: skip
def test_a_folder_of_another_model_or_version_is_refused(run, tmp_path, change, message):
    run("--scales", "3", "--count", "2")
    path = tmp_path / "out/base_v-ddim-2/options.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in run("--scales", "3,4", "--count", "2").error


def test_processes_share_the_images(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = tmp_path / "out/base_v-ddim-2/scale-3"
    monkeypatch.setenv("RANK", "1")
    assert run("--scales", "3").status == 0
    second_half = [path.name for path in list_images(folder)]
    monkeypatch.setenv("RANK", "0")
    assert run("--scales", "3").status == 0
    assert second_half == ["00002.png", "00003.png"]
    assert len(list_images(folder)) == 5


def test_fewer_images_than_the_folder_has_are_scored_alone(run, tmp_path):
    run("--scales", "3", "--count", "4")
    prompts = (tmp_path / "out/prompts.txt").read_text()
    status, out, _ = run("--scales", "3", "--count", "2")
    assert status == 0
    assert (tmp_path / "out/prompts.txt").read_text() == prompts  # of all images in the folder
    assert "| base_v-ddim-2 | 3 | 2 |" in out


def test_images_of_larger_runs_are_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    values = {"from_file": str(tmp_path / "prompts.txt"), "steps": 2, "scale": 3.0}
    setting = Setting("m", TASKS["txt2img"].build_request(values))
    first, second = setting.list_files(tmp_path)
    first.parent.mkdir(parents=True)
    for path in (first, first.with_name("00007.png")):
        path.touch()
    monkeypatch.setattr("ldm.evaluation.generate.WAIT_TIMEOUT", 0)
    with pytest.raises(TimeoutError, match="1 of 2 images are missing"):
        wait_for_images([setting], tmp_path)
    second.touch()
    wait_for_images([setting], tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", "empty.txt", "--generate"], "empty.txt has no prompts (--prompts)"),
        (["--prompts", "own.txt", "--generate"], "`a fox` has eta, clip_skip: per-prompt"),
        (["--count", "9"], "9 prompts requested, there are 5 (--count)"),
        (["--prompts", "nope.txt", "--generate"], "no file `nope.txt` (--prompts)"),
        (["--reference", "nowhere"], "no folder `nowhere` (--reference)"),
        (["--inception", "empty.txt", "--reference", "."], "empty.txt` is not a checkpoint (--inc"),
        (["--clip", "nope.pt"], "no checkpoint `nope.pt` (--clip)"),
        (["--outdir", "empty.txt"], "empty.txt` is not a folder (--outdir)"),
        (["--images", "."], "images cannot be combined with generate"),
        (["--resize", "dirty", "--reference", "."], "unknown resize `dirty`"),
    ],
)
def test_bad_input_is_refused_before_loading(run, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "own.txt").write_text("a house\na fox --eta 1 --clip-skip 2\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "real.png")
    monkeypatch.setattr("ldm.evaluation.generate.load_models", None)
    if flags[0] == "--images":
        flags = [*flags, "--generate"]
    assert message in run(*flags).error


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--samplers", "dddim", "unknown sampler `dddim`, did you mean `ddim`?"),
        ("--scales", "7,x", "`x` is not a number"),
        ("--steps", ",", "`,` is not a list of values"),
        ("--count", "many", "`many` is not a positive whole number"),
    ],
)
def test_values_of_flags_are_checked_without_generate_too(run, flag, value, message):
    status, _, err = run("--images", "mine", flag, value)
    assert status == 2
    assert f"argument {flag}: {message}" in err


def test_a_missing_checkpoint_is_named_before_anything_is_written(run, tmp_path):
    assert run("--ckpt", "nope.ckpt").error.endswith("no checkpoint `nope.ckpt` (--ckpt)")
    assert not (tmp_path / "out").exists()


def test_fewer_images_than_processes_are_refused_in_one_line(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("RANK", "0")
    message = "5 images for 6 processes: start fewer processes (--prompts)"
    assert run().error.endswith(message)


def test_captions_of_coco_are_drawn_without_replacement(tmp_path):
    images = [{"id": k, "file_name": f"{k}.jpg"} for k in range(20)]
    annotations = [{"image_id": k, "caption": f" caption\n{k} "} for k in range(20)]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    prompts = read_prompts(path)
    drawn = draw_prompts(prompts, 8, seed=1)
    assert len({prompt.text for prompt in drawn}) == 8
    assert drawn[0].text == f"caption {drawn[0].image_name[:-4]}"
    assert draw_prompts(prompts, 5, seed=1) == drawn[:5]
    for malformed in ([1], {"images": images, "annotations": [{"image_id": 0, "caption": None}]}):
        path.write_text(json.dumps(malformed))
        with pytest.raises(FileFormatError, match="captions.json is not captions in COCO's format"):
            read_prompts(path)


@pytest.fixture
def folders(tmp_path):
    """Path of folders of 12 images each: `real`, and those of a run at two guidance scales."""
    rng = np.random.default_rng(0)
    max_values = {"real": 256, "run/m-ddim-2/scale-2": 200, "run/m-ddim-2/scale-10": 150}
    for name, max_value in max_values.items():
        (tmp_path / name).mkdir(parents=True)
        for k in range(12):
            pixels = rng.integers(0, max_value, (8, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{k:05d}.png")
    return tmp_path


def test_scores_need_only_an_extractor_and_a_scorer(folders, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(folders / "cache"))
    sets = [
        ImageSet(found.series, found.files, found.scale, prompts=["x"] * 12)
        for found in find_image_sets(folders / "run")
    ]
    assert [image_set.scale for image_set in sets] == [2, 10]
    real = ImageSet("reference", list_images(folders / "real"), side=8)
    results = score_sets(sets, real, MeanColors(), MeanColors())
    assert results[0].scores["fid"].value < results[1].scores["fid"].value
    assert results[0].score_settings["reference"]["side"] == 8
    monkeypatch.setattr(MeanColors, "extract_features", None)  # all features are in the cache
    assert score_sets(sets, real, MeanColors(), MeanColors()) == results
    table = format_table(results)
    assert "| m-ddim-2 | 10 | 12 |" in table
    paths = save_results(results, folders / "out") + save_figure(results, folders / "out")
    assert [path.name for path in paths] == [
        "m-ddim-2-2.json", "m-ddim-2-10.json", "table.md", "figure.svg", "figure.png",
    ]  # fmt: skip
    content = json.loads(paths[0].read_text())
    assert content["scores"]["fid"]["value"] == results[0].scores["fid"].value
    assert content["count"] == 12


def test_features_of_a_network_of_unknown_hash_are_not_cached(folders, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(folders / "cache"))
    monkeypatch.setattr(MeanColors, "describe", lambda self: {"name": "Inception", "sha256": None})
    score_sets(find_image_sets(folders / "run"), None, None, MeanColors())
    images = ImageSet("reference", list_images(folders / "real"))
    read_features(images, MeanColors())
    assert not (folders / "cache").exists()


def test_a_folder_that_is_not_named_by_a_guidance_scale_is_refused(folders):
    (folders / "run/m-ddim-2/scale-2-old").mkdir()
    with pytest.raises(FileFormatError, match="scale-2-old` is not named by a guidance scale"):
        find_image_sets(folders / "run")


def test_few_images_are_warned_of_and_different_numbers_refused(folders, caplog):
    real = ImageSet("reference", list_images(folders / "real")[:3])
    sets = find_image_sets(folders / "run")
    score_sets(sets, real, MeanColors())
    assert "the number of reference images = 3 is not above the 3 features" in caplog.text
    with pytest.raises(ArgumentError, match="0 images requested, m-ddim-2 at scale 2 has 12"):
        sets[0].select_first(0)
    with pytest.raises(ArgumentError, match="scale 2 has 12 images, .* scale 10 11: scores of"):
        score_sets([sets[0], sets[1].select_first(11)], real, MeanColors())


def test_two_folders_are_compared_without_a_model(run, folders):
    status, out, _ = run("--images", folders / "real", "--images", folders / "run/m-ddim-2/scale-2")
    assert status == 0
    assert out[0].startswith("| images | scale | N |")
    assert [line.split(" |")[0] for line in out[2:4]] == ["| real", "| scale-2"]

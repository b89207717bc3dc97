"""Lines of a prompt file with options, dynamic prompts, and LoRAs in prompts."""

import json
import shutil

import pytest
import torch

import ldm
from imagehelp import write_random_lora
from ldm.generate.command_line import parse_request
from ldm.generate.lora_tags import add_tagged_loras, list_local_loras, split_tags
from ldm.generate.plan import plan_batches
from ldm.generate.prompt_file import PromptLine, read_prompt_file
from ldm.generate.request import ModelOptions
from ldm.generate.tasks import TASKS
from ldm.generate.wildcards import DynamicPrompts
from ldm.imaging.metadata import format_parameters, parse_parameters, read_info
from ldm.loading.files.checkpoint import write_checkpoint
from ldm.runtime.errors import ArgumentError


@pytest.fixture
def run(txt2img):
    """Runs txt2img; returns the metadata of its images, or the last line of an error."""

    def run(*flags):
        status, out, err = txt2img("--steps=1", "--skip_grid", *flags, "--json")
        return err.splitlines()[-1] if status else [json.loads(line) for line in out]

    return run


def plan(*flags):
    return plan_batches(parse_request(TASKS["txt2img"], list(flags)))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a fox", PromptLine("a fox")),
        ("a fox --ar 16:9", PromptLine("a fox --ar 16:9")),
        (
            "a fox --n low quality, it's dull --w 64 --h 72 --d 5 --s 3 --l 7.5 --ss euler_a",
            PromptLine(
                "a fox", {"negative_prompt": "low quality, it's dull"}, (5,),
                values={"width": 64, "height": 72, "steps": 3, "scale": 7.5, "sampler": "euler_a"},
            ),
        ),
        ("a --d 1,2,9", PromptLine("a", seeds=(1, 2, 9), count=3)),
        (
            '--prompt "a --seed b" --negative_prompt=\'c d\' --cfg_scale 2 --batch_size 2'
            ' --n_iter 3 --sampler_name "DPM++ 2M Karras"',
            PromptLine(
                "a --seed b", {"negative_prompt": "c d"}, count=6,
                values={"scale": 2, "sampler": "dpmpp_2m", "scheduler": "karras"},
            ),
        ),
    ],
)  # fmt: skip
def test_lines_are_read_as_kohya_and_a1111_write_them(text, line, tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text(text)
    assert read_prompt_file(tmp_path / "prompts.txt", TASKS["txt2img"]) == [line]
    assert ("is read as text of the prompt" in caplog.text) == ("--" in line.prompt)


def test_a_line_may_set_the_strength_of_its_task(tmp_path):
    (tmp_path / "prompts.txt").write_text("a --t 0.25")
    line = read_prompt_file(tmp_path / "prompts.txt", TASKS["img2img"])[0]
    assert line.values == {"strength": 0.25}


def test_a_file_may_end_in_a_partial_batch(tmp_path):
    file = tmp_path / "prompts.txt"
    last = "it's a cat --seed 7 --negative-prompt 'blue, dull'"
    file.write_text(f"\ufeffa fox\n\n{last}\n", "utf-8")
    batches = plan("--from-file", str(file), "--repeat=2", "--n_samples=4", "--n_iter=2")
    assert [len(batch) for batch in batches] == [4, 2] * 2
    specs = [spec for batch in batches for spec in batch.images]
    assert [spec.prompt for spec in specs] == ["a fox", "a fox", "", "", *["it's a cat"] * 2] * 2
    assert [spec.seed for spec in specs] == [42, 43, 44, 45, 7, 8, 48, 49, 50, 51, 9, 10]
    assert [spec.negative_prompt for spec in specs] == ([""] * 4 + ["blue, dull"] * 2) * 2


def test_images_of_a_line_have_its_options_and_replay(run, run_ldm, tmp_path):
    lines = "a\na --s 2 --w 72 --d 7,9 --l 1\nb --ss euler --clip-skip 2"
    (tmp_path / "prompts.txt").write_text(lines)
    infos = run("--from-file", tmp_path / "prompts.txt", "--n_samples=2")
    assert [info["seed"] for info in infos] == [42, 7, 9, 45]
    assert [info["steps"] for info in infos] == [1, 2, 2, 1]
    assert [info["size"] for info in infos] == [[64, 64], [64, 72], [64, 72], [64, 64]]
    assert [info["sampler"] for info in infos] == ["ddim", "ddim", "ddim", "euler"]
    assert [info["rows"] for info in infos] == [1, 2, 2, 1]
    assert run_ldm("replay", infos[1]["path"]).is_identical
    _, (command,), _ = run_ldm("replay", infos[1]["path"], "--show-command")
    assert "--from-file=" in command
    assert "--W=72" not in command
    assert "--scale" not in command


def test_a_grid_holds_images_of_different_sizes(txt2img, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\na --w 72")
    _, out, _ = txt2img("--steps=1", "--from-file", tmp_path / "prompts.txt")
    assert out[-1].endswith("grid-0000.png")


def test_dynamic_prompts_are_drawn_by_the_seed_of_each_image(tmp_path):
    (tmp_path / "color.txt").write_text("red\ngreen\nblue\n")
    prompt = "a {big|small|tiny} __color__ fox, 50% C#"
    batches = plan("--prompt", prompt, "--wildcards", str(tmp_path), "--n_samples=4", "--n_iter=4")
    texts = {spec.seed: spec.prompt for batch in batches for spec in batch.images}
    assert len({*texts.values()}) > 4
    assert all(text.endswith(" fox, 50% C#") and "{" not in text for text in texts.values())
    later = plan("--prompt", prompt, "--wildcards", str(tmp_path), "--seed=50", "--n_samples=1")
    assert later[0].images[0].prompt == texts[50]
    assert DynamicPrompts(tmp_path).expand(prompt, 0) == DynamicPrompts(tmp_path).expand(prompt, 0)


def test_images_of_a_sampler_that_adapts_to_the_batch_are_made_one_by_one(tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb --sampler dpm_adaptive\nc")
    batches = plan("--from-file", str(tmp_path / "prompts.txt"), "--repeat=3", "--n_iter=1")
    prompts = [[spec.prompt for spec in batch.images] for batch in batches]
    assert prompts == [["a"] * 3, ["b"], ["b"], ["b"], ["c"] * 3]
    assert len(plan("--sampler", "dpm_adaptive", "--n_samples=2", "--n_iter=1")) == 2


def test_legacy_noise_refuses_loras_that_differ_between_images(tmp_path):
    (tmp_path / "prompts.txt").write_text("a <lora:style>\nb")
    flags = ["--from-file", str(tmp_path / "prompts.txt"), "--legacy", "noise"]
    request = parse_request(TASKS["txt2img"], flags)
    with pytest.raises(ArgumentError, match="legacy `noise` needs the same LoRAs for all images"):
        plan_batches(request, lambda: {"style": "style.safetensors"})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dynamic-prompts", "--prompt", "a {b"], "`a {b` is not a dynamic prompt: brackets"),
        (["--dynamic-prompts", "--prompt", "__x__"], "`__x__` needs a folder of wildcards (--wild"),
        (["--wildcards", "none"], "no folder `none` (--wildcards)"),
        (["--wildcards", "{here}", "--prompt", "__colors__"], "unknown wildcard `colors`, did you"),
        (["--prompt", "a <lora:stlye:1>", "--lora-dir", "{here}"], "unknown LoRA `stlye`, did you"),
        (["--prompt", "a <lora:style:1>", "--lora-dir", "no"], "no folder `no` (--lora-dir)"),
        (["--prompt", "a <lora:style:te=x>"], "`te=x`: `x` is not a number"),
        (["--prompt", "a <lora:style:high>"], "`<lora:style:high>`: `high` is not a weight, such"),
        (
            ["--prompt", "a <lora:style>", "--lora-dir", "{here}/none"],
            "unknown LoRA `style`: no LoRA files",
        ),
        (["--prompt", "a <hypernet:x:1>"], "hypernetworks are not supported"),
    ],
)
def test_errors_in_prompts_are_one_line(run, tmp_path, flags, message):
    (tmp_path / "color.txt").write_text("red")
    (tmp_path / "style.safetensors").write_text("")
    (tmp_path / "none").mkdir()
    assert message in run(*(flag.replace("{here}", str(tmp_path)) for flag in flags))


def test_expanded_prompts_are_recorded_and_replayed(run, run_ldm):
    (info,) = run("--prompt", "a {red|green} fox", "--dynamic-prompts")
    assert info["prompt"] in ("a red fox", "a green fox")
    assert info["prompt"] in format_parameters(info)
    assert run_ldm("replay", info["path"]).is_identical


def test_a_lora_of_a_later_image_that_does_not_fit_is_refused_before_the_first(run, tmp_path):
    (tmp_path / "loras").mkdir()
    state = {"lora_unet_conv_in.diff": torch.zeros(5, 4, 3, 3)}
    write_checkpoint(tmp_path / "loras/wide.safetensors", state)
    (tmp_path / "prompts.txt").write_text("a fox\na fox <lora:wide:0.5>")
    error = run("--from-file", tmp_path / "prompts.txt", "--lora-dir", tmp_path / "loras")
    assert "wide.safetensors` does not fit this model, 0 of its 1 layers unknown, 1 of" in error
    assert not list((tmp_path / "out").rglob("*.png"))


def test_lora_tags_are_removed_from_a_prompt():
    text, loras = split_tags("a <lora:x:0.5>, b<lora:sub/y:te=0:unet=1><lyco:z>")
    assert (text, loras) == ("a , b", [("x", 0.5), ("sub/y", "0:1"), ("z", 1.0)])
    files = {"sub/One": "a/sub/One.pt", "b/two": "a/b/two.pt", "c/two": "a/c/two.pt"}
    assert add_tagged_loras("<lora:one:2>", (), lambda: files) == (("a/sub/One.pt", 2.0),)
    with pytest.raises(ValueError, match="could be any of `b/two`, `c/two`"):
        add_tagged_loras("<lora:two:1>", (), lambda: files)
    with pytest.raises(ValueError, match="the LoRA `one` is given twice"):
        add_tagged_loras("<lora:one:1>", (("a/sub/One.pt", 1.0),), lambda: files)


@pytest.mark.slow
def test_loras_in_prompts_are_found_recorded_and_replayed(run, run_ldm, tiny_model, tmp_path):
    """Each image uses the LoRAs of its own prompt, and its pixels are those with --lora."""
    model = ldm.load(*tiny_model)
    (tmp_path / "loras").mkdir()
    for seed, name in enumerate(("one", "two")):
        write_random_lora(tmp_path / f"loras/{name}.safetensors", model, seed)
    moved = shutil.copy(tiny_model.ckpt, tmp_path / "model.ckpt")
    lines = ["a fox <lora:one:0.5>", "a fox", "a fox <lora:two:0.5:1>", "a fox <lora:one:0>"]
    (tmp_path / "prompts.txt").write_text("\n".join(f"{line} --seed 3" for line in lines))
    flags = ["--ckpt", moved]
    infos = run(*flags, "--from-file", tmp_path / "prompts.txt")
    weights = [[lora["weight"] for lora in info["loras"]] for info in infos]
    assert weights == [[0.5], [], ["0.5:1"], [0]]
    hashes = [read_info(info["path"])["sha256"] for info in infos]
    assert (len({*hashes}), hashes[3]) == (3, hashes[1])
    file = tmp_path / "loras/two.safetensors"
    (by_flag,) = run(*flags, "--prompt=a fox", "--seed=3", "--lora", f"{file}:0.5:1")
    assert read_info(by_flag["path"])["sha256"] == hashes[2]
    text = format_parameters(read_info(infos[2]["path"]))
    assert text.startswith("a fox <lora:two:0.5:1>\n")
    assert parse_parameters(text)["prompt"] == "a fox"
    assert run_ldm("replay", infos[2]["path"]).is_identical


def test_loras_for_a_checkpoint_of_the_hub_are_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras/style.safetensors").write_text("")
    monkeypatch.chdir(tmp_path)
    assert list(list_local_loras(ModelOptions(ckpt="hf:nobody/not-here"))) == ["style"]

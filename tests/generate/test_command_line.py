"""The command line: flags of the original, errors, and requests that are written and read back."""

import json
import os
import resource
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from ldm.commands.main import main
from ldm.generate.command_line import build_parser, parse_request, to_argv
from ldm.generate.defaults import resolve_sampling
from ldm.generate.groups import ModelOptions
from ldm.generate.option_parsers import SCRIPT_QUIRKS
from ldm.generate.options import get_options
from ldm.generate.replay import read_request
from ldm.generate.tasks import TASKS
from ldm.model import Defaults
from ldm.nets.attention import BACKENDS

ROOT = Path(__file__).parents[2]


def parse(task, *arguments):
    return parse_request(TASKS[task], arguments)


@pytest.mark.parametrize(
    ("task", "command", "expected"),
    [
        ("img2img", "--prompt x --init-img a.jpg --strength 0.8 --ckpt m.ckpt",
         {"init_img": "a.jpg", "strength": 0.8, "n_samples": 2, "n_iter": 1}),
        ("img2img", "--init_img a.jpg --ddim_steps 20 --ddim_eta 0.5 --fixed_code --C 4 --f 8",
         {"steps": 20, "eta": 0.5, "outdir": "outputs/img2img-samples", "ema": None}),
        ("img2img", "--in a.jpg", {"init_img": "a.jpg"}),  # abbreviated, beside newer flags
        ("inpaint", "--indir in --outdir out --steps 20", {"indir": "in", "steps": 20}),
        ("inpaint", "--image a.png --mask m.png --mask-grow 4 --mask-box 0,1,20,30",
         {"mask": "m.png", "mask_grow": 4, "mask_box": (0, 1, 20, 30)}),
        ("depth2img", "--init-img a.png --depth-map d.png",
         {"strength": 0.9, "depth_map": "d.png"}),
        ("upscale", "--init-img a.png --noise_level 30 --eta 1", {"noise_level": 30}),
        ("unclip", "--image a.png --image b.png --weight 2 --weight -1 --noise-level 9",
         {"init_img": ("a.png", "b.png"), "weight": (2, -1), "noise_level": (9,)}),
        ("img2img", "--prompt p --init-img i --outdir o --ddim_steps 9 --fixed_code --ddim_eta 0"
         " --n_iter 1 --C 4 --f 8 --n_samples 1 --n_rows 0 --scale 5 --strength 0.5 --from-file f"
         " --config c --ckpt k --seed 1 --precision full --skip_grid --skip_save --plms",
         {"overrides": (), "sampler": "plms", "skip_save": True}),
        ("txt2img", "--prompt a_fox --ckpt 768.ckpt --config configs/v2.yaml --H 768 --W 768",
         {"prompt": "a_fox", "ckpt": "768.ckpt", "height": 768, "width": 768, "sampler": None}),
        ("txt2img", "--dpm_solver --scale 7.5 --n_rows 2",
         {"sampler": "dpm", "scale": 7.5, "n_rows": 2}),
        ("txt2img", "--dpm --steps 25 --device cuda --bf16",
         {"sampler": "dpm", "device": "cuda", "precision": "bf16"}),
        ("txt2img", "--precision full --device cpu --torchscript --ipex --bf16",
         {"precision": "bf16"}),
        ("txt2img", "--bf16 --precision full", {"precision": "bf16"}),
        ("txt2img", "--from-file prompts.txt --repeat 3",
         {"from_file": "prompts.txt", "repeat": 3}),
        ("txt2img", "--torchscript --ipex --laion400m", {"torchscript": True, "ipex": True}),
        ("txt2img", "--legacy", {"legacy": SCRIPT_QUIRKS}),
        ("txt2img", "--legacy steps,plms_v", {"legacy": ("plms-v", "steps")}),
        ("txt2img", "--eta 0.5 --grid-spacing karras --tile",
         {"eta": 0.5, "scheduler": "karras", "vae_tile": 512}),
        ("txt2img", "--spacing trailing --unet-tile 64 --guidance-interval 0.3,5",
         {"scheduler": "trailing", "unet_tile": 64, "guidance_interval": (0.3, 5.0)}),
        ("txt2img", "a.b=1 --seed 2 c.d=x", {"overrides": ("a.b=1", "c.d=x"), "seed": 2}),
        ("txt2img", "--ema a.b=1", {"ema": True, "overrides": ("a.b=1",)}),
        ("txt2img", "--ema --no-ema", {"ema": False}),
        ("inpaint", "--refiner r.ckpt --refiner-start 0.8 --original-size 768,1024 --crop 0,64",
         {"refiner": "r.ckpt", "refiner_start": 0.8, "original_size": (768, 1024),
          "crop": (0, 64), "target_size": None}),
        ("txt2img", "--lora a.safetensors:0.5 --lora C:/b.pt",
         {"lora": (("a.safetensors", 0.5), ("C:/b.pt", 1.0))}),
    ],
)  # fmt: skip
def test_command_lines_of_the_original_and_former_flags_keep_their_meaning(task, command, expected):
    values = parse(task, *command.split()).get_values()
    assert {key: values[key] for key in expected} == expected


def test_defaults_are_those_of_the_original():
    expected = {
        "prompt": "a professional photograph of an astronaut riding a triceratops",
        "outdir": "outputs/txt2img-samples", "fixed_code": False, "n_iter": 3, "n_samples": 3,
        "n_rows": 0, "from_file": None, "seed": 42,
        "precision": "autocast", "repeat": 1, "torchscript": False, "ipex": False,
    }  # fmt: skip
    request = parse("txt2img", "--ckpt", "m.ckpt")
    assert {key: request.get_values()[key] for key in expected} == expected
    sampling = resolve_sampling(request, Defaults())
    assert (sampling.steps, sampling.sampler, sampling.eta, sampling.scale) == (50, "ddim", 0, 9)


@pytest.mark.parametrize(
    ("task", "flags", "expected"),
    [
        ("txt2img", "", (9, 50, "ddim")),
        ("txt2img", "--scale 9 --steps 5 --plms", (9, 5, "plms")),
        ("inpaint", "--ckpt m.ckpt", (10, 50, "ddim")),
        ("unclip", "--ckpt m.ckpt", (10, 50, "ddim")),  # 20 are a default of the family
    ],
)
def test_tasks_have_defaults_of_their_own(task, flags, expected):
    sampling = resolve_sampling(parse(task, *flags.split()), Defaults())
    assert (sampling.scale, sampling.steps, sampling.sampler) == expected


def test_defaults_of_a_model_come_before_those_of_a_task():
    turbo = Defaults(scale=1.0, steps=4, sampler="euler_a")
    sampling = resolve_sampling(parse("inpaint", "--ckpt", "m.ckpt"), turbo)
    assert (sampling.scale, sampling.steps, sampling.sampler) == (1.0, 4, "euler_a")
    sampling = resolve_sampling(parse("txt2img", "--ckpt", "m.ckpt", "--steps", "8"), turbo)
    assert (sampling.scale, sampling.steps) == (1.0, 8)


def test_the_quirk_size_rounds_sides_down():
    request = parse("txt2img", "--legacy", "size", "--H", "515", "--W", "77")
    assert request.sampling.size == (512, 72)


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("--n-samples 5", "n_samples", 5),
        ("--from_file f", "from_file", "f"),
        ("--negative_prompt=a-b_c", "negative_prompt", "a-b_c"),
        ("--n_s 5", "n_samples", 5),
        ("--n-i 5", "n_iter", 5),
        ("--se 7", "seed", 7),
        ("--st 7", "steps", 7),
        ("--sc 7", "scale", 7.0),
        ("--r 7", "repeat", 7),
        ("--dd 1", "eta", 1.0),
        ("--fr f", "from_file", "f"),
        ("--co c", "config", "c"),
        ("--neg x", "negative_prompt", "x"),
        ("--file-variant fp16", "variant", "fp16"),
        ("--sampler euler --sampler=heun", "sampler", "heun"),
    ],
)
def test_flags_are_understood_in_both_spellings_and_abbreviated(command, option, value):
    assert parse("txt2img", *command.split()).get_values()[option] == value


@pytest.mark.parametrize(
    ("task", "command", "message"),
    [
        ("txt2img", "--stesp 3", "unknown argument `--stesp`, did you mean `--steps`?"),
        ("txt2img", "--n 3", "could be any of --n_iter, --n_rows, --n_samples"),
        ("img2img", "--st 1", "`--st` could be any of --steps, --strength"),
        ("txt2img", "--s 1", "--s-noise, --s-tmax, --s-tmin, --safety-checker,"),  # once each
        ("txt2img", "--steps 0", "not a positive whole number"),
        ("txt2img", "--H 100", "height 100 is not a positive multiple of 8 (--H)"),
        ("txt2img", "--W -8", "width -8 is not a positive multiple of 8 (--W)"),
        ("txt2img", "--prompt", "argument --prompt: expected one argument"),
        ("txt2img", "--plms --sampler euler", "--sampler euler contradicts --plms"),
        ("txt2img", "--bf16 --precision fp16", "--precision fp16 contradicts --bf16"),
        ("txt2img", "--n_rows -1", "argument --n_rows: `-1` is not a whole number >= 0"),
        ("txt2img", "--plms --ddim_eta 1", "sampler `plms` takes no eta, only ddim, euler_a,"),
        ("txt2img", "--sampler ddim --s-churn 1",
         "sampler `ddim` takes no s_churn, only euler, heun, dpm2 do (--s-churn)"),
        ("txt2img", "--sampler heun --s_tmin 2 --s_tmax 1",
         "s_tmax must be s_tmin (2) or more, got 1 (--s-tmax)"),
        ("txt2img", "--sigmas 14,3,5,0", "sigmas must descend, but 5 follows 3"),
        ("txt2img", "--sigmas 14,low", "`14,low` is not a list of numbers"),
        ("txt2img", "--sigmas 9,1,0 --steps 9", "sigmas have 2 steps, not 9 (--steps)"),
        ("txt2img", "--sigmas 9,0 --scheduler karras", "leave out scheduler (--scheduler)"),
        ("txt2img", "--scheduler simple --rho 2", "scheduler `simple` takes no rho, only karras"),
        ("txt2img", "--legacy stpes", "unknown quirk `stpes`, did you mean `steps`?"),
        ("txt2img", "--sampler dmp", "unknown choice `dmp`, did you mean `dpm`? choose one of"),
        ("txt2img", "--eta -1", "eta must be 0 or more, got -1 (--eta)"),
        ("txt2img", "stray", "unknown argument `stray`"),
        ("inpaint", "--strength 1.5", "is not a number in 0 … 1"),
        ("inpaint", "--mask-box 1,2,3", "is not LEFT,TOP,RIGHT,BOTTOM"),
        ("inpaint", "--mask-box 9,9,3,3", "is not LEFT,TOP,RIGHT,BOTTOM"),
        ("inpaint", "--mask-grow -1", "is not a whole number"),
        ("txt2img", "--guidance-interval 5,1", "is not LOW,HIGH"),
        ("txt2img", "--pag 0", "`0` is not a number above 0"),
        ("txt2img", "--apg 1,2", "apg takes 3 numbers (eta, norm, momentum), got 2"),
        ("txt2img", "--apg 1,0,0", "apg with eta 1, norm 0 and momentum 0 has no effect"),
        ("txt2img", "--apg 0,15,-1", "momentum must be in -1 … 1, got -1"),
        ("txt2img", "--apg --scale 1", "apg needs a guidance scale other than 1 (--apg)"),
        ("txt2img", "--apg --sld max", "sld and apg are both guidance methods: give one (--apg)"),
        ("txt2img", "--sld mild", "unknown preset of sld `mild`, choose one of weak, medium, st"),
        ("txt2img", "--sld 1,2,3", "takes 5 numbers (warmup, scale, threshold, momentum_scale, "),
        ("txt2img", "--sld 1,2,x,0,0", "`1,2,x,0,0` is not five numbers"),
        ("txt2img", "--sld 1,2,0,0,2", "beta must be in 0 … 1, got 2"),
        ("txt2img", "--sld max --sld-concept @concept.txt", "no file `concept.txt`"),
        ("txt2img", "--sld-concept cat", "sld_concept needs sld (--sld-concept)"),
        ("txt2img", "--unsafe black", "unsafe needs safety_checker (--unsafe)"),
        ("txt2img", "--freeu sd3", "unknown preset of freeu `sd3`, did you mean"),
        ("txt2img", "--freeu 1,1,1,1", "freeu with factors of 1 has no effect"),
        ("txt2img", "--freeu 11,1,1,1", "factors must be in 0 … 10, got (11.0, 1.0, 1.0, 1.0)"),
        ("txt2img", "--freeu-version 2", "freeu_version needs freeu (--freeu-version)"),
        ("txt2img", "--scale nan", "is not a number"),
        ("txt2img", "--original-size 512", "is not HEIGHT,WIDTH"),
        ("txt2img", "--crop=-1,0", "is not TOP,LEFT"),
        ("txt2img", "--refiner r --H 72", "height 72 is not a positive multiple of 64, which"),
        ("txt2img", "--refiner-strength 0.2 --refiner-start 0.8", "not both"),
        ("txt2img", "--refiner-start 0.8", "refiner_start needs a refiner"),
        ("upscale", "--refiner r.ckpt", "unknown argument `--refiner`"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_exits_with_status_2_and_one_line(task, command, message, capsys):
    with pytest.raises(SystemExit) as exit_error:
        parse(task, *command.split())
    err = capsys.readouterr().err.splitlines()
    assert exit_error.value.code == 2
    assert message in err[-1]
    assert len(err) <= 2


def test_each_option_of_each_task_survives_argv_json_png_and_the_command_line():
    """One option at a time, and all at once."""
    micro_conditions = ("original_size", "crop", "target_size")
    values = {"scheduler": "karras", "guidance_interval": "0.5,4", "mask_box": "1,2,3,4",
             "lora": "x.safetensors:0.25", "legacy": "noise,steps", "precision": "fp16",
             "attention": "math", "sampler": "dpm", "sigmas": "9,1,0", "strength": ".25",
             "rescale": ".5", "resize_mode": "pad", "height": "64", "width": "64", "tiling": "x",
             "sld": "1,20,0,0.5,0.25", "unsafe": "blur", "apg": "0.5,5,-0.25",
             "freeu": "1.25,1.5,0.5,0.25", "freeu_version": "2",
             "refiner_strength": ".25", "refiner_start": ".75", "noise_sigma": ".25",
             "noise_kind": "fake", "syntax": "a1111",
             **dict.fromkeys(micro_conditions, "8,16"),
             **{f"negative_{name}": "8,16" for name in micro_conditions}}  # fmt: skip
    required = {
        "sld_concept": ["--sld", "max"],
        "freeu_version": ["--freeu"],
        "unsafe": ["--safety-checker", "x"],
        **{name: ["--refiner", "x"] for name in ("refiner_strength", "refiner_start")},
        **{name: ["--upscaler", "x"] for name in ("upscaler_steps", "upscaler_scale")},
    }
    for task in TASKS.values():
        argvs = []
        for name, option in task.options.items():
            if not option.flags:
                argvs.append([f"{name}.x=1"])
            elif option.is_switch:
                argvs.append([option.flags[0]])
                if option.is_negatable:
                    argvs.append([option.flags[0].replace("--", "--no-")])
            else:
                argvs.append([*required.get(name, []), option.flags[0], values.get(name, "8")])
        exclusive = {  # cannot be combined with the rest
            "--refiner-start", "--s-churn", "--s-noise", "--brownian", "--syntax", "--sigmas",
            "--save-latents", "--apg", "--perp-neg",
        }  # fmt: skip
        compatible = [argv for argv in argvs if exclusive.isdisjoint(argv)]
        parser = build_parser(task)
        for argv in [[], *argvs, list(chain(*compatible))]:
            request = parse_request(task, argv, parser)
            assert parse_request(task, to_argv(request), parser) == request
            info = dict.fromkeys(["checkpoint_hash", "ema", "config_hash", "overrides", "device",
                                  "dtype", "attention", "threads", "torch", "ldm"])  # fmt: skip
            info |= {"task": task.name, "prompt": "", "seed": 1, "rows": 1}
            info |= {"request": request.to_json()}
            assert read_request(json.loads(json.dumps(info)), "x.png") == request


def test_the_choices_of_attention_are_the_backends():
    assert set(get_options(ModelOptions)["attention"].choices) == set(BACKENDS)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_help(task, capsys):
    with pytest.raises(SystemExit) as exit_error:
        build_parser(TASKS[task]).parse(["--help"])
    assert exit_error.value.code == 0
    assert TASKS[task].summary.splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--wrong"], 2)])
def test_help_and_errors_are_fast_and_import_no_large_package(arguments, status, tmp_path):
    code = (
        "import sys; from ldm.commands.main import main\n"
        f"try: status = main(['txt2img', *{arguments}])\n"
        "except SystemExit as error: status = error.code\n"
        "large = {'torch', 'numpy', 'PIL', 'omegaconf', 'tqdm', 'pydantic'} & {*sys.modules}\n"
        "sys.exit(', '.join(large) or status)"
    )
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                             env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == status, process.stderr
    assert end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime < 0.5  # s of CPU time


def test_a_closed_pipe_prints_no_error():
    with subprocess.Popen([sys.executable, "-m", "ldm", "download"], cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize(
    ("command", "nearest"),
    [
        ("txt2image", "`txt2img`"),
        ("inspect", "`inspect-checkpoint`"),
        ("loras", "`extract-lora` or `merge-lora`"),
    ],
)
def test_ldm_lists_its_commands_and_suggests_the_nearest(capsys, command, nearest):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in [*TASKS, "replay", "train", "app", "convert"])
    assert main([command]) == 2
    assert f"unknown command `{command}`, did you mean {nearest}?" in capsys.readouterr().err

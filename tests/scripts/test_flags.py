"""The command line: old words keep their meaning, in either spelling, and answers come at once."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import GRIDS
from ldm.generate import flags
from ldm.nets.attention import BACKENDS
from ldm.pipelines import LEGACY
from scripts import depth2img, img2img, inpaint, unclip, upscale
from scripts.txt2img import PARSER

ROOT = Path(__file__).parents[2]


TASKS = [img2img, inpaint, depth2img, upscale, unclip]


@pytest.mark.parametrize(
    ("script", "command", "expected"),
    [
        (img2img, "--prompt x --init-img a.jpg --strength 0.8 --ckpt m.ckpt",
         {"init_img": "a.jpg", "strength": 0.8, "n_samples": 2, "n_iter": 1, "scale": 9.0}),
        (img2img, "--init_img a.jpg --ddim_steps 20 --ddim_eta 0.5 --fixed_code --C 4 --f 8",
         {"steps": 20, "ddim_eta": 0.5, "outdir": "outputs/img2img-samples"}),
        (inpaint, "--indir in --outdir out --steps 20", {"indir": "in", "steps": 20}),
        (inpaint, "--image a.png --mask m.png --mask-grow 4 --mask-box 0,1,20,30",
         {"mask": "m.png", "mask_grow": 4, "mask_box": (0, 1, 20, 30)}),
        (depth2img, "--init-img a.png --depth-map d.png", {"strength": 0.9, "depth_map": "d.png"}),
        (upscale, "--init-img a.png --noise_level 30 --eta 1", {"noise_level": 30}),
        (unclip, "--image a.png --image b.png --weight 2 --weight -1 --noise-level 9",
         {"init_img": ["a.png", "b.png"], "weight": [2, -1], "noise_level": [9]}),
    ],
)  # fmt: skip
def test_the_tasks_keep_the_words_of_their_originals(script, command, expected):
    given = vars(flags.parse(script.PARSER, command.split()))
    assert {key: given[key] for key in expected} == expected


ORIGINALS = [
    (img2img, "--prompt p --init-img i --outdir o --ddim_steps 9 --fixed_code --ddim_eta 0"
     " --n_iter 1 --C 4 --f 8 --n_samples 1 --n_rows 0 --scale 5 --strength 0.5 --from-file f"
     " --config c --ckpt k --seed 1 --precision full --skip_grid --skip_save --plms"),
    (inpaint, "--indir i --outdir o --steps 9"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "command"), ORIGINALS)
def test_every_flag_of_the_originals_is_known(script, command):
    assert flags.parse(script.PARSER, command.split()).overrides == []


def test_a_shortened_strength_is_not_taken_for_steps(capsys):
    with pytest.raises(SystemExit):
        flags.parse(img2img.PARSER, ["--st", "1"])
    assert "`--st` could be any of --steps, --strength" in capsys.readouterr().err


@pytest.mark.parametrize("script", TASKS)
def test_every_task_explains_itself(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        flags.parse(script.PARSER, ["--help"])
    assert stopped.value.code == 0
    assert script.__doc__.splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize("words", [
    ["--strength", "1.5"], ["--strength", "much"], ["--mask-box", "1,2,3"],
    ["--mask-box", "9,9,3,3"], ["--mask-grow", "-1"],
])  # fmt: skip
def test_numbers_out_of_range_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        flags.parse(inpaint.PARSER, words)
    assert stopped.value.code == 2
    assert "is not" in capsys.readouterr().err


def parsed(*words: str) -> dict:
    return vars(flags.parse(PARSER, words))


def test_defaults_are_those_of_the_original():
    expected = {
        "prompt": "a professional photograph of an astronaut riding a triceratops",
        "outdir": "outputs/txt2img-samples", "steps": 50, "plms": False, "dpm": False,
        "fixed_code": False, "ddim_eta": 0.0, "n_iter": 3, "n_samples": 3, "n_rows": 0,
        "scale": 9.0, "from_file": None, "ckpt": "m.ckpt", "seed": 42, "precision": "autocast",
        "repeat": 1, "torchscript": False, "ipex": False,
    }  # fmt: skip
    given = parsed("--ckpt", "m.ckpt")
    assert {key: given[key] for key in expected} == expected


def test_the_demo_model_has_a_scale_of_its_own():
    assert parsed()["scale"] == 3.0
    assert parsed("--scale", "9")["scale"] == 9.0


COMMANDS = [
    (
        "--prompt a_fox --ckpt 768model.ckpt --config configs/v2-inference-v.yaml --H 768 --W 768",
        {"prompt": "a_fox", "ckpt": "768model.ckpt", "H": 768, "W": 768, "sampler": "ddim"},
    ),
    (
        "--prompt x --plms --ckpt m.ckpt --skip_grid --skip_save --n_iter 1 --ddim_steps 30",
        {"sampler": "plms", "skip_grid": True, "skip_save": True, "n_iter": 1, "steps": 30},
    ),
    ("--dpm_solver --scale 7.5 --n_rows 2", {"sampler": "dpm", "scale": 7.5, "n_rows": 2}),
    ("--dpm --steps 25 --device cuda --bf16", {"sampler": "dpm", "device": "cuda"}),
    ("--precision full --fixed_code --ddim_eta 1.0", {"precision": "full", "fixed_code": True}),
    ("--from-file prompts.txt --repeat 3", {"from_file": "prompts.txt", "repeat": 3}),
    ("--torchscript --ipex --C 4 --f 8 --laion400m", {"torchscript": True, "ipex": True}),
    ("--bf16", {"precision": "bf16"}),
    ("--legacy", {"legacy": frozenset(LEGACY) - {"encode"}}),
    ("--legacy steps,plms_v --seed 1", {"legacy": {"steps", "plms-v"}, "seed": 1}),
    ("--eta 0.5 --grid-spacing karras --tile", {"ddim_eta": 0.5, "spacing": "karras", "tile": 512}),
    ("--legacy size --H 515 --W 77", {"H": 512, "W": 72}),
    ("a.b=1 --seed 2 c.d=x", {"overrides": ["a.b=1", "c.d=x"], "seed": 2}),
]


@pytest.mark.parametrize(("command", "expected"), COMMANDS)
def test_command_lines_mean_what_they_meant(command, expected):
    given = parsed(*command.split())
    assert {key: given[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("command", "key", "value"),
    [
        ("--n-samples 5", "n_samples", 5),
        ("--from_file f", "from_file", "f"),
        ("--negative_prompt=a-b_c", "negative_prompt", "a-b_c"),
        ("--fixed-code", "fixed_code", True),
        ("--n_s 5", "n_samples", 5),
        ("--n-i 5", "n_iter", 5),
        ("--se 7", "seed", 7),
        ("--st 7", "steps", 7),
        ("--sc 7", "scale", 7.0),
        ("--r 7", "repeat", 7),
        ("--dd 1", "ddim_eta", 1.0),
        ("--fr f", "from_file", "f"),
        ("--co c", "config", "c"),
        ("--neg x", "negative_prompt", "x"),
    ],
)
def test_flags_are_understood_in_both_spellings_and_shortened(command, key, value):
    assert parsed(*command.split())[key] == value


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--stesp 3", "unknown argument `--stesp`, did you mean `--steps`?"),
        ("--n 3", "could be any of --n_iter, --n_rows, --n_samples"),
        ("--steps 0", "not a whole number from 1 up"),
        ("--H 100", "--H 100 is not a positive multiple of 8"),
        ("--W -8", "--W -8 is not a positive multiple of 8"),
        ("--prompt", "--prompt needs a value"),
        ("--plms --sampler euler", "--plms contradicts --sampler euler"),
        ("--plms --ddim_eta 1", "--ddim_eta must be 0"),
        ("--legacy stpes", "unknown `stpes`, choose from steps"),
        ("--sampler dmp", "invalid choice: 'dmp'"),
        ("stray", "unknown argument `stray`"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(command, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parsed(*command.split())
    err = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert message in err[-1]
    assert len(err) <= 2


def test_the_lists_of_names_are_the_true_ones():
    assert set(flags.SAMPLERS) == set(SAMPLERS)
    assert set(flags.SPACINGS) == set(GRIDS)
    assert set(flags.ATTENTION) == set(BACKENDS)
    # DDIM inversion is not a matter of the scripts.
    assert set(flags.LEGACY) == set(LEGACY) - {"encode"}


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), (["--wrong"], 2)])
def test_help_and_mistakes_answer_at_once(words, status, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "txt2img.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == status
    assert end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime < 0.5  # of the CPU


@pytest.mark.parametrize("script", ["txt2img", "replay"])
def test_reading_the_command_line_imports_no_torch(script):
    code = (
        f"import sys, scripts.{script} as s\n"
        "try: s.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'omegaconf', 'tqdm'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

"""--lora in the scripts: it changes the picture, is written down, and replayed."""

import hashlib
import shutil

import pytest
import torch

import ldm
from imagehelp import random_lora
from ldm.commands.main import main
from ldm.generate.info import describe_run
from ldm.generate.load import load_models
from ldm.generate.replay import read_request
from ldm.imaging.metadata import format_parameters, read_info
from ldm.loading.addons.embeddings import write_embeddings

QUICK = ["--steps=2", "--n_iter=1", "--n_samples=1", "--H=64", "--W=64", "--skip_grid"]
QUICK += ["--precision=full"]


@pytest.fixture
def loras(tiny, tmp_path):
    """Two files for the tiny model."""
    model = ldm.load(tiny.config, tiny.ckpt)
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    return [random_lora(path, model, seed) for seed, path in enumerate(paths)]


@pytest.fixture
def shot(tiny, tmp_path, capsys):
    def shot(*words: str) -> tuple[int, str]:
        status = main(["txt2img", *tiny.flags, *QUICK, "--outdir", str(tmp_path / "out"), *words])
        out, err = capsys.readouterr()
        return status, out.strip() if not status else err

    return shot


def test_pictures_with_loras_say_so_and_are_made_again(shot, loras, tiny, capsys, tmp_path):
    words = ["--lora", f"{loras[0]}:0.8", "--lora", f"{loras[1]}:-0.5"]
    paths = [shot()[1], shot(*words)[1]]
    plain, info = (read_info(path) for path in paths)
    assert plain["loras"] == []
    assert plain["sha256"] != info["sha256"]
    assert [(lora["path"], lora["weight"]) for lora in info["loras"]] == [
        (str(loras[0]), 0.8),
        (str(loras[1]), -0.5),
    ]
    tensors = loras[0].read_bytes()  # of which A1111 hashes all behind the header
    digest = hashlib.sha256(tensors[8 + int.from_bytes(tensors[:8], "little") :]).hexdigest()
    assert f'Lora hashes: "one: {digest[:12]}, two: ' in format_parameters(info)
    assert f"{info['prompt']} <lora:one:0.8> <lora:two:-0.5>\n" in format_parameters(info)
    assert main(["replay", paths[1], "--ckpt", str(tiny.ckpt)]) == 0
    moved = str(shutil.move(loras[1], tmp_path / "three.safetensors"))
    capsys.readouterr()
    assert main(["replay", paths[1], "--ckpt", str(tiny.ckpt)]) == 1
    assert "two.safetensors`, which is missing" in capsys.readouterr().err
    words = ["--lora", str(loras[0]), "--lora", moved]
    assert main(["replay", paths[1], "--ckpt", str(tiny.ckpt), *words]) == 1
    assert "\n  loras: ['" in capsys.readouterr().out


@pytest.mark.slow
def test_a_weight_by_tower_and_block_is_recorded_and_made_again(shot, loras, tiny, capsys):
    weight = "0.5:2:lbw=IN01=0.25,M00=0"
    path, plain = shot("--lora", f"{loras[0]}:{weight}")[1], shot("--lora", f"{loras[0]}:0.5")[1]
    info = read_info(path)
    assert info["sha256"] != read_info(plain)["sha256"]
    assert [lora["weight"] for lora in info["loras"]] == [weight]
    assert f"<lora:one:{weight}>" in format_parameters(info)
    assert main(["replay", path, "--ckpt", str(tiny.ckpt)]) == 0
    with pytest.raises(SystemExit):
        shot("--lora", f"{loras[0]}:te=much")
    assert "`te=much`: `much` is not a number" in capsys.readouterr().err
    assert shot("--lora", f"{loras[0]}:lbw=1,0")[0] == 1


def test_a_learned_word_changes_the_picture_and_is_written_down(shot, tiny, tmp_path, capsys):
    torch.manual_seed(0)
    width = ldm.load(tiny.config, tiny.ckpt).conditioner.text.width
    folder = tmp_path / "words"
    write_embeddings(folder / "cat.safetensors", {"<Cat>": torch.randn(2, width)})
    write_embeddings(folder / "wide.safetensors", {"<wide>": torch.randn(2, width + 1)})
    words = ["--prompt", "an apple by <cat>", "--embedding", str(folder)]
    (path,), plain = shot(*words)[1].splitlines(), shot(*words[:2])[1]
    info = read_info(path)
    assert [(file["words"], file["path"]) for file in info["embeddings"]] == [
        (["<cat>"], str(folder / "cat.safetensors"))
    ]
    assert info["sha256"] != read_info(plain)["sha256"]
    assert main(["replay", path, "--ckpt", str(tiny.ckpt)]) == 0
    request = read_request(info, path).with_values({"embedding": [str(folder)]})
    shown = describe_run(request, load_models(request), (64, 64), without_folders=True)
    assert [file["path"] for file in shown["embeddings"]] == ["cat.safetensors"]
    status, err = shot("--embedding", str(folder / "wide.safetensors"))
    assert status == 1
    assert f"`<wide>` has vectors of width {width + 1}" in err


def test_a_lora_that_is_not_there_is_one_line(shot):
    status, err = shot("--lora", "none.safetensors:0.5")
    assert status == 1
    assert err.splitlines()[-1].endswith("error: no checkpoint `none.safetensors` (--lora)")

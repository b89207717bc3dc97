"""--lora and --embedding change the image, are recorded in it, and are used by a replay."""

import hashlib
import shutil
from functools import partial

import pytest
import torch

import ldm
from imagehelp import write_random_lora
from ldm.generate.info import make_run_info
from ldm.generate.load import load_models
from ldm.generate.replay import read_request
from ldm.imaging.metadata import format_parameters, read_info
from ldm.loading.addons.embeddings import write_embeddings


@pytest.fixture
def loras(tiny_model, tmp_path):
    """Files of two LoRAs for the tiny model."""
    model = ldm.load(*tiny_model)
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    return [write_random_lora(path, model, seed) for seed, path in enumerate(paths)]


@pytest.fixture
def run(txt2img):
    return partial(txt2img, "--skip_grid")


def test_images_record_their_loras_and_replay(run, loras, run_ldm, tmp_path):
    flags = ["--lora", f"{loras[0]}:0.8", "--lora", f"{loras[1]}:-0.5"]
    _, (path,), _ = run(*flags)
    plain, info = read_info(run().out[0]), read_info(path)
    assert plain["loras"] == []
    assert plain["sha256"] != info["sha256"]
    recorded = [(lora["path"], lora["weight"]) for lora in info["loras"]]
    assert recorded == [(str(loras[0]), 0.8), (str(loras[1]), -0.5)]
    data = loras[0].read_bytes()  # A1111 hashes what follows the header
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert f'Lora hashes: "one: {digest[:12]}, two: ' in format_parameters(info)
    assert f"{info['prompt']} <lora:one:0.8> <lora:two:-0.5>\n" in format_parameters(info)
    assert run_ldm("replay", path).is_identical
    moved = shutil.move(loras[1], tmp_path / "three.safetensors")
    assert "two.safetensors`, which is missing" in run_ldm("replay", path).err
    status, out, _ = run_ldm("replay", path, "--lora", loras[0], "--lora", moved)
    assert status == 1
    assert any(line.startswith("  loras: ['") for line in out)


@pytest.mark.slow
def test_a_weight_by_tower_and_block_is_recorded_and_replayed(run, loras, run_ldm):
    weight = "0.5:2:lbw=IN01=0.25,M00=0"
    path, plain = (run("--lora", f"{loras[0]}:{w}").out[0] for w in (weight, "0.5"))
    info = read_info(path)
    assert info["sha256"] != read_info(plain)["sha256"]
    assert [lora["weight"] for lora in info["loras"]] == [weight]
    assert f"<lora:one:{weight}>" in format_parameters(info)
    assert run_ldm("replay", path).is_identical


def test_an_embedding_changes_the_image_and_is_recorded(run, tiny_model, tmp_path, run_ldm):
    torch.manual_seed(0)
    width = ldm.load(*tiny_model).conditioner.text.width
    folder = tmp_path / "words"
    write_embeddings(folder / "cat.safetensors", {"<Cat>": torch.randn(2, width)})
    flags = ["--prompt", "an apple by <cat>", "--embedding", str(folder)]
    (path,), (plain,) = run(*flags).out, run(*flags[:2]).out
    info = read_info(path)
    assert [(file["words"], file["path"]) for file in info["embeddings"]] == [
        (["<cat>"], str(folder / "cat.safetensors"))
    ]
    assert info["sha256"] != read_info(plain)["sha256"]
    assert run_ldm("replay", path).is_identical
    request = read_request(info, path).with_values({"embedding": [str(folder)]})
    run_info = make_run_info(request, load_models(request), (64, 64), without_folders=True)
    assert [file["path"] for file in run_info["embeddings"]] == ["cat.safetensors"]

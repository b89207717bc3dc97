"""ModelSpec metadata: fields about the weights, fields of the author, and the hash."""

import hashlib

import pytest
import torch

from ldm.loading.addons.embeddings import write_embeddings
from ldm.loading.addons.lora_files import write_lora
from ldm.loading.convert import convert, plan_conversion
from ldm.loading.files.checkpoint import read_checkpoint, write_checkpoint
from ldm.loading.inspection import inspect_checkpoint
from ldm.loading.modelspec import filter_metadata
from loading.lorahelp import build_tiny_model, make_random_lora
from loading.tinyfamilies import write_family

AUTHOR_DATA = {"modelspec.title": "Barns", "modelspec.author": "Ann",
               "modelspec.license": "CC0-1.0"}  # fmt: skip


def read_spec(path):
    metadata = read_checkpoint(path).metadata
    prefix = "modelspec."
    return {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}


def compute_tensor_hash(path):
    content = path.read_bytes()
    return "0x" + hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("modelspec") / "tiny.safetensors"
    write_family("sd2-v", path)
    file = read_checkpoint(path)
    old_hashes = {"modelspec.hash_sha256": "0x12", "sshs_model_hash": "12"}
    write_checkpoint(path, file.state_dict, {**file.metadata, **AUTHOR_DATA, **old_hashes})
    return path


def test_a_conversion_keeps_the_authors_metadata_and_computes_a_new_hash(model_file, tmp_path):
    path = convert(plan_conversion(model_file, tmp_path / "half.safetensors", dtype=torch.float16))
    spec = read_spec(path)
    assert (spec["title"], spec["author"], spec["license"]) == ("Barns", "Ann", "CC0-1.0")
    assert spec["hash_sha256"] == compute_tensor_hash(path)
    assert spec["prediction_type"] == "v"
    assert spec["resolution"] == "32x32"
    assert spec["sai_model_spec"] == "1.0.1"
    assert "sshs_model_hash" not in read_checkpoint(path).metadata
    assert "ModelSpec   author              Ann" in list(inspect_checkpoint(path).format_lines())


def test_changed_weights_keep_only_the_license_of_the_author_fields():
    metadata = {**AUTHOR_DATA, "ss_network_dim": "4", "ldm.config": "model: x"}
    filtered = filter_metadata(metadata, keep_author_fields=False)
    assert filtered == {"modelspec.license": "CC0-1.0", "ldm.config": "model: x"}


@pytest.mark.parametrize(
    ("family", "base", "implementation"),
    [
        ("sd1", "stable-diffusion-v1", "diffusers"),
        ("sdxl", "stable-diffusion-xl-v1-base",
         "https://github.com/Stability-AI/generative-models"),
    ],
)  # fmt: skip
def test_loras_and_embeddings_name_their_base_model(family, base, implementation, tmp_path):
    model = build_tiny_model(family)
    model.unet.context_dim = {"sd1": 768, "sdxl": 2048}[family]
    write_lora(make_random_lora(model), tmp_path / "style.safetensors", model)
    spec = read_spec(tmp_path / "style.safetensors")
    assert (spec["title"], spec["architecture"]) == ("style", f"{base}/lora")
    assert spec["implementation"] == implementation
    assert spec["hash_sha256"] == compute_tensor_hash(tmp_path / "style.safetensors")
    write_embeddings(tmp_path / "cat.safetensors", {"<cat>": torch.ones(1, 8)}, model=model)
    spec = read_spec(tmp_path / "cat.safetensors")
    assert spec["architecture"] == f"{base}/textual-inversion"
    assert spec["trigger_phrase"] == "<cat>"

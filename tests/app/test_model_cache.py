"""ModelCache: models stay loaded within a limit of memory, and share equal components."""

from functools import partial

import pytest
import torch
from torch import nn

from ldm.app.model_cache import ModelCache
from ldm.conditioning import Conditioner
from ldm.encoders.text import OpenCLIPText, TextEncoder
from ldm.nets.lora import MergedChanges


class LinearEncoder(TextEncoder):
    def __init__(self, seed: int, layer: str = "last") -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network, self.layer = nn.Linear(16, 16), layer


class Model(nn.Module):
    """The components of a model that the cache reads, with weights by seed."""

    def __init__(self, unet_seed: int, text: TextEncoder, vae_seed: int) -> None:
        super().__init__()
        torch.manual_seed(unet_seed)
        self.unet = nn.Linear(16, 16)
        self.conditioner = Conditioner(text=text)
        torch.manual_seed(vae_seed)
        self.autoencoder = nn.Conv2d(3, 4, 3)
        self.merged_changes = None


@pytest.fixture
def builders():
    """Functions that build the model of a file, by its name."""
    return {}


@pytest.fixture
def cache(builders):
    return ModelCache(1e6, lambda config, ckpt, **options: builders[ckpt.name]())


@pytest.fixture
def write_file(tmp_path, builders):
    """Writes a file, from which the cache loads what `build()` returns."""

    def write_file(name, build, size=10):
        (tmp_path / name).write_bytes(b"x" * size)
        builders[name] = build
        return tmp_path / name

    return write_file


def test_a_model_is_kept_until_its_file_changes(cache, write_file):
    path = write_file("a", lambda: Model(0, LinearEncoder(0), 0))
    first = cache(None, path, ema=False)
    assert cache(None, path, ema=False) is first
    assert cache(None, path, ema=True) is not first
    write_file("a", lambda: Model(1, LinearEncoder(0), 0), size=11)
    assert cache(None, path, ema=False) is not first


@pytest.mark.parametrize("option", ["vae", "config"])
def test_a_model_is_loaded_again_if_its_vae_or_config_changes(cache, write_file, tmp_path, option):
    path, file = write_file("a", lambda: Model(0, LinearEncoder(0), 0)), tmp_path / "file"
    file.write_text("1")
    first = cache(ckpt=path, **{option: file})
    assert cache(ckpt=path, **{option: file}) is first
    file.write_text("12")
    assert cache(ckpt=path, **{option: file}) is not first


def test_equal_text_towers_and_autoencoders_are_shared(cache, write_file):
    first = cache(None, write_file("a", lambda: Model(0, LinearEncoder(5), 7)))
    first_nbytes = cache.nbytes
    second = cache(None, write_file("b", lambda: Model(1, LinearEncoder(5), 7)))
    assert second.conditioner.text is first.conditioner.text
    assert second.autoencoder is first.autoencoder
    assert second.unet is not first.unet
    assert cache.nbytes == first_nbytes + sum(p.nbytes for p in second.unet.parameters())


def test_the_second_tower_of_sdxl_is_shared_with_the_refiner(cache, write_file):
    def build_tower(seed):
        torch.manual_seed(seed)
        arch = {"embed_dim": 8, "text_cfg": {"width": 8, "heads": 2, "layers": 2}}
        return OpenCLIPText(arch=arch, always_return_pooled=True, legacy=False)

    def build_base():
        model = Model(0, LinearEncoder(5), 7)
        model.conditioner.add_module("text_2", build_tower(1))
        return model

    def build_refiner(seed):
        model = Model(1, build_tower(seed), 7)
        model.conditioner.text.null = ""
        return model

    cache.max_bytes = 1e8
    base = cache(None, write_file("a", build_base))
    refiner, other_refiner = (
        cache(None, write_file(f"b{seed}", partial(build_refiner, seed))) for seed in (1, 2)
    )
    assert refiner.conditioner.text.model is base.conditioner.text_2.model
    assert refiner.conditioner.text is not base.conditioner.text_2
    assert other_refiner.conditioner.text.model is not refiner.conditioner.text.model


def test_components_that_differ_in_a_weight_or_an_option_are_not_shared(cache, write_file):
    base = cache(None, write_file("a", lambda: Model(0, LinearEncoder(5), 7)))
    other = cache(None, write_file("b", lambda: Model(0, LinearEncoder(6), 8)))
    other_layer = cache(None, write_file("c", lambda: Model(0, LinearEncoder(5, "penultimate"), 7)))
    half = cache(None, write_file("d", lambda: Model(0, LinearEncoder(5), 7).half()))
    for model in (other, other_layer, half):
        assert model.conditioner.text is not base.conditioner.text
    assert other_layer.autoencoder is base.autoencoder
    for model in (other, half):
        assert model.autoencoder is not base.autoencoder


def test_tensors_among_the_options_are_compared(cache, write_file):
    def build(value):
        model = Model(0, LinearEncoder(0), 0)
        model.conditioner.text.statistics = (torch.zeros(3), torch.full((3,), value))
        return model

    base, equal, other = (
        cache(None, write_file(name, partial(build, value)))
        for name, value in {"a": 1.0, "b": 1.0, "c": 2.0}.items()
    )
    assert equal.conditioner.text is base.conditioner.text
    assert other.conditioner.text is not base.conditioner.text


def test_models_with_other_embeddings_are_kept_separately(cache, write_file, tmp_path):
    path = write_file("a", lambda: Model(0, LinearEncoder(0), 0))
    options = {"embeddings": [tmp_path]}
    plain, with_embedding = cache(None, path), cache(None, path, **options)
    assert with_embedding is not plain
    assert cache(None, path, **options) is with_embedding
    (tmp_path / "word").write_bytes(b"123")
    assert cache(None, path, **options) is not with_embedding


def test_loras_are_removed_before_components_are_shared(cache, write_file, monkeypatch):
    def set_loras(model, loras):
        model.merged_changes = MergedChanges()
        calls.append((model, loras))

    monkeypatch.setattr("ldm.app.model_cache.set_loras", set_loras)
    calls = []
    path = write_file("a", lambda: Model(0, LinearEncoder(0), 0))
    other_path = write_file("b", lambda: Model(1, LinearEncoder(0), 0))
    plain = cache(None, path)
    assert calls == []
    assert cache(None, path, loras=[("x", 0.5)]) is plain
    assert cache(None, path, loras=[("x", 0.7)]) is plain
    cache(None, other_path)
    assert calls == [(plain, (("x", 0.5),)), (plain, (("x", 0.7),)), (plain, ())]


def test_a_tower_with_embeddings_is_not_shared(cache, write_file):
    first = cache(None, write_file("a", lambda: Model(0, LinearEncoder(5), 7)))
    first.conditioner.text.added_embeddings = {"cat": torch.ones(1, 16)}
    second = cache(None, write_file("b", lambda: Model(1, LinearEncoder(5), 7)))
    assert second.conditioner.text is not first.conditioner.text


def test_the_least_recently_used_model_is_removed_first(cache, write_file):
    paths = [write_file(name, lambda: Model(0, LinearEncoder(0), 0), size=4000) for name in "abc"]
    cache.max_bytes = 2 * sum(p.nbytes for p in Model(0, LinearEncoder(0), 0).parameters()) + 4000
    a, b = cache(None, paths[0]), cache(None, paths[1])
    cache.max_bytes = cache.nbytes + 3000  # no room for a third
    assert cache(None, paths[0]) is a
    cache(None, paths[2])
    assert cache(None, paths[0]) is a
    assert cache(None, paths[1]) is not b


def test_a_model_larger_than_the_limit_is_kept_alone(cache, write_file):
    cache.max_bytes = 1
    paths = [write_file(name, lambda: Model(0, LinearEncoder(0), 0)) for name in "ab"]
    assert cache(None, paths[0]) is cache(None, paths[0])
    cache(None, paths[1])
    assert cache.count == 1

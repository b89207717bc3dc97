"""ModelCache: models stay loaded within a limit of memory, and share equal parts."""

import pytest
import torch
from torch import nn

from ldm.app.model_cache import ModelCache
from ldm.conditioning import Conditioner
from ldm.encoders.text import OpenCLIPText, TextEncoder
from ldm.nets.lora import MergedChanges


class Text(TextEncoder):
    def __init__(self, seed: int, layer: str = "last") -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.layer = nn.Linear(16, 16), layer


class Model(nn.Module):
    """The parts of a model that the cache reads."""

    def __init__(self, unet: int, text: Text, autoencoder: int) -> None:
        super().__init__()
        torch.manual_seed(unet)
        self.unet = nn.Linear(16, 16)
        self.conditioner = Conditioner(text=text)
        torch.manual_seed(autoencoder)
        self.autoencoder = nn.Conv2d(3, 4, 3)
        self.merged = None


@pytest.fixture
def cache(tmp_path):
    """A cache of models; `cache.file(name, make)` writes a file from which `make()` is loaded."""
    makers = {}

    def load(config, ckpt, **options):
        return makers[ckpt.name]()

    cache = ModelCache(1e6, load)

    def file(name, make, size=10):
        (tmp_path / name).write_bytes(b"x" * size)
        makers[name] = make
        return tmp_path / name

    cache.file = file
    return cache


def test_a_model_is_kept_until_its_file_changes(cache):
    path = cache.file("a", lambda: Model(0, Text(0), 0))
    first = cache(None, path, ema=False)
    assert cache(None, path, ema=False) is first
    assert cache(None, path, ema=True) is not first
    cache.file("a", lambda: Model(1, Text(0), 0), size=11)
    assert cache(None, path, ema=False) is not first


@pytest.mark.parametrize("option", ["vae", "config"])
def test_a_model_is_loaded_again_if_its_vae_or_config_changes(cache, tmp_path, option):
    path, file = cache.file("a", lambda: Model(0, Text(0), 0)), tmp_path / "file"
    file.write_text("1")
    first = cache(ckpt=path, **{option: file})
    assert cache(ckpt=path, **{option: file}) is first
    file.write_text("12")
    assert cache(ckpt=path, **{option: file}) is not first


def test_equal_text_towers_and_autoencoders_are_shared(cache):
    one = cache(None, cache.file("a", lambda: Model(0, Text(5), 7)))
    alone = cache.nbytes
    two = cache(None, cache.file("b", lambda: Model(1, Text(5), 7)))
    assert two.conditioner.text is one.conditioner.text
    assert two.autoencoder is one.autoencoder
    assert two.unet is not one.unet
    assert cache.nbytes == alone + sum(p.nbytes for p in two.unet.parameters())


def test_the_second_tower_of_sdxl_is_shared_with_the_refiner(cache):
    def tower(seed):
        torch.manual_seed(seed)
        arch = {"embed_dim": 8, "text_cfg": {"width": 8, "heads": 2, "layers": 2}}
        return OpenCLIPText(arch=arch, always_return_pooled=True, legacy=False)

    def base():
        model = Model(0, Text(5), 7)
        model.conditioner.add_module("text_2", tower(1))
        return model

    def refiner(seed):
        model = Model(1, tower(seed), 7)
        model.conditioner.text.null = ""
        return model

    cache.max_bytes = 1e8
    one = cache(None, cache.file("a", base))
    two, three = (
        cache(None, cache.file(f"b{seed}", lambda seed=seed: refiner(seed))) for seed in (1, 2)
    )
    assert two.conditioner.text.model is one.conditioner.text_2.model
    assert two.conditioner.text is not one.conditioner.text_2
    assert three.conditioner.text.model is not two.conditioner.text.model


def test_parts_that_differ_in_a_weight_or_a_setting_are_not_shared(cache):
    one = cache(None, cache.file("a", lambda: Model(0, Text(5), 7)))
    other = cache(None, cache.file("b", lambda: Model(0, Text(6), 8)))
    setting = cache(None, cache.file("c", lambda: Model(0, Text(5, "penultimate"), 7)))
    half = cache(None, cache.file("d", lambda: Model(0, Text(5), 7).half()))
    for model in (other, setting, half):
        assert model.conditioner.text is not one.conditioner.text
    assert setting.autoencoder is one.autoencoder
    assert half.autoencoder is not one.autoencoder
    assert other.autoencoder is not one.autoencoder


def test_tensors_among_the_settings_are_compared(cache):
    def model(value):
        model = Model(0, Text(0), 0)
        model.conditioner.text.statistics = (torch.zeros(3), torch.full((3,), value))
        return model

    one, equal, other = (
        cache(None, cache.file(name, lambda value=value: model(value)))
        for name, value in {"a": 1.0, "b": 1.0, "c": 2.0}.items()
    )
    assert equal.conditioner.text is one.conditioner.text
    assert other.conditioner.text is not one.conditioner.text


def test_models_with_other_embeddings_are_kept_separately(cache, tmp_path):
    path, options = cache.file("a", lambda: Model(0, Text(0), 0)), {"embeddings": [tmp_path]}
    plain, with_embedding = cache(None, path), cache(None, path, **options)
    assert with_embedding is not plain
    assert cache(None, path, **options) is with_embedding
    (tmp_path / "word").write_bytes(b"123")
    assert cache(None, path, **options) is not with_embedding


def test_loras_are_set_on_the_kept_model_and_removed_before_its_parts_are_shared(
    cache, monkeypatch
):
    def set_loras(model, loras):
        model.merged = MergedChanges()
        calls.append((model, loras))

    monkeypatch.setattr("ldm.app.model_cache.set_loras", set_loras)
    calls = []
    one = cache.file("a", lambda: Model(0, Text(0), 0))
    two = cache.file("b", lambda: Model(1, Text(0), 0))
    plain = cache(None, one)
    assert calls == []
    assert cache(None, one, loras=[("x", 0.5)]) is plain
    assert cache(None, one, loras=[("x", 0.7)]) is plain
    cache(None, two)
    assert calls == [(plain, (("x", 0.5),)), (plain, (("x", 0.7),)), (plain, ())]


def test_a_tower_with_embeddings_is_not_shared(cache):
    one = cache(None, cache.file("a", lambda: Model(0, Text(5), 7)))
    one.conditioner.text.added_embeddings = {"cat": torch.ones(1, 16)}
    two = cache(None, cache.file("b", lambda: Model(1, Text(5), 7)))
    assert two.conditioner.text is not one.conditioner.text


def test_the_least_recently_used_model_is_removed_first(cache):
    paths = [cache.file(name, lambda: Model(0, Text(0), 0), size=4000) for name in "abc"]
    cache.max_bytes = 2 * sum(p.nbytes for p in Model(0, Text(0), 0).parameters()) + 4000
    a, b = cache(None, paths[0]), cache(None, paths[1])
    cache.max_bytes = cache.nbytes + 3000  # no room for a third
    assert cache(None, paths[0]) is a
    cache(None, paths[2])
    assert cache(None, paths[0]) is a
    assert cache(None, paths[1]) is not b


def test_a_model_larger_than_the_limit_is_kept_alone(cache):
    cache.max_bytes = 1
    paths = [cache.file(name, lambda: Model(0, Text(0), 0)) for name in "ab"]
    assert cache(None, paths[0]) is cache(None, paths[0])
    cache(None, paths[1])
    assert cache.count == 1

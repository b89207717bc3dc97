"""Conditioner with SDXL's encoders against the GeneralConditioner of `generative-models`."""

from typing import Any

import numpy as np
import pytest
import torch
from encoderhelp import assert_close

from goldfile import load_golden
from ldm.conditioning import Cond, Conditioner
from ldm.encoders.labels import ClassEmbedder, IdentityEncoder
from ldm.encoders.sizes import SizeEmbedding
from ldm.encoders.text import CLIPText, OpenCLIPText
from recipe import fill

GOLDEN = "sdxl_conditioner"
CLASSES: dict[str, Any] = {
    "FrozenCLIPEmbedder": CLIPText,
    "FrozenOpenCLIPEmbedder2": OpenCLIPText,
    "ConcatTimestepEmbedderND": SizeEmbedding,
    "ClassEmbedder": ClassEmbedder,
    "IdentityEncoder": IdentityEncoder,
}
ARCH_KEYS = {CLIPText: "tiny_hf_config", OpenCLIPText: "tiny_arch"}
PAIR_CASES = [
    "base_c_uc_zero_txt", "base_c_uc_negative", "base_c_uc_zero_sizes", "refiner_c_uc",
    "base_same_batch_cond_zero", "ucg_rates_ignored_in_pair",
]  # fmt: skip
SIZE_CASES = ["concat_ints_256", "concat_floats", "concat_1d", "concat_3cols_odd"]


def build_conditioner(golden, config_name) -> Conditioner:
    encoders = {}
    for n, config in enumerate(golden.meta[f"config_{config_name}"]["params"]["emb_models"]):
        build = CLASSES[config["target"].rpartition(".")[2]]
        options = dict(config.get("params", {}))
        options.pop("device", None)
        options |= {key: config[key] for key in ("ucg_rate", "legacy_ucg_value") if key in config}
        if build in ARCH_KEYS:
            options |= {"arch": golden.meta[ARCH_KEYS[build]], "null": None}
        else:
            options["key"] = config["input_key"]
        encoder = build(**options)
        encoder.load_state_dict(fill(encoder.state_dict(), golden.meta["salt"], f"embedders.{n}."))
        name = ("text", "text_2")[n] if build in ARCH_KEYS else f"embedder_{n}"
        encoders[name] = encoder
    return Conditioner(join="features", **encoders)


def assert_equal(cond: Cond, golden, case, prefix="") -> None:
    outputs = golden.outputs(case)
    for slot, value in cond.tensors().items():
        assert_close(value, outputs[prefix + slot], 2e-6)  # observed: 5e-7


@pytest.mark.parametrize("case", PAIR_CASES)
def test_conditional_and_unconditional_batches_equal_the_recorded_ones(case):
    golden = load_golden(GOLDEN)
    info = golden.info(case)
    conditioner = build_conditioner(golden, info["config"])
    for is_uncond, prefix in ((False, "c_"), (True, "uc_")):
        texts = info.get("negative", info["txt"]) if is_uncond else info["txt"]
        batch = {**golden.inputs(case), "txt": texts}
        if "aesthetic_score" in info:
            batch["aesthetic_score"] = [info["aesthetic_score"][is_uncond]] * len(texts)
        zero_keys = info.get(f"force_{'uc' if is_uncond else 'cond'}_zero_embeddings", [])
        if is_uncond and case == "ucg_rates_ignored_in_pair":
            zero_keys = ["txt"]
        cond = conditioner(batch, drop=dict.fromkeys(zero_keys, 1.0))
        assert_equal(cond, golden, case, prefix)
        if zero_keys == ["txt"]:
            no_text = conditioner(batch | {"txt": [None] * len(texts)})
            assert torch.equal(no_text.crossattn, cond.crossattn)
            assert torch.equal(no_text.vector, cond.vector)


@pytest.mark.parametrize("case", ["ucg_dropout", "ucg_dropout_b", "classes_and_concat"])
def test_outputs_are_dropped_independently_as_recorded(case):
    golden = load_golden(GOLDEN)
    info = golden.info(case)
    conditioner = build_conditioner(golden, info["config"])
    torch.manual_seed(info["seed_before"])
    batch = {**golden.inputs(case), "txt": info.get("txt")}
    assert_equal(conditioner(batch, drop=None, legacy={"independent-dropout"}), golden, case)


def test_later_encoders_read_the_replaced_text(monkeypatch):
    golden = load_golden(GOLDEN)
    info = golden.info("legacy_ucg")
    conditioner = build_conditioner(golden, info["config"])
    choices = [np.random.RandomState(seed).choice(2, 4, p=[0.5, 0.5]) for seed in (11, 12)]
    draws = (torch.tensor(1.0 - choice) for choice in choices)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: next(draws))
    texts = list(info["txt"])
    batch = {key: value.repeat(2, 1) for key, value in golden.inputs("legacy_ucg").items()}
    cond = conditioner(batch | {"txt": texts}, drop=None, legacy={"mutating-legacy-ucg"})
    assert_equal(cond, golden, "legacy_ucg")
    assert texts == info["txt"] != info["txt_after"]


def test_encoders_of_a_prompt_drop_the_same_samples():
    golden = load_golden(GOLDEN)
    conditioner = build_conditioner(golden, "base_ucg")
    for encoder in conditioner.encoders.values():
        encoder.ucg_rate = 0.5
    sizes = {key: value.repeat(8, 1) for key, value in golden.inputs("ucg_dropout").items()}
    generator = torch.Generator().manual_seed(0)
    cond = conditioner({**sizes, "txt": ["a cat"] * 16}, drop=None, generator=generator)
    is_dropped = (cond.crossattn[..., :32] == 0).flatten(1).all(1)  # CLIP's features
    assert 0 < is_dropped.sum() < 16
    for other in (cond.crossattn[..., 32:], cond.vector[:, :40]):
        assert torch.equal((other == 0).flatten(1).all(1), is_dropped)
    assert not torch.equal((cond.vector[:, 40:72] == 0).all(1), is_dropped)


def test_the_second_tower_may_read_another_prompt():
    golden = load_golden(GOLDEN)
    conditioner, sizes = build_conditioner(golden, "base"), golden.inputs("base_c_uc_negative")
    default, same, other = (
        conditioner({**sizes, "txt": ["a cat"] * 2, **second_prompt})
        for second_prompt in ({}, {"txt_2": ["a cat"] * 2}, {"txt_2": ["a dog"] * 2})
    )
    assert torch.equal(default.crossattn, same.crossattn)
    assert torch.equal(default.crossattn[..., :32], other.crossattn[..., :32])
    assert not torch.equal(default.crossattn[..., 32:], other.crossattn[..., 32:])
    assert not torch.equal(default.vector, other.vector)


@pytest.mark.parametrize("case", SIZE_CASES)
def test_size_embeddings_equal_the_recorded_ones(case):
    golden = load_golden(GOLDEN)
    encoder = SizeEmbedding(key="x", **golden.info(case)["params"])
    embedding = encoder.half()(golden.inputs(case)["x"])
    assert embedding.dtype == torch.float32
    # Observed: 3e-5, as the last bit of a frequency is 6e-5 radians at 1024 pixels.
    assert_close(embedding, golden.outputs(case)["emb"], 1e-4)


def test_inputs_of_other_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"`x` must be \(B, n\) numbers, got \(1, 2, 3\)"):
        SizeEmbedding(key="x")(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="`x` must have 2 to 4 dimensions, got 5"):
        IdentityEncoder(key="x")(torch.zeros(1, 1, 1, 1, 1))


def test_an_encoder_that_is_not_trainable_is_frozen():
    frozen, trained = (ClassEmbedder(embed_dim=2, is_trainable=flag) for flag in (False, True))
    Conditioner(frozen=frozen, trained=trained)
    assert not frozen.embedding.weight.requires_grad
    assert trained.embedding.weight.requires_grad

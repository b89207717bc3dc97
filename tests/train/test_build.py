"""Settings that change time or memory of a step do not change its numbers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.loading.config import instantiate
from ldm.model import LatentDiffusion
from ldm.runtime.errors import ConfigError
from ldm.runtime.types import JsonObject
from ldm.train.build import build_task, configure_model, set_gradient_checkpointing
from ldm.train.config.schema import TrainerOptions
from ldm.train.config.settings import read_settings
from ldm.train.tasks.diffusion import DiffusionTask
from loading.tinyfamilies import make_small_config
from quick import slow_except


def build_model(family: str = "sd2") -> LatentDiffusion:
    raw = make_small_config(family)["model"]
    raw["params"]["cond_stage_config"]["params"]["freeze"] = False
    unet = raw["params"]["unet_config"]["params"]
    unet |= {"model_channels": 64, "dropout": 0.2, "use_checkpoint": False}
    torch.manual_seed(0)
    model: LatentDiffusion = instantiate(raw)
    for p in model.unet.parameters():  # the last layers start at zero, and would hide the others
        nn.init.normal_(p, std=0.1)
    return model.train()


def compute_gradients(model: LatentDiffusion, autocast: bool) -> dict[str, Tensor]:
    """Compute the gradients of one batch, with dropout."""
    task, batch = DiffusionTask(model), {"z": torch.ones(2, 4, 8, 8), "txt": ["a cat", "a dog"]}
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = task.loss(batch, torch.Generator().manual_seed(2))["loss"]
    loss.backward()
    named = model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("family", ["sd1", "sd2"])  # their text encoders are of other classes
@pytest.mark.parametrize("autocast", slow_except([False, True], False))
def test_gradients_are_equal_with_and_without_checkpointing(family: str, autocast: bool) -> None:
    """Bit by bit: the same operations are done twice, dropout draws the same numbers."""
    plain, saving = build_model(family), build_model(family)
    assert set_gradient_checkpointing(saving) > 10
    actual, expected = compute_gradients(saving, autocast), compute_gradients(plain, autocast)
    assert actual.keys() == expected.keys()
    assert {name.split(".")[0] for name in actual} == {"unet", "conditioner"}
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet_config": 3}, r"model\.params\.unet_config: `target` is missing"),
        ({"scale_factor": "abc"}, "model: invalid parameters of LatentDiffusion: could not conv"),
    ],
)
def test_parameters_of_a_wrong_type_are_named(changes: JsonObject, message: str) -> None:
    raw = make_small_config("sd2")["model"]
    raw["params"] |= changes
    with pytest.raises(ConfigError, match=message):
        instantiate(raw, where="model")


@pytest.mark.parametrize("config", [3, {"params": 3}, {"params": {"emb_models": [3]}}])
def test_encoders_of_sdxl_of_a_wrong_type_are_named(config: object) -> None:
    raw = make_small_config("xl")["model"]
    raw["params"]["conditioner_config"] = config
    with pytest.raises(ConfigError, match="conditioner_config: `.*` (should|must) be a"):
        instantiate(raw, where="model")


def test_dropout_of_a_condition_that_the_model_does_not_have_is_refused() -> None:
    objective = {"conditioning_dropout_prob": {"text": 0.5}}
    raw = {"model": make_small_config("sd2")["model"], "lightning": {"objective": objective}}
    with pytest.raises(ValueError, match="prob: unknown condition `text`, did you mean `txt`"):
        build_task(build_model(), read_settings(raw))


def test_checkpointing_keeps_fewer_activations() -> None:
    numbers = []
    for on in (False, True):
        model = build_model()
        set_gradient_checkpointing(model, on)
        sizes: list[int] = []

        def record_size(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(record_size, lambda x: x):
            model.unet(torch.ones(1, 4, 16, 16), torch.ones(1), context=torch.ones(1, 7, 32))
        numbers.append(sum(sizes))
    assert numbers[1] < 0.5 * numbers[0]


def test_the_autoencoder_can_save_memory_too() -> None:
    losses = []
    for on in (False, True):
        autoencoder = build_model().autoencoder.requires_grad_(True)
        assert set_gradient_checkpointing(autoencoder, on) == 10
        loss = autoencoder.decode(torch.ones(1, 4, 4, 4)).square().mean()
        loss.backward()
        losses.append(autoencoder.decoder.conv_in.weight.grad)  # type: ignore[union-attr]
    assert torch.equal(*losses)


def test_channels_last_gives_the_same_gradients() -> None:
    """Tolerance: other kernels sum in another order. Dropout is off: it draws in memory order."""
    plain, converted = build_model().eval(), build_model().eval()
    configure_model(converted, TrainerOptions(channels_last=True))
    assert converted.unet.out[2].weight.is_contiguous(memory_format=torch.channels_last)
    actual, expected = compute_gradients(converted, False), compute_gradients(plain, False)
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-3 * value.norm(), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, while it traces
def test_a_compiled_model_keeps_its_names_and_its_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tolerance: fused operations round less often. Dropout is off: it draws other numbers."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # others may be half written
    plain, compiled = build_model().eval(), build_model().eval()
    configure_model(compiled, TrainerOptions(compile=True))
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    actual, expected = compute_gradients(compiled, False), compute_gradients(plain, False)
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-3 * value.norm(), name

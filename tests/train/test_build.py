"""Settings that save time or memory do not change gradients; invalid settings are refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.loading.build import build_on_meta
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
    config = make_small_config(family)["model"]
    config["params"]["cond_stage_config"]["params"]["freeze"] = False
    unet = config["params"]["unet_config"]["params"]
    unet |= {"model_channels": 64, "dropout": 0.2, "use_checkpoint": False}
    torch.manual_seed(0)
    model: LatentDiffusion = instantiate(config)
    for p in model.unet.parameters():  # last layers start at zero, and would hide the others
        nn.init.normal_(p, std=0.1)
    return model.train()


def test_training_ldm3d_is_refused_in_one_line() -> None:
    model = build_on_meta(make_small_config("ldm3d"))
    with pytest.raises(ValueError, match="encodes 6 channels .* cannot be trained: images of the"):
        build_task(model, read_settings({}))


def compute_gradients(model: LatentDiffusion, autocast: bool = False) -> dict[str, Tensor]:
    """Compute the gradients of one batch, with dropout."""
    task, batch = DiffusionTask(model), {"z": torch.ones(2, 4, 8, 8), "txt": ["a cat", "a dog"]}
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = task.loss(batch, torch.Generator().manual_seed(2))["loss"]
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["sd1", "sd2"])  # their text encoders are of other classes
@pytest.mark.parametrize("autocast", slow_except([False, True], False))
def test_gradients_are_equal_with_and_without_checkpointing(family: str, autocast: bool) -> None:
    """Bit by bit: operations are the same, and dropout draws the same numbers."""
    plain, checkpointed = build_model(family), build_model(family)
    assert set_gradient_checkpointing(checkpointed) > 10
    actual, expected = compute_gradients(checkpointed, autocast), compute_gradients(plain, autocast)
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
    config = make_small_config("sd2")["model"]
    config["params"] |= changes
    with pytest.raises(ConfigError, match=message):
        instantiate(config, where="model")


@pytest.mark.parametrize("conditioner_config", [3, {"params": 3}, {"params": {"emb_models": [3]}}])
def test_encoders_of_sdxl_of_a_wrong_type_are_named(conditioner_config: object) -> None:
    config = make_small_config("xl")["model"]
    config["params"]["conditioner_config"] = conditioner_config
    with pytest.raises(ConfigError, match="conditioner_config: `.*` (should|must) be a"):
        instantiate(config, where="model")


def test_dropout_of_an_unknown_condition_is_refused() -> None:
    objective = {"conditioning_dropout_prob": {"text": 0.5}}
    config = {"model": make_small_config("sd2")["model"], "lightning": {"objective": objective}}
    with pytest.raises(ValueError, match="prob: unknown condition `text`, did you mean `txt`"):
        build_task(build_model(), read_settings(config))


def test_checkpointing_keeps_fewer_activations() -> None:
    def count_saved(is_enabled: bool) -> int:
        sizes: list[int] = []
        model = build_model()
        set_gradient_checkpointing(model, is_enabled)

        def record_size(x: Tensor) -> Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(record_size, lambda x: x):
            model.unet(torch.ones(1, 4, 16, 16), torch.ones(1), context=torch.ones(1, 7, 32))
        return sum(sizes)

    assert count_saved(True) < 0.5 * count_saved(False)


def test_gradients_of_the_autoencoder_are_equal_with_and_without_checkpointing() -> None:
    gradients = []
    for is_enabled in (False, True):
        autoencoder = build_model().autoencoder.requires_grad_(True)
        assert set_gradient_checkpointing(autoencoder, is_enabled) == 10
        autoencoder.decode(torch.ones(1, 4, 4, 4)).square().mean().backward()
        gradients.append(autoencoder.decoder.conv_in.weight.grad)  # type: ignore[union-attr]
    assert torch.equal(*gradients)


def test_channels_last_does_not_change_gradients() -> None:
    """Tolerance: kernels sum in another order. Without dropout, which draws in memory order."""
    plain, converted = build_model().eval(), build_model().eval()
    configure_model(converted, TrainerOptions(channels_last=True))
    assert converted.unet.out[2].weight.is_contiguous(memory_format=torch.channels_last)
    actual, expected = compute_gradients(converted), compute_gradients(plain)
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-3 * value.norm(), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, while it traces
def test_a_compiled_model_has_the_same_names_and_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tolerance: fused operations round less often. Without dropout, which draws other numbers."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # others may be incomplete
    plain, compiled = build_model().eval(), build_model().eval()
    configure_model(compiled, TrainerOptions(compile=True))
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    actual, expected = compute_gradients(compiled), compute_gradients(plain)
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-3 * value.norm(), name

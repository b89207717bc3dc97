"""Training VQ autoencoders with the losses of taming-transformers and of the original."""

import pytest
import torch

from goldfile import load_golden
from ldm.loading.config import instantiate, read_yaml
from ldm.nets.lpips import LPIPS
from ldm.train.config.settings import read_settings
from ldm.train.memory_estimate import estimate_training_memory
from ldm.train.optim.optimizers import make_optimizer
from ldm.train.tasks.autoencoder import (
    ReconstructionTask,
    VQAdversarialTask,
    build_autoencoder_task,
)
from train.tinyrun import ROOT

# Relative to the largest value, as in test_autoencoder_training. Observed: 6e-6.
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def golden():
    return load_golden("ldm_vq_train")


@pytest.fixture(scope="module")
def lpips(golden):
    lpips = LPIPS()
    lpips.load_state_dict(golden.weights(lpips.state_dict(), "loss.perceptual_loss."))
    return lpips


def build_task(golden, lpips, name, **changes):
    """Build the recorded model and its task, with changed parameters of the loss."""
    config = golden.meta[f"config_{name}"]["params"]
    model = instantiate({"target": "ldm.models.autoencoder.VQModel", "params": config})
    model.load_state_dict(golden.weights(model.state_dict()))
    spec = config["lossconfig"]
    loss_config = instantiate({**spec, "params": spec["params"] | changes})
    task = VQAdversarialTask(model, loss_config, perceptual=lpips)
    state = golden.weights(task.discriminator.state_dict(), "loss.discriminator.")
    task.discriminator.load_state_dict(state)
    return task


CASES = [
    "taming_gen_before", "taming_gen_after", "taming_gen_vanilla_noperc", "ldm_gen_after",
    "ldm_gen_l2", "taming_disc_before", "taming_disc_after", "taming_disc_vanilla",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_the_recorded_ones(case, golden, lpips):
    info = golden.info(case)
    names = ("disc_loss", "perceptual_weight", "pixel_loss")
    changes = {name: info[name] for name in names if name in info}
    task = build_task(golden, lpips, case.partition("_")[0], **changes)
    task.step = info["global_step"]
    compute = task.discriminator_loss if "disc" in case else task.loss
    values = compute({"jpg": golden.select("shared/")["x"]}, torch.Generator())
    values["loss"].backward()
    network = task.discriminator if "disc" in case else task.model
    values["total_loss"] = values["loss"]
    values["qloss"] = values.get("quant_loss", values["loss"])
    for name, weight in network.named_parameters():
        prefix = "loss.discriminator." if "disc" in case else ""
        values[f"grad/{prefix}{name}"] = weight.grad
    checked = 0
    for key, expected in golden.outputs(case).items():
        error = (values[key.removeprefix("log/train/")].detach() - expected).abs().max()
        assert error <= TOLERANCE * max(1.0, float(expected.abs().max())), key
        checked += 1
    assert checked >= 5


def test_steps_reduce_the_error_and_move_the_codebook():
    config = load_golden("ldm_vq").meta["config_f4"]["params"]
    torch.manual_seed(0)
    model = instantiate({"target": "ldm.models.autoencoder.VQModel", "params": config})
    task = build_autoencoder_task(model, {}, {})
    assert isinstance(task, ReconstructionTask)
    before = model.quantize.embedding.weight.detach().clone()
    batch = {"jpg": torch.linspace(-1, 1, 32).expand(2, 3, 32, 32)}
    optimizer = make_optimizer(model, 1e-3, name="adamw", betas=(0.5, 0.9))
    losses = []
    for _ in range(8):
        values = task.loss(batch, torch.Generator())
        optimizer.zero_grad()
        values["loss"].backward()
        optimizer.step()
        losses.append(float(values["loss"].detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(model.quantize.embedding.weight, before)
    assert 1 <= values["cluster_usage"] <= 32
    assert task.get_weights_to_export([]).keys() == model.state_dict().keys()


KL_LOSS = {
    "target": "ldm.modules.losses.LPIPSWithDiscriminator",
    "params": {"disc_start": 1, "perceptual_weight": 0.0},
}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"lossconfig": KL_LOSS}, "LPIPSWithDiscriminator` is for an AutoencoderKL"),
        ({"lr_g_factor": 2.0}, "lr_g_factor: only 1.0 is supported"),
        ({"batch_resize_range": [64, 128]}, "batch_resize_range: only None is supported"),
    ],
)
def test_what_is_not_supported_is_named(params, message):
    config = load_golden("ldm_vq").meta["config_f4"]["params"]
    model = instantiate({"target": "ldm.models.autoencoder.VQModel", "params": config})
    with pytest.raises(ValueError, match=message):
        build_autoencoder_task(model, params, {})


def test_the_weight_of_a_loss_that_the_autoencoder_does_not_have_is_refused():
    config = load_golden("ldm_vq").meta["config_f4"]["params"]
    model = instantiate({"target": "ldm.models.autoencoder.VQModel", "params": config})
    with pytest.raises(ValueError, match="unknown key `kl_weight`"):
        build_autoencoder_task(model, {}, {"kl_weight": 0.5})


def test_the_memory_of_training_is_estimated():
    config = read_yaml(ROOT / "configs/autoencoder/vq-f4.yaml", [
        "model.params.ddconfig.ch=32", "model.params.ddconfig.ch_mult=[1,1]",
        "model.params.ddconfig.num_res_blocks=1", "model.params.n_embed=64",
        "model.params.lossconfig={target: torch.nn.Identity}",
        "data.params.train={root: x, transform: {name: photo, size: 16}}",
    ])  # fmt: skip
    assert estimate_training_memory(read_settings(config)).activations > 0

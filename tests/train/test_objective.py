"""The loss, its weights, and the originals' numbers for it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from goldfile import Gold, gold
from ldm.conditioning import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import Schedule, make_betas
from ldm.loading import config
from ldm.train import optim
from ldm.train.ema import EMA
from ldm.train.objective import min_snr, spread_timesteps, vocabulary

SCHEDULE = Schedule(make_betas("linear", linear_start=0.00085, linear_end=0.012))
PREFIX = "model.diffusion_model."


def unet_of(golden: Gold, key: str) -> Any:
    unet = config.instantiate(golden.meta[key]["params"]["unet_config"])
    unet.load_state_dict(golden.weights(unet.state_dict(), PREFIX))
    return unet


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
def test_loss_and_gradients_equal_the_originals(parameterization: str) -> None:
    golden = gold("train_losses")
    shared, case = golden.under("shared/"), golden.outputs(f"{parameterization}_l2_train")
    unet = unet_of(golden, "config_eps_l2")
    denoiser = Denoiser(unet, SCHEDULE, parameterization)
    cond = Cond(crossattn=shared["c"])
    loss = denoiser.loss(shared["x_start"], cond, shared["t"], shared["noise"]).mean()
    loss.backward()
    torch.testing.assert_close(loss, case["dict/train/loss_simple"], rtol=1e-5, atol=1e-6)
    for name, wanted in case.items():
        if name.startswith("grad/"):
            p = unet.get_parameter(name.removeprefix("grad/" + PREFIX))
            torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=1e-5)


def test_two_steps_of_adamw_equal_the_originals() -> None:
    golden = gold("train_step")
    given, wanted = golden.inputs("adamw"), golden.outputs("adamw")
    unet = unet_of(golden, "config")
    denoiser, ema = Denoiser(unet, SCHEDULE), EMA(unet)
    optimizer = optim.make(unet, 1e-3)
    for step in range(2):
        noise = given["noise"].roll(step, 0)
        cond = Cond(crossattn=given["c"])
        loss = denoiser.loss(given["x_start"], cond, given["t"], noise).mean()
        torch.testing.assert_close(loss.detach(), wanted[f"loss{step}"], rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(unet)
        for name in ("time_embed.0.weight", "out.2.weight", "middle_block.1.norm.weight"):
            ours = unet.get_parameter(name).detach()
            theirs = wanted[f"step{step}/{PREFIX}{name}"]
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            average = wanted[f"step{step}/model_ema.diffusion_model{name.replace('.', '')}"]
            torch.testing.assert_close(ema.shadow[name], average, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
def test_min_snr_weighs_the_same_error_of_z_alike(parameterization: str) -> None:
    snr = SCHEDULE.sigmas**-2
    per_z = {"x0": 1.0, "eps": snr, "v": snr + 1}[parameterization]
    weights = min_snr(SCHEDULE, parameterization, 5.0)
    torch.testing.assert_close((weights * per_z).double(), snr.clamp(max=5.0), rtol=1e-5, atol=0)


def test_without_gamma_all_timesteps_count_alike() -> None:
    assert min_snr(SCHEDULE, "v", None).unique().tolist() == [1.0]


def test_timesteps_are_spread_over_the_range() -> None:
    t = spread_timesteps(50, 1000, torch.Generator().manual_seed(0))
    assert sorted((t // 20).tolist()) == list(range(50))
    assert t.tolist() != sorted(t.tolist())


class Letters(nn.Module):
    """A text encoder as far as `vocabulary` looks at it."""

    token_ids = torch.zeros(5, dtype=torch.int64)

    def tokenize(self, texts: list[str]) -> Tensor:
        return torch.tensor([[ord(text[0]), 7] for text in texts])


def test_a_vocabulary_is_sorted_and_filled_up() -> None:
    ids = vocabulary(["cat", "ant", "cow"], Letters()).tolist()
    assert ids == [7, ord("a"), ord("c"), 49408, 49409]


def test_a_vocabulary_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="`compact_vocab` is too small: 6 tokens"):
        vocabulary(list("abcde"), Letters())

"""The loss of diffusion models and its options, compared with the original."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from goldfile import GoldenFile, load_golden
from ldm.conditioning import Cond, Conditioner
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import Schedule, make_betas
from ldm.encoders.text import collect_vocabulary
from ldm.loading.config import instantiate
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import PixelSpace
from ldm.train.build import build_diffusion_task, collect_diffusion_options
from ldm.train.optim.ema import EMA
from ldm.train.optim.optimizers import make_optimizer
from ldm.train.runs.initial_weights import set_scale_by_std
from ldm.train.tasks.criterion import Criterion
from ldm.train.tasks.diffusion import DiffusionTask
from ldm.train.tasks.noise_levels import draw_timesteps
from quick import slow_except

SCHEDULE = Schedule(make_betas("linear", linear_start=0.00085, linear_end=0.012))
PREFIX = "model.diffusion_model."


def build_unet(golden: GoldenFile, key: str) -> Any:
    unet = instantiate(golden.meta[key]["params"]["unet_config"])
    unet.load_state_dict(golden.weights(unet.state_dict(), PREFIX))
    return unet


CASES = ["eps_l2", "v_l2", "x0_l2", "eps_elbo", "v_elbo", "x0_elbo", "eps_l1", "logvar_init",
         "learn_logvar"]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", slow_except(["train", "eval"], "train"))
def test_losses_and_gradients_equal_the_originals(case: str, mode: str) -> None:
    """Tolerance: in another run of the original, gradients of 0.1 differ by 5e-7."""
    golden = load_golden("train_losses")
    shared, expected = golden.select("shared/"), golden.outputs(f"{case}_{mode}")
    params = golden.case(f"{case}_{mode}")["info"]["options"]
    unet = build_unet(golden, f"config_{case}").train(mode == "train")
    criterion = build_criterion(params)
    cond, noise = Cond(crossattn=shared["c"]), shared["noise"]
    denoiser = Denoiser(unet, SCHEDULE, params.get("parameterization", "eps"))
    losses = criterion(
        denoiser.compute_error(shared["x_start"], cond, shared["t"], noise), shared["t"]
    )
    assert losses["t"].equal(shared["t"])
    assert losses["loss_per_sample"].mean() == pytest.approx(float(losses["loss_simple"]), rel=1e-6)
    if mode == "train":
        losses["loss"].backward()
    for key, value in expected.items():
        prefix, _, weight = key.partition("/")
        if key == "grad/logvar":
            torch.testing.assert_close(criterion.logvar.grad, value, rtol=1e-4, atol=1e-6)
        elif prefix == "grad":
            gradient = unet.get_parameter(weight.removeprefix(PREFIX)).grad
            torch.testing.assert_close(gradient, value, rtol=1e-4, atol=1e-5)
        else:
            actual = losses[key.rsplit("/", 1)[-1]]
            torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-6, msg=key)


def build_criterion(params: dict[str, Any]) -> Criterion:
    """Build the criterion for parameters in a YAML of the original."""
    options = collect_diffusion_options(params, {})
    return Criterion(SCHEDULE, params.get("parameterization", "eps"), **options)


def test_the_loss_for_random_timesteps_and_noise_equals_the_originals() -> None:
    golden = load_golden("train_losses")
    shared = golden.select("shared/")
    t, noise = golden.draws("forward_rng")
    denoiser = Denoiser(build_unet(golden, "config_eps_l2"), SCHEDULE)
    with torch.no_grad():
        error = denoiser.compute_error(shared["x_start"], Cond(crossattn=shared["c"]), t, noise)
        loss = build_criterion({})(error, t)["loss"]
    torch.testing.assert_close(loss, golden.outputs("forward_rng")["loss"], rtol=1e-5, atol=1e-6)


def test_two_steps_of_adamw_equal_the_originals() -> None:
    golden = load_golden("train_step")
    inputs, expected = golden.inputs("adamw"), golden.outputs("adamw")
    unet, criterion = build_unet(golden, "config"), build_criterion({})
    denoiser, ema = Denoiser(unet, SCHEDULE), EMA(unet)
    optimizer = make_optimizer(unet, 1e-3)
    for step in range(2):
        cond, t, noise = Cond(crossattn=inputs["c"]), inputs["t"], inputs["noise"].roll(step, 0)
        loss = criterion(denoiser.compute_error(inputs["x_start"], cond, t, noise), t)["loss"]
        torch.testing.assert_close(loss.detach(), expected[f"loss{step}"], rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(unet)
        for name in ("time_embed.0.weight", "out.2.weight", "middle_block.1.norm.weight"):
            actual = unet.get_parameter(name).detach()
            weight = expected[f"step{step}/{PREFIX}{name}"]
            torch.testing.assert_close(actual, weight, rtol=1e-4, atol=1e-4)
            average = expected[f"step{step}/model_ema.diffusion_model{name.replace('.', '')}"]
            torch.testing.assert_close(ema.shadow[name], average, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
def test_min_snr_gives_the_same_weight_to_an_error_of_x0(parameterization: str) -> None:
    snr = SCHEDULE.sigmas**-2
    loss_per_error = {"x0": 1.0, "eps": snr, "v": snr + 1}[parameterization]
    weights = Criterion(SCHEDULE, parameterization, min_snr_gamma=5.0).compute_weights(
        torch.arange(1000)
    )
    actual = (weights * loss_per_error).double()
    torch.testing.assert_close(actual, snr.clamp(max=5.0), rtol=1e-5, atol=0)


def test_min_snr_weights_the_loss_but_not_the_logged_loss_per_sample() -> None:
    error, t = torch.ones(2, 4, 8, 8), torch.tensor([10, 900])
    criterion = Criterion(SCHEDULE, "eps", min_snr_gamma=5.0)
    losses = criterion(error, t)
    assert losses["loss_per_sample"].tolist() == [1.0, 1.0]
    torch.testing.assert_close(losses["loss"], criterion.compute_weights(t).mean())


class InputRecorder(nn.Module):
    """A network that predicts zeros and records its input."""

    out_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, z_t: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        self.input = z_t.detach()
        return self.bias.expand_as(z_t)


def build_task(**options: Any) -> DiffusionTask:
    networks: dict[str, Any] = {"unet": InputRecorder(), "autoencoder": PixelSpace()}
    model = LatentDiffusion(conditioner=Conditioner(), schedule=SCHEDULE, **networks)
    return build_diffusion_task(model, **options)


def record_input_noise(task: DiffusionTask) -> tuple[Tensor, float]:
    """Return the noise in the network's input for zero latents, and the loss for predicting 0."""
    losses = task.loss({"z": torch.zeros(16, 4, 16, 16)}, torch.Generator().manual_seed(3))
    unet: Any = task.model.unet
    std = (1 - SCHEDULE.alphas_cumprod[losses["t"]]).sqrt().float()
    return unet.input / std[:, None, None, None], float(losses["loss"].detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_range": (200, 0)},
         r"`\[200, 0\]` should be a range \[first, end\) within 0 … 1000"),
        ({"timestep_range": (0, 1001)}, r"`\[0, 1001\]` should be a range"),
        ({"timestep_range": (0, 200), "noise_levels": {}},
         "`timestep_range` and `timestep_bias` cannot be combined"),
        ({"timestep_bias": 2.0, "noise_levels": {}}, "`timestep_bias` cannot be combined with"),
    ],
)  # fmt: skip
def test_invalid_options_of_timesteps_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_task(**options)


def test_offset_noise_shifts_channels() -> None:
    """The mean of a channel has variance 1 / 256 from the noise, plus offset squared."""
    plain, _ = record_input_noise(build_task())
    shifted, loss = record_input_noise(build_task(noise_offset=0.5))
    assert plain.mean(dim=(2, 3)).std() == pytest.approx(1 / 16, rel=0.2)
    assert shifted.mean(dim=(2, 3)).std() == pytest.approx((1 / 256 + 0.25) ** 0.5, rel=0.2)
    # The offset is in the target, too.
    assert loss == pytest.approx(shifted.square().mean().item(), rel=1e-4)


def test_input_perturbation_is_in_the_input_but_not_in_the_target() -> None:
    plain, loss = record_input_noise(build_task())
    perturbed, same_loss = record_input_noise(build_task(input_perturbation=0.3))
    assert (perturbed - plain).std() == pytest.approx(0.3, rel=0.05)
    assert same_loss == pytest.approx(loss, rel=1e-6)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="offset_nose"):
        build_task(offset_nose=0.1)


def test_options_are_collected_from_the_model_and_the_objective() -> None:
    params = {"loss_type": "l1", "logvar_init": 0.5, "ckpt_path": None}
    options = {"loss_type": "l1", "logvar_init": 0.5, "min_snr_gamma": 5}
    assert collect_diffusion_options(params, {"min_snr_gamma": 5}) == options
    assert collect_diffusion_options(params, {"loss_type": "l2"})["loss_type"] == "l2"
    unclip = {"embedding_dropout": 0.25, "ucg_training": {"txt": {"p": 0.2, "val": ""}}}
    assert collect_diffusion_options(unclip, {}) == {
        "conditioning_dropout_prob": {"txt": 0.2, "embedding": 0.25}
    }
    assert collect_diffusion_options(unclip, {"conditioning_dropout_prob": 0.3}) == {
        "conditioning_dropout_prob": {"txt": 0.3, "embedding": 0.25}
    }
    unset = {"conditioning_dropout_prob": None}
    assert collect_diffusion_options(unclip, unset) == collect_diffusion_options(unclip, {})
    for params, dropout in (({"embedding_dropout": 0.25}, 0.25), ({"embedder_config": {}}, 0.5)):
        options = collect_diffusion_options(params, {})
        assert options["conditioning_dropout_prob"] == {"txt": 0.1, "embedding": dropout}


def test_logvar_is_learned_and_exported_if_asked_for() -> None:
    task = build_task(learn_logvar=True, logvar_init=-0.3)
    task.loss({"z": torch.ones(2, 4, 8, 8)}, torch.Generator().manual_seed(0))["loss"].backward()
    assert (task.trainable["criterion"].logvar.grad != 0).sum() == 2
    assert task.get_weights_to_export([])["logvar"].shape == (1000,)
    assert "logvar" not in build_task(logvar_init=0.5).get_weights_to_export([])
    assert "criterion" not in build_task(logvar_init=0.5).trainable


def test_a_measured_scale_factor_equals_the_originals() -> None:
    """Measured on the recorded latent, without an autoencoder."""
    expected = load_golden("misc_cond").outputs("scale_by_std")
    task = build_task(scale_by_std=True)
    set_scale_by_std(task.model, expected["z"], torch.Generator())
    assert task.model.scale_factor == pytest.approx(expected["scale_factor"].item(), rel=1e-6)
    exported = task.get_weights_to_export([])["scale_factor"]
    assert float(exported) == pytest.approx(task.model.scale_factor, rel=1e-6)
    with pytest.raises(ValueError, match="scale_by_std needs `scale_factor` 1, not"):
        set_scale_by_std(task.model, expected["z"], torch.Generator())


def test_timesteps_are_stratified() -> None:
    t = draw_timesteps(SCHEDULE, 50, torch.Generator().manual_seed(0))
    assert sorted((t // 20).tolist()) == list(range(50))
    assert t.tolist() != sorted(t.tolist())


class FirstLetterTokenizer(nn.Module):
    """A text encoder for `collect_vocabulary`: the token of a text is its first letter."""

    token_ids = torch.zeros(5, dtype=torch.int64)

    def tokenize(self, texts: list[str]) -> Tensor:
        return torch.tensor([[ord(text[0]), 7] for text in texts])


def test_a_vocabulary_is_sorted_and_padded_or_refused_as_too_small() -> None:
    ids = collect_vocabulary(["cat", "ant", "cow"], FirstLetterTokenizer()).tolist()
    assert ids == [7, ord("a"), ord("c"), 49408, 49409]
    with pytest.raises(ValueError, match="`compact_vocab` must be at least 7 for 6 tokens"):
        collect_vocabulary(list("abcde"), FirstLetterTokenizer())

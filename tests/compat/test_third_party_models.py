"""What third-party code does with the original's model classes: subclass, wrap, train, bridge."""

import copy

import numpy as np
import pytest
import torch
from compathelp import SCHEDULER, build_model, make_tiny_config
from torch import nn

import ldm
from goldfile import load_golden
from ldm.compat.bridge import from_modern, to_modern
from ldm.compat.lightning import PlainModule
from ldm.diffusion.schedule import Schedule
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModelInterface
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import (
    DiffusionWrapper,
    ImageEmbeddingConditionedLatentDiffusion,
    LatentDepth2ImageDiffusion,
    LatentDiffusion,
    LatentInpaintDiffusion,
    LatentUpscaleDiffusion,
)
from ldm.modules.diffusionmodules.util import extract_into_tensor, make_beta_schedule, noise_like
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.nets.autoencoder import PixelSpace
from ldm.runtime.errors import WrongFamily
from ldm.util import instantiate_from_config, mean_flat
from pipelines.goldmodels import build_recorded_model
from quick import slow_except

# Lightning, where it is installed, warns of `self.log` without a Trainer.
WITHOUT_TRAINER = pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")
SHAPE = (4, 8, 12)


class ControlBranch(nn.Module):
    """A control network of one convolution of the hint."""

    def __init__(self, hint_channels):
        super().__init__()
        self.conv = nn.Conv2d(hint_channels, 4, 1)

    def forward(self, x, hint, timesteps, context):
        return self.conv(hint)


class ControlLDM(LatentDiffusion):
    """A model with a control network, whose arguments come before those of its base class."""

    def __init__(self, control_stage_config, control_key, only_mid_control, *args, **kwargs):
        self.control_scales = [1.0]
        super().__init__(*args, **kwargs)
        self.control_model = instantiate_from_config(control_stage_config)
        self.control_key = control_key
        self.only_mid_control = only_mid_control
        self.calls = []

    @torch.no_grad()
    def get_input(self, batch, k, bs=None, *args, **kwargs):
        x, c = super().get_input(batch, self.first_stage_key, *args, **kwargs)
        hint = batch[self.control_key][:bs].movedim(-1, 1).float()
        return x, {"c_crossattn": [c], "c_concat": [hint]}

    def apply_model(self, x_noisy, t, cond, *args, **kwargs):
        self.calls.append(sorted(cond))
        context = torch.cat(cond["c_crossattn"], 1)
        eps = self.model.diffusion_model(x=x_noisy, timesteps=t, context=context)
        if cond["c_concat"] is None:
            return eps
        hint = torch.cat(cond["c_concat"], 1)
        return eps + self.control_scales[0] * self.control_model(x_noisy, hint, t, context)

    @torch.no_grad()
    def get_unconditional_conditioning(self, N):
        return self.get_learned_conditioning(torch.zeros(N, 7, 32))

    @torch.no_grad()
    def sample_log(self, cond, batch_size, ddim, ddim_steps, **kwargs):
        _, _, h, w = cond["c_concat"][0].shape
        return DDIMSampler(self).sample(
            ddim_steps, batch_size, (self.channels, h, w), cond, verbose=False, **kwargs
        )

    def configure_optimizers(self):
        parameters = list(self.control_model.parameters())
        if not self.sd_locked:
            parameters += list(self.model.diffusion_model.output_blocks.parameters())
            parameters += list(self.model.diffusion_model.out.parameters())
        return torch.optim.AdamW(parameters, lr=self.learning_rate)


@WITHOUT_TRAINER
def test_a_control_network_is_trained_and_sampled():
    config = load_golden("ddim_eps").meta["config"]
    branch = {"target": f"{__name__}.ControlBranch", "params": {"hint_channels": 3}}
    model = ControlLDM(branch, "hint", False, **copy_params(config), cond_stage_trainable=False)
    model.learning_rate, model.sd_locked = 1e-2, True
    batch = {
        "jpg": torch.randn(2, 8, 12, 4), "txt": torch.randn(2, 7, 32),
        "hint": torch.randn(2, 8, 12, 3),
    }  # fmt: skip
    model.cond_stage_key = "txt"
    optimizer = model.configure_optimizers()
    (before,) = (p.clone() for n, p in model.control_model.named_parameters() if "bias" in n)
    loss = model.training_step(batch, 0)
    loss.backward()
    optimizer.step()
    assert not torch.equal(before, model.control_model.conv.bias)
    _, c = model.get_input(batch, "jpg")
    uncond = {"c_concat": None, "c_crossattn": [model.get_unconditional_conditioning(2)]}
    guided = {"c_concat": c["c_concat"], "c_crossattn": uncond["c_crossattn"]}
    samples, _ = model.sample_log(
        c, 2, True, 2, unconditional_guidance_scale=3.0, unconditional_conditioning=guided
    )
    assert samples.shape == (2, *SHAPE)
    assert model.apply_model(samples, torch.tensor([1, 1]), uncond).shape == samples.shape
    assert model.calls == [["c_concat", "c_crossattn"]] * 4


def copy_params(config):
    """Copy the parameters of a recorded config, without `cond_stage_trainable`."""
    params = copy.deepcopy(config["params"])
    params.pop("cond_stage_trainable")
    return params


class ThirdPartyModel(nn.Module):
    """A model class of third-party code that uses only our helpers, UNet and autoencoder."""

    def __init__(self, unet_config, first_stage_config, timesteps):
        super().__init__()
        self.model = DiffusionWrapper(unet_config, "crossattn")
        self.model_ema = LitEma(self.model)
        self.first_stage_model = instantiate_from_config(first_stage_config)
        betas = make_beta_schedule("linear", timesteps, linear_start=1e-3, linear_end=1e-2)
        alphas = np.cumprod(1.0 - betas)
        self.num_timesteps, self.parameterization = timesteps, "eps"
        for name, table in {
            "betas": betas,
            "alphas_cumprod": alphas,
            "alphas_cumprod_prev": np.append(1.0, alphas[:-1]),
        }.items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.float32))

    device = torch.device("cpu")
    calls = 0

    def q_sample(self, x, t, noise):
        alpha = extract_into_tensor(self.alphas_cumprod.sqrt(), t, x.shape)
        sigma = extract_into_tensor((1 - self.alphas_cumprod).sqrt(), t, x.shape)
        return alpha * x + sigma * noise

    def apply_model(self, x, t, c):
        self.calls += 1
        return self.model(x, t, c_crossattn=[c])


def test_a_third_party_model_class_trains_the_unet_or_only_the_context():
    config = copy_params(load_golden("get_input_more").meta["config_base_eps"])
    unet = config["unet_config"]
    unet["params"]["use_checkpoint"] = True
    model = ThirdPartyModel(unet, config["first_stage_config"], 20)
    model.load_state_dict(model.state_dict())
    assert isinstance(model.first_stage_model, AutoencoderKL)
    assert not isinstance(model.first_stage_model, VQModelInterface | IdentityFirstStage)
    posterior = model.first_stage_model.encode(torch.zeros(1, 3, 64, 96))
    assert isinstance(posterior, DiagonalGaussianDistribution)
    nn.init.normal_(model.model.diffusion_model.out[2].weight, std=0.1)
    x, t = posterior.sample().detach(), torch.tensor([5])
    noise = noise_like(x.shape, "cpu")
    context = torch.randn(1, 7, 32, requires_grad=True)

    def compute_loss():
        return mean_flat((model.apply_model(model.q_sample(x, t, noise), t, context) - noise) ** 2)

    compute_loss().sum().backward()
    assert model.model.diffusion_model.input_blocks[0][0].weight.grad is not None
    expected, context.grad = context.grad, None
    model.model.requires_grad_(False)
    compute_loss().sum().backward()
    assert torch.allclose(context.grad, expected, atol=1e-6)
    model.model_ema(model.model)
    samples, _ = DDIMSampler(model).sample(4, 1, SHAPE, context.detach(), eta=1.0)
    assert (samples.shape, model.calls) == ((1, *SHAPE), 2 + 4)


class EpsDenoiser(nn.Module):
    """The wrapper of k-diffusion: takes sigmas, returns denoised, and calls `apply_model`."""

    def __init__(self, model):
        super().__init__()
        self.inner_model = model
        self.log_sigmas = ((1 - model.alphas_cumprod) / model.alphas_cumprod).sqrt().log()

    def forward(self, x, sigma, **kwargs):
        log_sigma, log_sigmas = sigma.log(), self.log_sigmas
        low = (log_sigmas < log_sigma[:, None]).sum(1).clamp(1, len(log_sigmas) - 1) - 1
        t = low + (log_sigma - log_sigmas[low]) / (log_sigmas[low + 1] - log_sigmas[low])
        shape = (-1, 1, 1, 1)
        c_in = (1 / (sigma**2 + 1) ** 0.5).reshape(shape)
        eps = self.inner_model.apply_model(x * c_in, t, **kwargs)
        return x - eps * sigma.reshape(shape)


def test_three_way_guidance_over_a_wrapper_with_fractional_timesteps(monkeypatch):
    config = copy_params(load_golden("conditioning_routes").meta["config_hybrid"])
    config["unet_config"]["params"]["in_channels"] = 8
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    model = build_model({"target": target, "params": config})
    calls, old = [], LatentDiffusion.apply_model

    def apply_model(self, x_noisy, t, cond, return_ids=False):
        calls.append((len(x_noisy), t.dtype, bool((t % 1 != 0).any())))
        return old(self, x_noisy, t, cond, return_ids)

    monkeypatch.setattr(LatentDiffusion, "apply_model", apply_model)
    denoiser = EpsDenoiser(model)
    text, image, x = torch.randn(1, 7, 32), torch.randn(1, *SHAPE), torch.randn(1, *SHAPE)
    null_text, null_image = torch.zeros_like(text), torch.zeros_like(image)
    cond = {
        "c_crossattn": [torch.cat([text, null_text, null_text])],
        "c_concat": [torch.cat([image, image, null_image])],
    }
    sigma = torch.full((3,), 2.5)
    with torch.no_grad():
        out_cond, out_img, out_uncond = denoiser(x.repeat(3, 1, 1, 1), sigma, cond=cond).chunk(3)
        alone = denoiser(x, sigma[:1], cond={"c_crossattn": [text], "c_concat": [image]})
    guided = out_uncond + 7.5 * (out_cond - out_img) + 1.5 * (out_img - out_uncond)
    assert guided.isfinite().all()
    assert (alone - out_cond).abs().max() < 1e-4 * max(1, alone.abs().max())
    assert calls == [(3, torch.float32, True), (1, torch.float32, True)]


@WITHOUT_TRAINER
def test_the_hooks_of_training_may_be_called_without_lightning():
    config = load_golden("train_step").meta["config"]
    ucg_training = {"label": {"p": 1.0, "val": "none"}}
    model = build_model(config, scheduler_config=SCHEDULER, ucg_training=ucg_training)
    model.train()
    assert not model.first_stage_model.training
    assert model.first_stage_model.train(True) is model.first_stage_model
    model.learning_rate = 1e-3
    (optimizer,), (scheduler,) = model.configure_optimizers()
    assert (scheduler["interval"], scheduler["frequency"]) == ("step", 1)
    batch = {
        "jpg": torch.randn(2, 8, 12, 4), "txt": torch.randn(2, 7, 32), "label": ["a", "b"],
    }  # fmt: skip
    model.use_scheduler, model.cond_stage_key = False, "any"
    batch["any"] = batch["txt"][..., None].movedim(1, 2)
    model.on_train_batch_start(batch, 0)
    calls, old = [], LatentDiffusion.get_loss

    def get_loss(pred, target, mean=True):
        calls.append(mean)
        return old(model, pred, target, mean)

    model.get_loss = get_loss
    model.get_input = lambda batch, k: (batch["jpg"].movedim(-1, 1), batch["txt"])
    loss = model.training_step(batch, 0)
    loss.backward()
    optimizer.step()
    model.on_train_batch_end(None, batch, 0)
    assert model.model_ema.num_updates == 1
    assert batch["label"] == ["none", "none"]
    assert calls == [False, False]
    model.validation_step(batch, 0)


def test_an_autoencoder_and_its_discriminator_are_trained_without_a_trainer():
    params = {"disc_start": 0, "perceptual_weight": 0.0}
    loss = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": params}
    model = build_model(load_golden("ae_loss").meta["config_vae"], lossconfig=loss, ema_decay=0.9)
    if not isinstance(model, PlainModule):
        pytest.skip("Lightning needs a Trainer")
    model.learning_rate = 1e-3
    optimizers, _ = model.configure_optimizers()
    model.optimizers = lambda: optimizers
    networks = (model.decoder.conv_out.weight, model.loss.discriminator.main[0].weight)
    before = [weight.detach().clone() for weight in networks]
    batch = {"image": torch.rand(2, 32, 32, 3) * 2 - 1}
    model.training_step(batch, 0)
    model.on_train_batch_end()
    for weight, old in zip(networks, before, strict=True):
        assert not torch.equal(weight, old)
    trained = model.decoder.conv_out.weight.detach().clone()
    model.validation_step(batch, 0)
    log = model.log_images(batch)
    assert torch.equal(model.decoder.conv_out.weight, trained)  # not the EMA weights
    assert log.keys() == {
        "inputs", "samples", "reconstructions", "samples_ema", "reconstructions_ema",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["base_v", pytest.param("base_eps", marks=pytest.mark.slow)])
def test_models_are_converted_both_ways_and_share_their_weights(name):
    """Largest errors: 0 of the UNet and the encoder, 2.1e-6 of the decoder."""
    modern = build_recorded_model(load_golden("e2e_txt2img"), name)
    compat_model = from_modern(modern)
    restored = to_modern(compat_model)
    weight = modern.unet.out[2].weight
    assert type(compat_model.model.diffusion_model.time_embed[0]) is nn.Linear
    assert type(modern.unet.time_embed[0]) is not nn.Linear
    assert weight.data_ptr() == compat_model.model.diffusion_model.out[2].weight.data_ptr()
    assert weight.data_ptr() == restored.unet.out[2].weight.data_ptr()
    assert torch.equal(restored.schedule.sigmas, modern.schedule.sigmas)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        c = compat_model.get_learned_conditioning(["a cube", ""])
        assert torch.allclose(c, modern.condition({"txt": ["a cube", ""]}).crossattn, atol=1e-6)
        assert torch.allclose(compat_model.apply_model(x, t, c), modern.unet(x, t, c), atol=1e-5)
        assert torch.allclose(compat_model.decode_first_stage(x), modern.decode(x), atol=1e-4)
    options = {"size": (64, 64), "steps": 2, "seeds": [1]}
    images = [ldm.txt2img(model, ["a cube"], **options) for model in (modern, restored)]
    assert torch.equal(*images)


IMAGE = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
# By family: golden file, task, class of the original.
FAMILIES = {
    "depth": (
        "e2e_depth2img",
        lambda model, **k: ldm.depth2img(model, ["a"], IMAGE, **k),
        LatentDepth2ImageDiffusion,
    ),
    "inpaint": (
        "e2e_inpaint",
        lambda model, **k: ldm.inpaint(model, ["a"], IMAGE, IMAGE[:, :1] > 0, **k),
        LatentInpaintDiffusion,
    ),
    "unclip": (
        "e2e_unclip",
        lambda model, **k: ldm.unclip(model, ["a"], [IMAGE], size=(64, 64), **k),
        ImageEmbeddingConditionedLatentDiffusion,
    ),
    "upscale": (
        "e2e_upscale",
        lambda model, **k: ldm.upscale(model, ["a"], IMAGE[..., :16, :16], noise_level=20, **k),
        LatentUpscaleDiffusion,
    ),
}


@pytest.mark.parametrize("family", slow_except(FAMILIES, "inpaint", "unclip"))
def test_a_model_converted_both_ways_makes_identical_images(family):
    golden_name, task, compat_class = FAMILIES[family]
    modern = build_recorded_model(load_golden(golden_name), family)
    compat_model = from_modern(modern)
    assert type(compat_model) is compat_class
    restored = to_modern(compat_model)
    assert set(restored.conditioner.encoders) == set(modern.conditioner.encoders)
    pointers = {weight.data_ptr() for weight in modern.parameters()}
    for model in (compat_model, restored):
        assert pointers == {weight.data_ptr() for weight in model.parameters()}
    assert torch.equal(*(task(model, steps=2, seeds=[1]) for model in (modern, restored)))


def test_models_without_a_counterpart_are_refused():
    with pytest.raises(WrongFamily, match="has these encoders: .*, text, text_2"):
        from_modern(build_recorded_model(load_golden("sdxl_e2e_txt2img"), "base"))
    concat = build_model(load_golden("conditioning_routes").meta["config_concat"])
    with pytest.raises(WrongFamily, match="LatentDiffusion with conditioning_key `concat`"):
        to_modern(concat)


def test_settings_without_a_counterpart_are_refused(monkeypatch):
    modern = build_recorded_model(load_golden("e2e_txt2img"), "base_v")
    text = modern.conditioner.text
    flipped = Schedule(modern.schedule.betas, flip_timesteps=True)
    for owner, name, value, message in (
        (modern, "schedule", flipped, "timestep options"),
        (modern, "latent_std", torch.ones(1, 4, 1, 1), "standard deviation of latents"),
        (text, "added_embeddings", {"<dog>": torch.zeros(1, 4)}, "this model has: <dog>"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            with pytest.raises(WrongFamily, match=message):
                from_modern(modern)
    modern.autoencoder = PixelSpace()
    with pytest.raises(WrongFamily, match="autoencoder of class PixelSpace"):
        from_modern(modern)


def test_added_tokens_are_converted():
    compat_model = instantiate_from_config(make_tiny_config()).eval()
    encoder = compat_model.cond_stage_model
    encoder.tokenizer.add_tokens("<thing>")
    encoder.transformer.resize_token_embeddings(len(encoder.tokenizer))
    c = compat_model.get_learned_conditioning(["a <thing>"])
    restored = to_modern(compat_model)
    assert torch.allclose(restored.condition({"txt": ["a <thing>"]}).crossattn, c, atol=1e-6)

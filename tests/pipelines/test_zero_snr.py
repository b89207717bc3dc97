"""Zero terminal SNR (arXiv:2305.08891): the schedule, sampling compared with diffusers, files."""

from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open

from ldm.conditioning import Cond
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Schedule, make_betas, rescale_zero_terminal_snr
from ldm.loading.config import instantiate
from ldm.loading.load import load, save_model
from ldm.model import LatentDiffusion
from ldm.pipelines import sample
from ldm.pipelines.sampling_options import get_default_scheduler
from loading.tinyfamilies import make_small_config
from quick import slow_except

BETAS = make_betas("linear", linear_start=0.00085, linear_end=0.012)


def test_rescaled_betas_equal_diffusers_except_the_last(diffusers: ModuleType) -> None:
    rescale = diffusers.schedulers.scheduling_ddim.rescale_zero_terminal_snr
    betas = rescale_zero_terminal_snr(BETAS), rescale(BETAS)
    ours, theirs = (torch.cumprod(1 - b, 0) for b in betas)
    torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=1e-9, atol=0)
    assert ours[-1].item() == pytest.approx(2**-24, rel=1e-9)
    assert theirs[-1] == 0
    assert Schedule(BETAS, zero_snr=True).sigmas.isfinite().all()


@pytest.mark.parametrize("steps", [4, 10])
def test_ddim_from_pure_noise_equals_diffusers(diffusers: ModuleType, steps: int) -> None:
    """Tolerance: at our last timestep 2.4e-4 of the latent remain, at that of diffusers nothing."""
    model, cond = build_model(), Cond(crossattn=torch.randn(1, 7, 32))
    x_T = torch.randn(1, 4, 8, 8)
    ours = sample(model, cond, x_T=x_T, steps=steps, scale=1.0)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    scheduler.set_timesteps(steps)
    z = x_T
    for t in scheduler.timesteps:
        with torch.no_grad():
            v = model.unet(z, t.expand(1), cond.crossattn)
        z = scheduler.step(v, t, z).prev_sample
    torch.testing.assert_close(ours, z, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "sampler", slow_except(SAMPLERS, "ddim", "plms", "heun", "restart", "dpm_fast")
)
def test_every_sampler_starts_from_pure_noise(sampler: str) -> None:
    """With the default scheduler for these models. Observed: at most 8.0, with `dpm_fast`."""
    cond = Cond(crossattn=torch.zeros(1, 7, 32))
    z = sample(build_model(), cond, sampler=sampler, size=(64, 64), steps=6, seeds=0, scale=1.0)
    assert z.isfinite().all()
    assert z.abs().max() < 10


def test_samplers_that_cannot_start_at_the_last_timestep_have_other_default_schedulers() -> None:
    model = build_model()
    defaults = {
        name: get_default_scheduler(model.schedule, model.defaults, name) for name in SAMPLERS
    }
    assert [name for name in SAMPLERS if defaults[name] == "uniform"] == ["plms", "heun", "dpm2_a"]
    assert defaults["restart"] == defaults["dpm_fast"] == defaults["dpm_adaptive"] == "edm"
    assert defaults["ddim"] == defaults["dpm2"] == "trailing"


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("restart", {"scheduler": "karras"}, "scheduler `karras` begins at 4096: take.* `edm`"),
        ("heun", {"scheduler": "trailing"}, "`trailing` begins at 4096: take scheduler `uniform`"),
        ("heun", {"sigmas": [4000, 10, 1, 0]}, "sigmas begins at 4000"),
        ("heun", {"scheduler": "uniform", "steps": 1000}, None),
        ("heun", {"scheduler": "trailing", "z": torch.zeros(1, 4, 8, 8), "strength": 0.5}, None),
        ("euler", {"scheduler": "trailing"}, None),
    ],
)
def test_noise_levels_that_are_too_high_for_a_sampler_are_warned_of(
    sampler: str, options: dict[str, Any], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SAMPLERS, sampler, lambda denoise, x, sigmas, **_: x)
    cond = Cond(crossattn=torch.zeros(1, 7, 32))
    options = {"steps": None if "sigmas" in options else 4, "seeds": 0, **options}
    with pytest.warns(UserWarning, match=message) if message else nullcontext():
        sample(build_model(), cond, sampler=sampler, **options)


def test_eps_prediction_is_refused() -> None:
    config = make_config(parameterization="eps")
    with pytest.raises(ValueError, match="rescale_betas_zero_snr needs parameterization `v`"):
        instantiate(config["model"], where="model")


def test_zero_snr_is_recognized_from_a_file_without_yaml(tmp_path: Path) -> None:
    """The config in it tells us; the empty tensors `v_pred` and `ztsnr` tell other programs."""
    model, config = build_model(), make_config()
    text = OmegaConf.to_yaml({"model": config["model"]})
    save_model(model, tmp_path / "model.safetensors", {"ldm.config": text})
    loaded = load(ckpt=tmp_path / "model.safetensors")
    assert torch.equal(loaded.schedule.betas, model.schedule.betas)
    with safe_open(str(tmp_path / "model.safetensors"), "pt") as file:
        assert {"v_pred", "ztsnr"} <= set(file.keys())


@cache
def build_model() -> LatentDiffusion:
    torch.manual_seed(0)
    model: LatentDiffusion = instantiate(make_config()["model"], where="model")
    for p in model.unet.parameters():  # the last layers start at zero
        torch.nn.init.normal_(p, std=0.05)
    return model.eval()


def make_config(**params: Any) -> dict[str, Any]:
    config = make_small_config("sd2-v")
    config["model"]["params"] |= {"rescale_betas_zero_snr": True, **params}
    return config

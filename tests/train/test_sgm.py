"""Training with configs of generative-models, compared with the original."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from goldfile import GoldenFile, load_golden
from ldm.diffusion.schedule import Schedule, make_betas
from ldm.loading.config import instantiate, parse_yaml
from ldm.loading.weight_names import rename_weights, restore_names
from ldm.train.build import collect_diffusion_options
from ldm.train.config.settings import Settings, read_settings
from ldm.train.config.sgm import translate_training
from ldm.train.optim.ema import EMA
from ldm.train.optim.optimizers import make_optimizer
from ldm.train.optim.schedules import build_lr_multiplier
from ldm.train.tasks.criterion import Criterion, compute_denoised_weights
from ldm.train.tasks.diffusion import DiffusionTask
from ldm.train.tasks.noise_levels import LogNormal, draw_timesteps
from recipe import fill

SGM = "sgm.modules.diffusionmodules."
# As in the examples of generative-models.
TRAINING = f"""
model:
  base_learning_rate: 1.0e-4
  target: sgm.models.diffusion.DiffusionEngine
  params:
    denoiser_config: {{target: {SGM}denoiser.DiscreteDenoiser, params: {{}}}}
    scheduler_config:
      target: sgm.lr_scheduler.LambdaLinearScheduler
      params:
        {{warm_up_steps: [10000], cycle_lengths: [10000000000000], f_start: [1.e-6], f_max: [1.],
         f_min: [1.]}}
    conditioner_config:
      target: sgm.modules.GeneralConditioner
      params: {{emb_models: [{{input_key: txt, ucg_rate: 0.1, legacy_ucg_value: ""}}]}}
    loss_fn_config:
      target: {SGM}loss.StandardDiffusionLoss
      params:
        loss_weighting_config: {{target: {SGM}loss_weighting.EpsWeighting}}
        sigma_sampler_config: {{target: {SGM}sigma_sampling.DiscreteSampling}}
    sampler_config:
      target: {SGM}sampling.EulerEDMSampler
      params:
        num_steps: 50
        discretization_config: {{target: {SGM}discretizer.LegacyDDPMDiscretization}}
        guider_config: {{target: {SGM}guiders.VanillaCFG, params: {{scale: 7.5}}}}
data:
  target: sgm.data.dataset.StableDataModuleFromConfig
  params: {{train: {{datapipeline: {{urls: [x]}}, loader: {{batch_size: 64, num_workers: 6}}}}}}
lightning:
  modelcheckpoint: {{params: {{every_n_train_steps: 5000}}}}
  callbacks:
    metrics_over_trainsteps_checkpoint: {{params: {{every_n_train_steps: 25000}}}}
    image_logger:
      target: main.ImageLogger
      params:
        {{disabled: false, enable_autocast: false, batch_frequency: 1000, max_images: 8,
         increase_log_steps: true, log_first_step: false,
         log_images_kwargs: {{use_ema_scope: false, N: 8, n_rows: 2}}}}
  trainer:
    {{devices: "0,", benchmark: true, num_sanity_val_steps: 0, accumulate_grad_batches: 1,
     max_epochs: 1000}}
"""
SCHEDULE = Schedule(make_betas("linear", linear_start=0.00085, linear_end=0.012))
LOSS = "model.params.loss_fn_config.params."


def read_training(*overrides: str) -> Settings:
    return read_settings(parse_yaml(TRAINING, overrides))


def test_an_example_of_generative_models_is_translated() -> None:
    result = read_training()
    assert result.objective == {
        "conditioning_dropout_prob": None, "loss_type": "l2", "weighting": "eps",
        "noise_levels": None,
    }  # fmt: skip
    assert result.callbacks.sampling == {
        "sampler": "euler", "steps": 50, "scheduler": "sgm_uniform", "scale": 7.5,
    }  # fmt: skip
    assert (result.data.batch_size, result.data.num_workers) == (64, 6)
    schedule, _ = result.build_lr_schedule(8)
    assert schedule(10_000, 0.0) == pytest.approx(1e-4)  # not scaled
    assert (result.optimizer.name, result.optimizer.options) == ("adamw", {"weight_decay": 1e-2})
    assert result.optimizer.ema_decay == 0
    assert result.callbacks.export_steps == 25_000


@pytest.mark.parametrize(
    ("overrides", "section", "values"),
    [
        (
            [LOSS + f"sigma_sampler_config={{target: {SGM}sigma_sampling.EDMSampling, "
             "params: {p_mean: 0.4}}"],
            "objective", {"noise_levels": {"mean": 0.4}},
        ),
        (
            [LOSS + f"loss_weighting_config={{target: {SGM}loss_weighting.EDMWeighting, "
             "params: {sigma_data: 1.0}}"],
            "objective", {"weighting": "edm", "sigma_data": 1.0},
        ),
        (
            ["model.params.sampler_config.params={s_churn: 5.0, s_tmax: 9.0, num_steps: 50}"],
            "callbacks", {"sampling": {"sampler": "euler", "s_churn": 5.0, "s_tmax": 9.0,
                          "steps": 50, "scheduler": "sgm_uniform", "scale": 7.5}},
        ),
        (
            ["model.params.sampler_config.params.discretization_config={target: "
             f"{SGM}discretizer.EDMDiscretization, params: {{rho: 5.0}}}}"],
            "callbacks", {"sampling": {"sampler": "euler", "steps": 50, "scheduler": "karras",
                          "rho": 5.0, "scale": 7.5}},
        ),
        (
            ["model.params.sampler_config.params.guider_config=null",
             "model.params.sampler_config.params.s_tmax=.inf",  # the original's default
             "model.params.sampler_config.params.s_tmin=0.5"],  # without effect
            "callbacks", {"sampling": {"sampler": "euler", "steps": 50, "scale": 1.0,
                          "scheduler": "sgm_uniform"}},
        ),
        (
            [f"model.params.sampler_config.target={SGM}sampling.LinearMultistepSampler",
             "model.params.sampler_config.params.order=4"],  # the original's default
            "callbacks", {"sampling": {"sampler": "lms", "steps": 50, "scheduler": "sgm_uniform",
                          "scale": 7.5}},
        ),
        (  # before November 2023
            [LOSS + "loss_weighting_config=null", LOSS + "type=l1",
             "model.params.denoiser_config.params.weighting_config.target="
             f"{SGM}denoiser_weighting.VWeighting"],
            "objective", {"weighting": "v", "loss_type": "l1"},
        ),
        ([LOSS + "offset_noise_level=0.05"],
         "objective", {"noise_offset": 0.05, "noise_offset_by": "sample"}),
        (["model.params.use_ema=true"], "optimizer", {"ema_decay": 0.9999}),
        (["model.params.use_ema=true", "model.params.ema_decay_rate=0.99"],
         "optimizer", {"ema_decay": 0.99}),
        (["model.params.optimizer_config={target: torch.optim.Adam, params: {eps: 1.e-6}}"],
         "optimizer", {"name": "adamw", "options": {"weight_decay": 0.0, "eps": 1e-6}}),
        (["model.params.compile_model=true"], "trainer", {"compile": True}),
        (["lightning.callbacks.sampling.steps=4"], "callbacks", {"sampling": {
            "sampler": "euler", "steps": 4, "scheduler": "sgm_uniform", "scale": 7.5}}),
        (["lightning.optimizer.name=muon"], "objective", {"weighting": "eps"}),
    ],
)  # fmt: skip
def test_training_settings_of_an_engine_are_translated(
    overrides: list[str], section: str, values: dict[str, Any]
) -> None:
    settings = getattr(read_training(*overrides), section)
    settings = settings if isinstance(settings, dict) else vars(settings)
    assert {key: settings[key] for key in values} == values


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (LOSS + "loss_type=lpips", "unknown loss_type `lpips`"),
        (LOSS + "batch2model_keys=[image_only_indicator]", "video models"),
        ("model.params.loss_fn_config.target=sgm.x.OtherLoss", "loss_fn_config: unknown target"),
        ("model.params.input_key=png", "input_key: must be `jpg`"),
        ("model.params.sampler_config.params.s_chrun=1", "EulerEDMSampler `s_chrun`, did you"),
        ("model.params.optimizer_config.target=torch.optim.SGD",
         "unknown target `torch.optim.SGD`"),
    ],
)  # fmt: skip
def test_unsupported_settings_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_training(override)


@pytest.mark.parametrize(
    ("name", "options"),
    [("unit", ("unit",)), ("eps", ("eps",)), ("v", ("v",)), ("edm_05", ("edm",)),
     ("edm_1", ("edm", 1.0))],
)  # fmt: skip
def test_loss_weights_of_x0_equal_the_originals(name: str, options: tuple[Any, ...]) -> None:
    golden = load_golden("sdxl_train")
    weights = compute_denoised_weights(
        options[0], golden.inputs(f"weighting_{name}")["sigma"], *options[1:]
    )
    expected = golden.outputs(f"weighting_{name}")["w"]
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)


def test_noise_levels_equal_the_originals() -> None:
    """We compute them from quantiles, the original from draws of a normal distribution."""
    golden = load_golden("sdxl_train")
    (index,) = golden.draws("sampling_discrete")
    sigma = SCHEDULE.t_to_sigma(index).float()
    expected = golden.outputs("sampling_discrete")["sigma"]
    torch.testing.assert_close(sigma, expected, rtol=1e-5, atol=0)
    for levels, draw, name in zip(
        (LogNormal(), LogNormal(mean=0.4, std=1.7)), golden.draws("sampling_edm"),
        ("sigma", "other"),
        strict=True,
    ):  # fmt: skip
        sigma = levels.compute_sigmas(torch.special.ndtr(draw.double())).float()
        expected = golden.outputs("sampling_edm")[name]
        torch.testing.assert_close(sigma, expected, rtol=1e-5, atol=0)


def test_noise_levels_have_the_mean_and_deviation_of_their_distribution() -> None:
    levels = LogNormal(mean=-0.4, std=1.0)
    t = draw_timesteps(SCHEDULE, 200, torch.Generator().manual_seed(0), sigma_distribution=levels)
    log_sigma = SCHEDULE.t_to_sigma(t).log()
    assert log_sigma.mean() == pytest.approx(-0.4, abs=0.02)
    assert log_sigma.std() == pytest.approx(1.0, abs=0.03)


LR_CASES = ["linear_example", "cosine2_example", "linear_two_cycles", "cosine2_two_cycles",
            "cosine"]  # fmt: skip


@pytest.mark.parametrize("name", LR_CASES)
def test_learning_rates_equal_the_originals(name: str) -> None:
    golden = load_golden("sdxl_train")
    info = golden.case(f"lr_{name}")["info"]
    multiplier = build_lr_multiplier({"target": info["class"], "params": info["params"]})
    expected = golden.outputs(f"lr_{name}")["factor"].tolist()
    assert [multiplier(step) for step in info["n"]] == pytest.approx(expected, rel=1e-9)


def build_engine(golden: GoldenFile, name: str) -> Any:
    model = instantiate(golden.meta[f"config_{name}"])
    weights = fill(restore_names(model.state_dict()), golden.meta["salt"])
    model.load_state_dict(rename_weights(weights))
    return model


def compute_engine_loss(
    golden: GoldenFile, name: str, model: Any, draws: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """Compute the loss of a recorded case: dropout of conditions, noise levels, noise."""
    *dropout_masks, level, noise = draws
    masks = iter(dropout_masks)
    monkeypatch.setattr(torch, "bernoulli", lambda *_, **__: next(masks))
    params = golden.meta[f"config_{name}"]["params"]
    options = collect_diffusion_options(params, translate_training(params)["objective"])
    levels = options.pop("noise_levels")
    dropout_prob = options.pop("conditioning_dropout_prob", 0.0)
    t = level
    if levels is not None:
        sigma = LogNormal(**levels).compute_sigmas(torch.special.ndtr(level.double()))
        t = model.schedule.sigma_to_t(sigma)
    options.pop("disable_first_stage_autocast")
    criterion = Criterion(model.schedule, model.parameterization, **options)
    shared = golden.select("shared/")
    cond = model.conditioner(shared, dropout_prob, legacy=("independent-dropout",))
    losses = criterion(model.denoiser.compute_error(shared["x"], cond, t, noise), t)
    return {**losses, "per_sample": criterion.compute_weights(t) * losses["loss_per_sample"]}


def test_conditions_are_dropped_independently_with_legacy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    golden = load_golden("sdxl_train")
    model = build_engine(golden, "eps_ucg")
    batch = golden.select("shared/")
    draws: list[Tensor] = []
    monkeypatch.setattr(torch, "bernoulli", lambda p, **_: draws.append(p) or torch.ones_like(p))
    for legacy, count in (((), 0), (("independent-dropout",), 3)):
        task = DiffusionTask(model, conditioning_dropout_prob=None, legacy=legacy)
        task.loss({**batch, "z": batch["x"]}, torch.Generator().manual_seed(0))
        assert len(draws) == count


@pytest.mark.parametrize(
    "name", ["eps_l2", "eps_l1", "v_l2", "eps_unit", "edm_l2", "edm_discrete", "eps_ucg"]
)
def test_losses_and_gradients_of_an_engine_equal_the_originals(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = load_golden("sdxl_train")
    model = build_engine(golden, name)
    losses = compute_engine_loss(golden, name, model, golden.draws(name), monkeypatch)
    losses["loss"].backward()
    for key, expected in golden.outputs(name).items():
        if key.startswith("grad/"):
            weight = next(iter(rename_weights({key.removeprefix("grad/"): expected})))
            value = model.get_parameter(weight).grad
        else:
            value = losses[key]
        assert_close(value, expected, key)


def test_steps_of_adamw_with_ema_equal_the_originals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    golden, name = load_golden("sdxl_train"), "adamw_ema"
    model, expected = build_engine(golden, name), golden.outputs(name)
    params = golden.meta[f"config_{name}"]["params"]
    multiplier = build_lr_multiplier(params["scheduler_config"])
    ema = EMA(model.unet, params["ema_decay_rate"])
    optimizer = make_optimizer(model.unet, 0.0, weight_decay=1e-2)
    draws = golden.draws(name)
    for step in range(3):
        step_draws = draws[4 * step : 4 * step + 4]
        loss = compute_engine_loss(golden, name, model, step_draws, monkeypatch)["loss"]
        assert_close(loss, expected["loss"][step], "loss")
        loss.backward()
        lr = 1e-3 * multiplier(step)
        assert lr == pytest.approx(float(expected["lr"][step]))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model.unet)
    for key, value in expected.items():
        prefix, _, weight = key.partition("/")
        if weight:
            weight = next(iter(rename_weights({weight: value}))).removeprefix("unet.")
            average = ema.shadow[weight]
            actual = model.unet.get_parameter(weight) if prefix == "weight" else average
            assert_close(actual, value, key)


def assert_close(value: Tensor | None, expected: Tensor, key: str) -> None:
    """Compare relative to the largest expected value; observed error: 1.1e-5."""
    assert value is not None
    error = (value.detach() - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, key

"""Training by Lightning, where `pytorch_lightning` is installed."""

import pytest
import torch
from compathelp import SCHEDULER, build_model

from goldfile import load_golden

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class CaptionLengths(torch.nn.Module):
    """Encodes captions by their length."""

    def encode(self, captions):
        return torch.stack([torch.full((7, 32), len(caption) / 10) for caption in captions])


class RandomSamples(torch.utils.data.Dataset):
    def __init__(self, *, as_latents):
        self.as_latents = as_latents

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if self.as_latents:
            return {"jpg": torch.randn(8, 8, 4), "txt": "a red cube"}
        return {"image": torch.rand(32, 32, 3) * 2 - 1}


@pytest.fixture
def lightning():
    return pytest.importorskip("pytorch_lightning")


def fit(lightning, model, callbacks=(), *, as_latents=True, steps=3):
    loader = torch.utils.data.DataLoader(RandomSamples(as_latents=as_latents), batch_size=2)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(model, loader, loader)
    return trainer


def test_a_latent_diffusion_model_is_fitted(lightning, tmp_path):
    keys = []

    class ImageLogger(lightning.Callback):
        """Logs images of each batch by `log_images` of the model, as the original's main.py."""

        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            assert model.training
            log = model.log_images(batch, split="train", ddim_steps=1, plot_progressive_rows=False)
            keys.append(sorted(log))

    encoder = {"target": f"{__name__}.CaptionLengths"}
    changes = {"scheduler_config": SCHEDULER, "cond_stage_config": encoder}
    model = build_model(load_golden("train_step").meta["config"], **changes)
    assert isinstance(model, lightning.LightningModule)
    model.learning_rate = 1e-3
    assert model.monitor == "val/loss_simple_ema"
    model.train()
    before = model.model.diffusion_model.out[2].weight.detach().clone()
    trainer = fit(lightning, model, [ImageLogger()])
    assert trainer.global_step == model.model_ema.num_updates == 3
    assert not torch.equal(before, model.model.diffusion_model.out[2].weight.detach())
    assert {"val/loss_simple", "val/loss_simple_ema"} <= trainer.callback_metrics.keys()
    assert "samples" in keys[0]
    assert len(keys) == 3
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    path, config = str(tmp_path / "last.ckpt"), load_golden("train_step").meta["config"]
    loaded = build_model(config, ckpt_path=path)
    loaded.init_from_ckpt(path)
    state, loaded_state = model.state_dict(), loaded.state_dict()
    assert "model_ema.diffusion_modelout2weight" in state
    assert all(torch.equal(state[name], loaded_state[name]) for name in state)


def test_an_autoencoder_and_its_discriminator_are_fitted(lightning):
    params = {"disc_start": 1, "perceptual_weight": 0.0, "kl_weight": 1e-6}
    loss = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": params}
    model = build_model(load_golden("ae_loss").meta["config_vae"], lossconfig=loss, ema_decay=0.9)
    model.learning_rate = 1e-4
    model.train()
    networks = (model.decoder.conv_out.weight, model.loss.discriminator.main[0].weight)
    before = [weight.detach().clone() for weight in networks]
    trainer = fit(lightning, model, as_latents=False, steps=6)  # two per batch
    assert "val/rec_loss" in trainer.callback_metrics
    for weight, old in zip(networks, before, strict=True):
        assert not torch.equal(weight.detach(), old)

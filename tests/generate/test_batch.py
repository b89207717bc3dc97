"""Precision of a run, and batches for which half precision overflows."""

import pytest
import torch

from ldm.generate.batch import generate_with_fallback
from ldm.generate.command_line import parse_request
from ldm.generate.listener import RunListener
from ldm.generate.load import load_models
from ldm.generate.plan import plan_batches
from ldm.generate.tasks import TASKS, PreparedTask
from ldm.runtime.errors import NonFinite, Stop


class Overflowing(PreparedTask):
    """Draws noise from the global generator, and then fails in half precision."""

    def generate(self, model, prompts, options):
        noise = torch.randn(len(prompts), 3, 8, 8)
        if model.dtype == torch.bfloat16:
            raise NonFinite("the UNet")
        return noise


def test_a_batch_repeated_in_float32_draws_the_same_noise(tiny_model):
    flags = [*tiny_model.flags, "--precision", "bf16", "--n_iter", "1"]
    request = parse_request(TASKS["txt2img"], flags)
    models, (batch,) = load_models(request), plan_batches(request)
    generator = torch.manual_seed(7)
    images = generate_with_fallback(Overflowing(request), batch, models, RunListener())
    assert models.base.dtype == torch.float32
    assert torch.equal(images, torch.randn(len(batch), 3, 8, 8, generator=generator.manual_seed(7)))


@pytest.mark.parametrize(
    "name", ["checkpoints/last.ckpt", "unet/diffusion_pytorch_model.bin"], ids=["run", "diffusers"]
)
def test_a_large_model_in_a_folder_of_pickles_runs_in_half_precision(name, tmp_path, monkeypatch):
    weights, dtypes = tmp_path / name, []
    weights.parent.mkdir()
    with weights.open("wb") as file:
        file.truncate(1 << 30)  # sparse
    if "unet" in name:
        (tmp_path / "model_index.json").write_text("{}", "utf-8")

    def load(*_, dtype, **__):
        dtypes.append(dtype)
        raise Stop

    monkeypatch.setattr("ldm.runtime.device.has_fast_bf16", lambda: True)
    flags = ["--ckpt", str(tmp_path), "--config", "x.yaml", "--device", "cpu"]
    with pytest.raises(Stop):
        load_models(parse_request(TASKS["txt2img"], flags), load=load)
    assert dtypes == [torch.bfloat16]

"""Batches of images: what happens where half precision overflows."""

import torch

from ldm.generate.batch import generate_with_fallback
from ldm.generate.command_line import parse_request
from ldm.generate.listener import RunListener
from ldm.generate.load import load_models
from ldm.generate.plan import plan_batches
from ldm.generate.tasks import TASKS, PreparedTask
from ldm.runtime.errors import NonFinite


class Overflowing(PreparedTask):
    """Draws from torch's global generator, and fails in half precision after that."""

    def generate(self, model, prompts, options):
        noise = torch.randn(len(prompts), 3, 8, 8)
        if model.dtype == torch.bfloat16:
            raise NonFinite("the UNet")
        return noise


def test_a_batch_made_again_in_float32_draws_the_same_noise(tiny):
    files = ["--config", str(tiny.config), "--ckpt", str(tiny.ckpt)]
    request = parse_request(TASKS["txt2img"], [*files, "--precision", "bf16", "--n_iter", "1"])
    models, (batch,) = load_models(request), plan_batches(request)
    generator = torch.manual_seed(7)
    images = generate_with_fallback(Overflowing(request), batch, models, RunListener())
    assert models.base.dtype == torch.float32
    assert torch.equal(images, torch.randn(len(batch), 3, 8, 8, generator=generator.manual_seed(7)))

"""Training an autoencoder, and folding the latents' statistics into it."""

from pathlib import Path

import torch

from ldm.data.drawings import EmojiTransform
from ldm.data.folder import Folder
from ldm.data.source import DatasetSource
from ldm.nets.autoencoder import AutoencoderKL
from ldm.train.optim.optimizers import make_optimizer
from ldm.train.tasks.autoencoder import Reconstruction, normalize_latents, psnr

EMOJI = Path(__file__).parents[1] / "data" / "emoji"
LAYOUT = {"ch": 32, "z_channels": 4, "num_res_blocks": 1, "ch_mult": (1, 1), "resolution": 32}


def build_tiny() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(ddconfig=LAYOUT, embed_dim=4)


def test_reconstructions_get_better() -> None:
    folder = Folder(root=EMOJI, transform=EmojiTransform(size=16))
    batch = next(DatasetSource(folder).batches(4))
    task = Reconstruction(build_tiny())
    optimizer = make_optimizer(task.trainable, 3e-3, name="muon")
    generator = torch.Generator().manual_seed(0)
    quality = []
    for _ in range(20):
        losses = task.loss(batch, generator)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        quality.append(float(losses["psnr"]))
    assert quality[-1] > quality[0] + 4


@torch.no_grad()
def test_the_worst_values_of_an_image_can_count_more() -> None:
    batch = {"jpg": torch.rand(2, 3, 32, 32) * 2 - 1}
    model = build_tiny()
    plain, weighted = (
        Reconstruction(model, peak=peak).loss(batch, torch.Generator().manual_seed(0))["loss"]
        for peak in (0.0, 2.0)
    )
    decoded = model(batch["jpg"], torch.Generator().manual_seed(0))[0]
    worst = (decoded - batch["jpg"]).abs().flatten(1).sort().values[:, -6:]  # of 3,072
    torch.testing.assert_close(weighted - plain, 2 * worst.mean())


def test_a_spike_in_the_decoder_can_cost_something() -> None:
    batch = {"jpg": torch.rand(2, 3, 32, 32) * 2 - 1}
    model = build_tiny()

    def compute_penalty() -> torch.Tensor:
        plain, weighted = (
            Reconstruction(model, outlier=weight).loss(batch, torch.Generator().manual_seed(0))
            for weight in (0.0, 1.0)
        )
        return weighted["loss"] - plain["loss"]

    assert compute_penalty() < 0.01
    spike = torch.zeros(1, 1, 16, 16)
    spike[..., 0, 15] = 1e3
    model.decoder.conv_in.register_forward_hook(lambda *args: args[-1] + spike)
    compute_penalty().backward()
    # A single pixel of 256 that has all of the variance is 16 standard deviations away.
    assert 0.3 < compute_penalty() < 16 / 6 - 1


@torch.no_grad()
def test_normalised_latents_are_standard_and_decode_to_the_same() -> None:
    model, image = build_tiny().eval(), torch.rand(4, 3, 32, 32) * 2 - 1
    posterior = model.encode(image)
    z, decoded = posterior.mode(), model.decode(posterior.mode())
    normalize_latents(model, z)
    after = model.encode(image)
    torch.testing.assert_close(after.mode().mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mode().std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(model.decode(after.mode()), decoded, atol=1e-4, rtol=1e-4)
    std = z.std((0, 2, 3))[:, None, None]
    torch.testing.assert_close(after.std * std, posterior.std, atol=1e-5, rtol=1e-4)


def test_psnr_of_a_known_error() -> None:
    image = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(psnr(image + 0.2, image), torch.full((2,), 20.0))

"""Grids of samples at fixed prompts, with raw and with EMA weights.

    images/train/samples_gs-001000_e-000002_b-001000.png   and .txt, its prompts

The input image is shown to the left of each sample if the model is conditioned on images, or is
trained on a range of timesteps only: sampling then starts from that image with noise. Grids of an
autoencoder show images above their reconstructions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.conditioning import DropRate
from ldm.data.dataset import Sample
from ldm.data.source import collate, to_device
from ldm.data.transforms import SIZE_KEYS
from ldm.imaging import pixels
from ldm.model import LatentDiffusion
from ldm.pipelines import sample
from ldm.train.distributed.parallel import eval_mode, is_sharded
from ldm.train.run import Run
from ldm.train.tasks.diffusion import ZERO_SIZES

__all__ = ["draw_samples"]

LABEL_HEIGHT = 20  # pixels
# Batch keys of texts and numbers.
NON_IMAGE_KEYS = {"txt", "class_label", "aesthetic_score", *SIZE_KEYS}
DEFAULT_SAMPLING = {"steps": 20, "scale": 3.0}  # defaults of `callbacks.sampling`


def draw_samples(run: Run) -> list[Path]:
    """Sample labelled grids for the training data, and for validation data if there is any.

    The main process samples and writes; if weights are sharded, all processes must sample.

    Returns:
        The files; [] on other processes.
    """
    options = run.settings.callbacks
    if not options.max_images or not (run.ranks.is_main_process or is_sharded(run.task.trainable)):
        return []
    sources = {"train": run.source}
    if run.validation_source is not None:
        sources["val"] = run.validation_source
    paths = []
    for split, source in sources.items():
        samples = source.load_fixed_samples(options.max_images)
        if options.prompts and split == "train" and isinstance(run.model, LatentDiffusion):
            for index, item in enumerate(samples):
                item["txt"] = options.prompts[index % len(options.prompts)]
        grids = []
        for is_ema in (True, False) if run.state.ema.decay else (False,):
            label = "EMA weights" if is_ema else "raw weights"
            weights = run.state.ema.apply_to(run.task.trainable, enabled=is_ema)
            with weights, eval_mode(run.model):
                grids.append((f"{label}, step {run.state.step}", _draw_grid(run, samples)))
        state = run.state
        name = f"samples_gs-{state.step:06}_e-{run.epoch:06}_b-{state.batches_consumed:06}.png"
        path = run.folder / "images" / split / name
        if run.ranks.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            _stack_labelled_grids(grids).save(path)
            if "txt" in samples[0]:
                texts = [f"{item['txt']}\n" for item in samples]
                path.with_suffix(".txt").write_text("".join(texts), "utf-8")
            paths.append(path)
    return paths


def _draw_grid(run: Run, samples: Sequence[Sample]) -> Image.Image:
    """Sample a grid, in batches of the training batch size, as these fit into memory."""
    model, n, batch_size = run.model, len(samples), run.batch_size
    images = torch.stack([item["jpg"] for item in samples])  # (n, 3, H, W)
    starts = range(0, n, batch_size)
    if not isinstance(model, LatentDiffusion):
        batches = [images[k : k + batch_size].to(run.device) for k in starts]
        decoded = [model.decode(model.encode(x).mode()).cpu() for x in batches]
        return pixels.make_grid(pixels.to_pil(torch.cat([images, *decoded])), columns=n)
    columns = max(1, round(n**0.5))
    cells = torch.cat([sample_images(run, model, samples[k : k + batch_size], k) for k in starts])
    if run.timestep_range is not None or model.conditioner.keys - NON_IMAGE_KEYS:
        columns, cells = 2 * columns, torch.stack([images, cells], 1).flatten(0, 1)
    return pixels.make_grid(pixels.to_pil(cells), columns)


def sample_images(
    run: Run, model: LatentDiffusion, samples: Sequence[Sample], seed: int = 0
) -> Tensor:
    """Sample images (n, 3, H, W) in [-1, 1] on the CPU, conditioned on samples of the data.

    Args:
        seed: Seed of the first image; that of image k is seed + k.
    """
    batch = collate(list(samples))
    height, width = batch["jpg"].shape[-2:]
    latent_size = (height // model.downscale_factor, width // model.downscale_factor)
    batch = model.prepare(to_device(batch, model.device), latent_size)
    cond = model.condition(batch)
    dropout: DropRate = 1.0
    if ZERO_SIZES in run.settings.objective.get("legacy", ()):
        dropout = dict.fromkeys(model.conditioner.keys, 1.0)
    uncond = model.condition(batch, dropout)
    options: dict[str, Any] = {**DEFAULT_SAMPLING, **run.settings.callbacks.sampling}
    if run.timestep_range is not None:  # start at the highest noise level that is trained
        strength = run.timestep_range[1] / len(model.schedule)
        generator = torch.Generator().manual_seed(seed)
        options |= {"z": model.encode(batch["jpg"], generator), "strength": strength}
    with run.autocast():
        seeds = list(range(seed, seed + len(samples)))
        z = sample(model, cond, uncond, size=(height, width), seeds=seeds, **options)
    image: Tensor = model.decode(z.float()).clamp(-1, 1).cpu()
    return image


def _stack_labelled_grids(grids: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Stack (label, grid) pairs, each grid below its label."""
    font = ImageFont.load_default(size=12)
    width = max(max(grid.width, int(font.getlength(label)) + 8) for label, grid in grids)
    stacked = Image.new(
        "RGB", (width, sum(grid.height + LABEL_HEIGHT for _, grid in grids)), "white"
    )
    draw = ImageDraw.Draw(stacked)
    top = 0
    for label, grid in grids:
        draw.text((4, top + 2), label, "black", font)
        stacked.paste(grid, (0, top + LABEL_HEIGHT))
        top += grid.height + LABEL_HEIGHT
    return stacked

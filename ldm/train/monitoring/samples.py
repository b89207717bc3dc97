"""What a model draws while it is trained: grids at fixed prompts, with and without averaging.

    images/train/samples_gs-001000_e-000002_b-001000.png   and .txt, its prompts

A model that sees more than text shows the picture that its condition was made of before each
sample; an autoencoder shows pictures above their reconstructions.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.data.source import Source, collate, to_device
from ldm.imaging import pixels
from ldm.nets.autoencoder import AutoencoderKL
from ldm.pipelines import sample
from ldm.pipelines.families import batch_keys
from ldm.train.monitoring.validation import paused

__all__ = ["draw", "epoch"]

STRIP = 20  # pixels of a label


def draw(run: Any, *, write: bool = True) -> list[Path]:
    """A file of labelled grids of what is trained on, one of what is held out; their paths.

    run: a `Run`; `callbacks.images` says how many pictures, `callbacks.prompts` of what.
    write: whether this process writes; if weights are split over processes, all must draw.
    """
    options, paths = run.settings.callbacks, []
    sources = {"train": run.source} | ({"val": run.held_out} if run.held_out else {})
    for split, source in sources.items() if options.images else ():
        prompts = options.prompts if split == "train" else None
        records = _records(run.model, source, options.images, prompts)
        grids = []
        for label, weights in _weights(run):
            with weights, paused(run.model):
                grids.append((label, _grid(run, records)))
        place = f"gs-{run.state.step:06}_e-{epoch(run):06}_b-{run.state.position:06}"
        path = run.folder / "images" / split / f"samples_{place}.png"
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            _labelled(grids).save(path)
            if "txt" in records[0]:
                texts = [f"{record['txt']}\n" for record in records]
                path.with_suffix(".txt").write_text("".join(texts), "utf-8")
            paths.append(path)
    return paths


def epoch(run: Any) -> int:
    """How often a run has seen all its data."""
    batches = run.source.batches_per_epoch(run.batch_size)
    return int(run.state.position // batches) if batches else 0


def _weights(run: Any) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """Labels, and contexts in which the model has the weights that they name."""
    step = run.state.step
    if run.state.ema.decay:
        yield f"averaged weights, step {step}", run.state.ema.applied(run.task.trained)
    yield f"weights as they are, step {step}", nullcontext()


def _records(
    model: Any, source: Source, n: int, prompts: Sequence[str] | None
) -> list[dict[str, Any]]:
    """n fixed records of one size; the prompts in place of their captions, over and over."""
    records = source.first_samples(n)
    records = [one for one in records if one["jpg"].shape == records[0]["jpg"].shape]
    if prompts and not isinstance(model, AutoencoderKL):
        for place, one in enumerate(records):
            one["txt"] = prompts[place % len(prompts)]
    return records


def _grid(run: Any, records: Sequence[dict[str, Any]]) -> Image.Image:
    """Made in batches of the size that is trained with, which surely fit into memory."""
    model, columns = run.model, len(records)
    image = torch.stack([record["jpg"] for record in records])  # (n, 3, H, W)
    parts = range(0, columns, run.batch_size)
    if isinstance(model, AutoencoderKL):
        seen = [image[k : k + run.batch_size].to(run.device) for k in parts]
        pictures = torch.cat([image, *[model.decode(model.encode(x).mode()).cpu() for x in seen]])
    else:
        columns = max(1, round(columns**0.5))
        pictures = torch.cat([sampled(run, records[k : k + run.batch_size], k) for k in parts])
        if batch_keys(model) != {"txt"}:
            columns, pictures = 2 * columns, torch.stack([image, pictures], 1).flatten(0, 1)
    return pixels.make_grid(pixels.to_pil(pictures), columns)


def sampled(run: Any, records: Sequence[dict[str, Any]], first: int = 0) -> Tensor:
    """One image (3, H, W) for every record, whatever the model reads; seeds first, first + 1, …"""
    model = run.model
    options: dict[str, Any] = {"steps": 20, "scale": 3.0, "eta": 0.0}
    options |= run.settings.callbacks.sampling
    batch, f = collate(list(records)), model.downscale
    height, width = batch["jpg"].shape[-2:]
    batch = model.prepare(to_device(batch, model.device), (height // f, width // f))
    cond, uncond = model.condition(batch), model.condition(batch, drop=1.0)
    with run.precision():
        seeds = list(range(first, first + len(records)))
        z = sample(model, cond, uncond, size=(height, width), seeds=seeds, **options)
    image: Tensor = model.decode(z.float()).clamp(-1, 1).cpu()
    return image


def _labelled(grids: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Grids below each other, each under a line that says what it is."""
    font = ImageFont.load_default(size=12)
    width = max(max(grid.width, int(font.getlength(text)) + 8) for text, grid in grids)
    sheet = Image.new("RGB", (width, sum(grid.height + STRIP for _, grid in grids)), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for label, grid in grids:
        pen.text((4, top + 2), label, "black", font)
        sheet.paste(grid, (0, top + STRIP))
        top += grid.height + STRIP
    return sheet

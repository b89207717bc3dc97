"""Judges of generated emoji: a rule for the background, small classifiers for style and object.

The classifiers learn from real pictures of the training split only, at half size, on every
background, moved, scaled and blurred. How well they do on real pictures that they never saw, drawn
for (object, style) pairs of the held-out split, bounds what a perfect model could score.
"""

import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm.data.folder import Folder
from ldm.data.transforms import COLOURS
from ldm.nets.blocks import Conv2d, GroupNorm, Linear
from ldm.train import optim

__all__ = ["Classifier", "Judges", "background"]

log = logging.getLogger(__name__)

SIDE = 64  # pixels that a classifier sees
SIDES = (48, 50, 52, 54, 56)  # of the picture inside; 52 is what the model is trained on
BORDER = 6  # pixels of a 128-pixel picture that are surely background


class Classifier(nn.Module):
    """image (B, 3, 64, 64) in [-1, 1] -> scores (B, classes)."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width, 6 * width)
        layers: list[nn.Module] = []
        for k, (before, after) in enumerate(pairwise(widths)):
            layers += [
                Conv2d(before, after, 5 if k == 0 else 3, stride=2, padding=2 if k == 0 else 1)
            ]
            layers += [GroupNorm(after), nn.SiLU()]
            layers += [Conv2d(after, after, 3, padding=1), GroupNorm(after), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.head = Linear(4 * widths[-1], classes)

    def forward(self, image: Tensor) -> Tensor:
        h = self.layers(image)  # (B, C, 4, 4)
        h = F.adaptive_avg_pool2d(h, 2).flatten(1)  # (B, 4 C)
        return self.head(F.dropout(h, 0.3, self.training))  # (B, classes)


class Judges:
    """What was drawn, in which style: classifiers of a set of objects and styles."""

    def __init__(self, objects: Sequence[str], styles: Sequence[str]) -> None:
        self.objects, self.styles = list(objects), list(styles)
        self.by_object, self.by_style = Classifier(len(objects)), Classifier(len(styles))

    @classmethod
    def load_or_train(cls, folder: Folder, path: Path, *, steps: int = 2500) -> "Judges":
        """Judges for the pictures of a folder; trained once, then kept in `path`."""
        objects = sorted({row["object"] for row in folder.rows})
        judges = cls(objects, sorted({row["style"] for row in folder.rows}))
        nets = nn.ModuleDict({"object": judges.by_object, "style": judges.by_style})
        if path.exists():
            nets.load_state_dict(torch.load(path, weights_only=True))
        else:
            judges.train(folder, steps)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(nets.state_dict(), path)
        nets.eval()
        return judges

    def train(self, folder: Folder, steps: int, *, batch: int = 64, seed: int = 0) -> None:
        """Cross entropy on real pictures of the training split."""
        rows = [k for k, row in enumerate(folder.rows) if row["split"] == "train"]
        banks = [_bank(folder, rows, side) for side in SIDES]
        objects, styles = self.labels([folder.rows[k] for k in rows])
        generator = torch.Generator().manual_seed(seed)
        nets = nn.ModuleList([self.by_object, self.by_style]).train()
        optimizer = optim.make(nets, 1e-3, name="muon", weight_decay=1e-2)
        for step in range(steps):
            lr = optim.learning_rate(1e-3, step, step / steps, decay="linear")
            for group in optimizer.param_groups:
                group["lr"] = lr
            chosen = torch.randint(len(rows), (batch,), generator=generator)
            image = _augmented(banks[step % len(banks)][chosen], generator)
            with torch.autocast("cpu", torch.bfloat16):
                scores = self.by_object(image), self.by_style(image)
            loss = F.cross_entropy(scores[0].float(), objects[chosen], label_smoothing=0.1)
            loss = loss + F.cross_entropy(scores[1].float(), styles[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 100 == 0:
                log.info("judges: step %d of %d, loss %.3f", step, steps, float(loss.detach()))

    def labels(self, rows: Sequence[dict]) -> tuple[Tensor, Tensor]:
        """The right answers for records or prompts: objects (B,), styles (B,)."""
        objects = torch.tensor([self.objects.index(row["object"]) for row in rows])
        return objects, torch.tensor([self.styles.index(row["style"]) for row in rows])

    @torch.inference_mode()
    def judge(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Ranked answers for images (B, 3, H, W): objects (B, all), styles (B, all), best first."""
        small = torch.cat([F.interpolate(x, (SIDE, SIDE), mode="area") for x in image.split(64)])
        scores = [(self.by_object(x), self.by_style(x)) for x in small.split(64)]
        objects, styles = (torch.cat(parts) for parts in zip(*scores, strict=True))
        return objects.argsort(dim=1, descending=True), styles.argsort(dim=1, descending=True)


def background(image: Tensor) -> list[str]:
    """The name of the colour nearest to the median of the border, for images (B, 3, H, W)."""
    width = max(1, BORDER * image.shape[-1] // 128)
    mask = torch.ones(image.shape[-2:], dtype=torch.bool)
    mask[width:-width, width:-width] = False
    border = image[:, :, mask].median(dim=2).values  # (B, 3)
    table = torch.tensor(list(COLOURS.values())) / 127.5 - 1  # (colours, 3)
    nearest = torch.cdist(border, table).argmin(dim=1)
    return [list(COLOURS)[k] for k in nearest.tolist()]


def _bank(folder: Folder, rows: Sequence[int], side: int) -> Tensor:
    """(N, 4, side, side) uint8 pictures with premultiplied alpha."""
    bank = torch.empty(len(rows), 4, side, side, dtype=torch.uint8)
    for place, index in enumerate(rows):
        picture = folder.record(index)["picture"].convert("RGBa")
        small = picture.resize((side, side), Image.Resampling.LANCZOS)
        bank[place] = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    return bank


def _augmented(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """On random named colours, moved by up to 4 pixels, half of them blurred: (B, 3, 64, 64)."""
    n, side = len(pictures), pictures.shape[-1]
    table = torch.tensor(list(COLOURS.values())) / 127.5 - 1
    colours = table[torch.randint(len(table), (n,), generator=generator)]
    image = colours[:, :, None, None].repeat(1, 1, SIDE, SIDE)  # (B, 3, 64, 64)
    rgb, alpha = pictures[:, :3] / 127.5, pictures[:, 3:] / 255
    top, left = (torch.randint(-4, 5, (2,), generator=generator) + (SIDE - side) // 2).tolist()
    where = (..., slice(top, top + side), slice(left, left + side))
    image[where] = image[where] * (1 - alpha) + rgb - alpha
    soft = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(n, 1, 1, 1, generator=generator)
    share = share * (torch.rand(n, 1, 1, 1, generator=generator) < 0.5)
    return torch.lerp(image, soft, share)

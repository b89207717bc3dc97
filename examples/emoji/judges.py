"""Judges of generated emoji: a rule for the background, and two opinions on style and object.

The gallery compares an image with every real drawing, the right one too, and needs no training. It
is stricter than a classifier: a new drawing in the right style may be nearer to another object's.

The classifiers learn from real images of the training split only, on every background, moved,
scaled and blurred. The one for objects sees the full image at half size; the one for styles sees
only patches, because one that sees full images memorises them and takes an unseen drawing for the
most similar one that it knows. Their accuracy on real images of held-out pairs, which they never
saw, bounds what a perfect model could score.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm.data.drawings import COLORS
from ldm.data.folder import Folder
from ldm.nets.blocks import Conv2d, GroupNorm, Linear
from ldm.train.optim.optimizers import make_optimizer
from ldm.train.optim.schedules import LearningRateSchedule

__all__ = ["Classifier", "Gallery", "Judges", "Texture", "background"]

log = logging.getLogger(__name__)

Row = dict[str, Any]  # of the metadata

SIDE = 64  # pixels that a judge sees
INSIDE = 52  # of them for the drawing, as in the training of the model
SIDES = (48, 50, INSIDE, 54, 56)  # of them for the drawing, in the training of a classifier
PATCHES = (56, 64, 72)  # of a drawing of 104, scaled to 64
BORDER = 6  # pixels of a 128-pixel image that are surely background


class Classifier(nn.Module):
    """image (B, 3, 64, 64) in [-1, 1] -> scores (B, classes)."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width, 6 * width)
        layers: list[nn.Module] = []
        for k, (before, after) in enumerate(pairwise(widths)):
            kernel = 5 if k == 0 else 3
            layers += [Conv2d(before, after, kernel, stride=2, padding=kernel // 2)]
            layers += [GroupNorm(after), nn.SiLU()]
            layers += [Conv2d(after, after, 3, padding=1), GroupNorm(after), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.head = Linear(4 * widths[-1], classes)

    def forward(self, image: Tensor) -> Tensor:
        h = F.dropout(self.hidden(image), 0.3, self.training)
        return self.head(h)  # (B, classes)

    def hidden(self, image: Tensor) -> Tensor:
        """The last hidden layer, (B, 24 width)."""
        h = self.layers(image)  # (B, C, 4, 4)
        return F.adaptive_avg_pool2d(h, 2).flatten(1)  # (B, 4 C)


class Texture(nn.Module):
    """image (B, 3, H, W) in [-1, 1] -> scores (B, classes), the mean over patches of 33."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 3 * width, 4 * width)
        strides = (2, 2, 1, 2)
        self.layers = nn.ModuleList(
            Conv2d(before, after, 5 if before == 3 else 3, stride=stride)
            for (before, after), stride in zip(pairwise(widths), strides, strict=True)
        )
        self.head = Conv2d(widths[-1], classes, 3)

    def forward(self, image: Tensor) -> Tensor:
        h = F.dropout(self.hidden(image), 0.2, self.training)
        return self.head(h).mean(dim=(2, 3))  # (B, classes)

    def hidden(self, image: Tensor) -> Tensor:
        """The last hidden layer, (B, 4 width, h, w)."""
        h = image
        for layer in self.layers:
            h = F.silu(layer(h))  # (B, C, h, w)
            h = h * (h.square().mean(dim=1, keepdim=True) + 1e-4).rsqrt()
        return h


class Judges:
    """Classifiers of the object and the style of an image."""

    def __init__(self, objects: Sequence[str], styles: Sequence[str]) -> None:
        self.objects, self.styles = list(objects), list(styles)
        self.by_object, self.by_style = Classifier(len(objects)), Texture(len(styles))

    @classmethod
    def load_or_train(
        cls, folder: Folder, path: Path, *, objects: Sequence[str] | None = None, steps: int = 2500
    ) -> "Judges":
        """Judges for the images of a folder; trained once, then kept in `path`.

        Args:
            objects: those to classify; None = all. Styles are learned from all images.
        """
        names = objects or sorted({row["object"] for row in folder.rows})
        judges = cls(names, sorted({row["style"] for row in folder.rows}))
        nets = nn.ModuleDict({"object": judges.by_object, "style": judges.by_style})
        if path.exists():
            nets.load_state_dict(torch.load(path, weights_only=True))
        else:
            judges.learn_objects(folder, steps)
            judges.learn_styles(folder, steps)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(nets.state_dict(), path)
        nets.eval()
        return judges

    def learn_objects(self, folder: Folder, steps: int) -> None:
        """Train on full images of the training split at half size."""
        objects = set(self.objects)
        rows = _training_rows(folder, lambda row: row["object"] in objects)
        banks = [_bank(folder, rows, side) for side in SIDES]
        labels, _ = self.labels([folder.rows[k] for k in rows])
        _fit(self.by_object, partial(_draw_full, banks), labels, steps, "objects")

    def learn_styles(self, folder: Folder, steps: int) -> None:
        """Train on patches of images of the training split, mirrored or not."""
        rows = _training_rows(folder, lambda row: True)
        labels = torch.tensor([self.styles.index(folder.rows[k]["style"]) for k in rows])
        draw = partial(_draw_patches, _bank(folder, rows, 104))
        _fit(self.by_style, draw, labels, steps, "styles")

    def labels(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """The classes of rows or prompts: objects (B,), styles (B,)."""
        objects = torch.tensor([self.objects.index(row["object"]) for row in rows])
        return objects, torch.tensor([self.styles.index(row["style"]) for row in rows])

    @torch.inference_mode()
    def judge(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Classes of images (B, 3, 128, 128), best first: objects (B, all), styles (B, all)."""
        scores = [
            (self.by_object(F.interpolate(x, (SIDE, SIDE), mode="area")), self.by_style(x))
            for x in image.split(64)
        ]
        objects, styles = (torch.cat(parts) for parts in zip(*scores, strict=True))
        return objects.argsort(dim=1, descending=True), styles.argsort(dim=1, descending=True)


class Gallery:
    """Every real drawing of some objects, held-out ones too, to find the nearest of an image.

    Args:
        folder: of the drawings.
        objects: their names.
    """

    def __init__(self, folder: Folder, objects: Sequence[str]) -> None:
        rows = [k for k, row in enumerate(folder.rows) if row["object"] in set(objects)]
        edge = (SIDE - INSIDE) // 2
        self.drawings = F.pad(_bank(folder, rows, INSIDE), (edge, edge, edge, edge))
        self.objects = [folder.rows[k]["object"] for k in rows]
        self.styles = [folder.rows[k]["style"] for k in rows]

    @torch.inference_mode()
    def distances(self, image: Tensor, colours: Sequence[str]) -> Tensor:
        """Squared distances of images (B, 3, H, W) to all drawings: (B, drawings).

        The image is moved by up to one pixel of 64 each way, to where it is nearest.

        Args:
            colours: names of the backgrounds on which the drawings are put, one per image.
        """
        result = torch.empty(len(image), len(self.drawings))
        small = F.interpolate(image.float(), (SIDE, SIDE), mode="area")
        for colour in sorted(set(colours)):
            indices = [k for k, name in enumerate(colours) if name == colour]
            plain = torch.tensor(COLORS[colour]).expand(len(self.drawings), 3) / 127.5 - 1
            real = _over(self.drawings, plain).flatten(1)  # (drawings, 3 * 64 * 64)
            moved = F.unfold(F.pad(small[indices], (1, 1, 1, 1), mode="replicate"), SIDE)
            flat = moved.mT.flatten(0, 1)  # (b * 9, 3 * 64 * 64)
            distance = flat.square().sum(1)[:, None] - 2 * flat @ real.mT + real.square().sum(1)
            result[indices] = distance.unflatten(0, (-1, 9)).amin(1)
        return result

    def nearest(self, image: Tensor, prompts: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Whether the nearest drawing is of the right object; of its drawings, of the right style.

        Args:
            prompts: one per image, with `object`, `style` and `colour`.
        Returns:
            Two bool tensors (B,), for the object and for the style.
        """
        distances = self.distances(image, [row["colour"] for row in prompts])
        objects, styles = [], []
        for row, distance in zip(prompts, distances, strict=True):
            own = [k for k, name in enumerate(self.objects) if name == row["object"]]
            objects.append(self.objects[int(distance.argmin())] == row["object"])
            styles.append(self.styles[own[int(distance[own].argmin())]] == row["style"])
        return torch.tensor(objects), torch.tensor(styles)


def background(image: Tensor) -> list[str]:
    """The name of the colour nearest to the median of the border, for images (B, 3, H, W)."""
    width = max(1, BORDER * image.shape[-1] // 128)
    mask = torch.ones(image.shape[-2:], dtype=torch.bool)
    mask[width:-width, width:-width] = False
    border = image[:, :, mask].median(dim=2).values  # (B, 3)
    table = torch.tensor(list(COLORS.values())) / 127.5 - 1  # (colours, 3)
    nearest = torch.cdist(border, table).argmin(dim=1)
    return [list(COLORS)[k] for k in nearest.tolist()]


def _bank(folder: Folder, rows: Sequence[int], side: int) -> Tensor:
    """(N, 4, side, side) uint8 drawings with premultiplied alpha."""
    bank = torch.empty(len(rows), 4, side, side, dtype=torch.uint8)
    for position, index in enumerate(rows):
        image = folder.load(index)["image"].convert("RGBa")
        small = image.resize((side, side), Image.Resampling.LANCZOS)
        bank[position] = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    return bank


def _training_rows(folder: Folder, is_used: Callable[[Row], bool]) -> list[int]:
    rows = enumerate(folder.rows)
    return [k for k, row in rows if row["split"] == "train" and is_used(row)]


def _fit(
    net: nn.Module,
    draw: Callable[[Tensor, torch.Generator], Tensor],
    labels: Tensor,
    steps: int,
    name: str,
) -> None:
    """Minimise the cross entropy of net(draw(rows, generator)) and the labels of the rows."""
    generator = torch.Generator().manual_seed(0)
    learning_rate = LearningRateSchedule(1e-3, warmup_steps=100, scheduler="linear")
    optimizer = make_optimizer(net.train(), 1e-3, name="muon", weight_decay=1e-2)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, step / steps)
        rows = torch.randint(len(labels), (64,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            scores = net(draw(rows, generator))
        loss = F.cross_entropy(scores.float(), labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            log.info("%s: step %d of %d, loss %.3f", name, step, steps, float(loss.detach()))


def _draw_full(banks: Sequence[Tensor], rows: Tensor, generator: torch.Generator) -> Tensor:
    """Full drawings of a random scale, moved by up to 4 pixels: (B, 3, 64, 64)."""
    which = int(torch.randint(len(banks), (), generator=generator))
    drawings = banks[which][rows]
    side = drawings.shape[-1]
    top, left = (torch.randint(-4, 5, (2,), generator=generator) + (SIDE - side) // 2).tolist()
    around = (left, SIDE - side - left, top, SIDE - side - top)
    return _soften(_on_colours(F.pad(drawings, around), generator), generator)


def _draw_patches(bank: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Random parts of drawings, mirrored or not: (B, 3, 64, 64)."""
    side = PATCHES[int(torch.randint(len(PATCHES), (), generator=generator))]
    top, left = torch.randint(0, bank.shape[-1] - side + 1, (2,), generator=generator).tolist()
    image = _on_colours(bank[rows, :, top : top + side, left : left + side], generator)
    if torch.rand((), generator=generator) < 0.5:
        image = image.flip(-1)
    image = F.interpolate(image, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return _soften(image, generator)


def _on_colours(drawings: Tensor, generator: torch.Generator) -> Tensor:
    """Drawings as `_over` takes them -> (B, 3, h, w) on random named colours."""
    table = torch.tensor(list(COLORS.values())) / 127.5 - 1
    return _over(drawings, table[torch.randint(len(table), (len(drawings),), generator=generator)])


def _over(drawings: Tensor, colours: Tensor) -> Tensor:
    """(B, 4, h, w) uint8 with premultiplied alpha -> (B, 3, h, w) on colours (B, 3) in [-1, 1]."""
    rgb, alpha = drawings[:, :3] / 127.5, drawings[:, 3:] / 255
    return colours[:, :, None, None] * (1 - alpha) + rgb - alpha


def _soften(image: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images, blurred by a random amount."""
    soft = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    weight = torch.rand(len(image), 1, 1, 1, generator=generator)
    weight = weight * (torch.rand(len(image), 1, 1, 1, generator=generator) < 0.5)
    return torch.lerp(image, soft, weight)

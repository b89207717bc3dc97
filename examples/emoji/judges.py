"""Recognize background, style and object of generated emoji by nearest drawings and classifiers.

The gallery compares an image with all real drawings, held-out ones included, and needs no training.
It is stricter than a classifier: a new drawing in the right style may be nearer to that of another
object.

The classifiers are trained on real images of the training split only, with random backgrounds,
shifts, scales and blur. That of objects gets the full image at half size. That of styles gets only
patches: on full images it would memorize drawings, and classify an unseen one by the most similar
of them. The accuracy on real images of held-out pairs bounds what a perfect model could score.
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
from ldm.data.folder import ImageFolder
from ldm.nets.blocks import Conv2d, GroupNorm, Linear
from ldm.train.optim.optimizers import make_optimizer
from ldm.train.optim.schedules import LearningRateSchedule

__all__ = ["Gallery", "Judges", "ObjectClassifier", "StyleClassifier", "classify_background"]

log = logging.getLogger(__name__)

Row = dict[str, Any]  # metadata of an image: a line of `metadata.jsonl`

# Height and width in pixels
SIDE = 64  # of the input of a classifier
DRAWING_SIDE = 52  # of the drawing in it, as in the training of the model
DRAWING_SIDES = (48, 50, DRAWING_SIDE, 54, 56)  # of the drawing, in the training of the classifier
PATCH_DRAWING_SIDE = 104  # of a drawing that patches are cut from
PATCH_SIDES = (56, 64, 72)  # of the patches, which are scaled to SIDE
BORDER = 6  # pixels at each border of a 128-pixel image that are always background


class ObjectClassifier(nn.Module):
    """image (B, 3, 64, 64) in [-1, 1] -> logits (B, classes)."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        channels = (3, width, 2 * width, 4 * width, 6 * width)
        layers: list[nn.Module] = []
        for k, (in_channels, out_channels) in enumerate(pairwise(channels)):
            kernel = 5 if k == 0 else 3
            layers += [Conv2d(in_channels, out_channels, kernel, stride=2, padding=kernel // 2)]
            layers += [GroupNorm(out_channels), nn.SiLU()]
            layers += [Conv2d(out_channels, out_channels, 3, padding=1)]
            layers += [GroupNorm(out_channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.head = Linear(4 * channels[-1], classes)

    def forward(self, image: Tensor) -> Tensor:
        h = F.dropout(self.extract_features(image), 0.3, self.training)
        return self.head(h)  # (B, classes)

    def extract_features(self, image: Tensor) -> Tensor:
        """Return the features of the last hidden layer, (B, 24 width)."""
        h = self.layers(image)  # (B, C, 4, 4)
        return F.adaptive_avg_pool2d(h, 2).flatten(1)  # (B, 4 C)


class StyleClassifier(nn.Module):
    """image (B, 3, H, W) in [-1, 1] -> logits (B, classes), the mean over patches of 33 pixels."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        channels = (3, width, 2 * width, 3 * width, 4 * width)
        strides = (2, 2, 1, 2)
        self.layers = nn.ModuleList(
            Conv2d(in_channels, out_channels, 5 if in_channels == 3 else 3, stride=stride)
            for (in_channels, out_channels), stride in zip(pairwise(channels), strides, strict=True)
        )
        self.head = Conv2d(channels[-1], classes, 3)

    def forward(self, image: Tensor) -> Tensor:
        h = F.dropout(self.extract_features(image), 0.2, self.training)
        return self.head(h).mean(dim=(2, 3))  # (B, classes)

    def extract_features(self, image: Tensor) -> Tensor:
        """Return the features of the last hidden layer, (B, 4 width, h, w)."""
        h = image
        for layer in self.layers:
            h = F.silu(layer(h))  # (B, C, h, w)
            h = h * (h.square().mean(dim=1, keepdim=True) + 1e-4).rsqrt()
        return h


class Judges:
    """Classifiers of the object and the style of an image."""

    def __init__(self, objects: Sequence[str], styles: Sequence[str]) -> None:
        self.objects, self.styles = list(objects), list(styles)
        self.object_classifier, self.style_classifier = (
            ObjectClassifier(len(objects)),
            StyleClassifier(len(styles)),
        )

    @classmethod
    def load_or_train(
        cls,
        folder: ImageFolder,
        path: Path,
        *,
        objects: Sequence[str] | None = None,
        steps: int = 2500,
    ) -> "Judges":
        """Load the classifiers for the images of a folder, or train them and write `path`.

        Args:
            objects: Names of the objects to classify; None = all. Styles are learned from all
                images.
            steps: Training steps of each classifier.

        Raises:
            SystemExit: `path` has classifiers of other objects or styles.
        """
        names = objects or sorted({row["object"] for row in folder.rows})
        judges = cls(names, sorted({row["style"] for row in folder.rows}))
        networks = nn.ModuleDict(
            {"object": judges.object_classifier, "style": judges.style_classifier}
        )
        classes = {"objects": judges.objects, "styles": judges.styles}
        if path.exists():
            content = torch.load(path, weights_only=True)
            if content.get("classes") != classes:
                raise SystemExit(f"{path} has classifiers of other objects or styles: move it away")
            networks.load_state_dict(content["state"])
        else:
            judges.train_objects(folder, steps)
            judges.train_styles(folder, steps)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"classes": classes, "state": networks.state_dict()}, path)
        networks.eval()
        return judges

    def train_objects(self, folder: ImageFolder, steps: int) -> None:
        """Train the classifier of objects on full images of the training split at half size."""
        objects = set(self.objects)
        indices = _find_training_rows(folder, lambda row: row["object"] in objects)
        drawings = [_load_drawings(folder, indices, side) for side in DRAWING_SIDES]
        labels, _ = self.get_labels([folder.rows[k] for k in indices])
        _fit(self.object_classifier, partial(_augment_full, drawings), labels, steps, "objects")

    def train_styles(self, folder: ImageFolder, steps: int) -> None:
        """Train the classifier of styles on patches of images of the training split."""
        indices = _find_training_rows(folder, lambda row: True)
        labels = torch.tensor([self.styles.index(folder.rows[k]["style"]) for k in indices])
        drawings = _load_drawings(folder, indices, PATCH_DRAWING_SIDE)
        _fit(self.style_classifier, partial(_augment_patches, drawings), labels, steps, "styles")

    def get_labels(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Return the class indices of rows or prompts: objects (B,), styles (B,)."""
        objects = torch.tensor([self.objects.index(row["object"]) for row in rows])
        return objects, torch.tensor([self.styles.index(row["style"]) for row in rows])

    def check(self, image: Tensor, prompts: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
        """Compare images (B, 3, 128, 128) with their prompts.

        Returns:
            Three bool tensors, whether these are right: the background (B,), the style (B,), and
            the best, second best … class of the object (B, objects).
        """
        objects, styles = self.classify(image)
        object_labels, style_labels = self.get_labels(prompts)
        colors = zip(classify_background(image), prompts, strict=True)
        color = torch.tensor([name == row["color"] for name, row in colors])
        return color, styles[:, 0] == style_labels, objects == object_labels[:, None]

    @torch.inference_mode()
    def classify(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Rank the classes of images (B, 3, 128, 128), best first.

        Returns:
            Indices of objects (B, objects) and of styles (B, styles).
        """
        logits = [
            (
                self.object_classifier(F.interpolate(x, (SIDE, SIDE), mode="area")),
                self.style_classifier(x),
            )
            for x in image.split(64)
        ]
        objects, styles = (torch.cat(batches) for batches in zip(*logits, strict=True))
        return objects.argsort(dim=1, descending=True), styles.argsort(dim=1, descending=True)


class Gallery:
    """All real drawings of some objects, also held-out ones, to find those nearest to an image.

    Args:
        folder: The dataset.
        objects: Names of the objects.
    """

    def __init__(self, folder: ImageFolder, objects: Sequence[str]) -> None:
        names = set(objects)
        indices = [k for k, row in enumerate(folder.rows) if row["object"] in names]
        margin = (SIDE - DRAWING_SIDE) // 2
        drawings = _load_drawings(folder, indices, DRAWING_SIDE)
        self.drawings = F.pad(drawings, (margin, margin, margin, margin))
        self.objects = [folder.rows[k]["object"] for k in indices]
        self.styles = [folder.rows[k]["style"] for k in indices]

    @torch.inference_mode()
    def compute_distances(self, image: Tensor, colors: Sequence[str]) -> Tensor:
        """Compute the squared distances of images (B, 3, H, W) to all drawings, (B, drawings).

        Each is the minimum over shifts of the image by up to one pixel of 64 in each direction.

        Args:
            colors: Name of the drawings' background for each image.
        """
        result = torch.empty(len(image), len(self.drawings))
        small = F.interpolate(image.float(), (SIDE, SIDE), mode="area")
        for color in sorted(set(colors)):
            indices = [k for k, name in enumerate(colors) if name == color]
            colors_rgb = torch.tensor(COLORS[color]).expand(len(self.drawings), 3) / 127.5 - 1
            real = _composite(self.drawings, colors_rgb).flatten(1)  # (drawings, 3 * 64 * 64)
            shifted = F.unfold(F.pad(small[indices], (1, 1, 1, 1), mode="replicate"), SIDE)
            flat = shifted.mT.flatten(0, 1)  # (b * 9, 3 * 64 * 64)
            # |a - b|² = |a|² - 2 a b + |b|², of all pairs
            distance = flat.square().sum(1)[:, None] - 2 * flat @ real.mT + real.square().sum(1)
            result[indices] = distance.unflatten(0, (-1, 9)).amin(1)
        return result

    def match_nearest(self, image: Tensor, prompts: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Return whether the nearest drawing has the object, and the nearest of it the style.

        Args:
            prompts: Prompt of each image, with `object`, `style` and `color`.

        Returns:
            Two bool tensors (B,), for object and style.
        """
        distances = self.compute_distances(image, [row["color"] for row in prompts])
        objects, styles = [], []
        for row, distance in zip(prompts, distances, strict=True):
            candidates = [k for k, name in enumerate(self.objects) if name == row["object"]]
            nearest_of_object = candidates[int(distance[candidates].argmin())]
            objects.append(self.objects[int(distance.argmin())] == row["object"])
            styles.append(self.styles[nearest_of_object] == row["style"])
        return torch.tensor(objects), torch.tensor(styles)


def classify_background(image: Tensor) -> list[str]:
    """Name the color nearest to the median of the border, for each image of (B, 3, H, W)."""
    width = max(1, BORDER * image.shape[-1] // 128)
    mask = torch.ones(image.shape[-2:], dtype=torch.bool)
    mask[width:-width, width:-width] = False
    border = image[:, :, mask].median(dim=2).values  # (B, 3)
    table = torch.tensor(list(COLORS.values())) / 127.5 - 1  # (colors, 3)
    nearest = torch.cdist(border, table).argmin(dim=1)
    return [list(COLORS)[k] for k in nearest.tolist()]


def _load_drawings(folder: ImageFolder, indices: Sequence[int], side: int) -> Tensor:
    """Load drawings as (N, 4, side, side) uint8, RGBA with premultiplied alpha."""
    drawings = torch.empty(len(indices), 4, side, side, dtype=torch.uint8)
    for k, index in enumerate(indices):
        image = folder.load(index)["image"].convert("RGBa")
        small = image.resize((side, side), Image.Resampling.LANCZOS)
        drawings[k] = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    return drawings


def _find_training_rows(folder: ImageFolder, is_used: Callable[[Row], bool]) -> list[int]:
    rows = enumerate(folder.rows)
    return [k for k, row in rows if row["split"] == "train" and is_used(row)]


def _fit(
    network: nn.Module,
    augment: Callable[[Tensor, torch.Generator], Tensor],
    labels: Tensor,
    steps: int,
    name: str,
) -> None:
    """Train a classifier by cross entropy on images of `augment(indices, generator)`."""
    generator = torch.Generator().manual_seed(0)
    learning_rate = LearningRateSchedule(1e-3, warmup_steps=100, scheduler="linear")
    optimizer = make_optimizer(network.train(), 1e-3, name="muon", weight_decay=1e-2)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, step / steps)
        indices = torch.randint(len(labels), (64,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(augment(indices, generator))
        loss = F.cross_entropy(logits.float(), labels[indices], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            log.info("%s: step %d of %d, loss %.3f", name, step, steps, float(loss.detach()))


def _augment_full(
    drawings_by_side: Sequence[Tensor], indices: Tensor, generator: torch.Generator
) -> Tensor:
    """Return full drawings (B, 3, 64, 64) of one random size, shifted by up to 4 pixels."""
    k = int(torch.randint(len(drawings_by_side), (), generator=generator))
    drawings = drawings_by_side[k][indices]
    side = drawings.shape[-1]
    top, left = (torch.randint(-4, 5, (2,), generator=generator) + (SIDE - side) // 2).tolist()
    padding = (left, SIDE - side - left, top, SIDE - side - top)
    return _blur_some(_composite_on_random_colors(F.pad(drawings, padding), generator), generator)


def _augment_patches(drawings: Tensor, indices: Tensor, generator: torch.Generator) -> Tensor:
    """Return one random patch of each drawing, (B, 3, 64, 64); all are flipped, or none is."""
    side = PATCH_SIDES[int(torch.randint(len(PATCH_SIDES), (), generator=generator))]
    top, left = torch.randint(0, drawings.shape[-1] - side + 1, (2,), generator=generator).tolist()
    patches = drawings[indices, :, top : top + side, left : left + side]
    image = _composite_on_random_colors(patches, generator)
    if torch.rand((), generator=generator) < 0.5:
        image = image.flip(-1)
    image = F.interpolate(image, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return _blur_some(image, generator)


def _composite_on_random_colors(drawings: Tensor, generator: torch.Generator) -> Tensor:
    """Composite drawings (B, 4, h, w) on random named colors: (B, 3, h, w)."""
    table = torch.tensor(list(COLORS.values())) / 127.5 - 1
    indices = torch.randint(len(table), (len(drawings),), generator=generator)
    return _composite(drawings, table[indices])


def _composite(drawings: Tensor, colors: Tensor) -> Tensor:
    """Composite drawings of `_load_drawings` on colors (B, 3) in [-1, 1]: (B, 3, h, w)."""
    rgb, alpha = drawings[:, :3] / 127.5, drawings[:, 3:] / 255
    return colors[:, :, None, None] * (1 - alpha) + rgb - alpha


def _blur_some(image: Tensor, generator: torch.Generator) -> Tensor:
    """Blur about half of the images by random amounts."""
    blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    weight = torch.rand(len(image), 1, 1, 1, generator=generator)
    weight = weight * (torch.rand(len(image), 1, 1, 1, generator=generator) < 0.5)
    return torch.lerp(image, blurred, weight)

"""Recognize background, style and object of generated emoji by nearest drawings and classifiers.

The gallery compares an image with all real drawings, including held-out ones, and needs no
training. It is stricter than a classifier: a new drawing in the right style may be nearer to the
drawing of another object.

The classifiers are trained only on real images of the training split, with random backgrounds,
shifts, scales and blur. The classifier of objects gets the full image at half size. The classifier
of styles gets only patches: on full images it would memorize drawings, and classify an unseen one
by the most similar of them. The accuracy on real images of held-out pairs is the upper bound for
generated images.
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

from ldm.data.drawings import BACKGROUND_COLORS
from ldm.data.folder import ImageFolder
from ldm.nets.blocks import Conv2d, GroupNorm, Linear
from ldm.train.optim.optimizers import make_optimizer
from ldm.train.optim.schedules import LearningRateSchedule

__all__ = [
    "WEIGHTS_PATH",
    "EmojiClassifiers",
    "Gallery",
    "ObjectClassifier",
    "StyleClassifier",
    "classify_background",
]  # fmt: skip

log = logging.getLogger(__name__)

Row = dict[str, Any]  # metadata of an image: a line of `metadata.jsonl`

WEIGHTS_PATH = Path("logs/classifiers.pt")
PALETTE = torch.tensor(list(BACKGROUND_COLORS.values())) / 127.5 - 1  # (colors, 3) in [-1, 1]
# Height and width in pixels
INPUT_SIDE = 64  # of the input of a classifier
DRAWING_SIDE = 52  # of the drawing in the input, as in the training of the diffusion model
TRAINING_DRAWING_SIDES = (48, 50, DRAWING_SIDE, 54, 56)  # in the training of the object classifier
PATCHED_DRAWING_SIDE = 104  # of the drawings from which patches are cut
PATCH_SIDES = (56, 64, 72)  # of the patches, which are resized to INPUT_SIDE
BORDER_WIDTH = 6  # pixels at each border of a 128-pixel image that are always background


class ObjectClassifier(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] -> logits (B, num_classes)."""

    def __init__(self, num_classes: int, width: int = 32) -> None:
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
        self.head = Linear(4 * channels[-1], num_classes)

    def forward(self, image: Tensor) -> Tensor:
        h = F.dropout(self.extract_features(image), 0.3, self.training)
        return self.head(h)  # (B, num_classes)

    def extract_features(self, image: Tensor) -> Tensor:
        """Return the last hidden layer, (B, 24 width)."""
        h = self.layers(image)  # (B, C, 4, 4)
        return F.adaptive_avg_pool2d(h, 2).flatten(1)  # (B, 4 C)


class StyleClassifier(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> logits (B, num_classes), averaged over 33x33 patches."""

    def __init__(self, num_classes: int, width: int = 32) -> None:
        super().__init__()
        channels = (3, width, 2 * width, 3 * width, 4 * width)
        strides = (2, 2, 1, 2)
        self.layers = nn.ModuleList(
            Conv2d(in_channels, out_channels, 5 if in_channels == 3 else 3, stride=stride)
            for (in_channels, out_channels), stride in zip(pairwise(channels), strides, strict=True)
        )
        self.head = Conv2d(channels[-1], num_classes, 3)

    def forward(self, image: Tensor) -> Tensor:
        h = F.dropout(self.extract_features(image), 0.2, self.training)
        return self.head(h).mean(dim=(2, 3))  # (B, num_classes)

    def extract_features(self, image: Tensor) -> Tensor:
        """Return the last hidden layer, (B, 4 width, h, w)."""
        h = image
        for layer in self.layers:
            h = F.silu(layer(h))  # (B, C, h, w)
            h = h * (h.square().mean(dim=1, keepdim=True) + 1e-4).rsqrt()
        return h


class EmojiClassifiers:
    """Classifiers of the object and the style of an image."""

    def __init__(self, objects: Sequence[str], styles: Sequence[str]) -> None:
        self.objects, self.styles = list(objects), list(styles)
        self.object_classifier = ObjectClassifier(len(objects))
        self.style_classifier = StyleClassifier(len(styles))

    @classmethod
    def load_or_train(
        cls,
        folder: ImageFolder,
        path: Path,
        *,
        objects: Sequence[str] | None = None,
        steps: int = 2500,
    ) -> "EmojiClassifiers":
        """Load the classifiers for the images of a folder, or train them and write `path`.

        Args:
            objects: Names of the objects to classify; None = all objects of the folder. Styles are
                learned from all images.
            steps: Number of training steps of each classifier.

        Raises:
            SystemExit: `path` has classifiers of other objects or styles.
        """
        objects = objects or sorted({row["object"] for row in folder.rows})
        classifiers = cls(objects, sorted({row["style"] for row in folder.rows}))
        networks = nn.ModuleDict(
            {"object": classifiers.object_classifier, "style": classifiers.style_classifier}
        )
        classes = {"objects": classifiers.objects, "styles": classifiers.styles}
        if path.exists():
            checkpoint = torch.load(path, weights_only=True)
            if checkpoint.get("classes") != classes:
                raise SystemExit(f"{path} has classifiers of other objects or styles: move it away")
            networks.load_state_dict(checkpoint["state"])
        else:
            classifiers.train_objects(folder, steps)
            classifiers.train_styles(folder, steps)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"classes": classes, "state": networks.state_dict()}, path)
        networks.eval()
        return classifiers

    def train_objects(self, folder: ImageFolder, steps: int) -> None:
        """Train the classifier of objects on full images of the training split at half size."""
        objects = set(self.objects)
        indices = _list_training_indices(folder, lambda row: row["object"] in objects)
        drawings = [_load_drawings(folder, indices, side) for side in TRAINING_DRAWING_SIDES]
        labels, _ = self.get_labels([folder.rows[k] for k in indices])
        _train(self.object_classifier, partial(_augment_full, drawings), labels, steps, "objects")

    def train_styles(self, folder: ImageFolder, steps: int) -> None:
        """Train the classifier of styles on patches of images of the training split."""
        indices = _list_training_indices(folder, lambda row: True)
        labels = torch.tensor([self.styles.index(folder.rows[k]["style"]) for k in indices])
        drawings = _load_drawings(folder, indices, PATCHED_DRAWING_SIDE)
        _train(self.style_classifier, partial(_augment_patches, drawings), labels, steps, "styles")

    def get_labels(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Return the class indices of rows: objects (B,), styles (B,)."""
        objects = torch.tensor([self.objects.index(row["object"]) for row in rows])
        return objects, torch.tensor([self.styles.index(row["style"]) for row in rows])

    def compare_with_prompts(
        self, image: Tensor, prompts: Sequence[Row]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compare images (B, 3, 128, 128) with their prompts.

        Returns:
            Three bool tensors: whether the background is right (B,), whether the style is (B,), and
            whether the most likely, second most likely … class is the object (B, objects).
        """
        objects, styles = self.classify(image)
        object_labels, style_labels = self.get_labels(prompts)
        colors = zip(classify_background(image), prompts, strict=True)
        has_color = torch.tensor([color == row["color"] for color, row in colors])
        return has_color, styles[:, 0] == style_labels, objects == object_labels[:, None]

    @torch.inference_mode()
    def classify(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Rank the classes of images (B, 3, 128, 128), most likely first.

        Returns:
            Class indices of objects (B, objects) and of styles (B, styles).
        """
        logits = [
            (
                self.object_classifier(F.interpolate(x, (INPUT_SIDE, INPUT_SIDE), mode="area")),
                self.style_classifier(x),
            )
            for x in image.split(64)
        ]
        objects, styles = (torch.cat(batches) for batches in zip(*logits, strict=True))
        return objects.argsort(dim=1, descending=True), styles.argsort(dim=1, descending=True)


class Gallery:
    """All real drawings of some objects, including held-out ones, to find the nearest to an image.

    Args:
        folder: The dataset.
        objects: Names of the objects.
    """

    def __init__(self, folder: ImageFolder, objects: Sequence[str]) -> None:
        object_set = set(objects)
        indices = [k for k, row in enumerate(folder.rows) if row["object"] in object_set]
        margin = (INPUT_SIDE - DRAWING_SIDE) // 2
        drawings = _load_drawings(folder, indices, DRAWING_SIDE)
        self.drawings = F.pad(drawings, (margin, margin, margin, margin))
        self.objects = [folder.rows[k]["object"] for k in indices]
        self.styles = [folder.rows[k]["style"] for k in indices]

    @torch.inference_mode()
    def compute_distances(self, image: Tensor, colors: Sequence[str]) -> Tensor:
        """Compute the squared distances of images (B, 3, H, W) to all drawings, (B, drawings).

        Images are resized to 64x64 pixels; a distance is the minimum over shifts of the image by up
        to one pixel in each direction.

        Args:
            colors: For each image, the name of the background that drawings get.
        """
        distances = torch.empty(len(image), len(self.drawings))
        small = F.interpolate(image.float(), (INPUT_SIDE, INPUT_SIDE), mode="area")
        for color in sorted(set(colors)):
            indices = [k for k, name in enumerate(colors) if name == color]
            rgb = torch.tensor(BACKGROUND_COLORS[color])
            background = rgb.expand(len(self.drawings), 3) / 127.5 - 1
            real = _composite(self.drawings, background).flatten(1)  # (drawings, 3 * 64 * 64)
            shifted = F.unfold(F.pad(small[indices], (1, 1, 1, 1), mode="replicate"), INPUT_SIDE)
            flat = shifted.mT.flatten(0, 1)  # (b * 9, 3 * 64 * 64)
            # |a - b|² = |a|² - 2 a b + |b|², of all pairs
            squared = flat.square().sum(1)[:, None] - 2 * flat @ real.mT + real.square().sum(1)
            distances[indices] = squared.unflatten(0, (-1, 9)).amin(1)
        return distances

    def match_nearest(self, image: Tensor, prompts: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Compare images with their prompts by the nearest drawings.

        Args:
            prompts: Prompt of each image, with `object`, `style` and `color`.

        Returns:
            Two bool tensors (B,): whether the nearest drawing shows the object, and whether the
            nearest drawing of the object has the style.
        """
        distances = self.compute_distances(image, [row["color"] for row in prompts])
        has_object, has_style = [], []
        for row, distance in zip(prompts, distances, strict=True):
            candidates = [k for k, name in enumerate(self.objects) if name == row["object"]]
            nearest_of_object = candidates[int(distance[candidates].argmin())]
            has_object.append(self.objects[int(distance.argmin())] == row["object"])
            has_style.append(self.styles[nearest_of_object] == row["style"])
        return torch.tensor(has_object), torch.tensor(has_style)


def classify_background(image: Tensor) -> list[str]:
    """Return the name of the color nearest to the median of the border, for images (B, 3, H, W)."""
    width = max(1, BORDER_WIDTH * image.shape[-1] // 128)
    mask = torch.ones(image.shape[-2:], dtype=torch.bool)
    mask[width:-width, width:-width] = False
    border = image[:, :, mask].median(dim=2).values  # (B, 3)
    nearest = torch.cdist(border, PALETTE).argmin(dim=1)
    return [list(BACKGROUND_COLORS)[k] for k in nearest.tolist()]


def _load_drawings(folder: ImageFolder, indices: Sequence[int], side: int) -> Tensor:
    """Load drawings as (N, 4, side, side) uint8, RGBA with premultiplied alpha."""
    drawings = torch.empty(len(indices), 4, side, side, dtype=torch.uint8)
    for k, index in enumerate(indices):
        image = folder.load(index)["image"].convert("RGBa")
        small = image.resize((side, side), Image.Resampling.LANCZOS)
        drawings[k] = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    return drawings


def _list_training_indices(folder: ImageFolder, is_used: Callable[[Row], bool]) -> list[int]:
    rows = enumerate(folder.rows)
    return [k for k, row in rows if row["split"] == "train" and is_used(row)]


def _train(
    network: nn.Module,
    augment: Callable[[Tensor, torch.Generator], Tensor],
    labels: Tensor,
    steps: int,
    name: str,
) -> None:
    """Train a classifier by cross entropy on images returned by `augment(indices, generator)`."""
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
    """Return drawings (B, 3, 64, 64), all of one random size and shifted by up to 4 pixels."""
    k = int(torch.randint(len(drawings_by_side), (), generator=generator))
    drawings = drawings_by_side[k][indices]
    side = drawings.shape[-1]
    margin = INPUT_SIDE - side
    top, left = (torch.randint(-4, 5, (2,), generator=generator) + margin // 2).tolist()
    padded = F.pad(drawings, (left, margin - left, top, margin - top))
    return _blur_half(_composite_on_random_colors(padded, generator), generator)


def _augment_patches(drawings: Tensor, indices: Tensor, generator: torch.Generator) -> Tensor:
    """Return the same random patch of each drawing, (B, 3, 64, 64); all are flipped, or none is."""
    side = PATCH_SIDES[int(torch.randint(len(PATCH_SIDES), (), generator=generator))]
    top, left = torch.randint(0, drawings.shape[-1] - side + 1, (2,), generator=generator).tolist()
    patches = drawings[indices, :, top : top + side, left : left + side]
    image = _composite_on_random_colors(patches, generator)
    if torch.rand((), generator=generator) < 0.5:
        image = image.flip(-1)
    image = F.interpolate(image, (INPUT_SIDE, INPUT_SIDE), mode="bilinear", align_corners=False)
    return _blur_half(image, generator)


def _composite_on_random_colors(drawings: Tensor, generator: torch.Generator) -> Tensor:
    """Composite drawings (B, 4, h, w) on random colors of PALETTE: (B, 3, h, w)."""
    indices = torch.randint(len(PALETTE), (len(drawings),), generator=generator)
    return _composite(drawings, PALETTE[indices])


def _composite(drawings: Tensor, colors: Tensor) -> Tensor:
    """Composite drawings (B, 4, h, w) on colors (B, 3) in [-1, 1]: (B, 3, h, w) in [-1, 1]."""
    rgb, alpha = drawings[:, :3] / 127.5, drawings[:, 3:] / 255
    return colors[:, :, None, None] * (1 - alpha) + rgb - alpha


def _blur_half(image: Tensor, generator: torch.Generator) -> Tensor:
    """Blur about half of the images by random amounts."""
    blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    weight = torch.rand(len(image), 1, 1, 1, generator=generator)
    weight = weight * (torch.rand(len(image), 1, 1, 1, generator=generator) < 0.5)
    return torch.lerp(image, blurred, weight)

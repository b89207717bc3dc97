"""Evaluate the demo model over guidance scales: distance to real drawings against prompt score.

    python examples/emoji/make_emoji_data.py data/emoji --objects 300
    python examples/emoji/evaluate_scales.py --data data/emoji

The result is a figure like that in Stable Diffusion 2's README, with features and prompt scores of
the classifiers in `classifiers.py` instead of Inception and CLIP. For 512 images per scale it takes
about 90 minutes on one CPU core; running the same command again continues an interrupted run.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from classifiers import INPUT_SIDE, WEIGHTS_PATH, EmojiClassifiers
from evaluate_demo import Prompt, load_real_images, make_prompts
from ldm.data.drawings import EmojiTransform
from ldm.data.folder import ImageFolder
from ldm.evaluation.generate import Setting, generate_images, write_prompts
from ldm.evaluation.report import format_table, save_figure, save_results
from ldm.evaluation.score import ImageSet, find_image_sets, score_sets
from ldm.generate.tasks import TASKS
from ldm.imaging.pixels import to_pil, to_tensor
from ldm.imaging.reading import list_images
from ldm.runtime.files import compute_sha256, write_atomically
from ldm.runtime.types import JsonObject

SCALES = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
NUM_COMPONENTS = 64  # principal components of the features of each classifier
REFERENCE_SEED = 1  # so that the reference has other random backgrounds than the prompts


class ClassifierFeatures:
    """A FeatureExtractor: principal components of the last hidden layers of both classifiers.

    Features of each classifier are divided by their standard deviation on real images.

    Args:
        real_images: Images whose features define the components.
        sha256: SHA-256 of the weights file of the classifiers, for the report.
    """

    num_features = 2 * NUM_COMPONENTS

    def __init__(
        self, classifiers: EmojiClassifiers, real_images: Sequence[Image.Image], sha256: str
    ) -> None:
        self.classifiers = classifiers
        self.sha256 = sha256
        self.projections = []
        for x in self._extract_hidden(real_images):
            mean = x.mean(dim=0)
            _, _, components = torch.linalg.svd(x - mean, full_matrices=False)
            std = (x - mean).square().sum(1).mean().sqrt()
            self.projections.append((mean, components[:NUM_COMPONENTS] / std))

    def describe(self) -> JsonObject:
        name = "features of the classifiers"
        return {"name": name, "components": NUM_COMPONENTS, "sha256": self.sha256}

    def extract_features(self, images: Sequence[Image.Image]) -> Tensor:
        hidden = zip(self._extract_hidden(images), self.projections, strict=True)
        return torch.cat([(x - mean) @ components.mT for x, (mean, components) in hidden], dim=1)

    @torch.inference_mode()
    def _extract_hidden(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Return the last hidden layers for objects (N, 768) and for styles (N, 128), float64."""
        objects: list[Tensor] = []
        styles: list[Tensor] = []
        for start in range(0, len(images), 64):
            x = torch.cat([to_tensor(image) for image in images[start : start + 64]])
            small = F.interpolate(x, (INPUT_SIDE, INPUT_SIDE), mode="area")
            objects.append(self.classifiers.object_classifier.extract_features(small))
            styles.append(self.classifiers.style_classifier.extract_features(x).mean(dim=(2, 3)))
        return torch.cat(objects).double(), torch.cat(styles).double()


class EmojiScorer:
    """A PromptScorer: 1 for an image with the background, object and style of its prompt, else 0.

    Args:
        prompts: Rows of `make_prompts`.
        sha256: SHA-256 of the weights file of the classifiers, for the report.
    """

    def __init__(
        self, classifiers: EmojiClassifiers, prompts: Sequence[Prompt], sha256: str
    ) -> None:
        self.classifiers = classifiers
        self.rows = {row["prompt"]: row for row in prompts}
        self.sha256 = sha256

    def describe(self) -> JsonObject:
        return {"name": "fraction with background, object and style right", "sha256": self.sha256}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        x = torch.cat([to_tensor(image) for image in images])
        rows = [self.rows[prompt] for prompt in prompts]
        has_color, has_style, matches = self.classifiers.compare_with_prompts(x, rows)
        return (has_color & has_style & matches[:, 0]).double()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="the dataset")
    parser.add_argument("--count", type=int, default=512, help="images per scale")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="guidance scales")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--ckpt", help="weights (default: the demo model's)")
    parser.add_argument(
        "--objects", type=int, default=300, help="objects that the model was trained on"
    )
    parser.add_argument("--precision", default="bf16", help="as for `ldm txt2img`")
    parser.add_argument("--batch", type=int, default=8, help="batch size")
    parser.add_argument("--score", type=int, metavar="N", help="only score the first N images")
    parser.add_argument(
        "--classifiers", type=Path, default=WEIGHTS_PATH, help="weights of the classifiers"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/scales"), help="folder")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = ImageFolder(root=args.data, transform=EmojiTransform())
    objects = sorted({row["object"] for row in folder.rows if row["rank"] < args.objects})
    prompts = make_prompts(folder, "train", objects, args.count)
    classifiers = EmojiClassifiers.load_or_train(folder, args.classifiers, objects=objects)
    if args.score is None:
        generate(args, prompts)
    reference = write_reference(folder, objects, args.out / "reference")
    sha256 = compute_sha256(args.classifiers)
    real_images = [reference.load(k) for k in range(len(reference.files))]
    extractor = ClassifierFeatures(classifiers, real_images, sha256)
    prompt_scorer = EmojiScorer(classifiers, prompts, sha256)
    sets = [image_set.select_first(args.score) for image_set in find_image_sets(args.out)]
    results = score_sets(sets, reference, extractor, prompt_scorer)
    save_results(results, args.out)
    save_figure(
        results, args.out, title=f"The demo model over guidance scales, N = {results[0].count}"
    )
    print(format_table(results))


def generate(args: argparse.Namespace, prompts: Sequence[Prompt]) -> None:
    """Generate the missing images of all scales."""
    values = {
        "from_file": str(write_prompts(args.out, [row["prompt"] for row in prompts])),
        "ckpt": args.ckpt,
        "steps": args.steps,
        "sampler": "ddim",
        "seed": 0,
        "n_samples": args.batch,
        "precision": args.precision,
        "no_watermark": True,
    }
    base = TASKS["txt2img"].build_request(values)
    label = Path(args.ckpt or "demo").stem
    settings = [
        Setting(label, replace(base, sampling=replace(base.sampling, scale=scale)))
        for scale in args.scales
    ]
    generate_images(settings, args.out)


def write_reference(folder: ImageFolder, objects: Sequence[str], out: Path) -> ImageSet:
    """Write missing real images of all trained pairs of object and style; return their set."""
    rows = make_prompts(folder, "train", objects, seed=REFERENCE_SEED)
    out.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, len(rows), 64), "Reference"):
        batch = range(start, min(start + 64, len(rows)))
        missing = [k for k in batch if not (out / f"{k:05d}.png").exists()]
        if missing:
            images = load_real_images(folder, [rows[k] for k in missing], seed=start)
            for k, image in zip(missing, to_pil(images), strict=True):
                with write_atomically(out / f"{k:05d}.png") as partial:
                    image.save(partial, "PNG")
    return ImageSet("reference", list_images(out))


if __name__ == "__main__":
    main()

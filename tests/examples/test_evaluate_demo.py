"""Evaluation of the demo model by classifiers and nearest images of the dataset."""

from pathlib import Path

import pytest
import torch

import evaluate_demo
from classifiers import EmojiClassifiers, Gallery, classify_background
from ldm.data.drawings import BACKGROUND_COLORS, EmojiTransform
from ldm.data.folder import ImageFolder

EMOJI = Path(__file__).parents[1] / "data" / "emoji"


@pytest.fixture(scope="module")
def folder():
    return ImageFolder(root=EMOJI, transform=EmojiTransform())


@pytest.fixture(scope="module")
def prompts(folder):
    return evaluate_demo.make_prompts(folder, "train")


@pytest.fixture(scope="module")
def images(folder, prompts):
    return evaluate_demo.load_real_images(folder, prompts)


def test_the_background_is_read_from_the_border():
    colors = torch.tensor(list(BACKGROUND_COLORS.values()))[:, :, None, None] / 127.5 - 1
    image = colors.repeat(1, 1, 64, 64)
    image += 0.05 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    image[..., 8:56, 8:56] = torch.rand(len(image), 3, 48, 48)
    assert classify_background(image) == list(BACKGROUND_COLORS)


def test_prompts_name_object_style_and_color(folder):
    (held_out,) = evaluate_demo.make_prompts(folder, "heldout")
    assert held_out["object"] == "red apple"
    assert f"{held_out['style']} emoji of a red apple on" in held_out["prompt"]
    assert f"{held_out['color']} background" in held_out["prompt"]
    assert len(evaluate_demo.make_prompts(folder, "train", count=5)) == 5


def test_shuffling_moves_every_prompt(prompts):
    shuffled = evaluate_demo.derange(prompts)
    assert all(a is not b for a, b in zip(prompts, shuffled, strict=True))
    assert {id(row) for row in prompts} == {id(row) for row in shuffled}


class PerfectClassifiers(EmojiClassifiers):
    """Classifiers that return the right labels."""

    def __init__(self, folder, prompts):
        objects, styles = ({row[key] for row in folder.rows} for key in ("object", "style"))
        super().__init__(sorted(objects), sorted(styles))
        self.labels = self.get_labels(prompts)

    def classify(self, image):
        objects, styles = self.labels
        ranks = torch.stack([(objects + k) % 3 for k in range(3)], dim=1)
        return ranks, torch.stack([(styles + k) % 8 for k in range(8)], dim=1)


def test_real_images_have_full_scores(folder, prompts, images):
    classifiers = PerfectClassifiers(folder, prompts)
    result = evaluate_demo.compute_scores(
        classifiers, Gallery(folder, classifiers.objects), images, prompts
    )
    assert result == evaluate_demo.Scores(23, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert "| real | 23 | 100.0 % | 100.0 %" in evaluate_demo.format_table({"real": result})


def test_the_gallery_separates_style_from_object(folder, prompts, images):
    gallery = Gallery(folder, sorted({row["object"] for row in prompts}))
    rocket = [{**row, "object": "rocket"} for row in prompts]
    object_is_right, _ = gallery.match_nearest(images, rocket)
    assert object_is_right.tolist() == [row["object"] == "rocket" for row in prompts]
    noto = [{**row, "style": "noto"} for row in prompts]
    object_is_right, style_is_right = gallery.match_nearest(images, noto)
    assert object_is_right.all()
    assert style_is_right.tolist() == [row["style"] == "noto" for row in prompts]


def test_classifiers_are_trained_once_and_loaded_again(folder, tmp_path):
    path = tmp_path / "classifiers.pt"
    classifiers = EmojiClassifiers.load_or_train(folder, path, steps=1)
    image = torch.zeros(2, 3, 128, 128)
    objects, styles = classifiers.classify(image)
    assert objects.shape == (2, 3)
    assert styles.shape == (2, 8)
    loaded = EmojiClassifiers.load_or_train(folder, path, steps=1)
    torch.testing.assert_close(loaded.style_classifier(image), classifiers.style_classifier(image))
    with pytest.raises(SystemExit, match="classifiers.pt has classifiers of other objects"):
        EmojiClassifiers.load_or_train(folder, path, objects=["a", "b", "c"])

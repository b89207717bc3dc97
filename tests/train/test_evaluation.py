"""Judging generated pictures."""

from pathlib import Path
from typing import Any

import pytest
import torch

import evaluation
from judges import Gallery, Judges, background
from ldm.data.folder import Folder
from ldm.data.transforms import COLOURS, Emoji

EMOJI = Path(__file__).parents[1] / "data" / "emoji"


@pytest.fixture
def folder() -> Folder:
    return Folder(root=EMOJI, transform=Emoji())


@pytest.mark.parametrize("colour", COLOURS)
def test_the_background_is_told_by_its_border(colour: str) -> None:
    image = torch.tensor(COLOURS[colour])[None, :, None, None].expand(1, 3, 64, 64) / 127.5 - 1
    image = image + 0.05 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    image[..., 8:56, 8:56] = torch.rand(1, 3, 48, 48)
    assert background(image) == [colour]


def test_prompts_name_object_style_and_colour(folder: Folder) -> None:
    (held_out,) = evaluation.prompts(folder, "heldout")
    assert held_out["object"] == "red apple"
    text = f"{held_out['style']} emoji of a red apple on"
    assert text in held_out["prompt"]
    assert f"{held_out['colour']} background" in held_out["prompt"]
    assert len(evaluation.prompts(folder, "train", count=5)) == 5


def test_shuffled_prompts_leave_none_in_place(folder: Folder) -> None:
    wanted = evaluation.prompts(folder, "train")
    mixed = evaluation.shuffled(wanted)
    assert all(a is not b for a, b in zip(wanted, mixed, strict=True))
    assert {id(row) for row in wanted} == {id(row) for row in mixed}


class Perfect(Judges):
    """Knows the answers."""

    def __init__(self, folder: Folder, wanted: list[dict]) -> None:
        super().__init__(
            ["cat face", "red apple", "rocket"], sorted({r["style"] for r in folder.rows})
        )
        self.answers = self.labels(wanted)

    def judge(self, image: torch.Tensor) -> Any:
        objects, styles = self.answers
        ranks = torch.stack([(objects + k) % 3 for k in range(3)], dim=1)
        return ranks, torch.stack([(styles + k) % 8 for k in range(8)], dim=1)


def test_real_pictures_score_full_marks(folder: Folder) -> None:
    wanted = evaluation.prompts(folder, "train")
    images = evaluation.real(folder, wanted)
    judges = Perfect(folder, wanted)
    result = evaluation.score(judges, Gallery(folder, judges.objects), images, wanted)
    assert result == evaluation.Score(23, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert "| real | 23 | 100.0 % | 100.0 %" in evaluation.table({"real": result})


def test_the_gallery_tells_style_apart_from_object(folder: Folder) -> None:
    wanted = evaluation.prompts(folder, "train")
    images = evaluation.real(folder, wanted)
    gallery = Gallery(folder, sorted({row["object"] for row in wanted}))
    rocket = [{**row, "object": "rocket"} for row in wanted]
    object_is_right, _ = gallery.nearest(images, rocket)
    assert object_is_right.tolist() == [row["object"] == "rocket" for row in wanted]
    drawn_anew = [{**row, "style": "noto"} for row in wanted]
    object_is_right, style_is_right = gallery.nearest(images, drawn_anew)
    assert object_is_right.all()
    assert style_is_right.tolist() == [row["style"] == "noto" for row in wanted]


def test_judges_learn_and_are_kept(folder: Folder, tmp_path: Path) -> None:
    path = tmp_path / "judges.pt"
    judges = Judges.load_or_train(folder, path, steps=3)
    images = torch.zeros(2, 3, 128, 128)
    objects, styles = judges.judge(images)
    assert objects.shape == (2, 3)
    assert styles.shape == (2, 8)
    again = Judges.load_or_train(folder, path, steps=3)
    torch.testing.assert_close(again.by_style(images), judges.by_style(images))

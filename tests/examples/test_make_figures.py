"""Figures of the documentation."""

import torch

from ldm.imaging.pixels import to_tensor
from make_figures import DEMO_IMAGES, Panel, draw_figure


def test_a_figure_has_titles_over_rows_of_images():
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(2, 3, 16, 16)
    figure = draw_figure([[Panel("before", red), Panel("after", red)], [Panel("III", red)]])
    assert figure.size == (2 * (2 * 18 + 2) + 10, 2 * (22 + 20))
    image = to_tensor(figure)[0]  # (3, H, W)
    is_red = (image == torch.tensor([1.0, -1.0, -1.0])[:, None, None]).all(dim=0)
    assert is_red.sum() == 6 * 16 * 16
    assert not is_red[:22].any()
    assert (image[:, :22] < 0).any()  # the titles


def test_the_demo_shows_every_style():
    assert len({style for _, style, _ in DEMO_IMAGES}) == 8

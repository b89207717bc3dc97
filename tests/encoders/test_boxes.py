"""Tokens of boxes, as recorded from the original."""

import pytest
import torch

from goldfile import load_golden
from ldm.encoders.boxes import Box, tokenize_boxes
from ldm.runtime.errors import ArgumentError

PADDING = 8191
NUM_CATEGORIES = 182


def split_triples(tokens):
    return sorted(map(tuple, tokens[:-2].reshape(-1, 3).tolist()))


def test_boxes_have_the_recorded_tokens():
    """The original shuffles boxes, and adds flags such as "group" to their categories."""
    golden = load_golden("ldm_layout")
    boxes = []
    for left, top, width, height, category, *flags in golden.select("shared/")["boxes"].tolist():
        modifier = sum(int(flag) << bit for bit, flag in enumerate(flags))
        boxes.append(Box(int(category) + NUM_CATEGORIES * modifier, left, top, width, height))
    tokens = tokenize_boxes(boxes, 92)[0]
    recorded = golden.outputs("bbox_full")["tokens"]
    assert split_triples(tokens) == split_triples(recorded)
    assert tokens[-2:].tolist() == recorded[-2:].tolist() == [0, 8099]


def test_padding_is_after_the_boxes():
    tokens = tokenize_boxes([Box(5, 0.5, 0, 0.5, 1)], 8)
    assert tokens.tolist() == [[5, 44, 8099, PADDING, PADDING, PADDING, 0, 8099]]
    assert tokens.dtype == torch.int64


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([Box(1, 0, 0, 1, 1)] * 3, "at most 2 boxes are allowed, got 3"),
        ([Box(1, 10, 20, 100, 100)], "fractions of the image's sides"),
        ([Box(9000, 0, 0, 1, 1)], "category of a box must be in 0 … 8190, got 9000"),
    ],
)
def test_invalid_boxes_are_refused(boxes, message):
    with pytest.raises(ArgumentError, match=message):
        tokenize_boxes(boxes, 8)

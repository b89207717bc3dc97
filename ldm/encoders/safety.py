"""The safety checker of Stable Diffusion 1: flags images by their CLIP embeddings.

    image --resize_and_center_crop, normalize--> VisionTower --> e (D,)
    score k = cos(e, concept k) - threshold k, rounded to 3 decimals; above 0 the image is flagged

There are 17 concepts. 3 special-care concepts are scored before them: they do not flag an image,
but after the first score above 0 all later scores are 0.01 higher. The texts of the concepts were
not published; Rando et al. 2022 (arXiv:2210.04610) found all 17 to be sexual.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm.encoders.image import normalize_pixels
from ldm.encoders.towers import VisionTower
from ldm.imaging.pixels import resize_and_center_crop

__all__ = ["SafetyChecker", "Verdict"]

SPECIAL_CARE_ADJUSTMENT = 0.01  # added to scores after a match of a special-care concept
SCORE_DECIMALS = 3


@dataclass(frozen=True)
class Verdict:
    """The scores of an image: cosine similarity minus threshold, above 0 for a match.

    Args:
        scores: One per concept; above 0 flags the image.
        special_scores: One per special-care concept; above 0 does not flag the image.
    """

    scores: tuple[float, ...]
    special_scores: tuple[float, ...]

    @property
    def concepts(self) -> list[int]:
        """Indices of the concepts that flag the image."""
        return [k for k, score in enumerate(self.scores) if score > 0]

    @property
    def special_concepts(self) -> list[int]:
        """Indices of the matched special-care concepts."""
        return [k for k, score in enumerate(self.special_scores) if score > 0]

    @property
    def is_flagged(self) -> bool:
        """Whether any concept matches."""
        return bool(self.concepts)


class SafetyChecker(nn.Module):
    """A vision tower of CLIP, with an embedding and a threshold per concept.

    Args:
        visual: The vision tower, which embeds images as (B, D).
    """

    def __init__(
        self, visual: VisionTower, *, num_concepts: int = 17, num_special_concepts: int = 3
    ) -> None:
        super().__init__()
        embed_dim = visual.proj.shape[1]
        self.visual = visual
        self.concept_embeds = nn.Parameter(torch.empty(num_concepts, embed_dim))
        self.concept_embeds_weights = nn.Parameter(torch.empty(num_concepts))
        self.special_care_embeds = nn.Parameter(torch.empty(num_special_concepts, embed_dim))
        self.special_care_embeds_weights = nn.Parameter(torch.empty(num_special_concepts))

    @torch.no_grad()
    def judge(self, images: Sequence[Image.Image]) -> list[Verdict]:
        """Score images, one by one, so that results do not depend on the batch."""
        device = self.visual.proj.device
        embeddings = [self.visual(self.preprocess(image).to(device)) for image in images]
        return [verdict for e in embeddings for verdict in self.judge_embeddings(e)]

    def preprocess(self, image: Image.Image) -> Tensor:
        """Resize the shorter side to S, center-crop and normalize: (1, 3, S, S) float32."""
        cropped = resize_and_center_crop(image.convert("RGB"), self.visual.image_size)
        pixels = torch.from_numpy(np.array(cropped)).movedim(-1, 0)[None].float() / 255
        return normalize_pixels(pixels)

    def judge_embeddings(self, embeddings: Tensor) -> list[Verdict]:
        """Score images by their embeddings (B, D)."""
        special_similarities, concept_similarities = (
            F.normalize(embeddings.float()) @ F.normalize(concept_embeddings.float()).mT
            for concept_embeddings in (self.special_care_embeds, self.concept_embeds)
        )  # (B, 3) and (B, 17)
        pairs = zip(special_similarities.tolist(), concept_similarities.tolist(), strict=True)
        return [self._score_similarities(*similarities) for similarities in pairs]

    def _score_similarities(
        self, special_similarities: list[float], concept_similarities: list[float]
    ) -> Verdict:
        special_scores, adjustment = [], 0.0
        thresholds = self.special_care_embeds_weights.tolist()
        for similarity, threshold in zip(special_similarities, thresholds, strict=True):
            special_scores.append(round(similarity - threshold + adjustment, SCORE_DECIMALS))
            if special_scores[-1] > 0:
                adjustment = SPECIAL_CARE_ADJUSTMENT
        thresholds = self.concept_embeds_weights.tolist()
        scores = [
            round(similarity - threshold + adjustment, SCORE_DECIMALS)
            for similarity, threshold in zip(concept_similarities, thresholds, strict=True)
        ]
        return Verdict(tuple(scores), tuple(special_scores))

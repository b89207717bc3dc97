"""Evaluation during training: FID, KID, CLIP score … of images sampled from fixed prompts.

eval/fid_scale_3, eval/prompt_score_scale_3 …
"""

from typing import Any

import torch

from ldm.evaluation.extractors import CLIPScorer, InceptionExtractor
from ldm.evaluation.load import find_clip_weights, load_clip_scorer, load_inception_extractor
from ldm.evaluation.prompts import draw_prompts, read_prompts
from ldm.evaluation.score import ImageSet, compute_scores, read_features
from ldm.generate.lora_tags import split_tags
from ldm.generate.prompt_file import has_options
from ldm.generate.tasks.txt2img import TASK
from ldm.imaging.pixels import to_pil
from ldm.imaging.reading import list_images
from ldm.model import LatentDiffusion
from ldm.pipelines import txt2img
from ldm.pipelines.families import FAMILIES, find_family
from ldm.runtime.errors import ConfigError
from ldm.train.config.schema import EvaluationOptions
from ldm.train.distributed.parallel import eval_mode, is_sharded
from ldm.train.monitoring.samples import DEFAULT_SAMPLING
from ldm.train.run import Run

__all__ = ["Evaluator"]

SECTION = "lightning.callbacks.evaluation"


class Evaluator:
    """Computes metrics of a run; opens all files in advance, so that a wrong one ends it early.

    Raises:
        ConfigError: The model is not a text-to-image model, a prompt has options, or there is
            neither a folder of reference images nor a CLIP model.
        ValueError, OSError: A file cannot be read.
    """

    def __init__(self, run: Run, options: EvaluationOptions) -> None:
        self.run = run
        self.options = options
        model = run.model
        if not isinstance(model, LatentDiffusion) or find_family(model.conditioner) != "text":
            raise ConfigError(f"{SECTION}: only {FAMILIES['text'].title} can be evaluated")
        prompts = draw_prompts(read_prompts(options.prompts), options.count, run.seed)
        self.prompts = [prompt.text for prompt in prompts]
        for prompt in self.prompts:
            if has_options(prompt, TASK) or split_tags(prompt)[1]:
                raise ConfigError(f"{SECTION}.prompts: `{prompt}` has options or LoRAs of its own")
        self.reference: ImageSet | None = None
        self.extractor: InceptionExtractor | None = None
        self.prompt_scorer: CLIPScorer | None = None
        if not run.ranks.is_main_process:  # the others compute no metrics
            return
        if options.reference is not None:
            side = model.image_size * model.downscale_factor
            self.reference = ImageSet("reference", list_images(options.reference), side=side)
            self.extractor = load_inception_extractor(options.inception, options.resize, run.device)
        clip = find_clip_weights(options.clip)
        if clip is not None:
            self.prompt_scorer = load_clip_scorer(clip, run.device)
        if self.extractor is None and self.prompt_scorer is None:
            raise ConfigError(f"{SECTION} needs `reference`, a folder of images, or `clip`, a file")

    def __call__(self) -> dict[str, float]:
        """Sample images with the EMA weights, and return their metrics by name.

        The main process samples and evaluates; others return {}, but sample if weights are sharded.
        """
        run = self.run
        if not (run.ranks.is_main_process or is_sharded(run.task.trainable)):
            return {}
        metrics: dict[str, float] = {}
        ema = run.state.ema
        weights = ema.apply_to(run.task.trainable, enabled=bool(ema.decay))
        with weights, eval_mode(run.model):
            for scale in self.options.scales:
                values = self._compute_metrics(scale)
                metrics |= {f"eval/{name}_scale_{scale:g}": v for name, v in values.items()}
        return metrics

    def _compute_metrics(self, scale: float) -> dict[str, float]:
        run, model = self.run, self.run.model
        assert isinstance(model, LatentDiffusion)
        options = run.settings.callbacks.sampling
        sampling: dict[str, Any] = {**DEFAULT_SAMPLING, **options, "scale": scale}
        features, prompt_scores = [], []
        for start in range(0, len(self.prompts), run.batch_size):
            prompts = self.prompts[start : start + run.batch_size]
            # An image depends on its index only, not on the batch size.
            seeds = list(range(start, start + len(prompts)))
            with run.autocast():
                images = to_pil(txt2img(model, prompts, seeds=seeds, **sampling))
            if self.extractor is not None:
                features.append(self.extractor.extract_features(images))
            if self.prompt_scorer is not None:
                prompt_scores.append(self.prompt_scorer.score(images, prompts))
        reference_features = None
        if self.extractor is not None and self.reference is not None:
            reference_features = read_features(self.reference, self.extractor)
        estimates = compute_scores(
            torch.cat(features) if features else None,
            reference_features,
            torch.cat(prompt_scores) if prompt_scores else None,
        )
        return {name: estimate.value for name, estimate in estimates.items()}

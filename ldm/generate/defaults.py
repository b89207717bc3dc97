"""Fill in the defaults of task and model for sampling options that are not set."""

import logging
from dataclasses import replace

from ldm.diffusion.names import SAMPLERS
from ldm.generate.groups import Sampling
from ldm.generate.request import Request
from ldm.loading.variants import VARIANTS
from ldm.model import Defaults, LatentDiffusion
from ldm.pipelines.sampling_options import get_default_scheduler

__all__ = ["log_variant", "resolve_sampling"]

log = logging.getLogger(__name__)


def resolve_sampling(request: Request, defaults: Defaults) -> Sampling:
    """Return the sampling options of a request, with defaults for scale, steps, sampler and eta.

    Args:
        defaults: Defaults of the model; a scale of None stands for the default of the task.
    """
    sampling = request.sampling
    sampler = sampling.sampler or defaults.sampler
    scales = (sampling.scale, SAMPLERS[sampler].scale, defaults.scale, request.task.scale)
    eta = SAMPLERS[sampler].eta
    if sampler == defaults.sampler and defaults.eta is not None:
        eta = defaults.eta
    return replace(
        sampling,
        scale=next(scale for scale in scales if scale is not None),
        steps=len(sampling.sigmas) - 1 if sampling.sigmas else sampling.steps or defaults.steps,
        sampler=sampler,
        eta=eta if sampling.effective_eta is None else sampling.effective_eta,
    )


def log_variant(request: Request, model: LatentDiffusion) -> None:
    """Log the kind of a few-step model, and how it will be sampled."""
    variant = model.provenance.get("variant")
    if variant is None:
        return
    sampling = resolve_sampling(request, model.defaults)
    assert sampling.sampler is not None
    log.info(
        "`%s` is %s (by %s): sampler %s, scheduler %s, steps %d, guidance scale %g",
        variant["file"],
        VARIANTS[variant["name"]].title,
        variant["evidence"],
        sampling.sampler,
        sampling.scheduler
        or get_default_scheduler(model.schedule, model.defaults, sampling.sampler),
        sampling.steps,
        sampling.scale,
    )

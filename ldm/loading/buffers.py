"""Buffers that are written with the weights: the noise schedule, and marker tensors."""

import torch
from torch import Tensor

from ldm.diffusion.schedule import ContinuousSchedule, Schedule
from ldm.loading.weight_names import has_sgm_names
from ldm.model import LatentDiffusion

__all__ = ["make_buffers"]


def make_buffers(model: LatentDiffusion) -> dict[str, Tensor]:
    """Return the buffers of the noise schedule, and marker tensors of special models.

    `v_pred` (v-prediction SDXL) and `ztsnr` (zero terminal SNR) are empty tensors. `edm_vpred.*`
    are the range of CosXL's noise levels, `edm_mean` and `edm_std` (1, C, 1, 1) the statistics of
    Playground 2.5's latents.
    """
    schedule, predicts_v = model.schedule, model.parameterization == "v"
    is_sgm = has_sgm_names(model.state_dict())
    buffers: dict[str, Tensor] = {}
    if isinstance(schedule, Schedule):
        sgm_buffers = {"denoiser.sigmas": schedule.network_sigmas.float()}
        buffers = sgm_buffers if is_sgm else schedule.compute_buffers()
    if isinstance(schedule, ContinuousSchedule) and predicts_v:
        buffers["edm_vpred.sigma_min"] = torch.tensor(schedule.sigma_min)
        buffers["edm_vpred.sigma_max"] = torch.tensor(schedule.sigma_max)
    elif predicts_v and (is_sgm or schedule.zero_snr):
        buffers["v_pred"] = torch.empty(0)
    if schedule.zero_snr:
        buffers["ztsnr"] = torch.empty(0)
    if model.latent_mean is not None and model.latent_std is not None:
        buffers["edm_mean"] = model.latent_mean.reshape(1, -1, 1, 1)
        buffers["edm_std"] = model.latent_std.reshape(1, -1, 1, 1)
    return buffers

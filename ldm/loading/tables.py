"""Tensors beside the weights in files: noise schedule, markers of what the model predicts."""

import torch
from torch import Tensor

from ldm.diffusion.schedule import ContinuousSchedule, Schedule
from ldm.loading.weight_names import has_engine_names
from ldm.model import LatentDiffusion

__all__ = ["make_tables"]


def make_tables(model: LatentDiffusion) -> dict[str, Tensor]:
    """Return the schedule's tables, and the tensors by which other programs know special models.

    `v_pred` and `ztsnr` are empty: SDXL that predicts v, zero terminal SNR. `edm_vpred.*` are the
    range of CosXL's noise levels, `edm_*` what normalises the latents of Playground 2.5.
    """
    schedule, predicts_v = model.schedule, model.parameterization == "v"
    is_engine = has_engine_names(model.state_dict())
    tables: dict[str, Tensor] = {}
    if isinstance(schedule, Schedule):
        tables = (
            {"denoiser.sigmas": schedule.network_levels.float()}
            if is_engine
            else schedule.buffers()
        )
    if isinstance(schedule, ContinuousSchedule) and predicts_v:
        tables["edm_vpred.sigma_min"] = torch.tensor(schedule.sigma_min)
        tables["edm_vpred.sigma_max"] = torch.tensor(schedule.sigma_max)
    elif predicts_v and (is_engine or schedule.zero_snr):
        tables["v_pred"] = torch.empty(0)
    if schedule.zero_snr:
        tables["ztsnr"] = torch.empty(0)
    if model.latent_mean is not None and model.latent_std is not None:
        tables["edm_mean"] = model.latent_mean.reshape(1, -1, 1, 1)
        tables["edm_std"] = model.latent_std.reshape(1, -1, 1, 1)
    return tables

"""A tiny model (30 thousand parameters) with a config of the original; converted families."""

import functools
from pathlib import Path

import pytest
import torch

from ldm.loading.config import instantiate, read_yaml
from ldm.loading.convert import convert, plan_conversion
from ldm.loading.weight_names import restore_names
from loading.tinyfamilies import write_family

TINY_YAML = """
model:
  base_learning_rate: 1.e-4
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    timesteps: 1000
    image_size: 8
    channels: 4
    scale_factor: 0.18215
    conditioning_key: crossattn
    use_ema: false
    monitor: val/loss_simple_ema
    scheduler_config: {target: os.system, params: {command: echo}}
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 8
        in_channels: 4
        out_channels: 4
        model_channels: 32
        attention_resolutions: [1]
        num_res_blocks: 1
        channel_mult: [1]
        num_head_channels: 16
        use_spatial_transformer: true
        use_linear_in_transformer: true
        context_dim: 16
        legacy: false
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        ckpt_path: models/first_stage_models/none.ckpt
        ddconfig: {double_z: true, z_channels: 4, resolution: 16, in_channels: 3, out_ch: 3,
          ch: 32, ch_mult: [1, 1], num_res_blocks: 1, attn_resolutions: [], dropout: 0.0}
        lossconfig: {target: torch.nn.Identity}
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder
      params:
        freeze: true
        layer: penultimate
        arch: {embed_dim: 16, text_cfg: {vocab_size: 49408, width: 16, heads: 2, layers: 2}}
data:
  target: nowhere.Data
lightning:
  trainer: {devices: 1}
"""


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    path.write_text(TINY_YAML)
    return path


@pytest.fixture(scope="session")
def tiny_state(tiny_yaml) -> dict[str, torch.Tensor]:
    """Random weights with the original's names, and the buffers of the noise schedule."""
    torch.manual_seed(0)
    model = instantiate(read_yaml(tiny_yaml), where="tiny.yaml")
    state = restore_names(model.state_dict(), model.schedule.compute_buffers())
    return {name: torch.randn_like(v) if v.dim() > 1 else v for name, v in state.items()}


@pytest.fixture(scope="session")
def convert_family(tmp_path_factory):
    """Function of a family -> original checkpoint, its weights, diffusers folder; cached."""
    parent = tmp_path_factory.mktemp("families")

    @functools.cache
    def convert_family(family):
        source, folder = parent / f"{family}.safetensors", parent / family
        state = write_family(family, source)
        convert(plan_conversion(source, folder))
        return source, state, folder

    return convert_family

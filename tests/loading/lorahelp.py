"""Tiny models and LoRAs; models of diffusers and transformers with the same weights."""

import re
import warnings
from pathlib import Path

import torch

from ldm.conditioning import Conditioner
from ldm.diffusion.schedule import Schedule, make_betas
from ldm.encoders.sizes import SizeEmbedding
from ldm.encoders.text import CLIPText, OpenCLIPText, TextEncoder
from ldm.loading.addons.lora import read_weight_changes
from ldm.loading.addons.lora_targets import list_lora_targets
from ldm.loading.diffusers.encoders import make_text_config, make_tokenizer_files
from ldm.loading.diffusers.files import write_text_files
from ldm.loading.diffusers.locations import convert_to_diffusers, locate_text_encoder, locate_unet
from ldm.loading.diffusers.networks import make_unet_config
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import PixelSpace
from ldm.nets.lora import LoRA, LoRALayer
from ldm.pipelines.families import is_sdxl
from nets.nethelp import build_tiny_unet

WIDTH, WIDTH_2, SIZE_DIM = 24, 32, 16
PROMPTS = ["a red apple on a table", "", "the cat, sleeping"]
FAMILIES = ("sd1", "sd2", "sdxl")
SDXL = {"num_res_blocks": 2, "transformer_depth": [1, 2], "num_classes": "sequential"}
UNETS = {
    "sd1": {"num_heads": 4, "num_head_channels": -1, "use_linear_in_transformer": False},
    "sd2": {},
    "sdxl": {**SDXL, "context_dim": WIDTH + WIDTH_2, "adm_in_channels": WIDTH_2 + 6 * SIZE_DIM},
    "refiner": {**SDXL, "context_dim": WIDTH_2, "adm_in_channels": WIDTH_2 + 5 * SIZE_DIM},
}
MICRO_CONDITIONS = {
    "original_size_as_tuple": [[64.0, 48.0]] * 3,
    "crop_coords_top_left": [[0.0, 8.0]] * 3,
    "target_size_as_tuple": [[64.0, 64.0]] * 3,
    "aesthetic_score": [[6.0]] * 3,
}
CLIP_CONFIG = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 3}


def build_tiny_model(family: str = "sd2", **unet_params) -> LatentDiffusion:
    levels = [2] if family in ("sdxl", "refiner") else [1]
    unet = build_tiny_unet(attention_resolutions=levels, **{**UNETS[family], **unet_params})
    networks = {"autoencoder": PixelSpace(), "conditioner": CONDITIONER_BUILDERS[family]()}
    model = LatentDiffusion(unet=unet, schedule=Schedule(make_betas("linear")), **networks)
    return model.eval().requires_grad_(False)


def build_clip_text(**options) -> CLIPText:
    return CLIPText(arch={**CLIP_CONFIG, "num_hidden_layers": 2}, **options)


def build_open_clip_text(width: int, heads: int, **options) -> OpenCLIPText:
    arch = {"width": width, "heads": heads, "layers": 3, "context_length": 77}
    return OpenCLIPText(arch=arch, layer="penultimate", **options)


def build_sdxl_conditioner(*size_keys: str, **text_encoders) -> Conditioner:
    embeddings = {key: SizeEmbedding(key=key, outdim=SIZE_DIM) for key in size_keys}
    return Conditioner(join="features", **text_encoders, **embeddings)


def build_big_g_text() -> OpenCLIPText:
    return build_open_clip_text(WIDTH_2, 4, always_return_pooled=True, legacy=False)


SIZE, CROP, TARGET, SCORE = MICRO_CONDITIONS
CONDITIONER_BUILDERS = {
    "sd1": lambda: Conditioner(text=build_clip_text()),
    "sd2": lambda: Conditioner(text=build_open_clip_text(WIDTH, 3)),
    "sdxl": lambda: build_sdxl_conditioner(
        SIZE, CROP, TARGET, text=build_clip_text(layer="hidden", layer_idx=1),
        text_2=build_big_g_text(),
    ),
    "refiner": lambda: build_sdxl_conditioner(SIZE, CROP, SCORE, text=build_big_g_text()),
}  # fmt: skip


def make_random_lora(model: LatentDiffusion, *, rank: int = 3, alpha=None, seed=0) -> LoRA:
    """Make a LoRA of every layer that LoRAs can change."""
    torch.manual_seed(seed)
    layers = {}
    for layer in list_lora_targets(model):
        layers[layer.kohya_name] = LoRALayer(layer.target, rank, alpha)
        torch.nn.init.normal_(layers[layer.kohya_name].lora_up.weight, std=0.05)
    return LoRA(layers).requires_grad_(False)


def read_lora(path: Path, model: LatentDiffusion) -> LoRA:
    """Read a plain LoRA without attaching or merging it."""
    return LoRA(dict(read_weight_changes(path, model)))


def rename_keys(state, *rules):
    """Apply (pattern, replacement) rules to the names of weights, one after another."""
    for pattern, replacement in rules:
        state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
    return state


def collect_weights(model: LatentDiffusion) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def are_equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in theirs
    )


@torch.no_grad()
def compute_outputs(model: LatentDiffusion) -> dict[str, torch.Tensor]:
    """Compute the prediction and the conditions for fixed inputs."""
    x, t = make_inputs()
    cond = model.condition({"txt": PROMPTS, **MICRO_CONDITIONS})
    return {"unet": model.unet(x, t, cond.crossattn, cond.vector), **cond.tensors()}


def make_inputs():
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([1, 400, 999])


def build_diffusers_pipeline(model: LatentDiffusion):
    """Build a pipeline of diffusers with the weights of our UNet and text encoders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
    has_sizes, state = is_sdxl(model), model.unet.state_dict()
    config = make_unet_config(model.unet, 8, size_embed_dim=SIZE_DIM if has_sizes else None)
    unet = diffusers.UNet2DConditionModel.from_config(config).eval()
    unet.load_state_dict(convert_to_diffusers(locate_unet(state), state))
    towers = [None, *map(build_transformers_tower, model.conditioner.find_all(TextEncoder))]
    components = {"unet": unet, "vae": diffusers.AutoencoderKL(), "tokenizer": None}
    components["scheduler"] = diffusers.DDIMScheduler()
    if not has_sizes:
        components |= {"safety_checker": None, "feature_extractor": None}
        components |= {"text_encoder": towers[1]}
        return diffusers.StableDiffusionPipeline(**components)
    components |= {"text_encoder": towers[-2], "text_encoder_2": towers[-1], "tokenizer_2": None}
    return diffusers.StableDiffusionXLPipeline(**components)


def build_transformers_tower(encoder: TextEncoder):
    """Build a text encoder of transformers with the weights of ours."""
    import transformers

    config, state = make_text_config(encoder), encoder.state_dict()
    tower_class = getattr(transformers, config["architectures"][0])
    tower = tower_class(tower_class.config_class(**config)).eval()
    theirs = convert_to_diffusers(locate_text_encoder(state), state)
    if "final_layer_norm.weight" in tower.state_dict():  # transformers 5 has no `text_model`
        theirs = {name.removeprefix("text_model."): value for name, value in theirs.items()}
    missing = tower.load_state_dict(theirs, strict=False).missing_keys
    assert [name for name in missing if "position_ids" not in name] == []
    return tower


def build_transformers_tokenizer(encoder: TextEncoder, folder: Path):
    """Build a tokenizer of transformers from the files that we write."""
    from transformers import CLIPTokenizer

    write_text_files(folder, make_tokenizer_files(encoder))
    return CLIPTokenizer.from_pretrained(folder)


@torch.no_grad()
def compute_diffusers_outputs(pipeline, model: LatentDiffusion) -> dict[str, torch.Tensor]:
    """Compute the same with diffusers; `model` only gives tokens and micro-conditions."""
    encoders = model.conditioner.encoders
    text_names = [name for name in encoders if "text" in name]
    towers = [pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    outputs = [
        tower(encoders[name].tokenize(PROMPTS), output_hidden_states=True)
        for name, tower in zip(text_names, [t for t in towers if t is not None], strict=True)
    ]
    x, t = make_inputs()
    if len(towers) == 1 or towers[1] is None:
        context = outputs[0].last_hidden_state
        return {"unet": pipeline.unet(x, t, context).sample, "crossattn": context}
    context = torch.cat([output.hidden_states[-2] for output in outputs], dim=2)
    text_embeds = outputs[-1].text_embeds
    time_ids = [torch.tensor(MICRO_CONDITIONS[name]) for name in encoders if name not in text_names]
    added_conditions = {"text_embeds": text_embeds, "time_ids": torch.cat(time_ids, dim=1)}
    prediction = pipeline.unet(x, t, context, added_cond_kwargs=added_conditions).sample
    return {"unet": prediction, "crossattn": context, "text_embeds": text_embeds}

"""Small models with LoRA, ours and those of diffusers and transformers with the same weights."""

import sys
import warnings
from pathlib import Path

import torch

from ldm.conditioning import Conditioner
from ldm.diffusion.schedule import Schedule, make_betas
from ldm.encoders.sizes import SizeEmbedding
from ldm.encoders.text import CLIPText, OpenCLIPText
from ldm.loading.addons.lora_targets import list_lora_targets
from ldm.loading.diffusers.locations import convert_to_diffusers, locate_text_encoder
from ldm.loading.diffusers.names import rename_unet_layers
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import PixelSpace
from ldm.nets.lora import LoRA, LoRALayer

sys.path.append(str(Path(__file__).parents[1] / "nets"))

from nethelp import tiny_unet

WIDTH, WIDTH_2, SIZES = 24, 32, 16
PROMPTS = ["a red apple on a table", "", "the cat, sleeping"]
KINDS = ("sd1", "sd2", "sdxl")
XL = {"num_res_blocks": 2, "transformer_depth": [1, 2], "num_classes": "sequential"}
UNETS = {
    "sd1": {"num_heads": 4, "num_head_channels": -1, "use_linear_in_transformer": False},
    "sd2": {},
    "sdxl": {**XL, "context_dim": WIDTH + WIDTH_2, "adm_in_channels": WIDTH_2 + 6 * SIZES},
    "refiner": {**XL, "context_dim": WIDTH_2, "adm_in_channels": WIDTH_2 + 5 * SIZES},
}
NUMBERS = {
    "original_size_as_tuple": [[64.0, 48.0]] * 3,
    "crop_coords_top_left": [[0.0, 8.0]] * 3,
    "target_size_as_tuple": [[64.0, 64.0]] * 3,
    "aesthetic_score": [[6.0]] * 3,
}
TEXT = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 3}
TEXT_2 = {"hidden_size": WIDTH_2, "intermediate_size": 4 * WIDTH_2, "num_attention_heads": 4}
THEIR_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
THEIR_XL = {
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": SIZES,
}
THEIR_KINDS = {
    "sd1": {"attention_head_dim": 4},
    "sd2": {"attention_head_dim": (2, 4), "use_linear_projection": True},
    "sdxl": {
        **THEIR_XL,
        "cross_attention_dim": WIDTH + WIDTH_2,
        "projection_class_embeddings_input_dim": WIDTH_2 + 6 * SIZES,
    },
    "refiner": {
        **THEIR_XL,
        "cross_attention_dim": WIDTH_2,
        "projection_class_embeddings_input_dim": WIDTH_2 + 5 * SIZES,
    },
}


def tiny_model(kind: str = "sd2", **unet) -> LatentDiffusion:
    levels = [2] if kind in ("sdxl", "refiner") else [1]
    net = tiny_unet(attention_resolutions=levels, **{**UNETS[kind], **unet})
    schedule = Schedule(make_betas("linear"))
    parts = {"unet": net, "autoencoder": PixelSpace(), "conditioner": CONDITIONERS[kind]()}
    return LatentDiffusion(**parts, schedule=schedule).eval().requires_grad_(False)


def clip(**options) -> CLIPText:
    return CLIPText(arch={**TEXT, "num_hidden_layers": 2}, **options)


def open_clip(width: int, heads: int, **options) -> OpenCLIPText:
    arch = {"width": width, "heads": heads, "layers": 3, "context_length": 77}
    return OpenCLIPText(arch=arch, layer="penultimate", **options)


def xl_conditioner(*sizes: str, **encoders) -> Conditioner:
    numbers = {key: SizeEmbedding(key=key, outdim=SIZES) for key in sizes}
    return Conditioner(join="features", **encoders, **numbers)


def big_g() -> OpenCLIPText:
    return open_clip(WIDTH_2, 4, always_return_pooled=True, legacy=False)


SIZE, CROP, TARGET, SCORE = NUMBERS
CONDITIONERS = {
    "sd1": lambda: Conditioner(text=clip()),
    "sd2": lambda: Conditioner(text=open_clip(WIDTH, 3)),
    "sdxl": lambda: xl_conditioner(
        SIZE, CROP, TARGET, text=clip(layer="hidden", layer_idx=1), text_2=big_g()
    ),
    "refiner": lambda: xl_conditioner(SIZE, CROP, SCORE, text=big_g()),
}


def random_adapter(model: LatentDiffusion, *, rank: int = 3, alpha=None, seed=0) -> LoRA:
    """Of every place there is."""
    torch.manual_seed(seed)
    changes = {}
    for layer in list_lora_targets(model):
        low = LoRALayer(layer.target, rank, alpha)
        torch.nn.init.normal_(low.lora_up.weight, std=0.05)
        changes[layer.kohya] = low
    return LoRA(changes).requires_grad_(False)


@torch.no_grad()
def outputs(model: LatentDiffusion) -> dict[str, torch.Tensor]:
    """Prediction and conditions for fixed inputs."""
    x, t = inputs()
    cond = model.condition({"txt": PROMPTS, **NUMBERS})
    return {"unet": model.unet(x, t, cond.crossattn, cond.vector), **cond.tensors()}


def inputs():
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([1, 400, 999])


def their_pipeline(model: LatentDiffusion, kind: str):
    """Of diffusers, with the UNet and text towers of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
    unet = diffusers.UNet2DConditionModel(**{**THEIR_UNET, **THEIR_KINDS[kind]}).eval()
    state = model.unet.state_dict()
    names = rename_unet_layers(state)
    unet.load_state_dict({names[name]: value for name, value in state.items()})
    encoders = [encoder for name, encoder in model.conditioner.encoders.items() if "text" in name]
    towers = [their_tower(encoder) for encoder in encoders]
    if kind == "refiner":
        towers.insert(0, None)
    parts = {"unet": unet, "vae": diffusers.AutoencoderKL(), "scheduler": None, "tokenizer": None}
    parts["scheduler"] = diffusers.DDIMScheduler()
    if kind in ("sd1", "sd2"):
        parts |= {"safety_checker": None, "feature_extractor": None, "text_encoder": towers[0]}
        return diffusers.StableDiffusionPipeline(**parts)
    parts |= {"text_encoder": towers[0], "text_encoder_2": towers[1], "tokenizer_2": None}
    return diffusers.StableDiffusionXLPipeline(**parts)


def their_tower(encoder: CLIPText | OpenCLIPText):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    state = encoder.state_dict()
    theirs = convert_to_diffusers(locate_text_encoder(state), state)
    sizes = TEXT if encoder.width == WIDTH else TEXT_2
    options = {**sizes, "eos_token_id": 49407, "projection_dim": encoder.width}
    if isinstance(encoder, CLIPText):
        tower = CLIPTextModel(CLIPTextConfig(**options, num_hidden_layers=2))
    elif encoder.always_return_pooled:
        config = CLIPTextConfig(**options, num_hidden_layers=3, hidden_act="gelu")
        tower = CLIPTextModelWithProjection(config)
        theirs["text_projection.weight"] = state["model.text_projection"].T
    else:
        config = CLIPTextConfig(**options, num_hidden_layers=2, hidden_act="gelu")
        tower = CLIPTextModel(config)
    if "final_layer_norm.weight" in tower.state_dict():  # transformers 5 has one level less
        theirs = {name.removeprefix("text_model."): value for name, value in theirs.items()}
    missing = tower.load_state_dict(theirs, strict=False).missing_keys
    assert [name for name in missing if "position_ids" not in name] == []
    return tower.eval()


@torch.no_grad()
def their_outputs(pipeline, model: LatentDiffusion) -> dict[str, torch.Tensor]:
    """As `outputs`; `model` only gives the tokens and the numbers."""
    conditioner = model.conditioner.encoders
    names = [name for name in conditioner if "text" in name]
    towers = [pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    answers = [
        tower(conditioner[name].tokenize(PROMPTS), output_hidden_states=True)
        for name, tower in zip(names, [t for t in towers if t is not None], strict=True)
    ]
    x, t = inputs()
    if len(towers) == 1 or towers[1] is None:
        context = answers[0].last_hidden_state
        return {"unet": pipeline.unet(x, t, context).sample, "crossattn": context}
    context = torch.cat([answer.hidden_states[-2] for answer in answers], dim=2)
    text_embeds = answers[-1].text_embeds
    numbers = [torch.tensor(NUMBERS[name]) for name in conditioner if name not in names]
    added = {"text_embeds": text_embeds, "time_ids": torch.cat(numbers, dim=1)}
    answer = pipeline.unet(x, t, context, added_cond_kwargs=added).sample
    return {"unet": answer, "crossattn": context, "text_embeds": text_embeds}

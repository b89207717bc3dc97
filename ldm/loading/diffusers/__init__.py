"""diffusers folders: a model as components, each with a JSON and its weights.

    model_index.json   unet/   vae/   text_encoder/   tokenizer/   scheduler/   …

`keys` says where each tensor of ours is there, `networks`, `encoders` and `schedulers` convert
configs, `index` says which components a family has, `files` reads and writes. Nothing here needs
diffusers or transformers.
"""

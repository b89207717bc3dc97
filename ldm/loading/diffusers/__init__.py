"""diffusers folders: a model as components, each with a JSON and its weights.

    model_index.json   unet/   vae/   text_encoder/   tokenizer/   scheduler/   …

`keys` maps our tensors to diffusers', `networks`, `encoders` and `schedulers` convert
configs, `index` says which components a family has, `files` reads and writes. Nothing here needs
diffusers or transformers.
"""

"""Read and write diffusers folders: a model as components, each with a JSON and its weights.

    model_index.json   unet/   vae/   text_encoder/   tokenizer/   scheduler/   …

`files` reads and writes folders, `folder_configs` defines the components of each family,
`locations` maps our tensors to diffusers', `networks`, `encoders` and `schedulers` convert configs.
diffusers and transformers are not needed.
"""

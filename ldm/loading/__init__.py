"""Load models from configs and weights, and convert between formats.

`load` is the entry point. It reads weights (`weights`, `files`), recognizes published families
(`families`), reads the YAML (`model_config`, `config`; `legacy` and `sgm` translate the original's
class names), detects few-step models (`find_variant`, `variants`), takes components from other
files (`replace_components`), and adds LoRAs and embeddings (`addons`). `published` and `hub` find
and download checkpoints by name. `diffusers` reads and writes diffusers folders, `convert` converts
between formats, `inspection` describes a file.

"The original" is the `ldm` of CompVis and Stability AI, sgm their `generative-models`; "our names"
of weights are those of this package's modules.

No code named in a file is executed: targets are looked up in a table, and pickles are read by a
restricted unpickler. Only `hub` uses the network.
"""

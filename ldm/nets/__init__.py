"""Networks with trainable parameters; each file imports only those before it.

attention -> blocks -> transformer -> unet, and attention -> blocks -> autoencoder. Parameter names
are the original ones, so published weights go straight into place. Nothing here knows about files,
schedules or prompts.
"""

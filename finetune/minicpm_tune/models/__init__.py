"""The models. One folder per family; beside them what families share.

loading            a folder or hub id -> a model with its weights
loss               the loss of supervised tokens, without all logits; the balance of experts
batch_layout       the slices and samples of a batch, and running a vision tower once on all slices
attention          attention within slices and within packed samples
quantization       the LLM in 4 or 8 bit
parameter_parts    which parts train, and the table of parts
speed_options      activation checkpointing, kernels of packages
autocast           what is 16 bit where trained weights are fp32
family_model       what the model classes of all families have in common: forward, generate, chat

A family is a package with a function ``model_class(generation)``; ``Generation.family`` names it. The class it gives
is a transformers model and a ``family_model.FamilyModel``, which

- loads and saves a released folder with ``from_pretrained`` and ``save_pretrained``;
- takes a ``batch.Batch`` (without ``provenance``) in ``forward`` and returns a ``loss.MiniCPMVOutput``;
- generates from left-padded prompts of the same form, and returns the new tokens alone;
- says with ``slice_grids(count)`` and ``slice_tokens(grid)`` how large images are in patches and tokens;
- has ``chat``.
"""

"""A run's network as one file: images of any size in, descriptors out, without this library.

`python -m mros_jax.export RUN --format onnx|stablehlo|torch`; docs/export.md says what is in each.
"""

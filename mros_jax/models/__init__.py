"""The MROS network: backbone, stripes, heads, and weights to and from PyTorch."""

"""torchcache: the layer between object storage and PyTorch."""

__version__ = "0.1.0"

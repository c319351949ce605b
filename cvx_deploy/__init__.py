"""cvx-deploy: a compiler that takes CogVideoX from a checkpoint to engines, and runs them without PyTorch."""

__version__ = "0.1.0"

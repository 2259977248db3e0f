"""surefoot: fine-tunes language models with LoRA, DoRA, QLoRA or in full, from one process to a cluster."""

__version__ = "0.1.0"

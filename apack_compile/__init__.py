"""attentionpack: a torch.compile backend for decoding with a packed KV cache."""
__version__ = "0.1.0"

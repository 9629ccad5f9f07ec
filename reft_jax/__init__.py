"""ReFT (arXiv 2401.08967) in JAX: Llama-family models in and out of Hugging Face folders, and their training.

`import reft_jax` imports no JAX: the executor's helpers must start before JAX does.
"""

import importlib

__version__ = "0.1.0"
_HF = dict.fromkeys(("load_hf", "load_value_head", "load_rerank_head"), "hf") | {"save_hf": "hf_write"}
__all__ = ["__version__", *_HF]


def __getattr__(name: str):
    if name in _HF:
        return getattr(importlib.import_module(f"reft_jax.model.{_HF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

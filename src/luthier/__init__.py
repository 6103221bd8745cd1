"""Luthier: fine-tune Llama-family models by LoRA and QLoRA, with each stage proven.

The stages are packages of their own (recipe, plan, data, model, train, evaluate, export, generate); nothing is imported
here, so `import luthier` costs nothing.
"""

__version__ = "0.1.0.dev0"
__all__ = ["__version__"]

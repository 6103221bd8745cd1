"""What the plan's choices rest on. A convention without a controlled study behind it is called one."""

from __future__ import annotations

__all__ = [
    "ATTENTION",
    "CAPACITY",
    "CHECKPOINTING",
    "EIGHT_BIT",
    "EPOCHS",
    "LEARNING_RATE",
    "LEARNS_LESS",
    "LOFTQ",
    "MICRO_BATCH",
    "MODELS",
    "PROMPT_LOSS",
    "PROMPT_WEIGHT",
    "QLORA",
    "RSLORA",
    "TARGETS",
    "WITHOUT_REGRET",
]

WITHOUT_REGRET = "LoRA Without Regret (Schulman 2025, doi 10.64434/tml.20250929)"
LEARNING_RATE = "tinker-cookbook, hyperparam_utils.py; " + WITHOUT_REGRET
CAPACITY = WITHOUT_REGRET + ": adapter parameters >= trained tokens"
TARGETS = WITHOUT_REGRET + "; PEFT method_comparison, MetaMathQA (2026-07)"
QLORA = "QLoRA (Dettmers et al. 2023, arXiv 2305.14314)"
RSLORA = "rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)"
LEARNS_LESS = "LoRA Learns Less and Forgets Less (Biderman et al. 2024, arXiv 2405.09673)"
EPOCHS = "Unsloth's guide: 1 to 3 (a convention, not a controlled study); Tinker's primer: at least 100 steps"
PROMPT_LOSS = "Instruction Tuning With Loss Over Instructions (Shi et al. 2024, arXiv 2405.14394)"
PROMPT_WEIGHT = "low to moderate weights did best (Chatterjee et al. 2025, arXiv 2507.07817)"
CHECKPOINTING = "torchtune's ablation (README): recomputing activations costs 21 % of the speed"
EIGHT_BIT = "8-bit optimizers (Dettmers et al. 2021, arXiv 2110.02861)"
MODELS = "computed: the memory and speed models (docs/plan.md)"
LOFTQ = "LoftQ (Li et al. 2023, arXiv 2310.08659)"
ATTENTION = "PyTorch's scaled_dot_product_attention: which backend serves which device"
MICRO_BATCH = MODELS + "; the result does not depend on it (the loss is divided once, by the whole step's tokens)"

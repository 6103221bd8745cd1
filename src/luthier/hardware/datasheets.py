"""Machines as their makers' documents describe them: one row each, figures as printed, and where they are printed.

Units of the tables: memory in GB as sold and in GiB as torch sees it, FLOP/s in 1e12, bytes a second in 1e9. Peaks are
dense (a datasheet's "with sparsity" is halved) and with fp32 accumulation, which is what training uses; fp32 is the
plain rate, as torch leaves TF32 off.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CARDS", "CHIPS", "PROCESSORS", "Card", "Chip", "Processor"]

PCIE3, PCIE4, PCIE5 = 15.8, 31.5, 63.0
"""x16, each way, in 1e9 bytes a second: 16 lanes of 8, 16, 32 GT/s in 128b/130b (PCI-SIG base specifications)."""


@dataclass(frozen=True)
class Card:
    """A GPU that torch calls cuda.

    seen_gib: torch's total_memory, as programs on such cards report it in their out-of-memory messages; the driver and
    error correction keep the rest of `sold_gb`, and drivers differ by up to 1 %. half, single: peaks in bf16/fp16 and
    fp32. bandwidth: of its memory. link: to its neighbours, each way. cores, host_gib: of the usual host, for each card
    (T4 and L4: Google Colab's; A10G: AWS g5.xlarge); None where hosts differ. limited: held below its peak by its power
    limit.
    """

    name: str
    title: str
    capability: tuple[int, int]
    sold_gb: int
    seen_gib: float
    half: float
    single: float
    bandwidth: float
    link: float
    cores: int
    host_gib: float | None
    source: str
    limited: bool = False
    rocm: bool = False


CARDS = (
    Card("t4", "NVIDIA T4", (7, 5), 16, 14.74, 65, 8.1, 320, PCIE3, 1, 12.7,
         "NVIDIA T4 datasheet", limited=True),
    Card("l4", "NVIDIA L4", (8, 9), 24, 22.03, 121, 30.3, 300, PCIE4, 6, 53.0,
         "NVIDIA L4 datasheet", limited=True),
    Card("a10g", "NVIDIA A10G", (8, 6), 24, 21.99, 70, 35, 600, PCIE4, 2, 16.0,
         "NVIDIA A10G datasheet"),
    Card("rtx3090", "NVIDIA GeForce RTX 3090", (8, 6), 24, 23.69, 71, 35.6, 936, PCIE4, 8, None,
         "NVIDIA Ampere GA102 whitepaper, appendix A"),
    Card("rtx4090", "NVIDIA GeForce RTX 4090", (8, 9), 24, 23.64, 165.2, 82.6, 1008, PCIE4, 8, None,
         "NVIDIA Ada GPU architecture whitepaper, appendix A"),
    Card("rtx5090", "NVIDIA GeForce RTX 5090", (12, 0), 32, 31.36, 209.5, 104.8, 1792, PCIE5, 8, None,
         "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A"),
    Card("a100-40g", "NVIDIA A100-SXM4-40GB", (8, 0), 40, 39.39, 312, 19.5, 1555, 300, 6, None,
         "NVIDIA A100 datasheet"),
    Card("a100-80g", "NVIDIA A100-SXM4-80GB", (8, 0), 80, 79.15, 312, 19.5, 2039, 300, 6, None,
         "NVIDIA A100 datasheet"),
    Card("h100", "NVIDIA H100 80GB HBM3 (SXM)", (9, 0), 80, 79.1, 989, 67, 3350, 450, 12, None,
         "NVIDIA H100 datasheet"),
    Card("h200", "NVIDIA H200 (SXM)", (9, 0), 141, 139.7, 989, 67, 4800, 450, 12, None,
         "NVIDIA H200 datasheet"),
    Card("b200", "NVIDIA B200 (SXM)", (10, 0), 180, 178.35, 2250, 75, 8000, 900, 12, None,
         "NVIDIA HGX B200 specifications, an eighth of eight"),
    Card("mi300x", "AMD Instinct MI300X", (9, 4), 192, 191.5, 1307.4, 163.4, 5300, 448, 6, None,
         "AMD Instinct MI300X data sheet", rocm=True),
)  # fmt: skip


@dataclass(frozen=True)
class Chip:
    """An Apple chip in its largest form. sold_gb: the memory sizes it is sold with. cores: of its CPU. single: fp32 of
    its GPU, which Apple published for the M1 family; later ones are GPU cores x 128 lanes x 2 x clock as reviewers
    measured it. bandwidth: Apple's figure. Half precision is no faster in these shader cores."""

    name: str
    title: str
    sold_gb: tuple[int, ...]
    cores: int
    single: float
    bandwidth: float
    source: str


_SPECS = "Apple's technical specifications and newsroom"

CHIPS = (
    Chip("m1", "Apple M1", (8, 16), 8, 2.6, 68, f"{_SPECS}, 2020-11"),
    Chip("m1-pro", "Apple M1 Pro", (16, 32), 10, 5.2, 200, f"{_SPECS}, 2021-10"),
    Chip("m1-max", "Apple M1 Max", (32, 64), 10, 10.4, 400, f"{_SPECS}, 2021-10"),
    Chip("m1-ultra", "Apple M1 Ultra", (64, 128), 20, 20.8, 800, f"{_SPECS}, 2022-03"),
    Chip("m2", "Apple M2", (8, 16, 24), 8, 3.6, 100, f"{_SPECS}, 2022-06"),
    Chip("m2-pro", "Apple M2 Pro", (16, 32), 12, 6.8, 200, f"{_SPECS}, 2023-01"),
    Chip("m2-max", "Apple M2 Max", (32, 64, 96), 12, 13.6, 400, f"{_SPECS}, 2023-01"),
    Chip("m2-ultra", "Apple M2 Ultra", (64, 128, 192), 24, 27.2, 800, f"{_SPECS}, 2023-06"),
    Chip("m3", "Apple M3", (8, 16, 24), 8, 3.5, 100, f"{_SPECS}, 2023-10"),
    Chip("m3-pro", "Apple M3 Pro", (18, 36), 12, 6.4, 150, f"{_SPECS}, 2023-10"),
    Chip("m3-max", "Apple M3 Max", (36, 48, 64, 96, 128), 16, 14.3, 400, f"{_SPECS}, 2023-10"),
    Chip("m3-ultra", "Apple M3 Ultra", (96, 256, 512), 32, 28.6, 819, f"{_SPECS}, 2025-03"),
    Chip("m4", "Apple M4", (16, 24, 32), 10, 3.8, 120, f"{_SPECS}, 2024-10"),
    Chip("m4-pro", "Apple M4 Pro", (24, 48, 64), 14, 7.5, 273, f"{_SPECS}, 2024-10"),
    Chip("m4-max", "Apple M4 Max", (36, 48, 64, 128), 16, 17.2, 546, f"{_SPECS}, 2024-10"),
)


@dataclass(frozen=True)
class Processor:
    """A plain computer without an accelerator, as people have it. half: bf16, None where it has no hardware for it.

    single: cores x 3.0e9 cycles x 32 FLOP (two 256-bit fused multiply-adds on 8 lanes). bandwidth: two channels of
    DDR4-3200 (JEDEC JESD79-4).
    """

    name: str
    title: str
    sold_gb: int
    cores: int
    single: float
    half: float | None
    bandwidth: float
    source: str


_TWO_CHANNELS = "two channels of DDR4-3200"
_AVX2 = f"8 cores × 3 GHz × 32 FLOP, {_TWO_CHANNELS}"
_AVX512 = f"as cpu-64g, bf16 twice fp32, {_TWO_CHANNELS}"

PROCESSORS = (
    Processor("cpu-16g", "8 cores, AVX2, 16 GB", 16, 8, 0.768, None, 51.2, _AVX2),
    Processor("cpu-32g", "8 cores, AVX2, 32 GB", 32, 8, 0.768, None, 51.2, _AVX2),
    Processor("cpu-64g", "8 cores, AVX2, 64 GB", 64, 8, 0.768, None, 51.2, _AVX2),
    Processor("cpu-bf16-64g", "8 cores, AVX512_BF16, 64 GB", 64, 8, 0.768, 1.536, 51.2, _AVX512),
)

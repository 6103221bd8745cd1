"""Memory figures and out-of-memory errors of devices that this machine does not have."""

from __future__ import annotations

import pytest
import torch

from luthier.train.memory import Memory, memory_peak, out_of_memory


def test_mps_counts_what_the_driver_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pass the tensors are gone, and the driver still holds what they took."""
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 2**30)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5 * 2**30)
    assert memory_peak(torch.device("mps")) == Memory(5.0, 5.0, 5.0)


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("MPS backend out of memory (MPS allocated: 9.00 GB)", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", False),
    ],
)
def test_errors_that_mean_out_of_memory(said: str, known: bool) -> None:
    assert out_of_memory(RuntimeError(said)) is known

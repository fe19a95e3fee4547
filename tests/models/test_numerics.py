"""The process-wide switches of torch are set within a context and restored after it."""

import os
import threading

import pytest
import torch

from musicgen_eval.models.numerics import float32_exactly, full_precision, numerics_in_use, request_deterministic_lstms


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_is_exact_within_the_context_and_restored_after_it(precision):
    found = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        with torch.autocast("cpu", dtype=torch.bfloat16), float32_exactly():
            assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.float32
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == precision
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
    finally:
        torch.set_float32_matmul_precision(found)


def test_the_last_of_several_threads_restores_the_switches():
    entered, leave = threading.Barrier(2), threading.Event()
    before = (
        torch.backends.cudnn.conv.fp32_precision,
        torch.backends.cudnn.rnn.fp32_precision,
        torch.get_default_dtype(),
    )

    def hold() -> None:
        with float32_exactly():
            entered.wait()
            leave.wait()

    other = threading.Thread(target=hold)
    with float32_exactly():
        other.start()
        entered.wait()
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"  # the other thread is still in its context
    leave.set()
    other.join()
    after = (
        torch.backends.cudnn.conv.fp32_precision,
        torch.backends.cudnn.rnn.fp32_precision,
        torch.get_default_dtype(),
    )
    assert after == before


def test_full_precision_turns_off_reduced_precision_and_nondeterministic_kernels():
    found = torch.backends.cudnn.benchmark
    attention = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cudnn.benchmark = True
    try:
        with full_precision():
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
            assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
            assert torch.backends.cudnn.deterministic
            assert not torch.backends.cudnn.benchmark
        assert torch.backends.cuda.cudnn_sdp_enabled() == attention
        assert torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.deterministic
    finally:
        torch.backends.cudnn.benchmark = found


def test_the_numerics_in_use_contain_switches_and_versions():
    assert numerics_in_use() == {
        "float32": "ieee",
        "reduced_precision_sums": False,
        "cudnn_deterministic": True,
        "cudnn_benchmark": False,
        "cudnn_attention": False,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def test_deterministic_lstms_are_requested_unless_the_user_has_decided(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    request_deterministic_lstms()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    request_deterministic_lstms()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_the_request_comes_too_late_after_cuda_has_started(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    request_deterministic_lstms()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ

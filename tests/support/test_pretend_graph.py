"""Tests of graphs on the pretend device: captured constants, errors and unchanged tensors."""

import pytest
import torch
from torch.nn import functional

from tests.support.pretend_graph import PretendGraph


def test_a_replay_uses_the_current_values_of_tensors(log):
    x, y = torch.tensor([1.0, 2.0], device="cuda"), torch.zeros(2, device="cuda")
    graph = PretendGraph()
    graph.capture(lambda: y.copy_(x * 2 + 1))
    for values in ([1.0, 2.0], [5.0, 7.0]):
        x.copy_(torch.tensor(values))
        graph.replay()
        assert y.tolist() == [2 * value + 1 for value in values]


def test_a_capture_leaves_every_tensor_unchanged(log):
    x, rows = torch.zeros(4, device="cuda"), torch.tensor([1, 2], device="cuda")

    def change():
        x.add_(1)
        x[1:3].mul_(3)
        x[rows] = x[rows] + 5
        x.scatter_(0, rows, 9.0)

    graph = PretendGraph()
    graph.capture(change)
    assert x.tolist() == [0, 0, 0, 0]
    graph.replay()
    assert x.tolist() == [1, 9, 9, 1]
    graph.replay()
    assert x.tolist() == [2, 9, 9, 2]


def test_python_numbers_are_constant_after_the_capture(log):
    x, columns = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")
    number, scale = [1], torch.tensor(10.0)

    def step():
        columns[number[0]].copy_(x[0] + number[0])  # an index and a summand of Python
        x[0].add_(scale)  # a number in CPU memory is an argument of the kernel

    graph = PretendGraph()
    graph.capture(step)
    number[0] = 3
    scale.fill_(99)
    graph.replay()
    graph.replay()
    assert columns.tolist() == [0, 11, 0, 0]
    assert x[0].item() == 20


def test_an_index_in_a_tensor_changes_with_each_replay(log):
    turn, columns = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.zeros(4, device="cuda")

    def step():
        columns.scatter_(0, turn, turn.float() + 1)
        turn.add_(1)

    graph = PretendGraph()
    graph.capture(step)
    for _ in range(3):
        graph.replay()
    assert columns.tolist() == [1, 2, 3, 0]


def test_a_tensor_replaced_after_the_capture_has_no_effect(log):
    held = {"x": torch.ones(2, device="cuda")}
    out = torch.zeros(2, device="cuda")
    graph = PretendGraph()
    graph.capture(lambda: out.copy_(held["x"] * 3))
    held["x"] = torch.full((2,), 7.0, device="cuda")
    graph.replay()
    assert out.tolist() == [3, 3]


def test_each_replay_overwrites_the_result_of_the_capture(log):
    x, made = torch.ones(2, 2, device="cuda"), []
    graph = PretendGraph()
    graph.capture(lambda: made.append((x @ x).t().reshape(-1)))
    x.fill_(2)
    graph.replay()
    assert made[0].tolist() == [8, 8, 8, 8]
    x.fill_(3)
    graph.replay()
    assert made[0].tolist() == [18, 18, 18, 18]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool(x.isfinite().all()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.tensor([1, 2], device="cuda"),
        lambda x: x[[0, 1]],
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.current_stream().synchronize(),
    ],
)
def test_waiting_during_a_capture_is_an_error(log, wait):
    x = torch.ones(3, device="cuda")

    def step():
        x.add_(1)
        wait(x)

    graph = PretendGraph()
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        graph.capture(step)
    assert x.tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        graph.replay()


def test_a_copy_from_pageable_memory_during_a_capture_is_an_error(log):
    x, pinned = torch.ones(2, device="cuda"), torch.ones(2).pin_memory()
    graph = PretendGraph()
    with pytest.raises(RuntimeError, match="unless the CPU tensor is pinned"):
        graph.capture(lambda: x.copy_(torch.ones(2), non_blocking=True))
    graph = PretendGraph()
    graph.capture(lambda: x.copy_(pinned, non_blocking=True))
    pinned.fill_(6)
    graph.replay()
    assert x.tolist() == [6, 6]


def test_other_errors_are_raised_and_end_the_capture(log):
    x = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        PretendGraph().capture(lambda: x.add_(1).add_(torch.ones(2)))
    assert x.tolist() == [1, 1]
    assert not torch.cuda.is_current_stream_capturing()


def test_captures_cannot_be_nested_or_repeated(log):
    graph = PretendGraph()
    with pytest.raises(RuntimeError, match="Only one capture at a time"):
        graph.capture(lambda: PretendGraph().capture(lambda: None))
    graph.capture(lambda: None)
    with pytest.raises(RuntimeError, match="already owns a captured graph"):
        graph.capture(lambda: None)


def test_kernels_of_a_graph_are_counted_and_a_replay_is_one_launch(log):
    x = torch.ones(2, 2, device="cuda")
    graph = PretendGraph()
    graph.capture(lambda: x.copy_((x @ x.t().reshape(4).view(2, 2)).t() + 1))
    assert graph.num_kernels == 4  # clone, mm, add, copy_
    log.clear()
    graph.replay()
    graph.replay()
    assert log.kernels == {"graph_replay": 2}
    assert log.num_replayed == 8
    assert log.num_waits == 0


def test_attention_and_norms_are_replayed(log):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 2, 3, 8, generator=generator).cuda()
    out = torch.zeros_like(x)

    def step():
        q = functional.layer_norm(x, (8,))
        out.copy_(functional.scaled_dot_product_attention(q, x, x))

    graph = PretendGraph()
    graph.capture(step)
    x.copy_(torch.rand(1, 2, 3, 8, generator=generator))
    graph.replay()
    replayed = out.cpu()
    step()
    assert torch.equal(replayed, out.cpu())


def test_graph_objects_of_torch_work(log):
    x, graph = torch.ones(2, device="cuda"), torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x.add_(1)  # a warm-up
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        x.mul_(2)
    assert x.tolist() == [2, 2]
    graph.replay()
    assert x.tolist() == [4, 4]
    with pytest.raises(RuntimeError, match="non-default stream"):
        torch.cuda.CUDAGraph().capture_begin()
    with pytest.raises(RuntimeError, match="failed due to a previous error"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x[0].item()

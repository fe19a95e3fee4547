"""Tests of the errors, records and memory layouts of the pretend device.

On a machine with a GPU, only `test_a_real_gpu_waits_where_the_pretend_one_does` runs, which compares both.
"""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from tests.support.pretend_cuda import PretendTensor, pretend_cuda

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="replaces a missing GPU")


def on_device(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype).to("cuda")


def test_a_device_tensor_reports_its_device_and_keeps_its_values(log):
    x = torch.arange(6.0).view(2, 3).to("cuda")
    assert (x.device, x.is_cuda, x.dtype, x.shape) == (torch.device("cuda", 0), True, torch.float32, (2, 3))
    assert torch.equal(x.cpu(), torch.arange(6.0).view(2, 3))
    assert (x.t().cpu() @ x.cpu()).equal((x.t() @ x).cpu())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3, device="cuda"),
        lambda: torch.arange(3, device=torch.device("cuda", 0)),
        lambda: torch.tensor([1.0, 2.0], device="cuda"),
        lambda: torch.as_tensor([1, 2], device="cuda:0"),
        lambda: torch.rand(3, device="cuda"),
        lambda: torch.ones(3).cuda(),
        lambda: torch.ones(3).to(0),
        lambda: torch.ones(3).to(torch.zeros(1, device="cuda")),
        lambda: torch.zeros(1, device="cuda").new_tensor([1, 2]),
        lambda: torch.zeros(1, device="cuda").new_zeros(2),
        lambda: nn.Linear(2, 2).to("cuda").weight,
        lambda: nn.Linear(2, 2).cuda().half().weight,
    ],
)
def test_all_functions_that_take_a_device_create_device_tensors(log, make: Callable[[], Tensor]):
    assert isinstance(make(), PretendTensor | nn.Parameter)
    assert make().device == torch.device("cuda", 0)


def test_a_device_context_creates_device_tensors(log):
    with torch.device("cuda"):
        assert torch.ones(2).is_cuda
        assert torch.tensor([1, 2]).is_cuda


def test_views_and_in_place_operators_share_memory(log):
    x = torch.zeros(2, 3, device="cuda")
    x[1, 1:] = 5
    x.t()[0].add_(1)
    assert x.tolist() == [[1, 0, 0], [1, 5, 5]]
    assert x[1].data_ptr() == x.data_ptr() + 3 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_products_only(log, dtype):
    linear = nn.Linear(4, 4).to("cuda").requires_grad_(False)
    with torch.autocast("cuda", dtype=dtype):
        product = linear(on_device(2, 4))
        assert product.dtype == dtype
        assert functional.layer_norm(product, (4,)).dtype == torch.float32
        assert functional.scaled_dot_product_attention(*[on_device(1, 2, 3, 8)] * 3).dtype == dtype
    assert linear(on_device(2, 4)).dtype == torch.float32


def test_bits_do_not_depend_on_the_number_of_threads(log):
    x = torch.rand(300, 301, generator=torch.Generator().manual_seed(0)).to("cuda")
    found = torch.get_num_threads()
    sums = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        sums.append((x @ x.t()).sum().cpu())
        assert torch.get_num_threads() == num_threads
    torch.set_num_threads(found)
    assert torch.equal(*sums)


def test_torch_reports_one_device(log):
    assert torch.cuda.is_available()
    assert torch.accelerator.is_available()
    assert (torch.cuda.device_count(), torch.cuda.current_device()) == (1, 0)
    assert torch.cuda.get_device_properties(0).major == 9
    assert torch.cuda.mem_get_info() == (80 * 2**30, 80 * 2**30)


@needs_no_gpu
def test_the_device_does_not_exist_after_the_block():
    with pretend_cuda():
        pass
    assert not torch.cuda.is_available()
    assert not torch.ones(1).is_pinned()
    with pytest.raises((RuntimeError, AssertionError), match=r"NVIDIA|CUDA"):
        torch.zeros(1, device="cuda")


def test_blocks_cannot_be_nested(log):
    with pytest.raises(RuntimeError, match="missing GPU"), pretend_cuda():
        pass


MIXED = "Expected all tensors to be on the same device"


@pytest.mark.parametrize(
    ("mixed", "message"),
    [
        (lambda x: x + torch.ones(3), MIXED),
        (lambda x: torch.ones(3).add_(x), MIXED),
        (lambda x: torch.cat([x, torch.ones(3)]), MIXED),
        (lambda x: x.expand(3, 3) @ torch.ones(3, 3), MIXED),
        (lambda x: functional.linear(x, torch.ones(2, 3)), MIXED),
        (lambda x: torch.where(torch.ones(3, dtype=torch.bool), x, x), MIXED),
        (lambda x: x.masked_fill(torch.ones(3, dtype=torch.bool), 0), MIXED),
        (lambda x: x.gather(0, torch.tensor([0, 1])), MIXED),
        (lambda x: torch.ones(3).gather(0, x.long()), MIXED),
        (lambda x: x.scatter_(0, torch.tensor([0, 1]), 1.0), MIXED),
        (lambda x: x.scatter_(0, x[:2].long(), torch.ones(2)), MIXED),
        (lambda x: x.index_select(0, torch.tensor([0])), MIXED),
        (lambda x: x.index_copy_(0, torch.tensor([0]), x[:1]), MIXED),
        (lambda x: x.index_add_(0, x[:1].long(), torch.ones(1)), MIXED),
        (lambda x: functional.embedding(torch.tensor([0]), x.view(3, 1)), MIXED),
        (lambda x: torch.ones(3).index_put_((torch.tensor([0, 1, 2]),), x), MIXED),
        (lambda x: x.index_put_((x.long(),), torch.ones(3)), MIXED),
        (lambda x: torch.ones(3)[x.long()], "indices should be either on cpu"),
        (lambda x: torch.ones(3)[x > 0], "indices should be either on cpu"),
        (lambda x: x.numpy(), "can't convert cuda:0 device type tensor to numpy"),
        (lambda x: x.pin_memory(), "only dense CPU tensors can be pinned"),
        (lambda x: torch.ops.mkldnn._linear_pointwise(x, x.view(1, 3), None, "none", [], ""), "'CUDA' backend"),
    ],
)
def test_errors_of_cuda_are_raised(log, mixed: Callable[[Tensor], object], message: str):
    with pytest.raises((RuntimeError, TypeError), match=message):
        mixed(on_device(3))


@pytest.mark.parametrize(
    "accepted",
    [
        lambda x: x + torch.tensor(1.0),
        lambda x: torch.tensor(2.0) * x,
        lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
        lambda x: x.masked_fill(x > 0, torch.tensor(0.0)),
        lambda x: x.fill_(torch.tensor(2.0)),
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x[[0, 2]],
        lambda x: x.index_put_((torch.tensor([0, 2]),), torch.tensor(1.0)),
        lambda x: x.gather(0, x.long()),
        lambda x: x.scatter(0, x.long(), 1.0),
        lambda x: x.scatter_add(0, x.long(), x),
        lambda x: x.index_select(0, x.long()),
        lambda x: x.index_copy(0, x[:1].long(), x[1:2]),
        lambda x: x.take(x.long()),
    ],
)
def test_operators_that_cuda_accepts_are_accepted(log, accepted: Callable[[Tensor], Tensor]):
    assert accepted(on_device(3)).is_cuda


def test_a_deterministic_cumsum_of_floats_is_an_error(log):
    torch.use_deterministic_algorithms(True)
    try:
        assert on_device(3, dtype=torch.int64).cumsum(0).tolist() == [1, 2, 3]
        with pytest.raises(RuntimeError, match="deterministic"):
            on_device(3).cumsum(0)
    finally:
        torch.use_deterministic_algorithms(False)


WAITING = {
    "item": (lambda x: x[0].item(), ["item"]),
    "a number in a condition": (lambda x: bool(x[0] > 0), ["item"]),
    "the whole as a list": (lambda x: x.tolist(), ["d2h"]),
    "nonzero": (lambda x: x.nonzero(), ["nonzero"]),
    "where a condition holds": (lambda x: torch.where(x > 0), ["nonzero"]),
    "masked_select": (lambda x: x.masked_select(x > 0), ["nonzero"]),
    "a boolean index": (lambda x: x[x > 0], ["nonzero"]),
    "writing behind a boolean index": (lambda x: x.index_put_((x > 0,), x[:1]), ["nonzero"]),
    "unique": (lambda x: x.unique(), ["nonzero"]),
    "repeats": (lambda x: x.repeat_interleave(torch.ones_like(x).long()), ["nonzero"]),
    "equal": (lambda x: torch.equal(x, x), ["item"]),
    "to the host": (lambda x: x.cpu(), ["d2h"]),
    "into host memory": (lambda x: torch.zeros(3).copy_(x), ["d2h"]),
    "to the device": (lambda x: torch.ones(3).to(x.device), ["h2d"]),
    "pinned, but blocking": (lambda x: torch.ones(3).pin_memory().to(x.device), ["h2d"]),
    "into device memory": (lambda x: x.copy_(torch.ones(3)), ["h2d"]),
    "numbers of Python": (lambda x: torch.tensor([1, 2], device=x.device), ["h2d"]),
    "a list as an index": (lambda x: x[[0, 1]], ["h2d"]),
    "an index of the host": (lambda x: x[torch.tensor([0, 1])], ["h2d"]),
    "one number at one place": (lambda x: x.__setitem__(0, 5), ["h2d"]),
    "synchronize": (lambda x: torch.cuda.synchronize(), ["synchronize"]),
    "a stream": (lambda x: torch.cuda.current_stream().synchronize(), ["synchronize"]),
    "an event": (lambda x: torch.cuda.current_stream().record_event().synchronize(), ["synchronize"]),
    "all of an accelerator": (lambda x: torch.accelerator.synchronize(), ["synchronize"]),
}
NOT_WAITING = {
    "arithmetic": (lambda x: (x + 1).softmax(0).sum(), []),
    "a mask": (lambda x: x.masked_fill(x > 0, 2.0), []),
    "a number behind a boolean index": (lambda x: x.__setitem__(x > 0, 2.0), []),
    "a number in a slice": (lambda x: x.__setitem__(slice(0, 2), 5), []),
    "an index of the device": (lambda x: x[x.long()], []),
    "made on the device": (lambda x: torch.full((3,), 2, device=x.device), []),
    "repeats of a known size": (lambda x: x.repeat_interleave(torch.ones_like(x).long(), output_size=3), []),
    "from pinned memory": (lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True), ["h2d async"]),
    "from a pinned view": (lambda x: x.copy_(torch.ones(6).pin_memory()[3:], non_blocking=True), ["h2d async"]),
    "to the host, unwaited": (lambda x: x.to("cpu", non_blocking=True), ["d2h async"]),
    "into pinned memory": (
        lambda x: torch.zeros(3, pin_memory=True).copy_(x, non_blocking=True),
        ["d2h async"],
    ),
    "streams": (lambda x: torch.cuda.current_stream().wait_stream(torch.cuda.Stream()), []),
}
PERHAPS_WAITING = {
    "pageable": (lambda x: torch.ones(3).to(x.device, non_blocking=True), ["h2d pageable"]),
    "pageable, into device memory": (lambda x: x.copy_(torch.ones(3), non_blocking=True), ["h2d pageable"]),
}


@pytest.mark.parametrize("name", [*WAITING, *NOT_WAITING, *PERHAPS_WAITING])
def test_copies_and_waits_are_recorded(log, name: str):
    call, kinds = (WAITING | NOT_WAITING | PERHAPS_WAITING)[name]
    x = on_device(3)
    log.clear()
    call(x)
    assert [sync.kind for sync in log.syncs] == kinds
    assert log.num_waits == (1 if name in WAITING else 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "name", [name for name in [*WAITING, *NOT_WAITING] if WAITING.get(name, [0, 0])[1] != ["synchronize"]]
)
def test_a_real_gpu_waits_where_the_pretend_one_does(name: str):
    call, _ = (WAITING | NOT_WAITING)[name]
    x = torch.ones(3).to("cuda")
    call(x.clone())
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    assert bool(waits) == (name in WAITING)


def test_an_asynchronous_copy_to_the_host_is_in_pinned_memory(log):
    assert on_device(3).to("cpu", non_blocking=True).is_pinned()
    assert not on_device(3).cpu().is_pinned()


def test_memory_is_pinned_until_it_is_freed(log):
    pinned = torch.ones(1000).pin_memory()
    assert pinned.is_pinned()
    assert pinned.pin_memory() is pinned
    assert pinned[3:].view(-1).is_pinned()
    assert not pinned.clone().is_pinned()
    del pinned
    assert not any(torch.ones(1000).is_pinned() for _ in range(3))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_pins_memory_without_a_warning(log, num_workers: int):
    data = list(torch.arange(8.0).view(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = list(DataLoader(data, batch_size=2, num_workers=num_workers, pin_memory=True))
    assert [batch.is_pinned() for batch in batches] == [True, True]
    assert torch.equal(torch.cat(batches), torch.stack(data))


def test_the_log_contains_sizes_and_places_of_copies(log):
    torch.ones(3, 5).to("cuda")
    (sync,) = log.syncs
    assert sync.num_bytes == 60
    assert "test_pretend_cuda.py" in sync.where
    assert sync.where.endswith("test_the_log_contains_sizes_and_places_of_copies")
    assert log.by_place() == {("h2d", sync.where): 1}
    assert log.by_kind() == {"h2d": 1}


def test_a_place_contains_the_lines_of_project_and_library(log):
    source = "def read(x):\n    return call(x)\n"
    space = {"call": lambda x: x.item()}
    exec(compile(source, "/anywhere/musicgen_eval/models/reading.py", "exec"), space)
    x = on_device(1)
    log.clear()
    space["read"](x)
    assert log.syncs[0].where.startswith("models/reading.py:2 read < test_pretend_cuda.py:")


def test_kernels_are_counted_and_views_are_not(log):
    x = on_device(4, 4)
    log.clear()
    y = (x.t().reshape(2, 8).unsqueeze(0) + 1) @ x.view(8, 2)
    torch.empty_like(y)
    assert log.kernels == {"clone": 1, "add": 1, "bmm": 1} or log.kernels == {"clone": 1, "add": 1, "mm": 1}
    assert log.num_launches == 3
    log.clear()
    assert (log.num_launches, log.syncs, log.attention) == (0, [], {})


def test_attention_is_counted_by_its_shapes(log):
    q, k = on_device(2, 4, 1, 8), on_device(2, 4, 7, 8)
    for _ in range(2):
        functional.scaled_dot_product_attention(q, k, k)
    assert log.attention == {(torch.float32, q.shape, k.shape, k.shape): 2}
    assert log.kernels[next(iter(log.kernels))] == 2


@pytest.mark.parametrize(
    ("dtype", "width", "masked", "strides"),
    [
        (torch.bfloat16, 64, False, (5 * 4 * 64, 64, 4 * 64, 1)),
        (torch.bfloat16, 36, False, (5 * 4 * 40, 40, 4 * 40, 1)),  # flash attention pads the heads and returns a slice
        (torch.bfloat16, 36, True, (4 * 5 * 36, 5 * 36, 36, 1)),
        (torch.float32, 36, False, (5 * 4 * 36, 36, 4 * 36, 1)),
        (torch.float32, 34, False, (4 * 5 * 34, 5 * 34, 34, 1)),
    ],
)
def test_attention_has_the_strides_of_the_cuda_kernels(log, dtype, width, masked, strides):
    q = on_device(2, 4, 5, width, dtype=dtype)
    mask = torch.ones(5, 5, dtype=torch.bool, device="cuda") if masked else None
    out = functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    assert out.stride() == strides
    assert torch.allclose(out.cpu().float(), torch.ones(2, 4, 5, width))


def test_padded_heads_cannot_be_viewed_and_can_be_reshaped(log):
    q = on_device(2, 4, 1, 36, dtype=torch.bfloat16)
    out = functional.scaled_dot_product_attention(q, q, q)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        out.view(2, -1)
    assert out.reshape(2, -1).shape == (2, 144)


def test_streams_and_events_can_be_used(log):
    side, x = torch.cuda.Stream(), on_device(3)
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() is side
        x.add_(1)
        x.record_stream(side)
        done = side.record_event()
    assert torch.cuda.current_stream() is torch.cuda.default_stream()
    torch.cuda.current_stream().wait_event(done)
    assert done.query()
    with pytest.raises(ValueError, match="enable_timing"):
        done.elapsed_time(done)

import threading
import time

import pytest
import torch

from musicgen_eval.models.threads import map_single_threaded, single_threaded


@pytest.fixture(autouse=True)
def _threads_as_found():
    found = torch.get_num_threads()
    yield
    torch.set_num_threads(found)


def torch_threads_of_a_new_thread() -> int:
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.parametrize("num_workers", [None, 1, 2, 5])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_every_item_has_one_torch_thread_and_other_threads_are_not_affected(num_threads, num_workers):
    torch.set_num_threads(num_threads)
    seen = map_single_threaded(lambda item: (item, torch.get_num_threads()), range(7), num_workers=num_workers)
    assert seen == [(item, 1) for item in range(7)]
    assert torch.get_num_threads() == num_threads
    assert torch_threads_of_a_new_thread() == num_threads


def test_items_are_processed_in_parallel():
    meet = threading.Barrier(2)
    assert map_single_threaded(lambda _: meet.wait(timeout=10) >= 0, range(2), num_workers=2) == [True, True]


def test_a_thread_started_within_single_threaded_has_the_default_number_of_torch_threads():
    torch.set_num_threads(3)
    with single_threaded():
        assert torch.get_num_threads() == 1
        assert torch_threads_of_a_new_thread() == 3
    assert torch.get_num_threads() == 3


def test_sums_are_bit_identical_for_any_number_of_threads(generator):
    rows = torch.randn(4, 320_000, generator=generator)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(torch.stack(map_single_threaded(torch.sum, rows)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_workers_have_the_modes_of_the_caller():
    def modes(_: int) -> tuple[bool, bool, torch.dtype]:
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), (torch.ones(1, 1) @ torch.ones(1, 1)).dtype

    def seen() -> list[tuple[bool, bool, torch.dtype]]:
        return list(dict.fromkeys(map_single_threaded(modes, range(3), num_workers=2)))

    assert seen() == [(False, True, torch.float32)]
    with torch.inference_mode():
        assert seen() == [(True, False, torch.float32)]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert seen() == [(False, False, torch.bfloat16)]
        with torch.autocast("cpu", enabled=False):
            assert seen() == [(False, False, torch.float32)]


def test_the_first_error_is_raised_and_remaining_items_are_skipped():
    begun = []

    def fail_on_one(item: int) -> None:
        begun.append(item)
        time.sleep(0.01)
        if item == 1:
            raise ValueError("item 1")

    with pytest.raises(ValueError, match="item 1"):
        map_single_threaded(fail_on_one, range(200), num_workers=2)
    assert len(begun) < 200
    assert torch_threads_of_a_new_thread() == torch.get_num_threads()


def test_no_items_give_no_results_and_zero_workers_are_refused():
    assert map_single_threaded(str, []) == []
    with pytest.raises(ValueError, match="num_workers"):
        map_single_threaded(str, [1], num_workers=0)

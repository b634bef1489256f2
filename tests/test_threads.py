"""Loops on several threads: every place is visited once, errors arrive, forked children go on."""

import multiprocessing
import sys
import threading
from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truestep.kernels import dispatch, packing, stepping, threads
from truestep.kernels.threads import GRAIN, spread


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def visit(start, stop, visits, callers):
    callers.append(threading.current_thread())
    for place in range(start, stop):
        visits[place] += 1


def meet(start, stop, meeting, *kept):
    meeting.wait(timeout=30)


@given(length=st.integers(0, 50), work=st.floats(0, 10 * GRAIN))
@pytest.mark.usefixtures("four_threads")
def test_every_place_is_visited_once(length, work):
    visits, callers = [0] * length, []
    spread(visit, length, work, visits, callers)
    assert visits == [1] * length
    assert len(callers) == (1 if work < 2 * GRAIN else max(1, min(4, work // GRAIN, length)))
    assert threading.current_thread() in callers


@pytest.mark.usefixtures("four_threads")
def test_parts_run_side_by_side():
    spread(meet, 4, 4 * GRAIN, threading.Barrier(4))


@pytest.mark.usefixtures("four_threads")
def test_what_a_caller_may_use_is_what_torch_may_use():
    torch.set_num_threads(1)
    callers = []
    spread(visit, 100, 100 * GRAIN, [0] * 100, callers)
    assert callers == [threading.current_thread()]


@pytest.mark.skipif(not dispatch.installed(), reason="numba is not installed")
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("four_threads")
def test_a_compiled_loop_that_fails_says_so(count):
    from numba import cfunc  # noqa: PLC0415

    from truestep.kernels.loops.step import SIGNATURE  # noqa: PLC0415

    fails = cfunc(SIGNATURE)(lambda a, b, c, d, e: 0 * (a + b + c + d + e))
    functions, table = array("q", [fails.address] * 3), stepping.Table(4)
    table.add((1, 0, 0), 0, 1, [stepping.Entry(1000, 1000)])
    lines = table.numbers
    arguments = lines.buffer_info()[0], 1, functions.buffer_info()[0], 0
    torch.set_num_threads(count)
    with pytest.raises(RuntimeError if count > 1 and threads.teams() else MemoryError):
        spread(dispatch.loops().step, table.work, table.work, *arguments)


@pytest.mark.parametrize("failing", range(4))
@pytest.mark.usefixtures("four_threads")
def test_an_error_arrives_when_all_parts_have_ended(failing):
    meeting, ended = threading.Barrier(4), []

    def loop(start, stop):
        meeting.wait(timeout=30)
        if start == failing:
            raise ZeroDivisionError(start)
        ended.append(start)

    with pytest.raises(ZeroDivisionError, match=str(failing)):
        spread(loop, 4, 4 * GRAIN)
    assert sorted(ended) == [part for part in range(4) if part != failing]


def test_an_interrupt_waits_for_the_parts():
    class Interrupted:
        """A queue whose first `get` is interrupted."""

        def __init__(self, *answers):
            self.answers = list(answers)

        def get(self):
            answer = self.answers.pop(0)
            if answer is KeyboardInterrupt:
                raise answer
            return answer

    done = Interrupted(KeyboardInterrupt, None, ValueError("late"))
    failures = threads._wait(done, 2)
    assert [type(failure) for failure in failures] == [KeyboardInterrupt, ValueError]
    assert done.answers == []


@pytest.mark.usefixtures("four_threads")
def test_nothing_is_kept_after_a_call():
    values = torch.zeros(4)
    before = sys.getrefcount(values)
    meeting = threading.Barrier(4)
    spread(meet, 4, 4 * GRAIN, meeting, values)
    # A second call begins in every thread only when the first one is over there.
    spread(meet, 4, 4 * GRAIN, meeting)
    assert sys.getrefcount(values) == before


def visit_in_a_child(results):
    visits, callers = [0] * 100, []
    spread(visit, 100, 100 * GRAIN, visits, callers)
    results.put((visits == [1] * 100, len(callers)))


# Python 3.12 and later warn of any fork beside threads, which is what is tested here.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("four_threads")
def test_a_forked_child_makes_threads_of_its_own():
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this platform does not fork")
    callers = []
    spread(visit, 100, 100 * GRAIN, [0] * 100, callers)
    assert len(callers) == 4
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=visit_in_a_child, args=(results,))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0
    assert results.get() == (True, 4)


def pack_in_a_child(values, results):
    results.put(int(packing.pack(values).sum()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not dispatch.installed(), reason="numba is not installed")
@pytest.mark.usefixtures("four_threads")
def test_a_forked_child_leaves_torchs_threads_alone(monkeypatch):
    """OpenMP has none of its threads there, and would wait for them for ever."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this platform does not fork")
    monkeypatch.setattr(threads, "TEAM_GRAIN", 1.0)
    monkeypatch.setattr(threads, "GRAIN", 1.0)
    values = torch.rand(700, 40) - 0.5
    values[values < 0] = 0
    expected = int(packing.pack(values).sum())
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=pack_in_a_child, args=(values, results))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0
    assert results.get() == expected

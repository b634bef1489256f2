"""What a user of `train` relies on besides its numbers."""

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from truestep import TruestepError
from truestep.ensemble import Data, Network, Optimizer, Record, Split, Stop, train

NETWORK = Network((2, 6, 6, 1), output="sigmoid", loss="binary_cross_entropy", start="he_uniform")
BACKENDS = ("compiled", "torch")


def circles(samples=64, seed=0, sets=None):
    generator = np.random.default_rng(seed)
    shape = (samples, 2) if sets is None else (sets, samples, 2)
    points = generator.standard_normal(shape).astype(np.float32)
    return Split(points, (np.square(points).sum(-1) > 1.4).astype(int))


DATA = Data(circles(), validation=circles(seed=1), test=circles(seed=2))


def run(**changes):
    arguments = {"replicas": 4, "steps": 30, "optimizer": Optimizer(lr=0.5)} | changes
    return train(arguments.pop("network", NETWORK), arguments.pop("data", DATA), **arguments)


def assert_same(first, second, rows=slice(None)):
    assert (first.final == second.final[rows]).all()
    for split, values in first.loss.items():
        assert np.array_equal(values, second.loss[split][rows], equal_nan=True)
    assert (first.stopped_at == second.stopped_at[rows]).all()
    assert (first.status == second.status[rows]).all()


@pytest.mark.parametrize("batch_size", [None, 7])
def test_a_seed_decides_whatever_the_threads_the_memory_and_the_others(batch_size):
    everyone = run(replicas=30, batch_size=batch_size, threads=1)
    assert_same(everyone, run(replicas=30, batch_size=batch_size, threads=3))
    assert_same(run(replicas=5, batch_size=batch_size), everyone, slice(5))
    assert_same(run(replicas=2, batch_size=batch_size, seed=[17, 3]), everyone, [17, 3])
    assert_same(run(replicas=30, batch_size=batch_size, threads=2, memory=3_000), everyone)


def test_numbers_of_numpy_and_arrays_that_change_later(tmp_path):
    points = circles()
    inputs = points.inputs[0].copy()
    split = Split(inputs, points.targets[0])
    inputs[:] = np.nan
    record = Record(every=np.int64(5))
    sizes = {"steps": np.int64(10), "batch_size": np.int64(8), "record": record}
    result = run(data=Data(split), **sizes, store=tmp_path)
    assert_same(run(data=Data(points), **sizes), result)


def test_what_no_sample_reaches_does_not_outgrow_those_that_are_there():
    start = np.array([[-1e30, 1e30, 1e30, 0, 0, 0]], np.float32)
    for activation in ("relu", "leaky_relu", "gelu"):
        network = Network((1, 1, 1, 1), activation, "sigmoid", "binary_cross_entropy")
        data = Data(Split(np.ones((17, 1)), np.ones(17, int)))
        statuses = [
            run(network=network, data=data, replicas=1, start=start, backend=backend).status[0]
            for backend in BACKENDS
        ]
        assert statuses == ["done", "done"]


def test_equal_seeds_make_pairs():
    result = run(
        replicas=4,
        seed=[3, 4, 3, 4],
        optimizer=[Optimizer(lr=0.1)] * 2 + [Optimizer(lr=0.1, asgd=True)] * 2,
        record=Record(every=10, parameters=True),
    )
    assert (result.parameters[:2, 0] == result.parameters[2:, 0]).all()
    assert (result.parameters[:2, -1] != result.parameters[2:, -1]).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_data_sets_take_turns(backend):
    several = circles(sets=3)
    apart = [Data(Split(several.inputs[k], several.targets[k])) for k in range(3)]
    together = run(data=Data(several), replicas=5, backend=backend)
    for replica in range(5):
        alone = run(data=apart[replica % 3], replicas=1, seed=[replica], backend=backend)
        np.testing.assert_allclose(alone.final[0], together.final[replica], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_replica_stops_under_a_loss_and_keeps_what_it_had(backend):
    stop = Stop(loss=0.45)
    record = Record(every=1, parameters=True, under=0.45)
    result = run(steps=400, stop=stop, record=record, backend=backend)
    free = run(steps=400, record=record, backend=backend)
    assert (result.status == "stopped").any()
    for replica, (status, step) in enumerate(zip(result.status, result.stopped_at, strict=True)):
        if status != "stopped":
            continue
        assert step == free.first_under[replica]
        assert free.loss["train"][replica, step] < 0.45 <= free.loss["train"][replica, step - 1]
        assert (result.final[replica] == free.parameters[replica, step]).all()
        assert np.isnan(result.loss["train"][replica, step + 1 :]).all()
        assert result.end_loss["test"][replica] == result.loss["test"][replica, step]


@pytest.mark.parametrize("backend", BACKENDS)
def test_patience_counts_measurements(backend):
    record = Record(every=5)
    arguments = {"steps": 2000, "optimizer": Optimizer(lr=2.0), "batch_size": 16}
    result = run(stop=Stop(patience=3), record=record, backend=backend, **arguments)
    free = run(record=record, backend=backend, **arguments)
    for replica, step in enumerate(result.stopped_at):
        curve = free.loss["validation"][replica]
        waited, best, expected = 0, np.inf, 2000
        for place, loss in enumerate(curve):
            waited, best = (0, loss) if loss < best else (waited + 1, best)
            if waited == 3:
                expected = free.steps[place]
                break
        assert step == expected
    assert (result.stopped_at < 2000).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_diverging_replica_ends_alone(backend):
    network = Network((2, 8, 1), output="linear", loss="squared_error")
    data = Data(Split(circles().inputs[0], circles().targets[0].astype(np.float32)[:, None]))
    rates = [0.01, 1e4, 0.01]
    result = run(
        network=network,
        data=data,
        replicas=3,
        optimizer=[Optimizer(lr=rate) for rate in rates],
        record=Record(every=1),
        backend=backend,
    )
    assert result.status.tolist() == ["done", "diverged", "done"]
    assert result.stopped_at[1] < 30
    assert np.isfinite(result.loss["train"][[0, 2]]).all()
    assert np.isnan(result.accuracy["train"]).all()


def test_an_order_of_ones_own_and_a_start_of_ones_own():
    starts = np.random.default_rng(0).standard_normal((2, NETWORK.parameters)).astype(np.float32)

    def order(seed, epoch):
        return np.roll(np.arange(64), seed + epoch)

    result = run(
        replicas=2,
        start=starts,
        order=order,
        batch_size=64 // 4,
        record=Record(steps=(0,), parameters=True),
    )
    assert (result.parameters[:, 0] == starts).all()
    again = run(replicas=1, start=starts[1:], order=order, seed=[1], batch_size=64 // 4)
    assert (again.final[0] == result.final[1]).all()
    other = run(replicas=1, start=starts[1:], batch_size=64 // 4)
    assert (other.final[0] != result.final[1]).any()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"replicas": 0}, r"replicas=0\): give a whole number of 1 or more"),
        ({"replicas": 4.0}, r"replicas=4.0\): give a whole number"),
        ({"replicas": True}, "give a whole number"),
        ({"batch_size": 16.0}, r"batch_size=16.0\): give a whole number"),
        ({"optimizer": []}, "there are 0 for 4 replicas"),
        ({"optimizer": "adam"}, "it is 'adam'"),
        ({"seed": [0.5, 1, 2, 3]}, "give whole numbers below"),
        ({"seed": 2**63}, "give whole numbers below"),
        ({"steps": 0}, r"steps=0\): give a whole number of 1 or more"),
        ({"steps": None}, "steps= or epochs="),
        ({"epochs": 2}, "steps= or epochs="),
        ({"batch_size": 65}, "there are 64 training samples"),
        ({"optimizer": [Optimizer()] * 3}, "there are 3 for 4 replicas"),
        ({"seed": [1, 2]}, r"seeds have the shape \[2\]"),
        ({"seed": [1, 2, -3, 4]}, "-3 is below 0"),
        ({"seed": -1}, "-1 is below 0"),
        ({"start": np.zeros((4, 3))}, r"need \[4, 67\]"),
        ({"start": np.full((4, 67), np.nan)}, "not all numbers are finite"),
        ({"order": lambda *_: np.zeros(64)}, "no permutation"),
        ({"threads": 0}, r"threads=0\): give a whole number of 1 or more"),
        ({"backend": "gpu"}, "choose one of compiled, torch"),
        ({"memory": 100}, "one replica takes"),
        ({"replicas": 10**10}, "GB are free"),
        ({"record": Record(steps=(31,))}, "asks for step 31"),
        ({"record": "all"}, "record is of type str"),
        ({"stop": 0.1}, "stop is of type float"),
        ({"order": [1, 0]}, r"order=\[1, 0\]\): give a function"),
        ({"optimizer": Optimizer(schedule=lambda _step: None)}, "for step 0 is None"),
        ({"record": Record(splits=("test",)), "data": Data(circles())}, "no test split"),
        ({"stop": Stop(patience=1), "data": Data(circles())}, "no validation split"),
        ({"network": Network((3, 2))}, "2 features and the network takes 3"),
        ({"network": Network((2, 3)), "data": Data(Split(np.zeros((2, 2)), [0, 3]))}, "go from 0 to 3"),
        ({"network": Network((2, 1), output="linear", loss="squared_error"),
          "data": Data(Split(np.zeros((2, 2)), np.zeros((2, 3))))}, "3 targets a sample"),
    ],
)  # fmt: skip
def test_bad_input_is_named_before_any_training(changes, says):
    with pytest.raises(TruestepError, match=says):
        run(**changes)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Split(np.array([[np.nan, 0]]), [0]), r"inputs\[0, 0\] is nan"),
        (lambda: Split(np.zeros((3, 2)), [0, 1]), r"inputs are \[3, 2\] and targets \[2\]"),
        (lambda: Split(np.zeros((0, 2)), np.zeros(0, int)), r"inputs are \[0, 2\]"),
        (lambda: Data(circles(), test=Split(np.zeros((2, 3)), [0, 1])), "test has 3 features"),
        (lambda: Data(circles(), test=circles(sets=2)), "test has 2 data sets"),
        (lambda: Data(circles(), test=Split(np.zeros((2, 2)), np.zeros((2, 1)))), "different kinds"),
        (lambda: Network((2,)), "one or more layers"),
        (lambda: Network((2, 2), loss="mse"), "choose one of"),
        (lambda: Network((2, 2), output="linear"), "goes with output='softmax'"),
        (lambda: Optimizer("lion"), "choose one of sgd"),
        (lambda: Optimizer(lr=np.inf), r"lr=inf\)"),
        (lambda: Optimizer("adam", momentum=0.9), "has no momentum"),
        (lambda: Optimizer(nesterov=True), "needs a momentum"),
        (lambda: Optimizer("adam", betas=(1.0, 0.9)), "below 1"),
        (lambda: Record(every=1, steps=(1,)), "give one of them"),
        (lambda: Record(every=0), "give a whole number of 1 or more"),
        (lambda: Record(every=1.5), "give a whole number"),
        (lambda: Record(steps=(0.7,)), "give a whole number"),
        (lambda: Record(every=1).at(10**10, 1), "Measure less often"),
        (lambda: Stop(loss=np.nan), r"loss=nan\): give a number of 0"),
        (lambda: Optimizer(lr="0.1"), "give a number"),
        (lambda: Optimizer(betas=("a", 0.9)), "give two numbers"),
        (lambda: Record(steps=5), "steps=5.: give several"),
        (lambda: Record(splits="train"), "splits='train'.: give several"),
        (lambda: Optimizer("adam", eps=0.0), "give a number above 0"),
        (lambda: Network((2, 6, 1)), "with one output is always 1"),
        (lambda: Network("23"), "give a whole number"),
        (lambda: Split([[0.0], [1.0, 2.0]], [0, 1]), "inputs are no array"),
        (lambda: Split([[0.0]], ["cat"]), "targets are of type"),
        (Stop, "needs a loss"),
    ],
)  # fmt: skip
def test_impossible_settings_are_named(make, says):
    with pytest.raises(TruestepError, match=says):
        make()


def test_without_numba_torch_runs_and_the_result_says_so(monkeypatch):
    compiled = run()
    monkeypatch.setattr("truestep.ensemble.training.installed", lambda: False)
    result = run()
    assert (compiled.backend, result.backend) == ("compiled", "torch")
    np.testing.assert_allclose(result.final, compiled.final, rtol=1e-4, atol=1e-5)
    with pytest.raises(TruestepError, match="needs numba"):
        run(backend="compiled")


def test_what_was_not_recorded_is_named():
    with pytest.raises(TruestepError, match=r"Record\(nodes=True\)"):
        _ = run().nodes


def test_progress_ends_with_all_steps():
    seen = []
    run(replicas=3, progress=lambda *told: seen.append(told[:2]))
    assert seen[-1] == (90, 90)
    seen.clear()
    run(replicas=3, steps=5000, stop=Stop(loss=10.0), progress=lambda *told: seen.append(told[:2]))
    assert seen[-1] == (15_000, 15_000)


def test_progress_on_the_terminal(capsys):
    run(replicas=3, progress=True)
    lines = capsys.readouterr().err.split("\r")
    assert lines[-1].startswith("100 %  90 of 90 replica-steps")
    assert lines[-1].endswith("\n")
    assert all(len(line) <= 80 for line in lines)


def test_a_store_goes_on_and_grows(tmp_path):
    record = Record(every=10, nodes=True)
    whole = run(replicas=9, record=record)
    first = run(replicas=4, record=record, store=tmp_path)
    assert_same(first, whole, slice(4))
    calls = []
    again = run(
        replicas=9, record=record, store=tmp_path, progress=lambda *told: calls.append(told)
    )
    assert_same(again, whole)
    assert (again.nodes == whole.nodes).all()
    assert calls[-1][:2] == (5 * 30, 5 * 30)
    run(replicas=9, record=record, store=tmp_path, progress=lambda *told: calls.append(told))
    assert calls[-1][:2] == (0, 0)
    changed = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    assert_same(run(replicas=9, record=record, store=tmp_path), whole)
    assert changed == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}


def test_a_store_may_hold_more_than_is_asked_for(tmp_path):
    whole = run(replicas=9)
    run(replicas=9, store=tmp_path, threads=1)
    assert_same(run(replicas=4, store=tmp_path, threads=1), whole, slice(4))
    assert_same(run(replicas=9, store=tmp_path, threads=1), whole)
    # As another process with other portions leaves them.
    some = run(replicas=6, store=tmp_path / "b", threads=1)
    assert len(some) == 6
    (part,) = (tmp_path / "b").glob("*.npz")
    part.rename(tmp_path / part.name)
    again = run(replicas=9, store=tmp_path, threads=1)
    assert len(again) == 9
    assert_same(again, whole)


def test_a_store_tells_functions_apart_by_what_they_give(tmp_path):
    def warm(first):
        return lambda step: first if step < 3 else 1.0

    def rotated(by):
        return lambda *_: np.roll(np.arange(64), by)

    run(store=tmp_path / "a", optimizer=Optimizer(schedule=warm(0.5)))
    run(store=tmp_path / "a", optimizer=Optimizer(schedule=warm(0.5)))
    with pytest.raises(TruestepError, match="other seeds, starts, orders or optimizers"):
        run(store=tmp_path / "a", optimizer=Optimizer(schedule=warm(0.0)))
    run(store=tmp_path / "b", batch_size=16, order=rotated(1))
    with pytest.raises(TruestepError, match="other seeds, starts, orders or optimizers"):
        run(store=tmp_path / "b", batch_size=16, order=rotated(5))


def test_an_order_is_checked_in_every_epoch():
    with pytest.raises(TruestepError, match="for seed 0 and epoch 1 is no permutation"):
        run(batch_size=16, order=lambda _, epoch: np.arange(64) + (epoch > 0) * 100, threads=1)


def test_a_damaged_file_is_moved_aside(tmp_path):
    whole = run()
    run(store=tmp_path, threads=2)
    damaged = min(tmp_path.glob("*.npz"))
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.warns(UserWarning, match="is damaged"):
        again = run(store=tmp_path, threads=2)
    assert_same(again, whole)
    assert damaged.with_suffix(".damaged").exists()


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_a_file_may_be_damaged_anywhere(tmp_path):
    whole = run(threads=1)
    run(store=tmp_path, threads=1)
    (path,) = tmp_path.glob("*.npz")
    good = path.read_bytes()
    for place in range(0, len(good), len(good) // 80):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x24]) + good[place + 1 :])
        assert_same(run(store=tmp_path, threads=1), whole)


def test_a_damaged_file_that_cannot_be_moved_is_one_error(tmp_path, monkeypatch):
    run(store=tmp_path, threads=1)
    (path,) = tmp_path.glob("*.npz")
    path.write_bytes(b"")

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(type(path), "replace", refuse)
    with pytest.raises(TruestepError, match="can't be moved aside"):
        run(store=tmp_path, threads=1)


def test_a_full_disk_is_one_error_and_the_same_call_goes_on(tmp_path):
    run(replicas=2, store=tmp_path, threads=1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(TruestepError, match=r"can't be written .* the same call goes on"):
            run(store=tmp_path, threads=1)
        with pytest.raises(TruestepError, match="can't be written"):
            run(store=tmp_path / "new", threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert len(list(tmp_path.glob("*.npz"))) == 1
    assert_same(run(store=tmp_path, threads=1), run(threads=1))


def test_a_store_of_something_else_is_refused(tmp_path):
    run(store=tmp_path / "a")
    with pytest.raises(TruestepError, match="differs in steps"):
        run(store=tmp_path / "a", steps=31)
    with pytest.raises(TruestepError, match="other seeds, starts, orders or optimizers"):
        run(store=tmp_path / "a", optimizer=Optimizer(lr=0.4))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(TruestepError, match="holds files, but no ensemble's"):
        run(store=tmp_path / "b")
    with pytest.raises(TruestepError, match="can't hold results"):
        run(store=tmp_path / "b" / "thesis.tex")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "ensemble.7.part").touch()
    run(store=tmp_path / "c")
    (tmp_path / "a" / "ensemble.json").write_text("{")
    with pytest.raises(TruestepError, match="can't be read"):
        run(store=tmp_path / "a")


SCRIPT = textwrap.dedent(
    """
    import sys
    sys.path.insert(0, {tests!r})
    from ensemble.test_training import run
    from truestep.ensemble import Record
    run(replicas=40, steps=60_000, record=Record(every=10_000), store={store!r}, memory=3_000)
    """
)


def test_nothing_is_lost_when_killed(tmp_path):
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    script = SCRIPT.format(tests=tests, store=str(tmp_path))
    kills = 0
    while kills < 2:
        had = len(list(tmp_path.glob("*.npz")))
        process = subprocess.Popen([sys.executable, "-c", script])  # noqa: S603
        while process.poll() is None and len(list(tmp_path.glob("*.npz"))) < had + 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        ended = process.wait()
        kills += 1
        if ended == 0:
            break
    assert kills > 1
    done = len(list(tmp_path.glob("*.npz")))
    assert done > 0
    arguments = {"replicas": 40, "steps": 60_000, "record": Record(every=10_000)}
    assert_same(run(**arguments, store=tmp_path, memory=3_000), run(**arguments))


def test_an_interruption_ends_the_threads():
    def interrupt(*told):
        raise KeyboardInterrupt

    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run(replicas=8, steps=10**7, progress=interrupt)
    assert time.perf_counter() - began < 60

import torch

from truestep import SampleCounter, doctor
from truestep.kernels import dispatch


def test_the_self_check_is_right_with_and_without_compiled_loops(monkeypatch):
    for installed in (True, False):
        monkeypatch.setattr(dispatch, "installed", lambda installed=installed: installed)
        checks = doctor.self_check()
        assert len(checks) == 6
        assert all(check.difference == 0 for check in checks)


def test_the_self_check_notices_wrong_counts(monkeypatch):
    right = SampleCounter.counts
    monkeypatch.setattr(
        SampleCounter, "counts", lambda self: {name: m + 1 for name, m in right(self).items()}
    )
    assert all(check.difference == 1 for check in doctor.self_check())


def test_the_self_check_leaves_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    doctor.self_check()
    assert torch.equal(torch.rand(1), expected)


def test_what_an_extra_lacks_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(doctor.EXTRAS, "fast", ("numba", "no_such_module"))
    packages = doctor.installed_packages()
    assert packages["extra fast"] == "lacks no_such_module: pip install '.[fast]'"
    assert packages["torch"] == torch.__version__


def test_the_code_in_use_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "installed", lambda: False)
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    assert "torch operations (no numba)" in doctor.paths_in_use()["CPU"]
    assert "torch operations (no Triton)" in doctor.paths_in_use()["CUDA"]

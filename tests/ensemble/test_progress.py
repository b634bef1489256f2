import pytest

from truestep.ensemble.progress import describe


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ((0, 10, 0.0), "  0 %  0 of 10 replica-steps  0/s  no estimate yet"),
        ((1, 4, 30.0), " 25 %  1 of 4 replica-steps  0/s  1 min 30 s left"),
        ((10**9, 10**11, 100.0), "  1 %  1.0G of 100.0G replica-steps  10.0M/s  2 h 45 min left"),
        ((1, 2, 119.7), " 50 %  1 of 2 replica-steps  0/s  2 min 0 s left"),
        ((1, 2, 59.7), " 50 %  1 of 2 replica-steps  0/s  1 min 0 s left"),
        ((0, 0, 0.0), "100 %  0 of 0 replica-steps  0/s  0 s left"),
        ((7, 7, 1.0), "100 %  7 of 7 replica-steps  7/s  0 s left"),
    ],
)
def test_one_line(told, says):
    assert describe(*told) == says

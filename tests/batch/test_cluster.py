"""How a machine or a cluster is shared among actors."""

import pytest

from modeling_ivtp.batch.cluster import Actors, Machines, Place, share
from modeling_ivtp.batch.options import Options

ONE, EIGHT, TWO_OF_EIGHT, PLAIN = Machines(1, 8, 1), Machines(1, 64, 8), Machines(2, 64, 16), Machines(3, 8, 0)


@pytest.mark.parametrize(
    ("machines", "options", "actors"),
    [
        (ONE, {}, Actors(1, 1, 1)),
        (EIGHT, {}, Actors(8, 1, 1)),
        (EIGHT, {"actors": 2, "threads": 4}, Actors(2, 4, 4)),
        (EIGHT, {"actors": 3}, Actors(3, 1, 2)),
        (EIGHT, {"device": "cuda"}, Actors(8, 1, 1)),
        (EIGHT, {"device": "cpu"}, Actors(1, 64, 0)),
        (EIGHT, {"device": "cuda:1"}, Actors(1, 64, 0)),
        (TWO_OF_EIGHT, {}, Actors(16, 1, 1)),
        # No model is spread over two machines.
        (TWO_OF_EIGHT, {"actors": 1}, Actors(1, 1, 8)),
        (PLAIN, {}, Actors(3, 8, 0)),
        (PLAIN, {"actors": 6}, Actors(6, 4, 0)),
        (PLAIN, {"actors": 4}, Actors(4, 4, 0)),
        (PLAIN, {"actors": 99}, Actors(99, 1, 0)),
        (PLAIN, {"actors": 3, "threads": 2}, Actors(3, 2, 0)),
    ],
)
def test_one_actor_for_each_device(machines, options, actors):
    assert share(Options("model", "data", "out", **options), machines) == actors


@pytest.mark.parametrize(
    ("gpus", "device", "kind"),
    [(1, "cuda", "cuda"), (4, None, "cuda"), (0, "cuda:1", "cuda"), (0, "cpu", "cpu"), (0, None, "mps")],
)
def test_the_kind_of_device_is_known(gpus, device, kind):
    assert Place(Actors(1, 1, gpus), device, 1).device_type == kind


@pytest.mark.parametrize(
    ("machines", "options", "message"),
    [
        (EIGHT, {"actors": 9}, "actors=9; allowed: up to 8, one for each GPU, or any number with device='cpu'"),
        (PLAIN, {"device": "cuda"}, "device='cuda'; there is no GPU"),
    ],
)
def test_more_than_there_is(machines, options, message):
    with pytest.raises(ValueError, match=message):
        share(Options("model", "data", "out", **options), machines)

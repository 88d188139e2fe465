"""Labels of the work that pruning adds: a profiler and a timer see them, and nobody else pays for them."""

import threading
import time
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from modeling_ivtp import methods
from modeling_ivtp.model.labels import CHOOSE, SCORE, TEXT_TOWER, label, labelled, timed_by
from tests.support.tiny import prompt, tiny_model


@pytest.fixture
def model():
    built = tiny_model()
    built.model.instruction_cache.limit = 0
    return built


@contextmanager
def counting(counts, name):
    counts[name] += 1
    yield


def labels_of(work):
    counts = Counter()
    with timed_by(lambda name: counting(counts, name)), torch.no_grad():
        work()
    return counts


def test_a_prompt_has_a_label_for_each_choice_and_each_layer_that_scores(model):
    inputs = prompt([[3, "image", 7]])
    counts = labels_of(lambda: model(**inputs))
    plan = model.model.plan()
    tower = sum(group.last - group.first + 1 for group in plan.tower)
    decoder = sum(group.last - group.first + 1 for group in plan.decoder)
    # The groups, the pseudo CLS, and what the pruner prepares; a group's top layer leaves one row of its map.
    assert counts[CHOOSE] == len(plan.tower) + len(plan.decoder) + 2
    assert counts[SCORE] == tower - len(plan.tower) + decoder
    assert counts[TEXT_TOWER] == 1
    with model.pruning(enabled=False):
        assert not labels_of(lambda: model(**inputs))


@pytest.mark.parametrize("method", [methods.DivPrune(keep=4), methods.CDPruner(keep=4), methods.FastV(keep=4)])
def test_other_methods_choose_under_the_same_label(model, method):
    with method(model):
        counts = labels_of(lambda: model(**prompt([[3, "image", 7]])))
    assert counts[CHOOSE] >= 1
    assert counts[TEXT_TOWER] == isinstance(method, methods.CDPruner)


def test_a_profiler_sees_the_labels(model):
    with profile(activities=[ProfilerActivity.CPU]) as profiled, torch.no_grad():
        model(**prompt([[3, "image", 7]]))
    assert {CHOOSE, SCORE, TEXT_TOWER} <= {event.key for event in profiled.key_averages()}


def test_a_timer_hears_of_its_own_thread_only():
    counts, other = Counter(), threading.Thread(target=labelled(CHOOSE)(lambda: None))
    with timed_by(lambda name: counting(counts, name)):
        other.start()
        other.join()
        with label(SCORE):
            pass
    with label(CHOOSE):
        pass
    assert counts == {SCORE: 1}


@pytest.mark.slow
def test_a_label_that_nobody_reads_costs_next_to_nothing():
    start = time.perf_counter()
    for _ in range(10_000):
        with label(CHOOSE):
            pass
    assert time.perf_counter() - start < 0.1  # 10 microseconds each; about one is usual, and a prompt has about 100

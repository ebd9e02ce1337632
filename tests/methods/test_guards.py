"""Configurations that mean nothing are refused, doubtful ones warn, both with the reason."""

from __future__ import annotations

import warnings

import pytest

from tropd.errors import ConfigError, MethodWarning
from tropd.methods import GKD, JSD, LSM, METHODS, OPD, FullFKL, ManyFaces, TrOPD, find_method
from tropd.objective import ForwardKL, JensenShannon, Objective, PolicyGradient, Schedule
from tropd.objective.selectors import STUDENT, TopFraction
from tropd.objective.targets import GeometricBridge, Temperature
from tropd.types import Sampling

REFUSED = {
    "renormalised k = 1": lambda: LSM(top_k=1),
    "renormalised k = 1 on any support": lambda: ManyFaces(outside="renormalise", top_k=1),
    "Jensen-Shannon at 0": lambda: JSD(beta=0.0),
    "Jensen-Shannon at 1": lambda: JensenShannon(beta=1.0),
    "k3 as a loss": lambda: OPD(estimator="k3"),
    "k2 with a reward's log-probability": lambda: OPD(estimator="k2", reward_logprobs="sampler"),
    "a bridge beyond its ends": lambda: GeometricBridge(1.5),
    "a target at temperature 0": lambda: Temperature(0.0),
    "a skew of 1": lambda: ForwardKL(skew=1.0),
    "a discount above 1": lambda: OPD(discount=1.5),
    "a trust threshold of 0": lambda: TrOPD(trust="threshold", trust_threshold=0.0),
    "top_k 0": lambda: FullFKL(top_k=0).objective,
    "a fraction of 0": lambda: TopFraction(STUDENT, 0.0),
    "alpha 0": lambda: METHODS["topd"](alpha=0.0),
    "a mixture of 1": lambda: METHODS["reopold"](mixture=1.0),
    "stop-gradient forward KL": lambda: ManyFaces(divergence="forward_kl", outside="stop_gradient"),
    "a schedule that never ends": lambda: Schedule(shape="cosine", until=0.0),
    "a share above 1": lambda: TrOPD(prefix_share=1.5),
    "clip and cap at once": lambda: PolicyGradient(clip=0.2, cap=2.0),
    "two terms of one name": lambda: Objective(*OPD().objective.terms, *OPD().objective.terms),
}


@pytest.mark.parametrize("what", REFUSED)
def test_meaningless_configurations_are_refused_at_once(what):
    with pytest.raises(ConfigError) as error:
        REFUSED[what]()
    assert len(str(error.value)) > 30


WARNED = {
    "full forward KL as a reward": (lambda: FullFKL(path="reward"), "expected gradient is zero"),
    "outliers' forward KL as a reward": (lambda: TrOPD(outlier="forward_kl_reward"), "never raises the teacher"),
    "GKD at beta 0": (lambda: GKD(beta=0.0), "not by continuity"),
    "truncated reverse KL": (lambda: ManyFaces(outside="ignore"), "1/e"),
}


@pytest.mark.parametrize("what", WARNED)
def test_doubtful_configurations_warn_with_the_reason(what):
    make, reason = WARNED[what]
    with pytest.warns(MethodWarning, match=reason):
        make()


def test_defaults_warn_about_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in METHODS.values():
            method()


def test_truncated_sampling_is_objected_to_by_tropd():
    assert TrOPD().objections(Sampling()) == []
    assert "total variation" in TrOPD().objections(Sampling(top_p=0.9))[0]
    assert "total variation" in METHODS["tropd_aopd"]().objections(Sampling(temperature=0.7))[0]


def test_an_unknown_method_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="Did you mean 'tropd'"):
        find_method("trpod")


def test_the_other_tropd_is_called_topd():
    """NeMo-RL's 'tropd' is arXiv 2607.04751; here the name belongs to 2606.01249."""
    assert METHODS["tropd"].paper == "2606.01249"
    assert METHODS["topd"].paper == "2607.04751"

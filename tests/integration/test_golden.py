"""What every method says of one fixed batch: a formula that changes shows here, whoever changed it.

These numbers prove nothing else; that they are right is shown in tests/objective.
"""

from __future__ import annotations

import pytest
import torch

from tests.objective.cases import Case, describe
from tropd.methods import METHODS
from tropd.objective.context import Context
from tropd.types import Author


def golden_case() -> Case:
    """Waves instead of random numbers, so that the numbers below belong to the formulas alone."""
    lengths = (5, 3, 6, 4)
    num, size = sum(lengths), 11
    wave = torch.arange(num * size, dtype=torch.float64).view(num, size)
    logits = (2.0 * torch.sin(0.7 * wave + 0.3)).requires_grad_()
    teacher = (2.0 * torch.sin(1.3 * wave + 1.1)).log_softmax(-1)
    authors = torch.full((num,), int(Author.STUDENT))
    authors[:2], authors[8:11] = Author.TEACHER, Author.TEACHER
    ids = torch.arange(num) * 5 % size
    sequences = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return Case(logits, teacher, describe(logits, teacher, ids, authors, sequences, top_k=size), top_k=size)


GOLDEN: dict[str, tuple[float, float]] = {
    "tropd": (-0.2744963591, 0.2792869149),
    "tropd_aopd": (0.1162366157, 0.2945265487),
    "opd": (-0.05767338599, 0.3765869895),
    "clip_outlier": (-0.1311316809, 0.3521833892),
    "mask_outlier": (-0.4153539032, 0.302190196),
    "full_fkl": (1.015522816, 0.09479605472),
    "jsd": (-0.06067466833, 0.1048977035),
    "eopd": (0.9578494304, 0.4237099523),
    "entropy_opd": (-0.338528398, 0.9307940888),
    "reopold": (-0.6796700233, 0.4944930481),
    "aopd": (-0.3830582278, 0.3240868307),
    "lsm": (1.028096346, 0.1235787189),
    "many_faces": (1.028096346, 0.1235787189),
    "rethinking": (1.028096346, 0.1235787189),
    "tip": (1.636616866, 0.2575859959),
    "ta_opd": (3.674831912, 3.030851021),
    "rock": (-0.05767338599, 0.3765869895),
    "near_future": (-0.1504086112, 0.3693828697),
    "draft_opd": (2.852695254, 0.4413043126),
    "lgr": (-0.2208399552, 0.470160908),
    "mopd": (1.100903073, 0.1317245845),
    "opd_plus": (-2.416313127, 1.006317761),
    "gkd": (0.2605343533, 0.01835977658),
    "minillm": (1.028096346, 0.2326460527),
    "distillm": (0.8781195575, 0.06695532862),
    "seqkd": (0.9866619538, 0.1275357457),
    "sft": (0.9866619538, 0.1275357457),
    "topd": (-0.2065321307, 0.1119107552),
    "tokenizer_barrier": (-0.05767338599, 0.3765869895),
    "gndpo": (0, 0.1897122949),
    "power_opd": (5.8829375e-05, 0.0002451896449),
    "vopd": (-1.085769732, 0.5654824247),
    "exopd": (-0.04853701915, 0.3763943252),
    "fire": (-0.06374982132, 0.5241733527),
    "opdvr": (0.06134944009, 0.3325290031),
    "sg_opd": (0.9499874416, 0.3951696601),
    "rg_opd": (-0.05767338599, 0.3765869895),
    "scope": (1.706833404, 0.3320562272),
    "kdrl": (-0.03414265302, 0.1433436527),
    "opsd": (0.191482248, 0.01585034217),
    "unisd": (1.434261516, 0.1334755493),
    "sdft": (1.028096346, 0.1235787189),
    "sdpo": (1.028096346, 0.1235787189),
    "multi_rollout": (0.191482248, 0.01585034217),
    "cgtr": (1.028096346, 0.1235787189),
    "ptd": (-0.1462272192, 0.158731957),
    "oprd": (2.708647561, 0.3447832037),
    "ogls": (0.3764506316, 0.04324935983),
    "safesteer": (1.028096346, 0.1235787189),
    "esr": (-0.05767338599, 0.3765869895),
    "adwin": (-0.05767338599, 0.3765869895),
    "omniopd": (0.3864864327, 0.03983807508),
    "trb": (1.028096346, 0.1235787189),
    "skd": (1.383538991, 0.1095709112),
    "kat": (-0.05767338599, 0.3765869895),
}
"""Loss and gradient norm of every method with its defaults, at a third of training."""


def test_every_method_has_its_number() -> None:
    assert GOLDEN.keys() == METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_the_numbers_of_a_method_do_not_change_unnoticed(name: str) -> None:
    case, objective = golden_case(), METHODS[name]().objective
    plan = objective.plan(case.tokens, Context(progress=1 / 3))
    loss = objective(case.tokens, case.view(), plan).loss
    (gradient,) = torch.autograd.grad(loss, case.logits)
    assert (float(loss.detach()), float(gradient.norm())) == pytest.approx(GOLDEN[name], rel=1e-8)

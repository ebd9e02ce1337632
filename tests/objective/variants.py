"""Every method with a small top-k, its options, and pieces that no method uses: what is tried on any evidence."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from tests.objective.cases import K
from tropd.methods import (
    AOPD,
    EOPD,
    GKD,
    JSD,
    KDRL,
    LGR,
    LSM,
    METHODS,
    MOPD,
    OGLS,
    OPD,
    OPRD,
    OPSD,
    PTD,
    REOPOLD,
    SCOPE,
    SDFT,
    SDPO,
    SGOPD,
    TAOPD,
    TIP,
    TOPD,
    DistiLLM,
    DraftOPD,
    EntropyOPD,
    ExOPD,
    FiRe,
    FullFKL,
    ManyFaces,
    MiniLLM,
    NearFuture,
    OPDPlus,
    PowerOPD,
    Rethinking,
    Rock,
    SafeSteer,
    TrOPD,
    TrOPDPlusAOPD,
    UniSD,
)
from tropd.objective import (
    AtMost,
    ForwardKL,
    JensenShannon,
    Needs,
    NegativeLogLikelihood,
    Objective,
    PolicyGradient,
    ReverseKL,
    Selector,
    Term,
    TokenLoss,
)
from tropd.objective.places import LastPositions, Shortest
from tropd.objective.rewards import GroupAdvantage
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Over

warnings.simplefilter("ignore")


@dataclass(frozen=True)
class Composed:
    """Pieces that no method of the list uses."""

    loss: TokenLoss
    where: Selector = STUDENT
    over: Over = "actions"

    @property
    def objective(self) -> Objective:
        return Objective(Term("composed", self.where, self.loss, over=self.over))

    @property
    def needs(self) -> Needs:
        return self.objective.needs


SMALL = {"top_k": K}
VARIANTS = {
    **{name: METHODS[name](**(SMALL if "top_k" in METHODS[name].__dataclass_fields__ else {})) for name in METHODS},
    "tropd_aopd": TrOPDPlusAOPD(tropd=TrOPD(top_k=K)),
    **{f"tropd_aopd_{r}": TrOPDPlusAOPD(reading=r, tropd=TrOPD(top_k=K)) for r in ("R1", "R3")},
    **{
        f"tropd_{t}_{o}_{d}": TrOPD(trust=t, outlier=o, denominator=d, top_k=K, trust_threshold=0.5)
        for t in ("bernoulli", "threshold", "soft")
        for o in ("forward_kl", "forward_kl_reward", "mask", "clip")
        for d in ("actions", "student")
    },
    "opd_discounted": OPD(discount=0.9),
    "opd_k2": OPD(estimator="k2"),
    "opd_clip": OPD(ratio_clip=0.2),
    "opd_cap": OPD(ratio_cap=1.0),
    "full_fkl_reward": FullFKL(path="reward", top_k=K),
    "jsd_skewed": JSD(beta=0.1, top_k=K),
    "eopd_code": EOPD(teacher_renormalised=False, top_k=K),
    "entropy_sequence": EntropyOPD(scope="sequence", denominator="actions"),
    "reopold_one": REOPOLD(stages=1),
    "reopold_refine": REOPOLD(switch=0.1),
    "aopd_reverse": AOPD(divergence="reverse_kl", top_k=K),
    "aopd_js": AOPD(divergence="jensen_shannon", top_k=K),
    **{f"lsm_{o}": LSM(top_k=K, special_ids=(1, 2, 3), special_occurrences=o) for o in ("first", "every")},
    "tropd_aopd_once": TrOPDPlusAOPD(guide_outliers=False, tropd=TrOPD(top_k=K)),
    "opd_sampler": OPD(reward_logprobs="sampler"),
    "minillm_twice": MiniLLM(own_reward="twice"),
    **{
        f"faces_{s}_{o}": ManyFaces(support=s, outside=o, top_k=3)
        for s in ("teacher_top_k", "student_top_k", "union", "intersection", "difference")
        for o in ("ignore", "stop_gradient", "generalised", "bucket", "renormalise")
    },
    "ta_opd_all": TAOPD(top_k=K, fraction=0.3, denominator="actions"),
    "rock_near": Rock(ids=(3, 5), window=1),
    "near_future_soft": NearFuture(candidates=2, separation=2, window=2, quiet=0.5, suppress=0.25),
    "draft_short": DraftOPD(block=3, discount=0.5, weight=0.3),
    "lgr_uncertain": LGR(top_k=3, nats=1.0, gamma=0.5),
    "faces_js": ManyFaces(divergence="jensen_shannon", outside="bucket", top_k=K),
    "faces_reward": ManyFaces(path="reward", top_k=K),
    **{f"rethinking_{w}": Rethinking(support="union", weight=w, top_k=K) for w in ("teacher", "none")},
    "tip_rank": TIP(normalise="rank", fraction=0.2),
    "mopd_reward": MOPD(path="reward"),
    **{f"opd_plus_{d}": OPDPlus(divergence=d) for d in ("reverse_kl", "jensen_shannon")},
    "gkd_forward": GKD(beta=0.0),
    "minillm_texts": MiniLLM(text_share=0.3, text_weight=0.5, reward_clip=0.7),
    "distillm_forward": DistiLLM(divergence="skew_forward", skew=0.3),
    "minillm_long": MiniLLM(single_step=False),
    "topd_baseline": TOPD(normalise="baseline"),
    "topd_group": TOPD(credit="future_mean", normalise="group"),
    "unisd_parts": UniSD(
        alpha=0.5, agreement_per="sequence", spread="range", gamma=1.0, clip=0.5, skip=1, features=0.0
    ),
    "sdft_code": SDFT(divergence="forward_kl", skip=2),
    "sdpo_teachers": SDPO(support="teacher_top_k", top_k=K, beta=0.5),
    "oprd": OPRD(layers="last"),
    "safesteer": SafeSteer(ids=(7, 0, 3), outside="generalised"),
    "ogls_reverse": OGLS(divergence="reverse_kl", threshold=0.5, first=3, last=2),
    "oprd_all": OPRD(layers="all", normalise=True, log_ratio=0.5, first=3, last=2),
    "ptd_valid": PTD(top_k=K, shorter_than=6),
    "opsd_clipped": OPSD(beta=0.0, entry_clip=0.05),
    "opsd_top_k": OPSD(teacher_top_k=K, entry_clip=0.02),
    "forward_clipped": Composed(ForwardKL(entry_clip=0.05)),
    "reverse_clipped": Composed(ReverseKL(entry_clip=0.05)),
    "js_clipped": Composed(JensenShannon(entry_clip=0.02)),
    "js_top_k_clipped": Composed(JensenShannon(support="teacher_top_k", top_k=K, outside="bucket", entry_clip=0.02)),
    "fixed_set": Composed(ReverseKL(ids=(7, 0, 3))),
    "at_most": Composed(AtMost(ReverseKL(), nats=1.0)),
    "fire_code": FiRe(preset="code", scope="batch", sure=2.0, unsure=0.5),
    "fire_most": FiRe(drop=0.6, scope="batch"),
    "scope_code": SCOPE(preset="code", temperature=0.5),
    "sg_opd_inside": SGOPD(agree=1.2, conflict=0.5),
    "exopd_inside": ExOPD(scale=0.4),
    "power_opd_small": PowerOPD(alpha=0.1),
    "kdrl_reward": KDRL(estimator="reward", distil="failures"),
    "kdrl_first": KDRL(distil_first=0.5),
    "kdrl_then": KDRL(distil_first=0.2),
    "grpo": Composed(PolicyGradient(GroupAdvantage(divide=True), clip=0.2, clip_high=0.28), over="sequences"),
    "anchor": Composed(NegativeLogLikelihood(), STUDENT & Shortest(0.5) & LastPositions(3), over="members"),
}

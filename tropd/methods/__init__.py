"""Every method, in one list that a person can read."""

from __future__ import annotations

import difflib

from tropd.errors import ConfigError
from tropd.methods.aopd import AOPD
from tropd.methods.base import Method
from tropd.methods.classics import GKD, MiniLLM, SeqKD
from tropd.methods.entropy_opd import EntropyOPD
from tropd.methods.eopd import EOPD
from tropd.methods.jsd import JSD
from tropd.methods.local_support import LSM, ManyFaces
from tropd.methods.mopd import MOPD
from tropd.methods.opd import OPD
from tropd.methods.opd_plus import OPDPlus
from tropd.methods.outliers import ClipOutlier, FullFKL, MaskOutlier
from tropd.methods.reopold import REOPOLD
from tropd.methods.tip import TIP
from tropd.methods.topd import TOPD
from tropd.methods.tropd import TrOPD
from tropd.methods.tropd_aopd import TrOPDPlusAOPD

METHODS: dict[str, type[Method]] = {
    "tropd": TrOPD,
    "tropd_aopd": TrOPDPlusAOPD,
    "opd": OPD,
    "clip_outlier": ClipOutlier,
    "mask_outlier": MaskOutlier,
    "full_fkl": FullFKL,
    "jsd": JSD,
    "eopd": EOPD,
    "entropy_opd": EntropyOPD,
    "reopold": REOPOLD,
    "aopd": AOPD,
    "lsm": LSM,
    "many_faces": ManyFaces,
    "tip": TIP,
    "mopd": MOPD,
    "opd_plus": OPDPlus,
    "gkd": GKD,
    "minillm": MiniLLM,
    "seqkd": SeqKD,
    "topd": TOPD,
}

AnyMethod = (
    TrOPD
    | TrOPDPlusAOPD
    | OPD
    | ClipOutlier
    | MaskOutlier
    | FullFKL
    | JSD
    | EOPD
    | EntropyOPD
    | REOPOLD
    | AOPD
    | LSM
    | ManyFaces
    | TIP
    | MOPD
    | OPDPlus
    | GKD
    | MiniLLM
    | SeqKD
    | TOPD
)
"""The same list as a type, for configuration files: `name` tells them apart.  A test holds the two together."""


def find_method(name: str) -> type[Method]:
    """The class behind a name; a near miss is named in the error."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"there is no method {name!r}.{hint} Known: {', '.join(METHODS)}.")


__all__ = [
    "AOPD",
    "EOPD",
    "GKD",
    "JSD",
    "LSM",
    "METHODS",
    "MOPD",
    "OPD",
    "REOPOLD",
    "TIP",
    "TOPD",
    "AnyMethod",
    "ClipOutlier",
    "EntropyOPD",
    "FullFKL",
    "ManyFaces",
    "MaskOutlier",
    "Method",
    "MiniLLM",
    "OPDPlus",
    "SeqKD",
    "TrOPD",
    "TrOPDPlusAOPD",
    "find_method",
]

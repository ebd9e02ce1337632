"""Every method.  Adding one is its file and its line here: METHODS, the docs and the exports follow."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence

import tropd.methods.controls
import tropd.methods.guidance  # noqa: F401
from tropd.base.names import find, is_name, offered
from tropd.errors import ConfigError
from tropd.methods.base import Method as Method
from tropd.methods.base import NamedMethod as NamedMethod

# In the order in which people read them.
# isort: off
from tropd.methods.tropd import TrOPD as TrOPD
from tropd.methods.tropd_aopd import TrOPDPlusAOPD as TrOPDPlusAOPD
from tropd.methods.opd import OPD as OPD
from tropd.methods.outliers import ClipOutlier as ClipOutlier, MaskOutlier as MaskOutlier, FullFKL as FullFKL
from tropd.methods.jsd import JSD as JSD
from tropd.methods.eopd import EOPD as EOPD
from tropd.methods.entropy_opd import EntropyOPD as EntropyOPD
from tropd.methods.reopold import REOPOLD as REOPOLD
from tropd.methods.aopd import AOPD as AOPD
from tropd.methods.local_support import LSM as LSM, ManyFaces as ManyFaces
from tropd.methods.rethinking import Rethinking as Rethinking
from tropd.methods.tip import TIP as TIP
from tropd.methods.ta_opd import TAOPD as TAOPD
from tropd.methods.rock import Rock as Rock
from tropd.methods.near_future import NearFuture as NearFuture
from tropd.methods.draft_opd import DraftOPD as DraftOPD
from tropd.methods.lgr import LGR as LGR
from tropd.methods.mopd import MOPD as MOPD
from tropd.methods.opd_plus import OPDPlus as OPDPlus
from tropd.methods.classics import GKD as GKD, MiniLLM as MiniLLM
from tropd.methods.distillm import DistiLLM as DistiLLM
from tropd.methods.supervised import SeqKD as SeqKD, SFT as SFT
from tropd.methods.topd import TOPD as TOPD
from tropd.methods.tokenizer_barrier import TokenizerBarrier as TokenizerBarrier
from tropd.methods.gndpo import GNDPO as GNDPO
from tropd.methods.power_opd import PowerOPD as PowerOPD
from tropd.methods.vopd import VOPD as VOPD
from tropd.methods.exopd import ExOPD as ExOPD
from tropd.methods.fire import FiRe as FiRe
from tropd.methods.sg_opd import OPDVR as OPDVR, SGOPD as SGOPD
from tropd.methods.rg_opd import RGOPD as RGOPD
from tropd.methods.scope import SCOPE as SCOPE
from tropd.methods.kdrl import KDRL as KDRL
from tropd.methods.opsd import OPSD as OPSD
from tropd.methods.unisd import UniSD as UniSD
from tropd.methods.sdft import SDFT as SDFT
from tropd.methods.sdpo import SDPO as SDPO, MultiRollout as MultiRollout
from tropd.methods.cgtr import CGTR as CGTR
from tropd.methods.ptd import PTD as PTD
from tropd.methods.oprd import OPRD as OPRD
from tropd.methods.ogls import OGLS as OGLS
from tropd.methods.safesteer import SafeSteer as SafeSteer
from tropd.methods.esr import ESR as ESR
from tropd.methods.adwin import ADWIN as ADWIN
from tropd.methods.trb import TRB as TRB
from tropd.methods.skd import SKD as SKD
from tropd.methods.kat import KAT as KAT
from tropd.methods.omniopd import OmniOPD as OmniOPD
# isort: on


def _names() -> dict[str, type[Method]]:
    """The methods that are imported above, by their names in run files."""
    classes = [x for x in globals().values() if isinstance(x, type) and issubclass(x, Method)]
    return {str(cls.__dataclass_fields__["name"].default): cls for cls in classes if cls not in (Method, NamedMethod)}


METHODS: dict[str, type[Method]] = _names()


def find_method(name: str) -> type[Method]:
    """The class behind a name: one of METHODS, or code of your own, which this imports."""
    if name in METHODS:
        return METHODS[name]
    check_name(name)
    cls = find(name, "method")
    if not (inspect.isclass(cls) and issubclass(cls, Method)):
        raise ConfigError(f"method '{name}' is no class that inherits from tropd.Method.")
    knobs = [key for key, hint in inspect.get_annotations(cls).items() if "ClassVar" not in str(hint)]
    if knobs and "__dataclass_fields__" not in vars(cls):
        raise ConfigError(f"method '{name}' is no dataclass. Write @dataclass(frozen=True, kw_only=True) above it.")
    return cls


def check_name(name: str, others: Sequence[str] = ()) -> None:
    """Refuse a name that is neither one of METHODS, nor of the others, nor of code of your own; a near miss is named in
    the error."""
    known = [*METHODS, *offered("methods"), *others]
    if name not in known and not is_name(name):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"there is no method {name!r}.{hint} Known: {', '.join(known)}.")

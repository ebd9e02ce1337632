"""Tasks with a small teacher and student, to watch distillation and compare methods on a laptop.

pair = make_pair(TESTBEDS["nano-hard"], seed=0, directory=Path("pairs/nano-hard-0"))    # trained here, kept there
pair = embedded("nano-hard")                                                            # comes with the package
"""

from tropd.testbeds.beds import TESTBEDS
from tropd.testbeds.pair import Pair, embedded, make_pair
from tropd.testbeds.task import Testbed

__all__ = ["TESTBEDS", "Pair", "Testbed", "embedded", "make_pair"]

"""Every fault applies to the code as it is; `make mutants` shows that tests notice them."""

from tests.mutants.__main__ import ROOT
from tests.mutants.faults import FAULTS


def test_every_fault_applies():
    stale = [fault.name for fault in FAULTS if (ROOT / fault.path).read_text().count(fault.line) != 1]
    assert not stale and len({fault.name for fault in FAULTS}) == len(FAULTS) >= 25

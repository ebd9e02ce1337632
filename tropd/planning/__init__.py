"""What a run will need on machines that are not at hand: memory, time, servers, bytes."""

from tropd.planning.devices import DEVICES, Device, measure_here, read_cluster
from tropd.planning.plan import Plan, make_plan

__all__ = ["DEVICES", "Device", "Plan", "make_plan", "measure_here", "read_cluster"]

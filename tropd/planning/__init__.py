"""What a run will need on other machines: memory, time, servers, bytes."""

from tropd.planning.devices import DEVICES, Device, measure_here, read_cluster
from tropd.planning.forecast import Forecast, make_forecast

__all__ = ["DEVICES", "Device", "Forecast", "make_forecast", "measure_here", "read_cluster"]

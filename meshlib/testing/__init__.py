"""What tests of services need: virtual time, networks in memory, and a simulator of whole clusters.

Nothing here is imported by the rest of the library. Virtual time needs trio: ``pip install "meshlib-rpc[testing]"``.
"""

from .cluster import Cluster, Host
from .faults import Fault, add, black_hole, crash, errors, hang, remove, restart, slow
from .latency import Latency, constant, exponential, lognormal, pareto, replayed, uniform
from .memory import MemoryStream, duplex
from .network import Name, Network
from .proxy import FaultProxy
from .report import Report
from .scenario import Calls, Clients, Load, Scenario, Servers
from .scripted import Script, ScriptedRequest, scripted
from .settings import load_scenario
from .toxics import Direction
from .virtual import run_virtual
from .workers import Workers

__all__ = [
    "Calls",
    "Clients",
    "Cluster",
    "Direction",
    "Fault",
    "FaultProxy",
    "Host",
    "Latency",
    "Load",
    "MemoryStream",
    "Name",
    "Network",
    "Report",
    "Scenario",
    "Script",
    "ScriptedRequest",
    "Servers",
    "Workers",
    "add",
    "black_hole",
    "constant",
    "crash",
    "duplex",
    "errors",
    "exponential",
    "hang",
    "load_scenario",
    "lognormal",
    "pareto",
    "remove",
    "replayed",
    "restart",
    "run_virtual",
    "scripted",
    "slow",
    "uniform",
]

"""Gates, sub-architectures and results in HDF5 files that any HDF5 tool opens.

One file for each network, data and recipe; see :class:`GateStore`, and the page on the file format.
Sizes, types and links are checked before anything is allocated, nothing is unpickled or evaluated,
and every fault of a file raises a :class:`GateStoreError`.
"""

from nad_attr.store._diff import StoreDiff, diff
from nad_attr.store._errors import GateStoreError
from nad_attr.store._gate_store import GateStore, read_task_gates, write_task_gates
from nad_attr.store._results import (
    read_result,
    read_units,
    result_names,
    unit_names,
    write_result,
    write_units,
)
from nad_attr.store._sub_architecture import read_sub_architecture, write_sub_architecture
from nad_attr.store._write import FORMAT_VERSION

__all__ = [
    "FORMAT_VERSION",
    "GateStore",
    "GateStoreError",
    "StoreDiff",
    "diff",
    "merge",
    "read_result",
    "read_sub_architecture",
    "read_task_gates",
    "read_units",
    "result_names",
    "unit_names",
    "write_result",
    "write_sub_architecture",
    "write_task_gates",
    "write_units",
]

merge = GateStore.merge

"""A neighbour that needs memory: it grows, touches all that it has over and over, and says how it fared.

`shape` says how much it wants at which time, `memory` takes and touches it, `worker` is the process that does so and
`supervise` starts one and tells what became of it.
"""

from kvpsi.hog.shape import HogSettings, step_bytes_for
from kvpsi.hog.supervise import Hog, HogReport, worker_command

__all__ = ["Hog", "HogReport", "HogSettings", "step_bytes_for", "worker_command"]

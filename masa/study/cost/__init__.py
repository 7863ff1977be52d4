"""What runs will cost before they are paid for: FLOPs, hours, memory and disk of every job of a configuration.

Everything is computed from run specs and a :class:`~masa.study.cost.devices.Device`; neither torch nor NumPy is
imported, so that the workflow can ask while it is parsed. Only :mod:`masa.study.cost.measure`, which times this
machine, needs torch.

* ``devices``: what a device does in a second and how much it holds
* ``readings``: what was measured on a card, where a file says it
* ``sizes``: the numbers of a model, and its parameters, exactly
* ``transformer``: work and memory of one pass over a batch
* ``training``, ``evaluation``, ``compression``, ``data``: seconds, memory and disk of the jobs of each kind
* ``preparation``: the jobs beside: data, counting, timing, tables and figures
* ``jobs``, ``workflow``, ``limits``: one job; all jobs of a configuration; what a cluster is asked for
* ``shares``: several small runs on one card
* ``schedule``, ``report``, ``logs``: the whole on so many cores; the printed plan; what a finished workflow took
"""

from masa.study.cost.devices import DEVICES, Device, device
from masa.study.cost.jobs import Job, Plan
from masa.study.cost.limits import resources

__all__ = ["DEVICES", "Device", "Job", "Plan", "device", "resources"]

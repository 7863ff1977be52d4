"""A real Slurm on this machine for the tests: controller, munge and two nodes with two pretend GPUs each.

Everything lives in one temporary directory, with ports of its own; while it runs, /etc/slurm has links to its
configuration (Snakemake's jobs find Slurm by no other way). Needs root and Debian's packages slurmctld, slurmd,
slurm-client and munge, and a machine that is no part of a cluster already.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
SYSTEM, FILES = Path("/etc/slurm"), ("slurm.conf", "gres.conf", "cgroup.conf")

CONF = """\
ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
MpiDefault=none
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
MinJobAge=7200
KillWait=30
SchedulerParameters=sched_interval=1,batch_sched_delay=0
GresTypes=gpu
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=a NodeHostname={host} NodeAddr=127.0.0.1 Port={port_a} CPUs={cpus} RealMemory={memory} Gres=gpu:2 State=UNKNOWN
NodeName=b NodeHostname={host} NodeAddr=127.0.0.1 Port={port_b} CPUs={cpus} RealMemory={memory} Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=a,b Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """Why Slurm cannot be started here, or None."""
    if os.geteuid():
        return "Slurm's daemons need root"
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if not absent:
        there = [name for name in FILES if (SYSTEM / name).exists() and not _abandoned(SYSTEM / name)]
        return f"this machine has a Slurm already ({SYSTEM / there[0]})" if there else None
    return f"Slurm is not installed ({', '.join(absent)}): apt-get install slurmctld slurmd slurm-client munge"


class Cluster:
    """Start with :meth:`start`, stop with :meth:`stop`."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def start(self):
        for name in ("state", "spool-a", "spool-b"):
            (self.folder / name).mkdir(parents=True)
        for part in (self.folder, *self.folder.parents):  # munge's socket must be reachable
            if part.stat().st_uid == os.geteuid():
                part.chmod(part.stat().st_mode | 0o555)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        ports = _free_ports(3)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        names = dict(zip(("port", "port_a", "port_b"), ports, strict=True))
        host = socket.gethostname().split(".")[0]
        more = {"host": host, "folder": self.folder, "cpus": os.cpu_count(), "memory": int(0.8 * memory)}
        (self.folder / "slurm.conf").write_text(CONF.format(**names, **more))
        # any character device will do; Slurm sets CUDA_VISIBLE_DEVICES from them
        (self.folder / "gres.conf").write_text("NodeName=a,b Name=gpu Flags=nvidia_gpu_env File=/dev/tty[0-1]\n")
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        SYSTEM.mkdir(exist_ok=True)
        for name in FILES:
            (SYSTEM / name).unlink(missing_ok=True)  # a link that leads nowhere
            (SYSTEM / name).symlink_to(self.folder / name)
        munge = [f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("key-file", "pid-file", "log-file")]
        munge += [f"--socket={self.folder}/munge.sock", f"--seed-file={self.folder}/munge.seed", "--force"]
        self._run("munged", *munge)
        self._run("slurmctld", "-i", "-f", str(self.folder / "slurm.conf"))
        for node in "ab":
            self._run("slurmd", "-N", node, "-f", str(self.folder / "slurm.conf"))
        for _ in range(100):
            if self._run("sinfo", "--noheader", "--format=%t %D", check=False).split() == ["idle", "2"]:
                return self
            time.sleep(0.2)
        raise RuntimeError("Slurm did not start:\n" + (self.folder / "slurmctld.log").read_text()[-3000:])

    def stop(self):
        self._run("scancel", "--user=root", check=False)
        time.sleep(1)
        for file in (*self.folder.glob("slurm*.pid"), *self.folder.glob("munge.pid")):
            try:
                os.kill(int(file.read_text()), 15)
            except (ProcessLookupError, ValueError):
                continue
        for name in FILES:
            (SYSTEM / name).unlink(missing_ok=True)

    def jobs(self, states="RUNNING"):
        """Ids of jobs -> their comments, which Snakemake fills with rule and wildcards."""
        lines = self._run("squeue", "--noheader", f"--states={states}", "--format=%i|%k").splitlines()
        return dict(line.strip().split("|", 1) for line in lines)

    def requeue(self, job):
        self._run("scontrol", "requeue", job)

    def records(self):
        """What the controller remembers of all jobs, running or ended."""
        return self._run("scontrol", "--oneliner", "show", "jobs").splitlines()

    def _run(self, *command, check=True):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {result.stdout}{result.stderr}")
        return result.stdout


def _abandoned(file):
    """Whether a file of Slurm's is a link that tests left which were killed: their controller runs no more."""
    folder = file.resolve().parent
    ours = file.is_symlink() and folder.is_relative_to(tempfile.gettempdir()) and (folder / "munge.key").is_file()
    controller = folder / "slurmctld.pid"
    return ours and not (controller.is_file() and psutil.pid_exists(int(controller.read_text())))


def _free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports

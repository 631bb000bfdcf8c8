"""A real SLURM whose nine nodes are all this machine: real daemons, real scheduling, pretend GPUs.

Needs root, slurmctld, slurmd, srun and munged (Debian: slurmctld slurmd slurm-client munge).
Every wait has a limit, and everything that was started is stopped by its process id.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

NODES = 9
CGROUPS, HIERARCHIES = Path("/sys/fs/cgroup"), ("freezer", "cpuset")
"""Where control groups lie, and those that SLURM makes groups in here."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")

SLURM_CONF = """\
ClusterName=pretend
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={base}/run/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
MailProg=/bin/true
PlugStackConfig={base}/etc/plugstack.conf
ProctrackType={process_tracking}
TaskPlugin={task_plugin}
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
EnforcePartLimits=ALL
ReturnToService=2
SlurmdTimeout=5
KillWait={kill_wait}
CompleteWait=0
MinJobAge=600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd.%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd.%n.log
{addresses}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=off
"""


NODE_CONF = """\
NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} \
{cores} ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:8 State=UNKNOWN"""


class PretendCluster:
    """Daemons of one cluster, and what a user of it types."""

    controller = "127.0.0.1"
    """Address that the nodes reach the controller at."""
    nodes = NODES
    cores = "Sockets=2 CoresPerSocket=32"
    """Of each node, whatever this machine has."""
    task_plugin, process_tracking = "task/none", "proctrack/linuxproc"

    def __init__(self, base: Path, kill_wait: int = 60) -> None:
        self.base = base
        self.config = base / "etc" / "slurm.conf"
        self._kill_wait = kill_wait
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._hurried: set[tuple[str, str]] = set()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            "SLURM_CONF": str(self.config),
        }

    def start(self) -> None:
        """Start every daemon and wait until all nodes are idle."""
        for folder in ("etc", "run", "log", "state", "spool", "dev"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        self._write_configuration()
        self._start_munge()
        self._daemon("slurmctld", "slurmctld", "-D", "-f", self.config)
        self.until(lambda: "UP" in self.command("scontrol", "ping", check=False), 30, "slurmctld")
        for number in range(1, self.nodes + 1):
            self.start_node(f"n{number}")
        self.until(lambda: self.nodes_in("idle") == self.nodes, 60, "idle nodes")

    def stop(self) -> None:
        """Kill what is left of jobs, then the daemons."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.command("scancel", "--state=RUNNING", "--signal=KILL", "--full", "--user=root", check=False)
            self.command("scancel", "--user=root", check=False)
        for daemon in reversed(self._daemons.values()):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        (self.base / "spool" / node).mkdir(exist_ok=True)
        self._daemon(node, *self._inside(node), "slurmd", "-D", "-f", self.config, "-N", node)

    def address(self, number: int) -> str:
        """Address of node n<number>."""
        return "127.0.0.1"

    def _inside(self, node: str) -> list[str]:
        """Command in front of a node's daemon."""
        return []

    def kill_node(self, node: str) -> None:
        """Take a node's power away: its daemon and everything that runs on it die at once."""
        self.kill_daemon(node)
        for process in self.processes_of(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def kill_daemon(self, node: str) -> None:
        """Kill a node's daemon alone: for SLURM the node is gone, but its ranks run on."""
        self._daemons.pop(node).kill()

    def processes_of(self, node: str) -> list[int]:
        """Processes of job steps on a node: the step's daemon and the ranks."""
        return [
            process
            for process, environment in _environments()
            if f"SLURMD_NODENAME={node}" in environment and f"SLURM_CONF={self.config}" in environment
        ] + _daemons_of_steps(self.base / "spool" / node, node)

    def ranks(self, job: str, script: str = "pretrain.py", mark: str = "MEGAREGION_FENCE") -> dict[int, int]:
        """Process of each rank of a job that runs a script, with a mark among its environment."""
        found = {}
        for process, environment in _environments():
            values = dict(item.split("=", 1) for item in environment if "=" in item)
            if values.get("SLURM_JOB_ID") != job or "SLURM_PROCID" not in values:
                continue
            # srun's own command line ends with the ranks', and it carries rank 0's number.
            command = _read(f"/proc/{process}/cmdline").split(b"\0")
            runs = b"python" in command[0] and any(part.endswith(script.encode()) for part in command)
            if runs and mark in values:
                found.setdefault(int(values["SLURM_PROCID"]), process)
        return found

    def submit(self, *arguments: object, environment: dict[str, str] | None = None, cwd: Path) -> str:
        """Submit a script and return the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, arguments)],
            env={**self.environment, **(environment or {})},
            cwd=cwd, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().split(";")[0]

    def command(self, *command: object, check: bool = True) -> str:
        """Run one of SLURM's tools and return what it printed."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What scontrol knows of a job; empty once it has been forgotten."""
        text = self.command("scontrol", "--oneliner", "show", "job", job, check=False)
        return dict(item.split("=", 1) for item in text.split() if "=" in item)

    def hurry(self, job: str) -> None:
        """Start a requeued job soon instead of after SLURM's pause of minutes.

        Not at once: a node refuses credentials made in the second in which it revoked the job's last ones.
        """
        known = self.job(job)
        start = (job, known.get("Restarts", ""))
        waits = known.get("JobState") == "PENDING" and known.get("Reason") == "BeginTime"
        if waits and start not in self._hurried:
            self._hurried.add(start)
            self.command("scontrol", "update", f"job={job}", "StartTime=now+3", check=False)
        # A node that comes back at that moment may fail to launch the job, which SLURM then holds.
        if known.get("Reason", "").lower() == "launch_failed_requeued_held":
            self.command("scontrol", "release", job, check=False)

    def finish(self, job: str, seconds: float) -> str:
        """Wait for a job to end for good, requeues included, and return its last state."""

        def ended() -> bool:
            self.hurry(job)
            return self.has_ended(job)

        self.until(ended, seconds, f"the end of job {job}")
        return self.job(job)["JobState"]

    def has_ended(self, job: str) -> bool:
        """Whether a job has ended and will not come back."""
        return self.job(job).get("JobState", "") in (
            "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED",
        )  # fmt: skip

    def nodes_in(self, state: str) -> int:
        """Number of nodes in a state."""
        return (
            len(
                self.command("sinfo", "--noheader", "--Node", f"--states={state}", "--partition=batch").split(
                    "\n"
                )
            )
            - 1
        )

    def until(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Wait for a condition, not for ever."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(
                    f"waited {seconds:.0f} s for {what}\n{self.command('squeue', '--long', check=False)}"
                )
            time.sleep(0.2)

    def _write_configuration(self) -> None:
        first = _free_ports(self.nodes + 1)
        host = socket.gethostname().split(".")[0]
        nodes = [
            NODE_CONF.format(
                name=f"n{i}", host=host, address=self.address(i), port=first + i, cores=self.cores
            )
            for i in range(1, self.nodes + 1)
        ]
        text = SLURM_CONF.format(
            base=self.base, host=host, port=first, controller=self.controller, kill_wait=self._kill_wait,
            task_plugin=self.task_plugin, process_tracking=self.process_tracking,
            addresses="\n".join(nodes),
        )  # fmt: skip
        self.config.write_text(text)
        (self.base / "etc" / "plugstack.conf").write_text("")
        devices = self.base / "dev"
        for number in range(8):
            os.mknod(devices / f"gpu{number}", 0o600 | 0o020000, os.makedev(1, 3))
        (self.base / "etc" / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={devices}/gpu[0-7]\n")

    def _start_munge(self) -> None:
        run, key = self.base / "run", self.base / "etc" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._daemon(
            "munged", "munged", "-F", f"--socket={run}/munge.sock", f"--key-file={key}",
            f"--pid-file={run}/munged.pid", f"--seed-file={run}/munge.seed",
            f"--log-file={self.base}/log/munged.log",
        )  # fmt: skip
        self.until(lambda: (run / "munge.sock").exists(), 20, "munged")

    def _daemon(self, name: str, *command: object) -> None:
        with (self.base / "log" / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                [str(part) for part in command],
                env=self.environment, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip


class BindingCluster(PretendCluster):
    """One node of two cores, this machine's first two, to which SLURM binds the tasks."""

    nodes, cores, task_plugin = 1, "Sockets=1 CoresPerSocket=2", "task/affinity"


class CgroupCluster(BindingCluster):
    """The same node, where control groups hold the processes of each job and confine them to its cores."""

    task_plugin, process_tracking = "task/cgroup,task/affinity", "proctrack/cgroup"

    def start(self) -> None:
        """Start every daemon; skips where the kernel or the container does not allow it."""
        lacking = [name for name in HIERARCHIES if not os.access(CGROUPS / name / "cgroup.procs", os.W_OK)]
        if lacking:
            # SLURM's plugin for version 2 wants a systemd that hands it a group of its own.
            pytest.skip(f"needs control groups of version 1 that can be written: no {CGROUPS}/{lacking[0]}")
        super().start()

    def stop(self) -> None:
        """Stop every daemon and remove the groups, which SLURM leaves; one that is in use stays."""
        super().stop()
        for top in CGROUPS.glob("*/slurm_n1"):
            for folder in [*sorted(path for path in top.rglob("*") if path.is_dir())[::-1], top]:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def _write_configuration(self) -> None:
        super()._write_configuration()
        (self.base / "etc" / "cgroup.conf").write_text(
            f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={CGROUPS}\nConstrainCores=yes\n"
        )


@contextlib.contextmanager
def pretend_cluster(kind: type[PretendCluster] = PretendCluster) -> Iterator[PretendCluster]:
    """A running cluster; a machine without SLURM skips, except under CI, where that is a failure."""
    lacking = [program for program in PROGRAMS if shutil.which(program) is None]
    reason = f"needs root and SLURM ({', '.join(lacking)} not found)" if lacking else "needs root"
    if lacking or os.geteuid() != 0:
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="pretend-slurm-", ignore_cleanup_errors=True) as base:
        Path(base).chmod(0o755)  # munged wants every user to reach its socket
        cluster = kind(Path(base))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def _environments() -> Iterator[tuple[int, list[str]]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            content = _read(f"/proc/{folder.name}/environ")
            if b"SLURM" in content:
                yield int(folder.name), content.decode(errors="replace").split("\0")


def _daemons_of_steps(spool: Path, node: str) -> list[int]:
    """slurmstepd processes of a node; they carry its spool folder among their open files or their name."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and _read(f"/proc/{folder.name}/comm").startswith(b"slurmstepd"):
            files = [str(f.readlink()) for f in _listed(folder / "fd")]
            if any(file.startswith(f"{spool}/") or f"{node}_" in file for file in files):
                found.append(int(folder.name))
    return found


def _listed(folder: Path) -> list[Path]:
    try:
        return [file for file in folder.iterdir() if file.is_symlink()]
    except OSError:
        return []


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _free_ports(count: int) -> int:
    """First of some neighbouring ports that nobody listens on."""
    # Each process looks in a place of its own: what one has found, another may take before it is used.
    for first in range(10000 + os.getpid() % 900 * 10, 32000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise OSError("no free ports")

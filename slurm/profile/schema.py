"""What a cluster profile may say: what an admin writes once, so that no pipeline names a partition, account or module.

A profile is a YAML file of the dataclasses below (`slurm/profiles/example.yaml` is the one to copy), or several, each
laid upon those that it extends (layers.py); files.py finds and reads them. A pipeline asks for a role and perhaps some
numbers (`Request`); resolve.py fills in the rest (`Resources`), check.py says what the cluster would refuse, policy.py
what its admin does. Times are Slurm's: "30" (minutes), "1:30:00", "2-00:00:00".

The dataclasses are OmegaConf structured configs too.
"""

import re
from dataclasses import dataclass, field

from data_tools.base.declared import setting

STANDARD_ROLES = ("cpu", "train", "generate", "eval")
DEFAULT_ROLE = "cpu"  # of a phase that names none
KINDS = ("slurm", "local")
RUNTIMES = ("none", "pyxis", "apptainer", "charliecloud")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
REFERENCES = ("file", "cmd", "env")  # where env.secrets may point


@dataclass
class Meta:
    """Who to ask. `name` is the file's name where it is not given."""

    name: str = ""
    contact: str = ""
    description: str = ""


@dataclass
class NodeType:
    """One kind of a partition's nodes, where they differ (None: the partition's value).

    A job asks for `constraint`, beside what it asks for anyhow, or for `gres` by name: so it gets nodes of one kind.
    """

    max_nodes: int | None = None  # how many there are
    cpus: int | None = None
    mem_gib: int | None = None
    gpus_per_node: int | None = None
    gpu: str | None = None
    gpu_mem_gib: int | None = None
    gres: str | None = None
    constraint: str | None = None


@dataclass
class Partition:
    """What a Slurm partition allows a job (None: not known, not checked) and what every job in it must say."""

    max_time: str | None = None
    max_nodes: int | None = None
    cpus: int | None = None  # of a node
    mem_gib: int | None = None  # of a node
    gpus_per_node: int | None = None
    gpu: str | None = None  # type: a100, h100, h200, b200; with it `plan` knows memory and speed
    gpu_mem_gib: int | None = None  # of one GPU; None: that of the type
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    licenses: str | None = None  # "lustre:1,matlab"
    constraint: str | None = None
    # Slurm's name of a node's GPUs as `sinfo -o %G` prints it, "gpu:h100:8"; with it jobs ask by that name
    gres: str | None = None
    node_types: dict[str, NodeType] = field(default_factory=dict)  # the first that a phase fits on is taken
    # whether a stopped or preempted job may run again under its id; None: asked of Slurm
    requeue: bool | None = None
    extra_sbatch: dict[str, str] = field(default_factory=dict)


@dataclass
class Env:
    """What a job's environment is made of, in this order: `forward`, `set`, `modules`, `setup`, our own, `secrets`.

    Each sees what those before it made, and may change it. `modules` are loaded with `module load`, one after the
    other; `modules_init` is sourced before them, and without it a batch shell that has no `module` gets it from where
    Environment Modules and Lmod are installed (launchers/backends/shell_lines.py). One that is not loaded ends the job.
    `setup` are lines of one shell script, run under bash's default options, so without -e, -u and pipefail: a command
    of theirs that fails is told in the job's log and does not end it, `exit` does. Our own are PYTHONPATH,
    PYTHONSAFEPATH, PYTHONUNBUFFERED, MASTER_ADDR and MASTER_PORT. Local processes get `set` and `secrets`.

    `secrets` maps a variable to where its value lies: "file:~/.wandb_key" and "cmd:pass show hf" are read by the worker
    on its node (jobs/secrets.py) and are written nowhere. "env:NAME" means NAME of the submitter's environment, which
    `forward` must list too. It is no secret: Slurm writes the environment that sbatch sends into the controller's
    StateSaveLocation, the node's spool, and slurmdbd where it has AccountingStoreFlags=job_env (seen with 22.05).
    """

    python: str | None = None  # interpreter of the jobs; None: the one that submits
    setup: list[str] = field(default_factory=list)  # shell lines
    modules_init: str | None = None  # the file that defines `module`; None: looked for where packages put it
    modules: list[str] = field(default_factory=list)
    set: dict[str, str] = field(default_factory=dict)
    forward: list[str] = field(default_factory=list)  # names of variables taken from the submitter
    secrets: dict[str, str] = field(default_factory=dict)  # variable -> file:PATH, cmd:COMMAND or env:NAME


@dataclass
class RoleEnv:
    """What a role's environment has otherwise: lists and single values replace the profile's, mappings are laid upon.

    None is the profile's own. A trainer's and an engine's Python often cannot share modules.
    """

    python: str | None = None
    setup: list[str] | None = None
    modules_init: str | None = None
    modules: list[str] | None = None
    set: dict[str, str] = field(default_factory=dict)
    forward: list[str] | None = None
    secrets: dict[str, str] = field(default_factory=dict)


@dataclass
class Role:
    """What a phase of this kind gets where its pipeline does not say."""

    partition: str | None = None  # None: the only partition, or none at all on a local profile
    partitions: list[str] = field(default_factory=list)  # or several: the first that a phase fits into is taken
    time: str | None = None  # None: the partition's max_time
    nodes: int = 1
    gpus_per_node: int = 0
    gpu: str | None = None  # type and memory of one GPU; None: the partition's
    gpu_mem_gib: int | None = None
    cpus_per_task: int = 1
    mem_gib: int | None = None  # a node; None: the cluster's default
    ranks_per_node: int | None = None  # None: one a GPU, else one
    account: str | None = None  # these five: None: the partition's
    qos: str | None = None
    reservation: str | None = None
    licenses: str | None = None
    constraint: str | None = None
    gres: str | None = None  # what a node must have beside its GPUs, "nvme:1"; or its GPUs by name, "gpu:h100:4"
    env: RoleEnv = field(default_factory=RoleEnv)


@dataclass
class Network:
    """How nodes find each other. The two names become NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, and NCCL_IB_HCA."""

    interface: str | None = None  # whole names as `ip link` prints them: "ib0", "eth0,eth1"; NCCL reads "=ib0" as exact
    hca: str | None = None  # NCCL's words: "mlx5_0,mlx5_1" as `ibv_devinfo -l` prints them, "mlx5" for all, "^mlx5_2"
    port_range: list[int] = field(default_factory=lambda: [20000, 29999])  # first and last port for MASTER_PORT


@dataclass
class Storage:
    """Where files may lie. With `scratch` or `shared`, a run that lies below none of them is refused."""

    scratch: str | None = None  # a folder that all nodes share; jobs have it as AFTEROK_SCRATCH
    node_local: str | None = None  # a folder of each node's own, there already; jobs have it as TMPDIR
    shared: list[str] = field(default_factory=list)  # further folders that every node must see


@dataclass
class Srun:
    mpi: str | None = None
    extra: list[str] = field(default_factory=list)


@dataclass
class Container:
    """In which image the ranks of each role run; the batch script itself runs outside, with `env.python`."""

    runtime: str = "none"  # none, pyxis, apptainer, charliecloud
    images: dict[str, str] = field(default_factory=dict)  # role -> file, folder or URI; "default" for the others
    mounts: list[str] = field(default_factory=list)  # SRC[:DST[:ro]], beside the run's folder
    python: str = "python3"  # of the image
    args: list[str] = field(default_factory=list)  # further words for the runtime


@dataclass
class Health:
    """What each node is asked before the ranks of a job start; one that fails is named, and the job runs without it.

    Only what is said is asked. The all-reduce is among the GPUs of one node, so that a failure has one name.
    """

    gpus: bool = False  # nvidia-smi sees as many as the job has
    ecc: bool = False  # none has an uncorrected error of memory
    min_clock_mhz: int | None = None  # none is limited to less, or slowed down by heat or power
    all_reduce: bool = False  # NCCL adds a tensor up on all of them
    commands: list[str] = field(default_factory=list)  # shell lines that end with 0 on a good node
    limit_s: int = 60  # of each command, and of the all-reduce


@dataclass
class Hooks:
    """The site's own lines in each job."""

    prolog: list[str] = field(default_factory=list)  # shell lines, once a job, on its first node, before its ranks
    health: Health = field(default_factory=Health)


@dataclass
class Mail:
    """Whom Slurm sends mail, and of what (mail.py): sbatch's --mail-user and --mail-type, said once for a pipeline.

    Without `type` it is END and FAIL, without `user` the one who submits. Local processes send none.
    """

    user: str | None = None
    type: list[str] = field(default_factory=list)  # BEGIN, END, FAIL, REQUEUE, INVALID_DEPEND, TIME_LIMIT…, ALL, NONE


@dataclass(kw_only=True)
class Wishes:
    """What a phase may ask for, beside its role; None takes the profile's value for its kind, else the role's."""

    nodes: int | None = setting(None, "nodes of each element", unit="nodes", example=2)
    gpus_per_node: int | None = setting(None, "GPUs of each node", unit="GPUs", example=8)
    cpus_per_task: int | None = setting(None, "CPU cores of each rank", unit="cores", example=12)
    mem_gib: int | None = setting(None, "memory of each node", unit="GiB", example=500)
    time: str | None = setting(None, "time limit, as sbatch takes it: minutes, H:M:S or D-H:M:S", example="8:00:00")
    ranks_per_node: int | None = setting(
        None, "processes of each node; by default one a GPU, and one where there are no GPUs", unit="ranks", example=8
    )
    partition: str | None = setting(None, "partition, in place of the role's", example="gpu")
    account: str | None = setting(None, "account that is charged", example="llm")
    qos: str | None = setting(None, "quality of service", example="normal")
    reservation: str | None = setting(None, "reservation that the job runs in", example="course")
    licenses: str | None = setting(None, "licences that the job holds", example="matlab:1")
    constraint: str | None = setting(None, "features that the nodes must have", example="h100")
    gres: str | None = setting(
        None, "generic resources of each node, beside its GPUs or with their names", example="nvme:1"
    )


@dataclass
class Bound:
    """What a value may be. Times are compared as minutes, all else as integers."""

    min: str | None = None
    max: str | None = None
    choices: list[str] = field(default_factory=list)  # the only values; empty: any
    reason: str = ""  # what a user who asks for more is told


@dataclass
class Policy:
    """What an admin lets nobody change. It counts only in a file that is an admin's (admins.py), and is applied last.

    Keys are dotted places of a profile, where "*" stands for any one name, and mean all that lies below: "env.setup",
    "partitions.*.max_time", "roles". In `bounds`, "resources.KEY" is what a phase gets in the end (`Resources`),
    whoever said it.
    """

    locked: dict[str, str] = field(default_factory=dict)  # key -> what a user who changes it is told
    bounds: dict[str, Bound] = field(default_factory=dict)
    require_account: bool = False
    allowed_qos: list[str] = field(default_factory=list)  # empty: any
    unwaivable: list[str] = field(default_factory=list)  # checks (slurm/checks.py) that nobody may waive
    reason: str = ""  # what a user is told whom require_account, allowed_qos or unwaivable refuses


@dataclass
class Profile:
    extends: list[str] = field(default_factory=list)  # names or paths of profiles that this one is laid upon, in order
    kind: str = "slurm"  # or "local": processes of this machine
    meta: Meta = field(default_factory=Meta)
    partitions: dict[str, Partition] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    phases: dict[str, Wishes] = field(default_factory=dict)  # phase kind (sft, ...) -> what it gets by default
    env: Env = field(default_factory=Env)
    storage: Storage = field(default_factory=Storage)
    container: Container = field(default_factory=Container)
    hooks: Hooks = field(default_factory=Hooks)
    network: Network = field(default_factory=Network)
    srun: Srun = field(default_factory=Srun)
    mail: Mail = field(default_factory=Mail)
    max_array_size: int | None = None  # None: no limit known
    max_submit_jobs: int | None = None  # of one user at a time, array elements counted; None: asked of sacctmgr
    signal_lead_s: int = 90  # seconds before the time limit at which a job is asked to stop: one checkpoint must fit
    waive: list[str] = field(default_factory=list)  # ids of checks (slurm/checks.py) whose findings do not count here
    policy: Policy = field(default_factory=Policy)


@dataclass
class Request(Wishes):
    """What a phase asks for."""

    role: str = setting(DEFAULT_ROLE, "what it does: the profile maps it to a partition and defaults", example="train")


@dataclass(frozen=True)
class Resources:
    """What one array element gets. None means that the option is not given to sbatch."""

    role: str
    partition: str | None
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    gpu: str | None
    gpu_mem_gib: int | None
    cpus_per_task: int
    mem_gib: int | None
    time_minutes: int | None
    account: str | None
    qos: str | None
    constraint: str | None
    extra_sbatch: dict[str, str]
    reservation: str | None = None
    licenses: str | None = None
    gres: str | None = None  # whole, GPUs included; then gpus_per_node is not said a second time
    node_type: str | None = None

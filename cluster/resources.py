"""From the configuration and what the cluster has: how many trainers and model actors, with which CPUs and GPUs.

A plan that does not fit makes Ray wait for ever without a word, so it is checked here and refused with the numbers.

How many model actors feed one trainer is first guessed from what a token costs each side, then left to Ray Data: the
pool starts at the guess and grows, on GPUs up to twice that, while actors have more work waiting than they can take and
the trainers take what they are given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from cluster.placement import placed_members, split_of, step_seconds
from mtc.config import ConfigError, RunConfig

# Several torch processes share cores: threads that spin while they wait would steal them from the others.
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
# Shapes change from unit to unit: without this the allocator keeps pieces that fit nothing, and of one GPU that two
# processes share, what one holds the other lacks.
GPU_ENVIRONMENT = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}

SMALLEST_SHARE = 0.1  # of a CPU, for a model actor
CPUS_PER_ACTOR = 8  # a forward pass does not use many more well
SMALL_ACTORS_PER_NODE = 4
SMALL_MODEL_BYTES = 1e9
ACTOR_SHARE_OF_ONE_GPU = 0.6
ROOM_TO_GROW = 2  # times the model actors that a trainer is thought to keep up with

FORWARD_FLOPS = 360e12
"""Operations per second of the language model's pass on one GPU: 45 % of a large bfloat16 product, an estimate for an
H100, of which ratios matter here; docs/gpu.md derives it, and those of a training step in cluster.placement."""


class Node(NamedTuple):
    """What one node offers."""

    cpus: float
    """CPUs that Ray may hand out: those that nobody holds."""
    gpus: float
    """GPUs that Ray may hand out: those that nobody holds."""
    is_head: bool = False
    """Whether it is the cluster's head."""
    node_id: str = ""
    """Ray's id of the node."""
    held_cpus: float = 0.0
    """CPUs of it that others hold."""
    held_gpus: float = 0.0
    """GPUs of it that others hold."""
    memory: float = 0.0
    """Bytes of main memory that Ray counts for processes there; 0 if that is not known."""
    gpu_memory: float = 0.0
    """Bytes of each of its GPUs; 0 if that is not known."""
    object_store: float = 0.0
    """Bytes of main memory that Ray's object store may take there; 0 if that is not known."""

    def whole(self) -> Node:
        """The node as if nobody held anything."""
        return self._replace(
            cpus=self.cpus + self.held_cpus, gpus=self.gpus + self.held_gpus, held_cpus=0.0, held_gpus=0.0
        )


class Plan(NamedTuple):
    """The layout of one run."""

    device: str
    """`cuda` or `cpu`, for trainers and model actors."""
    num_trainers: int
    """Trainer processes."""
    trainer_cpus: float
    """CPUs that Ray reserves for each trainer."""
    trainer_gpus: float
    """GPUs for each trainer, possibly a fraction of one."""
    trainer_threads: int
    """Torch threads of each trainer."""
    num_model_actors: int
    """Processes that hold the language model, at the start and at least."""
    max_model_actors: int
    """Most processes that hold the language model, which there may become while trainers wait."""
    actor_cpus: float
    """CPUs that Ray reserves for each model actor."""
    actor_gpus: float
    """GPUs for each model actor, possibly a fraction of one."""
    actor_threads: int
    """Torch threads of each model actor."""
    nodes: tuple[Node, ...]
    """Nodes that the plan is made for."""
    not_on: str = ""
    """Ray's id of the head node if nothing may run there; empty otherwise."""
    environment: tuple[tuple[str, str], ...] = ()
    """Environment variables of trainers and model actors, besides those that they always have."""
    near: str = ""
    """Ray's id of the node where model actors go as long as it has room, that of the only trainer; empty if there is
    none."""
    transcoders: tuple[int, ...] = ()
    """Transcoders of each trainer, where these divide them; empty where each trains all on its share of the tokens."""

    @property
    def spread(self) -> bool:
        """Whether trainers go to different nodes, which spreads their traffic and their memory."""
        usable = [node for node in self.nodes if node.gpus or self.device == "cpu"]
        return 1 < self.num_trainers <= len(usable)

    @property
    def label_selector(self) -> dict[str, str] | None:
        """Labels of the nodes on which Ray may put trainers and model actors."""
        return {"ray.io/node-id": f"!{self.not_on}"} if self.not_on else None

    @property
    def shares_gpu(self) -> bool:
        """Whether trainer and model actor are on the same GPU."""
        return 0 < self.trainer_gpus < 1

    @property
    def worker_environment(self) -> dict[str, str]:
        """All environment variables of trainers and model actors."""
        found = dict(WORKER_ENVIRONMENT)
        if self.device == "cuda":
            largest = max(self.nodes, key=lambda node: node.gpus)  # which may hold as many as have GPUs there
            smallest = min(share for share in (self.trainer_gpus, self.actor_gpus) if share) if largest.gpus else 1
            processes = min(self.num_trainers + self.max_model_actors, max(1, int(largest.gpus / smallest + 1e-6)))
            threads = max(1, int(largest.cpus // processes))
            found |= GPU_ENVIRONMENT | {"TORCHINDUCTOR_COMPILE_THREADS": str(threads)}  # or each takes all cores
        return found | dict(self.environment)

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment of trainers and model actors."""
        return {"env_vars": self.worker_environment}

    @property
    def actor_placement(self) -> dict[str, Any]:
        """Where Ray may put model actors, as options of their pool."""
        anywhere = self.label_selector
        if self.near:
            return {
                "label_selector": {"ray.io/node-id": self.near},
                "fallback_strategy": [{"label_selector": anywhere or {}}],
            }
        return {"label_selector": anywhere} if anywhere else {}

    def describe(self) -> str:
        """The plan as a table for people."""
        actors = str(self.num_model_actors)
        if self.max_model_actors > self.num_model_actors:
            actors += f" to {self.max_model_actors}"
        rows = [
            ("", "processes", "CPUs each", "GPUs each", "threads each", "where"),
            self._row("trainers", str(self.num_trainers), self.trainer_cpus, self.trainer_gpus, self.trainer_threads),
            self._row("model actors", actors, self.actor_cpus, self.actor_gpus, self.actor_threads),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        cpus, gpus = _total(self.nodes)
        free_cpus, free_gpus = cpus - self.cpus(), gpus - self.gpus()
        nodes = f"{len(self.nodes)} node{'s' if len(self.nodes) > 1 else ''}"
        head = f"plan for {nodes} with {cpus:g} CPUs and {gpus:g} GPUs{_held(self.nodes)}, on {self.device}"
        if self.transcoders:
            each = " + ".join(str(count) for count in self.transcoders)
            lines.append(f"{each} transcoders, each with one trainer that gets its rows of the whole batch")
        return "\n".join(
            [head, *(f"  {line}" for line in lines), f"  left over: {free_cpus:g} CPUs, {free_gpus:g} GPUs"]
        )

    def cpus(self) -> float:
        """CPUs that all processes of the plan reserve at the start."""
        return round(self.num_trainers * self.trainer_cpus + self.num_model_actors * self.actor_cpus, 6)

    def gpus(self) -> float:
        """GPUs that all processes of the plan reserve at the start."""
        return round(self.num_trainers * self.trainer_gpus + self.num_model_actors * self.actor_gpus, 6)

    def _row(self, name: str, processes: str, cpus: float, gpus: float, threads: int) -> tuple[str, ...]:
        if len(self.nodes) == 1:
            shares = self.actor_gpus < 1 if self.device == "cuda" else True
            where = "share the GPU" if self.device == "cuda" and shares else "share the node"
            where = "a GPU each" if self.device == "cuda" and not shares else where
        elif name == "trainers":
            where = "one per node" if self.spread else "packed"
        else:
            where = "near the trainer" if self.device == "cuda" and self.num_trainers == 1 else "on all nodes"
        return name, processes, f"{cpus:g}", f"{gpus:g}", str(threads), where


def make_plan(
    config: RunConfig, nodes: Sequence[Node], d_model: int | None = None, num_trainers: int | None = None
) -> Plan:
    """Lay out a run on the cluster's nodes; `d_model` is the language model's width, where it is known, and
    `num_trainers` how many trainers there are, where they run already.

    Raises ConfigError if the run does not fit into what is free of them.
    """
    if not nodes:
        raise ConfigError("the cluster has no node with CPUs")
    if num_trainers is not None:
        settings = config.cluster.model_copy(update={"num_trainers": num_trainers, "min_trainers": None})
        config = config.model_copy(update={"cluster": settings})
    settings = config.cluster
    not_on = ""
    others = [node for node in nodes if not node.is_head]
    by_default = bool(others) and (_total(others)[1] > 0 or _total(nodes)[1] == 0)  # unless only the head has GPUs
    if settings.use_head is False or (settings.use_head is None and by_default):
        not_on = next((node.node_id for node in nodes if node.is_head), "")
        nodes = others
        if not nodes:
            raise ConfigError("cluster.use_head is false, but the head is the only node with CPUs")
    cpus, gpus = _total(nodes)
    use_gpu = gpus > 0 if settings.use_gpu is None else settings.use_gpu
    if use_gpu and gpus <= 0:
        raise ConfigError(f"cluster.use_gpu is true, but the cluster has 0 GPUs{_held(nodes)}")
    plan = _gpu_plan(config, tuple(nodes), d_model) if use_gpu else _cpu_plan(config, tuple(nodes), d_model)
    plan = plan._replace(not_on=not_on)
    if split_of(config, plan.num_trainers) == "transcoders":
        plan = plan._replace(transcoders=tuple(len(mine) for mine in placed_members(config, plan.num_trainers)))
    if not_on and (settings.min_trainers or plan.num_trainers) < plan.num_trainers:
        raise ConfigError(
            f"cluster.min_trainers={settings.min_trainers}: Ray Train would count on the head's CPUs; "
            "start the head with --num-cpus=0, or set cluster.use_head"
        )
    if use_gpu and (settings.min_trainers or plan.num_trainers) < plan.num_trainers:
        left = gpus - max(node.gpus for node in nodes)
        if left < plan.num_trainers + 1:  # Ray Train would take all of them
            raise ConfigError(
                f"cluster.min_trainers={settings.min_trainers}: without the largest node {left:g} GPUs are left, and "
                f"{plan.num_trainers} trainers and a model actor need {plan.num_trainers + 1}; "
                "lower cluster.num_trainers"
            )
    if use_gpu and plan.num_trainers > max(gpus, 1):
        raise ConfigError(
            f"cluster.num_trainers={plan.num_trainers} trainers need a GPU each, the cluster has {gpus:g} GPUs"
        )
    if not _fits(plan):
        raise ConfigError(
            f"the run does not fit the cluster: cluster.num_trainers={plan.num_trainers} and "
            f"cluster.num_model_actors={plan.num_model_actors} need {plan.cpus():g} CPUs and {plan.gpus():g} GPUs, "
            f"the cluster has {cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} nodes{_held(nodes)}; "
            f"one process needs at most {max(plan.trainer_cpus, plan.actor_cpus):g} CPUs and "
            f"{max(plan.trainer_gpus, plan.actor_gpus):g} GPUs on one node"
        )
    return plan


def beside(plan: Plan, running: Plan) -> Plan:
    """`plan` with as many model actors as find room beside the trainers of `running`, which are there already; at least
    one, which Ray may have to wait for."""
    plan = plan._replace(trainer_cpus=running.trainer_cpus, trainer_gpus=running.trainer_gpus)
    while not _fits(plan):
        if plan.num_model_actors > 1:
            plan = plan._replace(num_model_actors=plan.num_model_actors - 1)
        elif plan.actor_cpus > SMALLEST_SHARE:
            plan = plan._replace(actor_cpus=max(round(0.8 * plan.actor_cpus, 2), SMALLEST_SHARE))
        else:
            break
    return plan._replace(max_model_actors=max(plan.num_model_actors, plan.max_model_actors))


def actor_rate(config: RunConfig, d_model: int) -> float:
    """Tokens per second that a model actor on a GPU makes, estimated.

    A layer has about 12 d_model^2 weights and each token takes 2 operations per weight.
    """
    layers = max(sites.layer for sites in config.model.sites) + 1
    return FORWARD_FLOPS / (24 * d_model**2 * layers)


def trainer_rate(config: RunConfig, d_model: int, trainers: int = 1) -> float:
    """Tokens per second that each of so many trainers on a GPU takes, estimated for the sparse step.

    Every transcoder of the run has a step of its own. Of trainers that divide the transcoders each takes its share of
    what the one with the longest steps takes.
    """
    batch, configs = config.optimizer.batch_tokens, dict(config.members())
    seconds = [sum(step_seconds(configs[name], d_model) for name in mine) for mine in placed_members(config, trainers)]
    together = 1 if split_of(config, trainers) == "tokens" else trainers
    return batch / max(seconds) / together


def actors_per_trainer(config: RunConfig, d_model: int, trainers: int = 1) -> float:
    """Model actors that each of so many trainers keeps up with, on equal GPUs: it takes each captured token
    `data.replays` times."""
    return trainer_rate(config, d_model, trainers) / config.data.replays / actor_rate(config, d_model)


def _cpu_plan(config: RunConfig, nodes: tuple[Node, ...], d_model: int | None) -> Plan:
    """A plan without GPUs: one trainer (a step is short beside the language model's pass, and gradients cost more to
    exchange than to compute); the actors share the rest, on a small machine the same cores.

    Several actors of one thread beat one of several: threads of one product wait for the slowest, which shares its
    core with the trainer and with Ray. Large models are held once for 8 CPUs all the same, for their memory. An actor
    lies on one node, so its share shrinks until all find a place.
    """
    cpus = sum(node.cpus for node in nodes)
    trainers = config.cluster.num_trainers or 1
    # Of a CPU that is held in part, mostly by what sleeps, a whole thread is worth having.
    cores = [math.ceil(node.cpus) for node in nodes]
    several = sum(min(n, SMALL_ACTORS_PER_NODE) for n in cores) if _is_small(config, d_model) else 0
    actors = config.cluster.num_model_actors or max(len(nodes), int(cpus // CPUS_PER_ACTOR), several)
    # When a node of one CPU is gone, two trainers share another one with a model actor, or one trains on alone.
    alone = config.cluster.min_trainers is not None and trainers <= len(nodes)
    trainer_cpus = 0.5 if trainers == 1 else 0.55 if alone else 0.45
    trainer_cpus = min(trainer_cpus, _floor(cpus / trainers if alone else cpus / (2 * trainers)))
    left = cpus - trainers * trainer_cpus
    share = max(left / actors * (0.5 if left <= actors else 0.9), SMALLEST_SHARE)
    trainer_threads = max(1, min(max(cores), CPUS_PER_ACTOR) // trainers)
    actor_threads = max(1, min(sum(cores) // actors, max(cores)))
    while True:
        plan = Plan(
            "cpu", trainers, trainer_cpus, 0, trainer_threads, actors, actors, round(share, 2), 0, actor_threads, nodes
        )
        if share <= SMALLEST_SHARE or _fits(plan):
            return plan
        share = max(share * 0.9, SMALLEST_SHARE)


def _floor(cpus: float) -> float:
    """In the ten thousandths that Ray counts in, never more."""
    return math.floor(cpus * 1e4 + 1e-6) / 1e4


def _is_small(config: RunConfig, d_model: int | None) -> bool:
    """Whether a node can hold the layers' weights several times, as float32."""
    layers = max(sites.layer for sites in config.model.sites) + 1
    return d_model is not None and 4 * 12 * d_model**2 * layers < SMALL_MODEL_BYTES


def _gpu_plan(config: RunConfig, nodes: tuple[Node, ...], d_model: int | None) -> Plan:
    """A plan with GPUs: one GPU is shared. Of several one trains, since several would exchange gradients at every step
    for longer than a step takes, and as many as it keeps up with run the model."""
    cpus, gpus = _total(nodes)
    settings = config.cluster
    if gpus <= 1:
        trainers, actors = settings.num_trainers or 1, settings.num_model_actors or 1
        trainer_gpus = round((1 - ACTOR_SHARE_OF_ONE_GPU) * gpus / trainers, 4)
        actor_gpus, most = round(ACTOR_SHARE_OF_ONE_GPU * gpus / actors, 4), actors
    else:
        trainers = settings.num_trainers or 1
        room = max(1, int(gpus) - trainers)
        needed = room if d_model is None else math.ceil(trainers * actors_per_trainer(config, d_model, trainers))
        actors = settings.num_model_actors or max(1, min(room, needed))
        most = settings.num_model_actors or min(room, ROOM_TO_GROW * actors)
        trainer_gpus = actor_gpus = 1.0
    # Whole CPUs where there are enough: Ray Data lets a pool grow only into whole ones.
    each = cpus / (trainers + most + 1)
    each = 1.0 if each >= 1 else max(math.floor(each * 100) / 100, 0.01)
    return Plan("cuda", trainers, each, trainer_gpus, 1, actors, most, each, actor_gpus, 1, nodes)


def _held(nodes: Sequence[Node]) -> str:
    """That others hold something besides, if they do."""
    cpus, gpus = sum(node.held_cpus for node in nodes), sum(node.held_gpus for node in nodes)
    return f", beside {cpus:g} CPUs and {gpus:g} GPUs that others hold" if cpus or gpus else ""


def _total(nodes: Sequence[Node]) -> tuple[float, float]:
    return sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)


def _fits(plan: Plan) -> bool:
    """Whether all processes of a plan find a node: trainers that are spread one on each, then the largest requests
    first."""
    left = [[node.cpus, node.gpus] for node in plan.nodes]
    trainers = [(plan.trainer_cpus, plan.trainer_gpus)] * plan.num_trainers
    actors = [(plan.actor_cpus, plan.actor_gpus)] * plan.num_model_actors
    if plan.spread:
        for node, (cpus, gpus) in zip(sorted(left, key=lambda n: (-n[1], -n[0])), trainers, strict=False):
            node[0] -= cpus
            node[1] -= gpus
        if any(cpus < -1e-6 or gpus < -1e-6 for cpus, gpus in left):
            return False
        trainers = []
    for cpus, gpus in sorted(trainers + actors, key=lambda r: (-r[1], -r[0])):
        place = next((n for n in left if n[0] + 1e-6 >= cpus > 0 and n[1] + 1e-6 >= gpus), None)
        if place is None:
            return False
        place[0] -= cpus
        place[1] -= gpus
    return True

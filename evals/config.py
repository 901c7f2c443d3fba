"""What a run is to do: a YAML file with defaults and a sweep, checked whole before anything loads, and its runs."""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kvpress.errors import PolicyError, nearest
from kvpress.evals.locations import ConfigError, KeyPath, Locations, expand, load, location_of
from kvpress.evals.task import Task, TaskError
from kvpress.evals.tasks import OUTSIDE, find_task, make_task, task_origin
from kvpress.policy import Policy, check_budget
from kvpress.registry import POLICIES, absolute, make_policies, origin, read_budget

LENGTH_FIELDS = ("length", "lengths", "max_length")
"""The fields in which tasks take a length; the first that a task has is what `length` sets."""


AGREEMENT = "agreement"
"""The metric of runs that are compared with full attention token by token."""


def _budget(value: Any) -> Any:
    value = read_budget(value)
    if value is not None:
        check_budget(value)
    return value


Spec = str | dict[str, Any]


class Fields(BaseModel):
    """One combination, as it is written.

    Attributes:
        model: hub name or folder of a causal LM, or "smollm2".
        dtype: "auto" is what `kvpress.models.load_model` takes for best.
        device: a torch device; "auto" is the GPU if there is one.
        device_map: spreads the layers over devices ("auto", "balanced", ..., or module -> device), as transformers takes it.
        tp_plan: "auto" splits every layer over the processes that torchrun started.
        policy: a name (or a class of your own as package.module:MyPolicy or file.py:MyPolicy) or a mapping with `name` and
            fields, or a YAML file of one; a list of them acts together.
        budget: share of the prompt (float) or entries (int) for the policy; no effect on one that takes none, or no share.
        task: a name (or a class of your own as package.module:MyTask or file.py:MyTask) or a mapping with `name` and fields.
        length: sets the task's `length`, `lengths` or `max_length`.
        seed: sets the task's seed.
        query_aware: whether the prompt that is compressed holds the question.
        samples: the first so many of the task's samples; None for all.
        agreement: instead of answers being scored, full attention's own answer of at most so many tokens is fed, and the score is
            the share of its tokens that are the most likely ones under the policy too. Under perplexity nothing is written: so
            many of the scored tokens are fed, and at each the most likely ones are compared.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str = "smollm2"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|[a-z]+(:\d+)?)$")] = "auto"
    device_map: str | dict[str, int | str] | None = None
    tp_plan: Literal["auto"] | None = None
    policy: Spec | list[Spec] = "full"
    budget: Annotated[Any, BeforeValidator(_budget)] = None
    task: Spec = "needle"
    length: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    query_aware: bool = True
    samples: Annotated[int, Field(ge=1)] | None = None
    agreement: Annotated[int, Field(ge=1)] | None = None


class RayOptions(BaseModel):
    """How `launcher: ray` runs runs.

    Attributes:
        address: of a running cluster ("auto", "host:6379"), or "local" to start one for the run; None for $RAY_ADDRESS, else a
            cluster that runs on this machine, else one started for the run.
        num_gpus: GPUs per worker; None for one if the cluster has any and a run may use it.
        num_cpus: cores per worker.
        workers: how many at once at most; None for as many as the cluster has room for.
        attempts: how often a run is begun, when workers are lost with it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    address: str | None = None
    num_gpus: Annotated[float, Field(ge=0)] | None = None
    num_cpus: Annotated[float, Field(gt=0)] = 1
    workers: Annotated[int, Field(ge=1)] | None = None
    attempts: Annotated[int, Field(ge=1)] = 3


class File(BaseModel):
    """A configuration file.

    Attributes:
        out: folder for the runs' directories.
        defaults: fields of every run.
        sweep: field -> values, each combined with each; or a list of such mappings, one grid after the other. A dotted
            field (policy.window, task.repeats) sets a part.
        share_prompts: whether policies that leave a prompt's attention exact share one pass over it.
        allow_extrapolation: whether prompts may be longer than the model was made for.
        batch_size: how many samples of the same prompt length and the same number of new tokens are answered together.
        launcher: "local" runs run after run in this process; "ray" gives each to a worker of a cluster.
        ray: how; see `RayOptions`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    out: str
    defaults: dict[str, Any] = Field(default_factory=dict)
    sweep: dict[str, list[Any]] | list[dict[str, list[Any]]] = Field(default_factory=dict)
    share_prompts: bool = True
    allow_extrapolation: bool = False
    batch_size: Annotated[int, Field(ge=1)] = 1
    launcher: Literal["local", "ray"] = "local"
    ray: RayOptions = RayOptions()


@dataclass(frozen=True)
class ModelSpec:
    """What has to be loaded: the arguments of `kvpress.models.load_model`.

    Attributes:
        placement: its keyword arguments (device_map, tp_plan), as JSON.
    """

    name: str
    device: str
    dtype: str
    placement: str = "{}"

    def load(self, loader: Callable[..., Any]) -> Any:
        """What `loader` makes of it."""
        return loader(self.name, self.device, self.dtype, **json.loads(self.placement))

    def __str__(self) -> str:
        placed = [f"{name} {value}" for name, value in json.loads(self.placement).items()]
        return f"{self.name} ({', '.join(placed or [f'device {self.device}'])}, dtype {self.dtype})"


@dataclass(frozen=True)
class Run:
    """One combination, checked and built.

    Attributes:
        fields: as written.
        policies: what acts on the model.
        task: what is asked.
        definition: everything that decides the answers, defaults included; the directory's name is its hash.
    """

    fields: Fields
    policies: tuple[Policy, ...]
    task: Task
    definition: dict[str, Any]

    @cached_property
    def id(self) -> str:
        return digest(self.definition)

    @property
    def samples_id(self) -> str:
        """The same for runs that differ in the policy only: they answer the same samples."""
        return digest({**self.definition, "policy": None})

    @property
    def model(self) -> ModelSpec:
        """What has to be loaded."""
        written = self.fields
        return ModelSpec(
            expand(written.model), written.device, written.dtype, json.dumps(_placement(written), sort_keys=True)
        )

    @property
    def policy(self) -> str:
        """The policies with the fields that differ from their defaults, and where one comes from that is not the package's."""
        return " + ".join(
            policy.describe() + (f" from {source}" if (source := origin(policy)) else "") for policy in self.policies
        )

    @property
    def budget(self) -> Any:
        """The budget, if one of the policies takes it; else None."""
        given = self.fields.budget
        return given if given is not None and any(policy.accepts_budget(given) for policy in self.policies) else None

    @property
    def where(self) -> str:
        """Task, length and form of the question."""
        length = "" if self.fields.length is None else f", length {self.fields.length}"
        agreement = "" if self.fields.agreement is None else f", agreement over {self.fields.agreement} tokens"
        return f"{self.task.label}{length}{agreement}, {'query-aware' if self.fields.query_aware else 'query-agnostic'}"

    @property
    def label(self) -> str:
        return f"{self.policy}, {self.where}"

    @property
    def metric(self) -> str:
        """What the score is."""
        return self.task.metric if self.fields.agreement is None else AGREEMENT

    def to_dict(self) -> dict[str, Any]:
        """What a directory's config.json holds: the definition, and what a table shows of it."""
        return {
            "id": self.id,
            "samples_id": self.samples_id,
            "policy": self.policy,
            "policy_names": [policy.name for policy in self.policies],
            "kind": " + ".join(dict.fromkeys(policy.kind for policy in self.policies)),
            "budget": self.budget,
            "task": self.task.label,
            "metric": self.metric,
            "length": self.fields.length,
            "seed": self.task.seed,
            "fields": self.fields.model_dump(),
            "definition": self.definition,
        }


@dataclass(frozen=True)
class Plan:
    """All runs of a run, in order, and how to run them; see `File`."""

    out: Path
    runs: tuple[Run, ...]
    share_prompts: bool = True
    allow_extrapolation: bool = False
    batch_size: int = 1
    launcher: str = "local"
    ray: RayOptions = field(default_factory=RayOptions)


def read_plan(path: Path, settings: Sequence[str] = ()) -> Plan:
    """The plan that a YAML file describes.

    Args:
        path: the file.
        settings: overrides "a.b=c". A top-level key of the file is set there (sweep.budget=[0.1,0.2], out=x); any other name
            is a run's field, which then has this one value: a sweep over it goes away.

    Raises:
        ConfigError: anything that cannot work, with file and line.
    """
    tree, locations = load(path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: no configuration in it; give a mapping with out, defaults and sweep")
    sweep = tree.get("sweep")
    for part in (tree.get("defaults"), *(sweep if isinstance(sweep, list) else [sweep])):
        for key in part if isinstance(part, dict) else ():
            kind = {"policy": POLICIES, "task": OUTSIDE}.get(key.partition(".")[0])
            if kind is not None:  # files that policies name, and those of classes, are relative to this file
                part[key] = absolute(part[key], path.parent, kind)
    return make_plan(tree, locations, settings)


def make_plan(tree: dict[str, Any], locations: Locations | None = None, settings: Sequence[str] = ()) -> Plan:
    """The plan of a configuration that is read already; see `read_plan`."""
    locations = {(): "configuration"} if locations is None else locations
    for setting in settings:
        _override(tree, locations, setting)
    file = _validate(File, tree, locations, ())
    grids = [file.sweep] if isinstance(file.sweep, dict) else file.sweep
    paths: list[KeyPath] = [("sweep",)] if isinstance(file.sweep, dict) else [("sweep", i) for i in range(len(grids))]
    runs: dict[str, Run] = {}
    combinations = (c for grid, at in zip(grids, paths, strict=True) for c in _combinations(file, grid, at, locations))
    for tree_of_run, locations_of_run in combinations:
        run = _run(tree_of_run, locations_of_run)
        runs.setdefault(run.id, run)  # a policy without a budget comes once for all budgets
    given = [run.fields.budget for run in runs.values() if run.fields.budget is not None]
    if given and all(run.budget is None for run in runs.values()):
        written = [path for path in locations if "budget" in path]
        where = location_of(locations, written[0] if written else ())
        takes = "a share, only entries" if any(p.takes_budget for run in runs.values() for p in run.policies) else "one"
        raise ConfigError(f"{where}: budget={given[0]!r}, but none of the policies takes {takes}; leave it out")
    if file.launcher == "ray" and any(run.fields.tp_plan for run in runs.values()):
        raise ConfigError(
            f"{location_of(locations, ('launcher',))}: launcher='ray' with tp_plan; a split model runs under torchrun, on Ray use "
            "device_map and ray.num_gpus"
        )
    return Plan(
        Path(_expand(file.out, locations, ("out",))),
        tuple(runs.values()),
        file.share_prompts,
        file.allow_extrapolation,
        file.batch_size,
        file.launcher,
        file.ray,
    )


def digest(content: Any) -> str:
    """Twelve hexadecimal digits of the content's hash."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _override(tree: dict[str, Any], locations: Locations, setting: str) -> None:
    name, equals, text = setting.partition("=")
    keys = tuple(name.split("."))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        equals = ""
    if not equals or not all(keys):
        raise ConfigError(f"--set {setting!r} does not work; write NAME=VALUE, for instance --set policy.window=16")
    if keys[0] not in File.model_fields:
        if keys[0] not in Fields.model_fields:
            known = [*Fields.model_fields, *File.model_fields]
            raise ConfigError(f"--set {setting!r}: there is no field {keys[0]!r}{nearest(keys[0], known)}")
        sweep = tree.get("sweep")
        for i, grid in enumerate(sweep if isinstance(sweep, list) else [sweep]):
            if not isinstance(grid, dict):
                continue  # which is said later
            for key in [key for key in grid if key == name or key.startswith(f"{name}.")]:
                del grid[key]
            if len(keys) > 1 and keys[0] in grid:  # part of what is swept over: set in each of its values
                grid[name] = [value]
                locations[("sweep", i, name) if isinstance(sweep, list) else ("sweep", name)] = f"--set {setting!r}"
        keys = ("defaults", *keys)
    put(tree, locations, keys, value, f"--set {setting!r}")


def put(tree: dict[str, Any], locations: Locations, keys: KeyPath, value: Any, where: str) -> None:
    """Set a nested value of a configuration that is read already, and that it stands at `where`."""
    _set(tree, keys, value)
    for path in [path for path in locations if path[: len(keys)] == keys]:
        del locations[path]
    locations[keys] = where


def _set(tree: dict[str, Any], keys: Sequence[Any], value: Any) -> None:
    """Set a nested key; a name on the way there becomes the mapping that it stands for."""
    for key in keys[:-1]:
        inner = tree.get(key)
        if isinstance(inner, str) and key in ("policy", "task"):
            inner = {"name": inner}
        tree[key] = dict(inner) if isinstance(inner, dict) else {}
        tree = tree[key]
    tree[keys[-1]] = value


def _combinations(
    file: File, grid: dict[str, list[Any]], at: KeyPath, locations: Locations
) -> Iterator[tuple[dict[str, Any], Locations]]:
    """Each run's fields, and where each of them stands."""
    for key, values in grid.items():
        first, _, part = key.partition(".")
        where = location_of(locations, (*at, key))
        if first not in Fields.model_fields or (part and first not in ("policy", "task")):
            raise ConfigError(
                f"{where}: there is no field {key!r} to sweep over{nearest(first, list(Fields.model_fields))}"
            )
        if not values:
            raise ConfigError(f"{where}: the sweep over {key!r} is empty; give at least one value, or leave it out")
    order = sorted(grid, key=lambda key: "." in key)  # a whole policy first, then its parts
    for chosen in itertools.product(*(range(len(grid[key])) for key in grid)):
        index = dict(zip(grid, chosen, strict=True))
        tree = dict(file.defaults)
        found: Locations = {path[1:]: where for path, where in locations.items() if path[:1] == ("defaults",)}
        for key in order:
            keys, source = tuple(key.split(".")), (*at, key, index[key])
            if len(keys) > 1 and isinstance(tree.get(keys[0]), list):
                raise ConfigError(
                    f"{location_of(locations, source)}: {key!r} is unclear, for {keys[0]} is a list; sweep over whole lists"
                )
            _set(tree, keys, grid[key][index[key]])
            found = {path: where for path, where in found.items() if path[: len(keys)] != keys}
            found[keys] = location_of(locations, source)
            found |= {(*keys, *p[len(source) :]): where for p, where in locations.items() if p[: len(source)] == source}
        yield tree, found


def _validate(model: type[Any], tree: dict[str, Any], locations: Locations, at: KeyPath) -> Any:
    try:
        return model.model_validate(tree)
    except ValidationError as errors:
        # a name that is not known is often the reason of what is missing
        error = min(errors.errors(), key=lambda error: error["type"] != "extra_forbidden")
        path, value = _follow(tree, error["loc"])
        where, name = location_of(locations, (*at, *path)), ".".join(map(str, path))
        if error["type"] == "extra_forbidden":
            known = list((RayOptions if path[0] == "ray" else model).model_fields)
            raise ConfigError(f"{where}: there is no field {name!r}{nearest(str(path[-1]), known)}") from errors
        if error["type"] == "missing":
            missing = ".".join(map(str, error["loc"]))
            raise ConfigError(f"{where}: {missing!r} is missing; add it") from errors
        said = str(error["msg"]).removeprefix("Value error, ")
        shown = "" if name in said else f"{name}={repr(value)[:60]}: "
        raise ConfigError(f"{where}: {shown}{said[0].lower()}{said[1:]}") from errors


def _follow(tree: Any, location: Sequence[str | int]) -> tuple[KeyPath, Any]:
    """The path that pydantic means, and what stands there: among the keys it names the alternatives that it tried."""
    path: KeyPath = ()
    key: Any
    for key in location:
        if (isinstance(tree, dict) and key in tree) or (isinstance(tree, list) and isinstance(key, int)):
            path, tree = (*path, key), tree[key]
    return path, tree


def _run(tree: dict[str, Any], locations: Locations) -> Run:
    """Check one combination and build what it names."""
    written: Fields = _validate(Fields, tree, locations, ())
    try:
        specs = written.policy if isinstance(written.policy, list) else [written.policy]
        is_name = [isinstance(spec, str) and not spec.endswith((".yaml", ".yml")) for spec in specs]
        named = [{"name": spec} if name else spec for spec, name in zip(specs, is_name, strict=True)]
        policies = tuple(make_policies(named, written.budget))
    except PolicyError as error:
        raise ConfigError(f"{_blame(locations, 'policy', written.policy, str(error))}: {error}") from error
    try:
        raw = _task_spec(written)
        task = make_task(raw)
    except TaskError as error:
        raise ConfigError(f"{_blame(locations, 'task', written.task, str(error))}: {error}") from error
    if len(_placement(written)) > (written.device == "auto"):
        both = ", ".join(f"{name}={value!r}" for name, value in _placement(written).items())
        where = location_of(locations, ("tp_plan",) if written.tp_plan else ("device_map",))
        also = "" if written.device == "auto" else f", device={written.device!r}"
        raise ConfigError(f"{where}: {both}{also}: each of them places the model; keep one")
    _expand(written.model, locations, ("model",))
    built = replace(task, **_expand({f.name: getattr(task, f.name) for f in fields(task)}, locations, ("task",)))
    if written.query_aware and built.unseen_because:
        where = location_of(locations, ("query_aware",) if ("query_aware",) in locations else ("task", "name"))
        raise ConfigError(f"{where}: {built.unseen_because}; set query_aware: false")
    if task.name == "perplexity" and (mode := getattr(task, "mode", "decode")) != "decode":
        raise ConfigError(
            f"{location_of(locations, ('task',))}: a run scores perplexity with mode: decode, not {mode!r}"
        )
    definition = {
        "model": written.model,
        "device": written.device,
        "dtype": written.dtype,
        "policy": [_definition(policy) for policy in policies],
        "task": {**task.to_dict(), **_from(task_origin(task))},  # with ${...} as written: the same run on every machine
        "query_aware": written.query_aware,
        "samples": written.samples,
        **_placement(written),
        **({} if written.agreement is None else {"agreement": written.agreement}),
    }
    return Run(written, policies, built, json.loads(json.dumps(definition)))


def _definition(policy: Policy) -> dict[str, Any]:
    return {"name": policy.name, **asdict(policy), **_from(origin(policy))}


def _from(source: str) -> dict[str, str]:
    """Where a class of the user's comes from, with the hash of its code: one that was changed is another one."""
    return {"from": source} if source else {}


def _placement(written: Fields) -> dict[str, Any]:
    """Those of device_map and tp_plan that are given."""
    placed = {"device_map": written.device_map, "tp_plan": written.tp_plan}
    return {name: value for name, value in placed.items() if value is not None}


def _task_spec(written: Fields) -> dict[str, Any]:
    """The task's mapping, with `length` and `seed` in it."""
    spec: dict[str, Any] = {"name": written.task} if isinstance(written.task, str) else dict(written.task)
    if "name" not in spec:
        make_task(spec)  # which says what is missing
    task = find_task(spec["name"])
    known = {field.name for field in fields(task)}
    if written.length is not None:
        found = [name for name in LENGTH_FIELDS if name in known]
        if not found:
            raise TaskError(f"length={written.length}, but {task.name} has no length to set; leave it out")
        if found[0] in spec:
            raise TaskError(f"length={written.length} and task.{found[0]}={spec[found[0]]!r}; keep one of them")
        spec[found[0]] = (written.length,) if found[0] == "lengths" else written.length
    if written.seed is not None:
        if "seed" in spec:
            raise TaskError(f"seed={written.seed} and task.seed={spec['seed']!r}; keep one of them")
        spec["seed"] = written.seed
    return spec


def _blame(locations: Locations, field: str, spec: Any, message: str) -> str:
    """Where the fault that a message tells of stands: at the part that it names, else at another field, else the whole."""
    parts = list(spec) if isinstance(spec, dict) else []
    if "unknown" in message:
        return location_of(locations, (field, "name"))
    for key in parts:
        if key != "name" and re.search(rf"\b{re.escape(key)}\b", message):
            return location_of(locations, (field, key))
    for key in ("budget", "length", "seed"):
        if (key,) in locations and message.startswith(f"{key}="):
            return locations[key,]
    return location_of(locations, (field,))


def _expand(value: Any, locations: Locations, path: KeyPath) -> Any:
    try:
        return expand(value)
    except KeyError as error:
        where = location_of(locations, path)
        raise ConfigError(
            f"{where}: the environment variable {error.args[0]} is not set; set it, or write the path"
        ) from error

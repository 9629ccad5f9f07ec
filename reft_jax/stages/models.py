"""The models of a work directory by name: their weights, their checksums, and what a finished stage recorded."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from reft_jax.algo.algorithms import ALGORITHMS, make_algorithm
from reft_jax.model.heads import RerankHead, ValueHead
from reft_jax.model.hf import load_hf, load_value_head
from reft_jax.model.llama import Llama
from reft_jax.model.lora import Lora, make_lora, merged_model, trained, whole
from reft_jax.model_folder import read_json
from reft_jax.parallel import hosts
from reft_jax.parallel.mesh import abstract_arrays, put, shardings
from reft_jax.run.inputs import Inputs
from reft_jax.run.open import Run
from reft_jax.run.workdir import STAGES
from reft_jax.store import origin, published, reading
from reft_jax.train.checkpoints import has_value_head, load_params
from reft_jax.train.checksums import ADAPTER, MEMORY, model_checksum
from reft_jax.train.state import abstract_params, init_head
from reft_jax.types import InputError

COUNTS = {  # fields that a stage's done.json must have besides `seconds`; rerankers: RERANKED
    "sft": ("best", "epochs"),
    "self_train_offline": ("best", "epochs", "rows"),
    "self_train_online": ("best", "iterations"),
    "reft": ("best", "iterations"),
}
RERANKED = ("rows", "positive")


def method(config) -> str:
    """How ReFT trains, in words: the algorithm; LoRA and a reward of one's own, if there are."""
    rl, lora, reward = config.rl, config.lora, config.reward
    name = ALGORITHMS[rl.algorithm].__name__ if rl.algorithm in ALGORITHMS else Path(rl.algorithm).name
    more = [f"LoRA of rank {lora.rank}"] * bool(lora.rank) + [f"reward {Path(reward).name}"] * bool(reward)
    return f"{name} ({', '.join(more)})" if more else name


class Weights(NamedTuple):
    """A model: the checksum that its answers are stored under, and the function that loads its parameters."""

    checksum: str
    load: Callable[[], Any]


def abstract_policy(run: Run):
    """The shapes of the policy that a stage trains: with a value head if the algorithm has a critic."""
    return policy_shapes(run.machine.model, value_head=make_algorithm(run.config).critic)


def policy_shapes(model: Llama, *, value_head: bool):
    return abstract_params(model, ValueHead(), "value_head") if value_head else abstract_params(model)


def abstract_reranker(run: Run):
    return abstract_params(run.machine.model, RerankHead(), "rerank_head")


def base_policy(inputs: Inputs, mesh, model: Llama, dtype=jnp.float32):
    """The base model's weights on the mesh. With a critic also the value head of its folder, or a new one."""
    critic = make_algorithm(inputs.config).critic
    where = shardings(mesh, policy_shapes(model, value_head=critic))
    _, lm = load_hf(inputs.base, dtype=dtype, shardings=where["lm"])
    if not critic:
        return {"lm": lm}
    if head := load_value_head(inputs.base):
        print(f"the value head is that of {origin(inputs.base)}", flush=True)
        return {"lm": lm, "value_head": put(head, where["value_head"])}
    return {"lm": lm, "value_head": new_value_head(inputs.config, mesh, model)}


def new_value_head(config, mesh, model: Llama):
    head = init_head(mesh, ValueHead(), model.config.hidden_size, config.seed)
    return jax.tree.map(lambda x: config.rl.value_init * x, head)


def start_policy(run: Run):
    """The warm-up model as a stage trains it: with its value head, or a new one, if the algorithm has a critic."""
    params = load_model(run, "warmup")
    if not make_algorithm(run.config).critic:
        return {"lm": params["lm"]}
    if "value_head" in params:
        return params
    return params | {"value_head": new_value_head(run.config, run.machine.mesh, run.machine.model)}


def load_model(run: Run, name: str, abstract=None):
    """The parameters {'lm', head} that a stage made under `name`; InputError if it has not run in this work directory.

    Those of a model that was trained whole are float32. If it is an adapter, that is merged in the compute dtype.
    """
    folder = run.workdir.model(name)
    if not published(folder):
        raise InputError(f"{folder}: no such model; run the stage that makes it with this --workdir first")
    memory = run.workdir.path / MEMORY
    return load_saved(folder, run.inputs.base, run.machine.mesh, run.machine.model, memory, abstract)


def load_saved(folder: Path, base: Path, mesh, model: Llama, memory: Path, abstract=None):
    """`load_model` of the folder RUN/models/NAME, for commands that are not in that run.

    base: the folder of the run's base model. memory: as for `model_checksum`. abstract: {'lm', head}; None: a policy's.
    """
    abstract = abstract or policy_shapes(model, value_head=has_value_head(folder))
    if (adapter := read_adapter(folder)) is None:
        return load_params(folder, abstract_arrays(mesh, abstract))
    params = load_params(folder, abstract_arrays(mesh, trained(adapter.lora, abstract)))
    of = folder.with_name(adapter.of) if adapter.of else base
    found = hosts.from_first(f"checksum of {of}", lambda: model_checksum(of, base, memory))
    if found != adapter.checksum:
        raise InputError(
            f"{folder}: is an adapter of {of}, which has changed since (its checksum was {adapter.checksum}, is "
            f"{found}); restore that model"
        )
    if adapter.of:
        lm = load_saved(of, base, mesh, model, memory)["lm"]
    else:
        _, lm = load_hf(base, dtype=model.dtype, shardings=shardings(mesh, abstract["lm"]))
    params = whole(params, as_base(lm, model), adapter.lora)
    return params | {"lm": merged_model(params["lm"])}


def as_base(lm, model: Llama):
    """The language model in the compute dtype, as training with an adapter holds it."""
    return jax.tree.map(lambda x: x.astype(model.dtype), lm)


class Adapter(NamedTuple):
    """What a saved adapter says about itself: the name of the model that it belongs to ("": the base), that model's
    checksum, and its rank, alpha and targets."""

    of: str
    checksum: str
    lora: Lora

    def as_json(self) -> dict:
        return {"of": self.of, "checksum": self.checksum} | asdict(self.lora) | {"targets": list(self.lora.targets)}


def adapters_of(run: Run, name: str) -> list[tuple[Lora, dict]]:
    """The adapters that the base model has in a policy of the work directory, on the host, from the base upwards.

    InputError if one of the models on this way was trained whole.
    """
    folder, model = run.workdir.model(name), run.machine.model
    if (adapter := read_adapter(folder)) is None:
        raise InputError(f"--adapter: {folder} was trained whole, without an adapter; leave --adapter out")
    before = adapters_of(run, adapter.of) if adapter.of else []
    shapes = trained(adapter.lora, policy_shapes(model, value_head=has_value_head(folder)))
    params = load_params(folder, abstract_arrays(run.machine.mesh, shapes))
    return [*before, (adapter.lora, hosts.fetch(params["lora"]))]


def new_adapter(run: Run, of: str) -> Adapter | None:
    """The adapter that a stage trains on models/OF ("": on the base model); None if lora.rank is 0."""
    if (lora := make_lora(run.config)) is None:
        return None
    folder, base, memory = run.workdir.model(of) if of else run.inputs.base, run.inputs.base, run.workdir.path / MEMORY
    made = hosts.from_first(f"checksum of {folder}", lambda: model_checksum(folder, base, memory))
    return Adapter(of, made, lora)


def read_adapter(folder: Path) -> Adapter | None:
    """What the adapter in the folder of a stage's model says; None if that model was trained whole."""
    path = folder / ADAPTER
    if not path.exists():
        return None
    try:
        raw = dict(read_json(path))
        return Adapter(raw.pop("of"), raw.pop("checksum"), Lora(**raw | {"targets": tuple(raw["targets"])}))
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error!r}); restore the model from a copy") from error


def checksum(run: Run, name: str, memory: Path | None = None) -> str:
    """The checksum of models/NAME with the base's config and tokenizer; "" if there is none. InputError if damaged.

    memory: the file that remembers checksums (see `model_checksum`); default: the one in the work directory.
    """
    folder = run.workdir.model(name)

    def look() -> str:
        return model_checksum(folder, run.inputs.base, memory or run.workdir.path / MEMORY) if published(folder) else ""

    return hosts.from_first(f"checksum of {name}", look)


def policy(run: Run, name: str) -> Weights:
    """The language model of a policy."""
    return Weights(checksum(run, name), lambda: load_model(run, name)["lm"])


def reranker(run: Run, name: str) -> Weights:
    return Weights(checksum(run, name), partial(load_model, run, name, abstract_reranker(run)))


# --- finished stages


def done(run: Run, stage: str) -> dict | None:
    """What `Training.finish` wrote for this stage; None if the stage has not ended. InputError if damaged."""
    return hosts.from_first(f"is {stage} done?", lambda: read_result(run.workdir.path / stage / "done.json"))


def read_result(path: Path) -> dict | None:
    try:
        with reading(path):
            result = json.loads(path.read_text(encoding="utf-8"))
        problem = _problem(path.parent.name, dict(result))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        problem = error
    if problem:
        both = f"{path.parent} and {path.parent.parent / 'models' / path.parent.name}"
        remedy = f"restore it from a copy, or remove {both} to begin the stage again"
        raise InputError(f"{path}: not what a finished stage writes ({problem}); {remedy}")
    return result


def _problem(stage: str, result: dict) -> str:
    """What is wrong with a result; "" if nothing. Fields that older versions did not record may be absent."""
    numbers = ("seconds", *COUNTS.get(stage, RERANKED))
    if absent := [name for name in (*numbers, "checksum") if name not in result]:
        return f"no {', '.join(absent)}"
    if wrong := [name for name in numbers if type(result[name]) not in (int, float)]:
        return f"{wrong[0]} is not a number"
    data, made_from = result.get("data"), result.get("from", {})
    if data is not None and not (isinstance(data, dict) and {"settings", "train", "dev"} <= data.keys()):
        return "data is not settings, train and dev"
    return "" if isinstance(made_from, dict) else "from is not an object"


def finished(run: Run, stage: str) -> dict | None:
    """The result of the stage if it is done, for a command that would train it; prints a line that says so.

    InputError if a finished stage was trained on data that has changed since, or this one from models that have. Prints
    a line if this one's checkpoint was chosen on other dev questions.
    """
    check_data(run)
    check_sources(run, stage)
    result = done(run, stage)
    if result:
        print(f"{stage}: done already, {run.workdir.path / stage / 'done.json'}", flush=True)
        if "best" in result and "dev" in changed_data(run, result):
            print(f"{stage}: its checkpoint was chosen on other dev questions than there are now", flush=True)
    return result


def check_sources(run: Run, stage: str) -> None:
    """InputError if the stage is done but was trained from models that have changed since."""
    if (result := done(run, stage)) and (told := other_sources(run, result)):
        problem = f"{run.workdir.path / stage}: this stage is done, but was trained from another model ({told})"
        raise InputError(f"{problem}; restore that, or remove {stage}/ and models/{stage} to train again")


def check_data(run: Run) -> None:
    """InputError if a finished stage was trained on data that has changed since, under the same data settings."""
    for stage in STAGES:
        if (result := done(run, stage)) and "train" in changed_data(run, result):
            problem = f"{run.workdir.path / stage}: this stage was trained on other rows than the training data has now"
            remedy = f"bring them back, choose another --workdir, or remove {stage}/ and its models to train again"
            raise InputError(f"{problem}; {remedy}")


def changed_data(run: Run, result: dict) -> list[str]:
    """Which of "train" and "dev" has other rows now than when the stage was trained.

    Nothing if the data settings changed too, for the user allowed that, and nothing where an older version recorded no
    data.
    """
    before, now = result.get("data") or run.inputs.data_made, run.inputs.data_made
    if before["settings"] != now["settings"]:
        return []
    return [split for split in ("train", "dev") if before[split] != now[split]]


def other_sources(run: Run, result: dict) -> str:
    """In words, the models that a finished stage was trained from and that have changed since; "" if none."""
    before = result.get("from", {})
    changed = {name: now for name, now in sources(run, *before).items() if now != before[name]}
    return ", ".join(f"models/{name} was {before[name]}, is {now or 'not there'}" for name, now in changed.items())


def sources(run: Run, *names: str) -> dict[str, str]:
    """Checksums of the models that a stage is trained from, as its `from` records them."""
    return {name: checksum(run, name) for name in names}

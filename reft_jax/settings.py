"""Every setting of a run: its type, default, what is allowed and what it means. Defaults are the paper's (CodeLlama-7B,
GSM8K). reft_jax/config.py reads and checks them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a value may be: `allowed` is the text shown to the user when `holds(value)` is false. "": anything."""

    allowed: str
    holds: Callable[[Any], bool]

    @property
    def in_brackets(self) -> str:
        return f" ({self.allowed})" if self.allowed else ""


class Setting(NamedTuple):
    """Default, rule and meaning of one setting."""

    default: Any
    rule: Rule
    doc: str


def setting(default, rule: Rule, doc: str) -> Any:
    """A dataclass field that is a setting."""
    if type(default) is int:
        rule = rule._replace(allowed=rule.allowed.replace("a number", "a whole number"))
    return field(default=default, metadata={"setting": Setting(default, rule, doc)})


def at_least(low) -> Rule:
    return Rule(f"a number >= {low}", lambda v: low <= v < math.inf)


def between(low, high) -> Rule:
    return Rule(f"a number from {low} to {high}", lambda v: low <= v <= high)


def one_of(*values) -> Rule:
    return Rule("one of " + ", ".join(map(str, values)), lambda v: v in values)


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


def _distinct(names: str) -> bool:
    return len(set(_split(names))) == len(_split(names))


LINEAR = ("q", "k", "v", "o", "gate", "up", "down")  # the matrices of a layer
POSITIVE = Rule("a number > 0", lambda v: 0 < v < math.inf)
MULTIPLE_OF_32 = Rule("a multiple of 32", lambda v: v > 0 and v % 32 == 0)
ANY = Rule("", lambda v: True)


@dataclass(frozen=True)
class ModelSettings:
    """A folder in Hugging Face format, or "toy": a tiny Llama made from the seed."""

    path: str = setting("", ANY, 'folder with config.json, *.safetensors and tokenizer files, or "toy"')
    family: str = setting("", ANY, "empty: by config.json's model_type; or path.py:NAME (model/families.py)")
    dtype: str = setting("bfloat16", one_of("bfloat16", "float32"), "compute dtype; master weights are float32")
    remat: str = setting("full", one_of("none", "dots", "full"), "computed twice; dots: all but weight products")


@dataclass(frozen=True)
class DataSettings:
    """JSON files, `hub:owner/name:split`, or "toy": generated word problems."""

    train: str = setting("", ANY, 'training questions: a JSON file, hub:owner/name:split or "toy"')
    test: str = setting("", ANY, 'test questions: a JSON file, hub:owner/name:split or "toy"')
    dev: str = setting("", ANY, "questions that choose checkpoints, as data.train; if empty, see data.dev_rows")
    dev_rows: int = setting(0, at_least(0), "training questions held out as dev if data.dev is empty; 0: the test file")
    format: str = setting("python", one_of("python", "nl"), "what a solution is: a Python program, or text (nl)")
    template: str = setting(
        "method", one_of("method", "chat"), "the prompt: the method's, or that in the base model's chat template"
    )
    system: str = setting("", ANY, "system prompt of the chat template; empty: the template's own")
    reading: str = setting(
        "strict", one_of("strict", "lenient"), "how answers are read: as the paper does, or as a careful person does"
    )
    train_limit: int = setting(0, at_least(0), "rows of the training file to use, drawn with the seed; 0: all")
    test_limit: int = setting(0, at_least(0), "rows of the test file to use, drawn with the seed; 0: all")
    max_dropped: float = setting(0.2, between(0, 1), "largest share of training rows to drop: too long, never rewarded")
    line_len: int = setting(
        0, at_least(0), "tokens of the lines that rows are packed into; less than a stage's max_len: its max_len"
    )
    pad_multiple: int = setting(64, MULTIPLE_OF_32, "rows are padded to a multiple of this: few shapes are compiled")


@dataclass(frozen=True)
class ToySettings:
    """The toy example: a small synthetic task that uses every part."""

    train_rows: int = setting(2000, POSITIVE, "generated training questions")
    dev_rows: int = setting(300, POSITIVE, "generated questions that choose checkpoints")
    test_rows: int = setting(500, POSITIVE, "generated test questions")
    skipped_share: float = setting(0.3, between(0, 1), "share of annotations that skip steps and write a value down")
    drop_skipped: bool = setting(False, ANY, "train SFT only on the good annotations (a control)")
    vocab_size: int = setting(1000, between(300, 50000), "tokens of the toy's byte-level BPE tokenizer")
    layers: int = setting(3, POSITIVE, "of the tiny Llama")
    hidden_size: int = setting(64, POSITIVE, "of the tiny Llama")
    mlp_size: int = setting(176, POSITIVE, "of the tiny Llama")
    heads: int = setting(4, POSITIVE, "of the tiny Llama; also its kv heads")


@dataclass(frozen=True)
class SftSettings:
    """Supervised fine-tuning: one run makes the warm-up model (an early epoch) and the best checkpoint."""

    epochs: int = setting(40, POSITIVE, "epochs of SFT and of its learning-rate schedule")
    stop_epoch: int = setting(0, at_least(0), "last epoch, in the schedule of sft.epochs; 0: sft.epochs")
    warmup_epoch: int = setting(2, POSITIVE, 'makes "warmup": start and reference of ReFT, and the reranker\'s sampler')
    batch_size: int = setting(48, POSITIVE, "rows per update")
    micro_batch: int = setting(48, POSITIVE, "rows in memory at once; gradients are summed over micro-batches")
    learning_rate: float = setting(1e-5, POSITIVE, "peak learning rate")
    lr_warmup: float = setting(0.1, between(0, 1), "share of the updates that warm up linearly, then linear decay to 0")
    weight_decay: float = setting(0.0, at_least(0), "weight decay of AdamW")
    clip_norm: float = setting(1.0, POSITIVE, "largest gradient norm")
    max_len: int = setting(1024, POSITIVE, "tokens of prompt and target; longer rows are dropped")
    eval_every: int = setting(1, POSITIVE, "epochs between greedy evaluations")


@dataclass(frozen=True)
class RlSettings:
    """Reinforcement learning."""

    algorithm: str = setting("ppo", ANY, "ppo, rloo, grpo, dr_grpo or dapo (docs/algorithms.md); or path.py:NAME")
    iterations: int = setting(0, at_least(0), "training iterations; 0: rl.epochs passes over the training questions")
    epochs: int = setting(300, POSITIVE, "passes over the training questions, if rl.iterations is 0")
    tokens: int = setting(0, at_least(0), "end with the iteration that reaches so many sampled tokens; 0: no limit")
    questions: int = setting(32, POSITIVE, "questions per iteration")
    samples: int = setting(
        0, at_least(0), "solutions sampled per question; 0: the algorithm's own number (docs/algorithms.md)"
    )
    micro_batch: int = setting(32, POSITIVE, "rows in memory at once in scoring and updates")
    minibatches: int = setting(1, POSITIVE, "updates per PPO epoch, each on all samples of its questions")
    ppo_epochs: int = setting(2, POSITIVE, "passes over the rows of an iteration")
    learning_rate: float = setting(3e-7, POSITIVE, "learning rate, constant after rl.lr_warmup")
    lr_warmup: int = setting(0, at_least(0), "updates of linear warm-up")
    weight_decay: float = setting(0.0, at_least(0), "weight decay of AdamW")
    clip_norm: float = setting(1.0, POSITIVE, "largest gradient norm")
    kl_coef: float = setting(0.01, at_least(0), "KL penalty β; paper: 0.01, but 0.05 for nl other than MathQA-numeric")
    kl_in: str = setting(
        "",
        one_of("", "reward", "loss", "none"),
        "where the KL penalty is: reward, loss or none; empty: the algorithm's own",
    )
    kl_estimator: str = setting("k3", one_of("k1", "k2", "k3"), "estimate of the KL penalty in the loss")
    gamma: float = setting(1.0, between(0, 1), "discount")
    lam: float = setting(0.95, between(0, 1), "λ of GAE")
    vf_coef: float = setting(5.0, at_least(0), "weight of the value loss")
    value_init: float = setting(1.0, at_least(0), "scale of the value head's initial weights; 0 starts with V = 0")
    clip: float = setting(0.2, POSITIVE, "largest change of the policy ratio: it is clipped to 1 ± this")
    clip_high: float = setting(
        0.0, at_least(0), "largest change of the policy ratio upwards; 0: the algorithm's own (dapo 0.28, else rl.clip)"
    )
    loss_mean: str = setting(
        "", one_of("", "rows", "tokens", "sum", "constant"), "what the loss is a mean over; empty: the algorithm's own"
    )
    overlong: int = setting(
        0, at_least(0), "dapo: tokens before the length limit in which a response loses up to 1 of its reward; 0: none"
    )
    redraws: int = setting(
        0, at_least(0), "dapo: times that questions with equal rewards are replaced by others; then they are left out"
    )
    sampler_correction: str = setting(
        "none", one_of("none", "tis", "mis"), "importance weights of trainer against sampler: truncated or masked"
    )
    sampler_cap: float = setting(
        2.0, at_least(1), "largest importance weight: tis truncates to it, mis drops the token"
    )
    max_gap: float = setting(
        0.0, between(0, 1), "stop if trainer and sampler differ by a factor of 2 on a larger share of tokens; 0: never"
    )
    value_clip: float = setting(0.2, POSITIVE, "largest change of a value: it is clipped to the old value ± this")
    temperature: float = setting(1.0, POSITIVE, "temperature of sampling and of every log-probability in training")
    max_prompt: int = setting(300, POSITIVE, "tokens; training questions with a longer prompt are skipped")
    max_len: int = setting(700, POSITIVE, "tokens of prompt and response")
    eval_every: int = setting(0, at_least(0), "iterations between greedy evaluations; 0: once per pass")
    save_every: int = setting(0, at_least(0), "iterations between resumable checkpoints; 0: once per pass")


@dataclass(frozen=True)
class LoraSettings:
    """LoRA: the base is frozen, small adapters are trained (docs/lora.md)."""

    rank: int = setting(0, at_least(0), "rank of the adapters; 0: no LoRA, every weight is trained")
    alpha: float = setting(32.0, POSITIVE, "the adapters' product is multiplied by lora.alpha / lora.rank")
    targets: str = setting(
        ",".join(LINEAR),
        Rule(f"some of {','.join(LINEAR)}, with commas", lambda v: _distinct(v) and set(_split(v)) <= set(LINEAR)),
        "matrices of a layer that have an adapter",
    )


@dataclass(frozen=True)
class SelfTrainSettings:
    """Self-training, the paper's two baselines. All else is as in `sft` (offline) and `rl` (online)."""

    samples: int = setting(10, POSITIVE, "offline: most distinct correct samples per question, besides its solution")
    epochs: int = setting(20, POSITIVE, "offline: epochs of training and of its learning-rate schedule")
    updates: int = setting(2, POSITIVE, "online: updates on each batch")
    learning_rate: float = setting(3e-7, POSITIVE, "online: learning rate, constant after rl.lr_warmup")


@dataclass(frozen=True)
class SampleSettings:
    """Sampling for voting, reranking and offline self-training."""

    n: int = setting(100, POSITIVE, "completions per test question")
    train_n: int = setting(100, POSITIVE, "completions per training question, for the reranker and self-training")
    train_limit: int = setting(0, at_least(0), "training questions to sample (reranker, self-training); 0: all")
    temperature: float = setting(1.0, POSITIVE, "temperature of sampling for voting, reranking and self-training")
    top_k: int = setting(50, at_least(0), "draw only from the k most likely tokens; 0: from the whole vocabulary")
    max_len: int = setting(1024, POSITIVE, "tokens of prompt and response, also of greedy evaluation")


@dataclass(frozen=True)
class EngineSettings:
    """The rollout engine."""

    slots: int = setting(128, POSITIVE, "completions decoded at once, in rollouts, evaluation and sampling")
    weights: str = setting("", one_of("", "int8"), "of the layers' matrices while it samples; empty: model.dtype")
    cache: str = setting("", one_of("", "int8"), "keys and values of earlier tokens; empty: model.dtype")


@dataclass(frozen=True)
class RerankSettings:
    """The reranker."""

    epochs: int = setting(3, POSITIVE, "passes over the deduplicated samples")
    batch_size: int = setting(24, POSITIVE, "rows per update")
    micro_batch: int = setting(24, POSITIVE, "rows in memory at once")
    learning_rate: float = setting(1e-6, POSITIVE, "peak learning rate")
    lr_warmup: float = setting(0.1, between(0, 1), "share of the updates that warm up linearly, then linear decay to 0")
    weight_decay: float = setting(0.0, at_least(0), "weight decay of AdamW")
    clip_norm: float = setting(1.0, POSITIVE, "largest gradient norm")
    max_len: int = setting(700, POSITIVE, "tokens of prompt and completion; longer rows are dropped")


@dataclass(frozen=True)
class ExecutorSettings:
    """The executor, which runs the models' programs."""

    timeout_s: float = setting(10.0, POSITIVE, "wall-clock seconds per program")
    workers: int = setting(2, POSITIVE, "programs run at once")
    memory_mb: int = setting(1024, at_least(64), "MiB of address space per program, above the interpreter's own")
    program_kb: int = setting(64, POSITIVE, "size of a program, KiB; a longer one is not run")
    allow_unsandboxed: bool = setting(False, ANY, "run programs even if they can read this machine's files")


@dataclass(frozen=True)
class MeshSettings:
    """The mesh of devices."""

    data: int = setting(-1, at_least(-1), "groups of devices, each with all parameters; -1: as many as fit")
    fsdp: int = setting(1, at_least(1), "devices over which parameters and rows are split")
    tensor: int = setting(1, at_least(1), "devices over which heads, mlp and vocabulary are split")
    cpu_devices: int = setting(0, at_least(0), "virtual devices that the CPU is split into; 0: do not split it")


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    name: str = setting("reft", ANY, "title of the report")
    seed: int = setting(42, at_least(0), "initial heads, data order and sampling are functions of it")
    task: str = setting("", ANY, "empty: by item id; or a name in tasks/registry.py, or path.py:NAME")
    reward: str = setting("", ANY, "empty: the task's reward; or path.py:NAME, a function (docs/rewards.md)")
    reward_timeout_s: float = setting(30.0, POSITIVE, "wall-clock seconds per completion for `reward`")
    reward_workers: int = setting(4, POSITIVE, "processes that compute `reward`")
    tracking: str = setting(
        "jsonl,tensorboard",
        Rule("names of trackers with commas, jsonl among them", lambda v: "jsonl" in map(str.strip, v.split(","))),
        "where metrics go: jsonl (resuming needs it), tensorboard, wandb, trackio, path.py:NAME",
    )
    compiled: str = setting(
        "", ANY, "folder of compiled functions, unless JAX_COMPILATION_CACHE_DIR is set; empty: WORKDIR/compiled"
    )
    keep_steps: int = setting(2, POSITIVE, "saved steps kept while a stage runs; with 2, one of them may be damaged")
    watchdog_minutes: float = setting(60.0, at_least(0), "end the process if nothing is finished for so long; 0: never")
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    toy: ToySettings = field(default_factory=ToySettings)
    sft: SftSettings = field(default_factory=SftSettings)
    rl: RlSettings = field(default_factory=RlSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    self_train: SelfTrainSettings = field(default_factory=SelfTrainSettings)
    sample: SampleSettings = field(default_factory=SampleSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    rerank: RerankSettings = field(default_factory=RerankSettings)
    executor: ExecutorSettings = field(default_factory=ExecutorSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)


def _settings(kind: type, prefix: str = "") -> dict[str, Setting]:
    found = {}
    for one in fields(kind):
        name = prefix + one.name
        found |= {name: one.metadata["setting"]} if one.metadata else _settings(one.type, f"{name}.")
    return found


SETTINGS = _settings(Config)  # {"rl.kl_coef": …}

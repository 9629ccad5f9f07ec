"""The types that flow between the parts of the package, and its errors.

They are NamedTuples: JAX sees them as pytrees, and this file does not need JAX.

Letters for axes, used everywhere: `B` rows, `T` query positions, `S` cache positions, `N` heads, `K` kv heads,
`G` = N/K, `H` head dim, `D` model, `F` mlp, `V` vocab, `L` layers, `P` prompt. Packed arrays
(train/packing.py): `M` micro-batches of `b` lines, `W` decisions per line at most, `w` decisions of one chunk of these.

One rule of alignment holds for every row: prompt + response + padding on the right, no gap, position = index. Every
reinforcement-learning array is [B,T]. Its entry `t` is about the decision taken after reading `tokens[:t+1]`, that is,
about token t+1. The actions of a row are `prompt_len-1 <= t <= total_len-2`. Masks come from lengths, never from
comparing ids with a pad id (CodeLlama pads with BOS).
"""

from typing import Any, NamedTuple

Array = Any  # numpy.ndarray or jax.Array


class InputError(Exception):
    """The user's input is wrong. The message is one line: the file or key, what is wrong, what to do."""

    exit_code = 2


class NotFiniteError(FloatingPointError):
    """A loss or another number of a step is NaN or infinite."""

    exit_code = 3


class SamplerGapError(Exception):
    """The engine that samples and the policy that is trained disagree about the probabilities of what was sampled."""

    exit_code = 3


class SaveError(Exception):
    """A file could not be written, for example on a full disk. The message says what is still there and what to do."""

    exit_code = 4


class Stopped(Exception):
    """The run was asked to stop and has reached a safe point; all hosts stop at the same one."""

    exit_code = 75  # EX_TEMPFAIL: run it again


class Example(NamedTuple):
    """One question. `answer_cot` is the worked solution; None in test files."""

    item_id: str
    question: str
    answer_value: str
    answer_cot: str | None = None


class Prompt(NamedTuple):
    """The start of a row, which the engine continues.

    tokens: int32[p]. sample: the number of this completion among the n completions of its item.
    """

    item_id: str
    sample: int
    tokens: Array


class Completion(NamedTuple):
    """A sampled response. Training uses its ids as they are; they are never tokenized again.

    tokens: int32[n], with EOS if `finished`. logprobs: float32[n], their log-probabilities at the sampling temperature,
    over the whole vocabulary.
    """

    item_id: str
    sample: int
    tokens: Array
    logprobs: Array
    finished: bool


class Verdict(NamedTuple):
    """The grade of one completion. The reward is the task's: by default 1 if correct, 0.1 if wrong, 0 for no answer.

    parts: the named parts of the reward if the setting `reward` gave it (tasks/rewards.py), else None.
    """

    value: float | str | None
    correct: bool
    reward: float
    status: str
    parts: dict[str, float] | None = None


class Rollout(NamedTuple):
    """Sampled rows and their scores: tokens int32[B,T], prompt_len int32[B], total_len int32[B], score float32[B].

    The samples of a question are next to each other.
    """

    tokens: Array
    prompt_len: Array
    total_len: Array
    score: Array


class PPOBatch(NamedTuple):
    """What an update reads about decisions: float32, [B,T] or packed.

    advantage: 0 off the actions. weight: what an action weighs in the loss, 0 elsewhere; for PPO 1 / (actions of the
    row · rows of the minibatch). old_value and return_ are None without a critic; ref_logprob is None unless the loss
    has a KL penalty.
    """

    weight: Array
    old_logprob: Array
    old_value: Array | None
    advantage: Array
    return_: Array | None
    ref_logprob: Array | None = None

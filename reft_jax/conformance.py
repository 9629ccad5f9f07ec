"""Replays the authors' own numbers: one PPO iteration, one rerank evaluation. For tests, and for readers in doubt.

Everything is computed in float32 by the functions that a training run uses. The case of a PPO iteration is a folder:
`config.json`, `policy_before` and `reference` (Hugging Face Llama weights, the policy's with `v_head`), `case.json`
(settings, sampled programs, gold answers) and `step.npz`, of which only the token ids, their mask and the prompts'
padded length are read; every other number in it is only for comparison.
"""

import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from reft_jax import executor
from reft_jax.algo import advantages
from reft_jax.algo.algorithms import PPO
from reft_jax.evaluation.voting import deduplicate, rerank_choice, upper_bound, voted_correct
from reft_jax.model.hf import load_hf, load_value_head
from reft_jax.model.hf_folder import WRAPPER
from reft_jax.model.hf_write import hf_tensors
from reft_jax.model.safetensors import read_header
from reft_jax.model_folder import read_json
from reft_jax.parallel.mesh import make_mesh
from reft_jax.tasks.answers import grade
from reft_jax.train.batches import pad_tokens
from reft_jax.train.iteration import Iteration, Scores
from reft_jax.train.state import TrainState, make_optimizer
from reft_jax.types import Example, InputError, PPOBatch, Rollout

_COEFFICIENTS = ("kl_coef", "gamma", "lam", "clip", "value_clip", "vf_coef")
_NEEDED = (*_COEFFICIENTS, *"programs gold lr weight_decay max_grad_norm ppo_epochs minibatch".split())
# Fixed here: a case may not have other values.
_FIXED = {"adam_eps": 1e-8, "adam_b1": 0.9, "adam_b2": 0.999, "whitening": "global"}


def replay_ppo(case_dir: str | Path) -> dict:
    """One PPO iteration of a case, from the sampled ids to the weights after the last update.

    Returns numpy arrays. In our layout (types.py; T is the longest row), 0 off the actions, float32[B,T]: rewards,
    score_rewards, kl_rewards (as the authors keep them, before β multiplies them), values, old_logprobs, ref_logprobs,
    advantages, advantages_whitened, returns; action_mask bool[B,T]; prompt_len, total_len int32[B]; scores float32[B],
    from executing the case's programs. One entry per update, float32[U]: losses, grad_norms (before clipping). Scalars
    of the last update: pg_loss, vf_loss, vf_expl_var (of the values right before it). params_after: a dict, float32,
    under the names that `policy_before` has.
    InputError names a file or field that is missing, or a field whose value cannot be replayed.
    """
    folder = Path(case_dir)
    case = read_json(folder / "case.json")
    with np.load(_there(folder / "step.npz")) as step:
        tokens, prompt_len, total_len = repack(step["input_ids"], step["attention_mask"], int(step["prompt_len"]))
    _check_case(folder / "case.json", case, rows=len(tokens))
    scores = execute(case["programs"], case["gold"])
    with jax.default_matmul_precision("highest"):
        model, policy = _load(folder, "policy_before")
        _, reference = _load(folder, "reference")
        rollout = Rollout(tokens, prompt_len, total_len, scores)
        replayed, params = _iteration(model, policy, reference["lm"], rollout, case)
    names = read_header(folder / "policy_before.safetensors")
    return jax.device_get(replayed) | {"params_after": _under_names(names, model.config, params)}


def _iteration(model, policy, reference, rollout: Rollout, case: dict) -> tuple[dict, dict]:
    """What `replay_ppo` returns without the weights, and the parameters after the updates."""
    length, rows = rollout.tokens.shape[1], len(rollout.tokens)
    algorithm = PPO(**{name: case[name] for name in _COEFFICIENTS}, temperature=1.0)
    schedule = optax.constant_schedule(case["lr"])
    optimizer = make_optimizer(schedule, weight_decay=case["weight_decay"], clip_norm=case["max_grad_norm"])
    size = {"micro_batch": rows, "max_len": 2 * length, "multiple": 8}
    one = Iteration(model, make_mesh(1, 1, 1, jax.devices()[:1]), optimizer, algorithm, None, **size)
    scores, _ = one.score(policy, reference, rollout)
    batch, _ = one.make_batch(rollout, scores)
    arrays = _arrays(rollout, scores, batch, kl_coef=case["kl_coef"], gamma=case["gamma"], lam=case["lam"])
    state, updates = TrainState(jnp.zeros((), jnp.int32), policy, jax.jit(optimizer.init)(policy)), []
    for _ in range(case["ppo_epochs"]):
        now, _ = one.score(state.params, reference, rollout)
        state, metrics = one.update(state, rollout, batch)
        explained = jax.jit(advantages.explained_variance)(now.value, batch.return_, batch.weight > 0)
        updates.append(metrics | {"vf_expl_var": explained})
    updates = jax.device_get(updates)
    last = {
        "losses": np.array([update["loss"] for update in updates]),
        "grad_norms": np.array([update["grad_norm"] for update in updates]),
        "pg_loss": updates[-1]["policy_loss"],
        "vf_loss": updates[-1]["value_loss"],
        "vf_expl_var": updates[-1]["vf_expl_var"],
    }
    return arrays | last, state.params


@partial(jax.jit, static_argnames=("kl_coef", "gamma", "lam"))
def _arrays(rollout: Rollout, scores: Scores, batch: PPOBatch, *, kl_coef: float, gamma: float, lam: float):
    """Every array on the way to what an update reads."""
    mask, ref_logprob = batch.weight > 0, scores.ref_logprob
    paid = (rollout.score, scores.logprob, ref_logprob, mask)
    rewards, score_rewards, _ = advantages.token_rewards(*paid, kl_coef=kl_coef)
    return {
        "rewards": rewards,
        "score_rewards": score_rewards,
        "kl_rewards": advantages.token_rewards(*paid, kl_coef=1.0)[2],
        "values": batch.old_value,
        "old_logprobs": batch.old_logprob,
        "ref_logprobs": jnp.where(mask, ref_logprob, 0.0),
        "advantages": advantages.gae(rewards, batch.old_value, mask, gamma=gamma, lam=lam)[0],
        "advantages_whitened": batch.advantage,
        "returns": batch.return_,
        "action_mask": mask,
        "prompt_len": rollout.prompt_len,
        "total_len": rollout.total_len,
        "scores": rollout.score,
    }


def repack(input_ids, attention_mask, padded_prompt: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows whose prompts are padded on the left to `padded_prompt`, in our layout: tokens, prompt_len, total_len."""
    attended = np.asarray(attention_mask, bool)
    tokens, total_len = pad_tokens([ids[real] for ids, real in zip(input_ids, attended, strict=True)], 1)
    return tokens, attended[:, :padded_prompt].sum(1).astype(np.int32), total_len


def execute(programs: list[str], gold: list[str]) -> np.ndarray:
    """The score of each program, float32[B]: 1, 0.1 or 0 by running it."""
    asked = [Example(f"gsm8k_{i}", "", answer) for i, answer in enumerate(gold)]
    verdicts = grade(programs, asked, "python", run_programs=executor.run_programs)
    return np.array([verdict.reward for verdict in verdicts], np.float32)


def replay_rerank(case_dir: str | Path) -> dict[str, float]:
    """A rerank evaluation from samples and the reranker's logits: shares of all questions, 0 to 1.

    Returns: cls_acc (distinct samples judged correctly), rerank_acc, upper_bound, voting_accuracy (a vote over all
    predictions, counted here) and vote_acc (the same, as the file's `is_correct` has it, of the questions that have a
    distinct sample with a valid answer). InputError if a distinct sample has no logits.
    """
    path = Path(case_dir) / "rerank.json"
    case = read_json(path)
    logits = {(row["item_id"], row["completion"]): row["logits"] for row in case["rows"]}
    judged, chosen, votes, stored_votes, bounds = [], [], [], [], []
    for record in case["samples"]:
        distinct = deduplicate(record["predictions"])
        missing = [p["completion"] for p in distinct if (record["item_id"], p["completion"]) not in logits]
        if missing:
            raise InputError(f"{path}: field 'rows' has no logits for {record['item_id']}'s {missing[0]!r}")
        rows = jnp.array([logits[record["item_id"], p["completion"]] for p in distinct])
        probabilities = np.asarray(jax.nn.softmax(rows, -1)[:, 1]).tolist()
        judged += [(x > 0.5) == p["correctness"] for x, p in zip(probabilities, distinct, strict=True)]
        best = rerank_choice(distinct, probabilities)
        chosen.append(best is not None and distinct[best]["correctness"])
        votes.append(voted_correct(record["predictions"]))
        stored_votes.append(best is not None and record["is_correct"])
        bounds.append(upper_bound(record["predictions"]))
    shares = {"cls_acc": judged, "vote_acc": stored_votes, "rerank_acc": chosen, "upper_bound": bounds}
    return {name: float(np.mean(flags)) for name, flags in (shares | {"voting_accuracy": votes}).items()}


def _load(folder: Path, name: str) -> tuple:
    """Model and parameters of one weights file of a case; with 'value_head' where the file has one."""
    with tempfile.TemporaryDirectory() as scratch:
        for source, target in (("config.json", "config.json"), (f"{name}.safetensors", "model.safetensors")):
            (Path(scratch) / target).symlink_to(_there(folder / source).resolve())
        model, lm = load_hf(scratch)
        head = load_value_head(scratch)
    return model, {"lm": lm} | ({"value_head": head} if head else {})


def _under_names(names, config, params) -> dict[str, np.ndarray]:
    """Our parameters under the names of a case: those of TRL's value-head wrapper."""
    ours = dict(hf_tensors(config, params["lm"], value_head=params["value_head"]))
    ours.setdefault("lm_head.weight", ours["model.embed_tokens.weight"])  # tied: one matrix, sometimes stored twice
    plain = {name: name.removeprefix(WRAPPER).replace("v_head.summary.", "v_head.") for name in names}
    plain = {name: short.replace("v_head.", "v_head.summary.") for name, short in plain.items()}
    return {name: ours[plain[name]] for name in names if plain[name] in ours}  # rotary constants are no parameters


def _check_case(path: Path, case: dict, rows: int) -> None:
    for name in _NEEDED:
        if name not in case:
            raise InputError(f"{path}: field {name!r} is missing; see reft_jax/conformance.py for what a case holds")
    for name, value in (_FIXED | {"minibatch": rows}).items():
        if case.get(name, value) != value:
            raise InputError(f"{path}: field {name!r} is {case[name]!r}; only {value!r} can be replayed")


def _there(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"{path}: the file is missing; a case is a folder like those under golden/")
    return path

"""Complete PPO iterations and a rerank evaluation of the authors' own code, replayed entry by entry.

Their rows are padded on the left, ours are not: row b of theirs without its padding is row b of ours.
"""

import json
import shutil

import numpy as np
import pytest

from reft_jax import executor
from reft_jax.conformance import replay_ppo, replay_rerank
from reft_jax.stages.reft import mean_advantages
from reft_jax.train.packing import pack_rollout
from reft_jax.types import InputError, PPOBatch, Rollout

CASES = ("ppo_0", "ppo_1", "ppo_2")
ARRAYS = "rewards score_rewards kl_rewards values old_logprobs ref_logprobs advantages advantages_whitened returns"


@pytest.fixture(scope="module", autouse=True)
def workers():
    yield
    executor.shutdown()


@pytest.fixture(scope="module", params=CASES)
def replayed(request, shared):
    """(folder of the case, its numbers, ours)."""
    folder = shared / "golden" / request.param
    return folder, dict(np.load(folder / "step.npz")), replay_ppo(folder)


def on_actions(theirs: dict, name: str):
    """Their array at each row's actions, row after row; old and reference log-probabilities lack the last column."""
    mask = theirs["mask"].astype(bool)
    return theirs[name][mask[:, : theirs[name].shape[1]]]


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_golden_rows_and_masks(replayed):
    folder, theirs, ours = replayed
    attended = theirs["attention_mask"].astype(bool)
    assert ours["action_mask"].any(1).all()
    for b, real in enumerate(attended):
        length = real.sum()
        assert ours["total_len"][b] == length
        np.testing.assert_array_equal(ours["action_mask"][b, :length], theirs["mask"][b, real].astype(bool))
        assert not ours["action_mask"][b, length - 1 :].any()
    lengths = json.loads((folder / "case.json").read_text())["prompt_lengths"]
    np.testing.assert_array_equal(ours["prompt_len"], lengths)


@pytest.mark.parametrize("name", ARRAYS.split())
def test_golden_arrays(replayed, name):
    _, theirs, ours = replayed
    expected = on_actions(theirs, name)
    assert expected.size == ours["action_mask"].sum()
    close(ours[name][ours["action_mask"]], expected)
    assert not ours[name][~ours["action_mask"]].any()


def test_golden_mean_advantages_of_the_audit_log(replayed):
    """The authors' whitened advantages, averaged over the actions of each row with their own mask."""
    _, theirs, ours = replayed
    expected = [row[mask].mean() for row, mask in _rows_on_actions(theirs, "advantages_whitened")]
    rollout = Rollout(np.zeros(ours["action_mask"].shape), ours["prompt_len"], ours["total_len"], ours["scores"])
    batch = PPOBatch(None, None, None, ours["advantages_whitened"], None)
    rows, length = rollout.tokens.shape
    packing = pack_rollout(rollout, max_len=length, micro_batch=rows, micro_batches=1, multiple=1)
    assert len(set(np.sign(expected))) == 2
    close(mean_advantages(packing, batch), expected)


def _rows_on_actions(theirs: dict, name: str):
    width = theirs[name].shape[1]
    return zip(theirs[name], theirs["mask"].astype(bool)[:, :width], strict=True)


def test_golden_scores_come_from_running_the_programs(replayed):
    _, theirs, ours = replayed
    np.testing.assert_array_equal(ours["scores"], theirs["scores"])


def test_golden_losses_and_gradient_norms_of_every_update(replayed):
    folder, theirs, ours = replayed
    assert len(ours["losses"]) == json.loads((folder / "case.json").read_text())["ppo_epochs"]
    for name in ("losses", "grad_norms", "pg_loss", "vf_loss", "vf_expl_var"):
        close(ours[name], theirs[name])


def test_golden_weights_after_the_updates(replayed):
    safetensors = pytest.importorskip("safetensors.numpy")
    folder, _, ours = replayed
    case = json.loads((folder / "case.json").read_text())
    before = safetensors.load_file(folder / "policy_before.safetensors")
    after = safetensors.load_file(folder / "policy_after.safetensors")
    assert ours["params_after"].keys() == after.keys()
    errors = np.concatenate([np.abs(ours["params_after"][name] - after[name]).ravel() for name in after])
    moved = np.concatenate([np.abs(before[name] - after[name]).ravel() for name in after])
    assert np.mean(moved > 0.5 * case["lr"]) > 0.9  # so that an update that does nothing would not pass
    assert np.mean(errors <= 0.02 * case["lr"]) >= 0.999
    # AdamW divides a gradient by its own size plus 1e-8. Where the gradient is near 1e-8, its rounding, which differs
    # between CPUs and between versions of XLA, decides about the step: two such weights of 24,000, one update each.
    assert np.sum(errors > 2e-5) <= 2
    assert errors.max() <= 2e-5 + case["lr"]


def test_golden_rerank_evaluation(shared):
    folder = shared / "golden" / "rerank_0"
    stored = json.loads((folder / "rerank.json").read_text())
    expected = stored["expected"] | {"voting_accuracy": stored["voting_accuracy"]}
    assert replay_rerank(folder) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gamma": None}, "field 'gamma' is missing"),
        ({"minibatch": 2}, "field 'minibatch' is 2; only 4"),
        ({"adam_b2": 0.95}, "field 'adam_b2' is 0.95"),
        ({"whitening": "per row"}, "field 'whitening'"),
    ],
)
def test_golden_cases_that_cannot_be_replayed_are_named(tmp_path, shared, changes, words):
    folder = tmp_path / "case"
    shutil.copytree(shared / "golden" / "ppo_0", folder)
    case = json.loads((folder / "case.json").read_text()) | changes
    (folder / "case.json").write_text(json.dumps({k: v for k, v in case.items() if v is not None}))
    with pytest.raises(InputError, match=words):
        replay_ppo(folder)


def test_golden_cases_without_a_file_are_named(tmp_path, shared):
    folder = tmp_path / "case"
    shutil.copytree(shared / "golden" / "ppo_0", folder)
    (folder / "reference.safetensors").unlink()
    with pytest.raises(InputError, match="reference.safetensors: the file is missing"):
        replay_ppo(folder)
    rerank = json.loads((shared / "golden" / "rerank_0" / "rerank.json").read_text())
    rerank["rows"].pop()
    (tmp_path / "rerank.json").write_text(json.dumps(rerank))
    with pytest.raises(InputError, match="field 'rows' has no logits for gsm8k_29"):
        replay_rerank(tmp_path)

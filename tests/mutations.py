"""Would the tests notice? Plants one-line mistakes, one after another, and shows that a test fails for each.

    python tests/mutations.py            all of them; exit code 1 if one goes unnoticed
    python tests/mutations.py gae        those whose name contains "gae"

Nothing here is written: a mutated module exists only in this process, which imports the package anew for every
mutation. The executor's are read by processes of their own: they are mutated in a copy of the repository.
"""

import importlib.abc
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
ALGO = ("test_advantages.py", "test_losses.py")


class Mutation(NamedTuple):
    """A mistake: `old` stands once in `module` and becomes `new`; one of `tests` must fail."""

    name: str
    module: str
    old: str
    new: str
    tests: tuple[str, ...] = ALGO


A, L, S = "reft_jax.algo.advantages", "reft_jax.algo.losses", "reft_jax.train.steps"
P, C, SLOTS = "reft_jax.train.packing", "reft_jax.train.scoring", "reft_jax.engine.slots"
SCHEDULE = "reft_jax.engine.schedule"
CHECKSUMS, CHECKPOINTS, DAMAGE = "reft_jax.train.checksums", "reft_jax.train.checkpoints", "faults/test_damage.py"
BATCH = ("test_steps.py::test_a_ppo_batch_equals_its_slow_twin",)
PACKING = ("test_packing.py",)
SELF = "reft_jax.runs.self_train"
ONLINE = ("test_self_train.py::test_online_trains_responses_of_correct_rows_and_gold_targets_half_each",)
PROVENANCE, RECORDS = "reft_jax.task.provenance", "reft_jax.task.records"
TRUTH, WHOSE = ("test_truth.py",), "test_provenance.py"
SUBSETS, OVER_ALL = "reft_jax.task.subsets", ("test_subsets.py::test_closed_forms_are_the_mean_over_all_subsets",)
SCORES = ("test_scoring.py::test_decisions_equal_the_full_log_softmax",)
ENDS = ("test_engine.py::test_a_row_ends_with_its_first_eos_or_at_max_len",)
SEVERAL = ("test_engine.py::test_a_row_ends_with_the_first_of_several_end_ids",)
TOKENIZERS, WRITTEN = "test_tokenizer_folders.py", "test_hf_write.py"
TPU = ("test_engine.py::test_a_tpus_form_of_weights_and_cache_draws_the_same_tokens",)
JOINS = ("test_model.py::test_joining_writes_what_was_drawn_inside_the_cache_and_nothing_else",)
ATTENDS = ("test_model.py::test_attention_of_one_token_equals_its_slow_twin",)
LOCK = "reft_jax.runs.lock"
SERVED = ("test_schedule.py::test_every_request_is_served_once_however_rows_end[3-5-8-4]",)
E = "reft_jax.executor"
ROOM = "test_executor_room.py::test_"
CORNER, SCRIPTS = "test_executor_corners.py::test_corner", "test_executor_cpython.py"
FIELDS, CONFIG, HF = "reft_jax.model.config_fields", "reft_jax.model.llama_config", "reft_jax.model.hf"
FOLDER, FORMAT = "reft_jax.model.hf_folder", "reft_jax.model.safetensors"
READS, KINDS, FILES = ("test_llama_config.py",), ("test_hf_folder.py",), ("test_hf_files.py",)
MUTATIONS = [
    Mutation("mask starts one late", A, "t >= prompt_len[:, None] - 1", "t >= prompt_len[:, None]"),
    Mutation("mask starts one early", A, "t >= prompt_len[:, None] - 1", "t >= prompt_len[:, None] - 2"),
    Mutation("mask leaves EOS out", A, "t <= total_len[:, None] - 2", "t <= total_len[:, None] - 3"),
    Mutation("mask takes padding in", A, "t <= total_len[:, None] - 2", "t <= total_len[:, None] - 1"),
    Mutation("KL with the wrong sign", A, "-kl_coef * (old", "kl_coef * (old"),
    Mutation("KL paid on padding", A, "jnp.where(mask, -kl_coef * (old_logprob - ref_logprob), 0.0)",
             "-kl_coef * (old_logprob - ref_logprob)"),
    Mutation("KL as a square", A, "-kl_coef * (old_logprob - ref_logprob)",
             "-kl_coef * 0.5 * (old_logprob - ref_logprob) ** 2"),
    Mutation("score on the first action", A, "mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))",
             "mask & ~jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))"),
    Mutation("score on every action", A, "jnp.where(last, score", "jnp.where(mask, score"),
    Mutation("score truncated to an integer", A, "jnp.where(last, score[:, None], 0.0)",
             "jnp.where(last, score[:, None].astype(int), 0)"),
    Mutation("gae without discount", A, "rewards + gamma * next_values", "rewards + next_values"),
    Mutation("gae with lambda only", A, "delta + gamma * lam * advantage", "delta + lam * advantage"),
    Mutation("gae forgets the value", A, "gamma * next_values - values", "gamma * next_values"),
    Mutation("gae forward in time", A, "deltas.T, reverse=True", "deltas.T, reverse=False"),
    Mutation("gae reads values off the mask", A, "    values = jnp.where(mask, values, 0.0)\n", ""),
    Mutation("returns without the value", A, "return advantages, advantages + values", "return advantages, advantages"),
    Mutation("Bessel dropped", A, "jnp.maximum(count - 1, 1)", "count"),
    Mutation("whitening without the mean", A, "jnp.where(mask, (x - mean) * jax", "jnp.where(mask, x * jax"),
    Mutation("whitening over padding", A, "mean, variance = masked_moments(x, mask)\n    return jnp.where(mask, (x",
             "mean, variance = x.mean(), x.var()\n    return jnp.where(mask, (x"),
    Mutation("whitening by the variance", A, "jax.lax.rsqrt(variance + 1e-8)", "1 / (variance + 1e-8)"),
    Mutation("explained variance of values", A, "masked_moments(returns - values, mask)",
             "masked_moments(values, mask)"),
    Mutation("policy clip below only", L, "jnp.clip(ratio, 1 - clip, 1 + clip)", "jnp.maximum(ratio, 1 - clip)"),
    Mutation("policy clip above only", L, "jnp.clip(ratio, 1 - clip, 1 + clip)", "jnp.minimum(ratio, 1 + clip)"),
    Mutation("policy loss takes the better", L, "jnp.maximum(-advantage * ratio", "jnp.minimum(-advantage * ratio"),
    Mutation("policy gradient uphill", L, "_weighted(jnp.maximum(-advantage * ratio, -advantage *",
             "_weighted(jnp.maximum(advantage * ratio, advantage *"),
    Mutation("ratio upside down", L, "jnp.where(weight > 0, logprob - old_logprob, 0.0)",
             "jnp.where(weight > 0, old_logprob - logprob, 0.0)"),
    Mutation("ratio of what does not count", L, "jnp.where(weight > 0, logprob - old_logprob, 0.0)",
             "logprob - old_logprob"),
    Mutation("value loss unclipped", L, "0.5 * jnp.maximum(jnp.square(value - return_), jnp.square(clipped - return_))",
             "0.5 * jnp.square(value - return_)"),
    Mutation("value loss takes the smaller", L, "0.5 * jnp.maximum(", "0.5 * jnp.minimum("),
    Mutation("value loss doubled", L, "_weighted(0.5 * ", "_weighted(1.0 * "),
    Mutation("mean over padding too", L, "/ jnp.maximum(mask.sum(1, keepdims=True), 1)", "/ mask.shape[1]"),
    Mutation("mean divides by zero", L, "/ jnp.maximum(mask.sum(1, keepdims=True), 1)",
             "/ mask.sum(1, keepdims=True)"),
    Mutation("mean over actions, not over rows", L, "/ jnp.maximum(mask.sum(1, keepdims=True), 1) / mask.shape[0]",
             "/ mask.sum()"),
    Mutation("rows without actions are no rows", L, "/ mask.shape[0]", "/ mask.any(1).sum()"),
    Mutation("weights are a mask", L, "jnp.where(weight > 0, x * weight, 0.0)", "jnp.where(weight > 0, x, 0.0)"),
    Mutation("garbage times weight 0", L, "jnp.where(weight > 0, x * weight, 0.0)", "(x * weight)"),
    Mutation("returns from whitened advantages", S,
             "advantages.whiten(advantage, mask), return_), metrics",
             "advantages.whiten(advantage, mask), advantages.whiten(advantage, mask) + value), metrics", BATCH),
    Mutation("advantages not whitened", S, "value, advantages.whiten(advantage, mask), return_), metrics",
             "value, advantage, return_), metrics", BATCH),
    Mutation("reference and policy swapped", S, "token_rewards(rollout.score, logprob, ref_logprob, mask",
             "token_rewards(rollout.score, ref_logprob, logprob, mask", BATCH),
    Mutation("KL of the metrics with the wrong sign", S, "jnp.where(mask, logprob - ref_logprob, 0.0).sum(1).mean()",
             "jnp.where(mask, ref_logprob - logprob, 0.0).sum(1).mean()", BATCH),
    Mutation("a minibatch weighs what a batch does", S, "losses.row_weights(mask) * minibatches",
             "losses.row_weights(mask)", ("test_steps.py::test_weights_of_a_minibatch_make_a_mean_over_its_rows",)),
    Mutation("the last micro-batch left out", S, "jax.lax.fori_loop(0, count, step, zeros_of(one, 0))",
             "jax.lax.fori_loop(0, count - 1, step, zeros_of(one, 0))",
             ("test_steps.py::test_micro_batches_without_rows_change_nothing_run_or_not",)),
    Mutation("ratio errors of micro-batches added", C, "jnp.maximum(largest, larger)", "largest + larger",
             ("test_steps.py::test_a_ppo_step_equals_its_slow_twin",)),
    Mutation("temperature on the sampler's side only", C, 'method="unembed") / temperature', 'method="unembed")',
             SCORES),
    Mutation("temperature on the trainer's side only", "reft_jax.engine.sampling",
             "logits / (temperature or 1.0)", "logits / 1.0",
             ("test_engine.py::test_logprobs_are_those_of_a_full_forward_at_the_temperature",)),
    Mutation("log-probability of this token, not the next", C, "at_decisions(lines.tokens, lines.decisions + 1)",
             "at_decisions(lines.tokens, lines.decisions)", SCORES),
    Mutation("hidden states of the next token", C, "at_decisions(hidden, lines.decisions)",
             "at_decisions(hidden, lines.decisions + 1)",
             ("test_scoring.py::test_hidden_states_are_those_of_the_decisions",)),
    Mutation("scores end with the line that has least", C, "(lines.decisions >= 0).sum(1).max()",
             "(lines.decisions >= 0).sum(1).min()", SCORES),
    Mutation("chunks rounded down", C, "(used + self.size - 1) // self.size", "used // self.size", SCORES),
    Mutation("gradient of the last chunk only", C, "jax.tree.map(jnp.add, to_head, more)", "more",
             ("test_scoring.py::test_gradients_are_those_of_the_full_log_softmax",)),
    Mutation("a loss's factor lost on the way back", C, "(x * cotangent[0])", "x",
             ("test_scoring.py::test_gradients_are_those_of_the_full_log_softmax",)),
    Mutation("rows of a line see each other", "reft_jax.model.llama",
             "(segments[:, :, None] == segments[:, None, :])", "(segments[:, :, None] >= segments[:, None, :])",
             ("test_packing.py::test_packed_scores_equal_those_of_rows_alone",)),
    Mutation("positions run on", P, "row, np.arange(len(row)), seg", "row, np.arange(begin, begin + len(row)), seg",
             PACKING),
    Mutation("one segment a line", P, "segments[line].max() + 1", "1", PACKING),
    Mutation("decisions one late", P, "offset[self.at[0]] + self.at[1] + 1", "offset[self.at[0]] + self.at[1] + 2",
             PACKING),
    Mutation("decisions of a line on top of each other", P, "used[line] += decisions[row]",
             "used[line] = decisions[row]", PACKING),
    Mutation("lines overfilled by one", P, "there + lengths[row] <= capacity", "there + lengths[row] <= capacity + 1",
             PACKING),
    Mutation("lines never full", P, "there + lengths[row] <= capacity", "there + lengths[row] < capacity", PACKING),
    Mutation("rows overlap by one", P, "used[at] += lengths[row]", "used[at] += lengths[row] - 1", PACKING),
    Mutation("short rows first", P, "np.argsort(-lengths", "np.argsort(lengths", PACKING),
    Mutation("the last line's micro-batch not counted", P, "int(self.line.max()) // micro_batch + 1",
             "int(self.line.max()) // micro_batch", PACKING),
    Mutation("lines longer than the longest row needs", P, "if length >= lengths.max()", "if length > lengths.max()",
             PACKING),
    Mutation("padding of what is not run", P, "self.count * micro_batch * self.length",
             "np.prod(self.shape) * self.length", PACKING),
    Mutation("SFT trains one token late", P, "[prompt - 1 for", "[prompt for", PACKING),
    Mutation("PPO acts one token late", P, "rollout.prompt_len - 1,", "rollout.prompt_len,", PACKING),
    Mutation("the reranker judges one token early", "reft_jax.runs.rerank", "        lengths - 1,\n",
             "        lengths - 2,\n", PACKING),
    Mutation("one token too many", SLOTS, "mark(slots.limit, seats.limit)", "mark(slots.limit, seats.limit + 1)", ENDS),
    Mutation("one token too few", SLOTS, "mark(slots.limit, seats.limit)", "mark(slots.limit, seats.limit - 1)", ENDS),
    Mutation("one token after EOS", SLOTS, "active & ended, total_len, slots.limit)",
             "active & ended, total_len + 1, slots.limit)", ENDS),
    Mutation("EOS of the token before", SLOTS, "ended = (token[:, None] ==",
             "ended = (jnp.take_along_axis(slots.tokens, last[:, None], 1) ==", ENDS),
    Mutation("end ids: the first alone ends a row", SLOTS, "== jnp.array(eos_ids)[None]).any(1)",
             "== jnp.array(eos_ids)[None])[:, 0]", SEVERAL),
    Mutation("end ids: the first alone counts as finished", "reft_jax.engine.generate",
             "in self.engine.eos_ids)", "in self.engine.eos_ids[:1])", SEVERAL),
    Mutation("end ids: config.json first", "reft_jax.model_folder",
             "listed_ids(folder / GENERATION) or listed_ids(folder / CONFIG)",
             "listed_ids(folder / CONFIG) or listed_ids(folder / GENERATION)",
             (f"{TOKENIZERS}::test_a_rollout_ends_at_the_tokenizers_eos_and_the_folders",)),
    Mutation("end ids: the one that ended it is text", "reft_jax.runs.setup",
             "completion.tokens[:-1] if completion.finished", "completion.tokens if completion.finished",
             (f"{TOKENIZERS}::test_the_id_that_ended_a_completion_is_not_its_text",)),
    Mutation("tokenizer: an id that no text gives counts", "reft_jax.task.tokenizer", "or index in encode(tok, text)]",
             "or True]", (f"{TOKENIZERS}::test_codellama_starts",)),
    Mutation("tokenizer: EOS may lack an embedding", "reft_jax.task.tokenizer", "max([*given, tok.eos_token_id])",
             "max(given)", (f"{TOKENIZERS}::test_an_id_that_text_can_give_must_be_in_the_model",)),
    Mutation("tokenizer: through the class, which cuts at <FILL_ME>", "reft_jax.task.tokenizer",
             "return _encode(tok.backend_tokenizer, text)", "return tok(text, add_special_tokens=False, "
             "split_special_tokens=True)['input_ids']", (f"{TOKENIZERS}::test_codellama_starts",)),
    Mutation("tokenizer: the class is believed", "reft_jax.task.tokenizer", "if ours != own:", "if not ours:",
             (f"{TOKENIZERS}::test_a_class_that_reads_otherwise_than_the_file_is_refused",)),
    Mutation("tokenizer: transformers guesses the class", "reft_jax.task.tokenizer",
             "if only_model and not known else", "if False else",
             (f"{TOKENIZERS}::test_a_sentencepiece_model_alone_gives_sentencepieces_ids",)),
    Mutation("tokenizer: a folder's code is let in", "reft_jax.task.tokenizer",
             "if not known and any(", "if known and any(",
             (f"{TOKENIZERS}::test_code_of_a_folder_is_never_run_and_never_asked_for",)),
    Mutation("tokenizer: a pointer of git-lfs", "reft_jax.model_folder",
             "if read_bytes(path, len(LFS_POINTER)) == LFS_POINTER:", "if False:",
             (f"{TOKENIZERS}::test_files_that_are_not_what_they_should_be",)),
    Mutation("export: tokenizer files written anew", "reft_jax.model_folder", 'getattr(tok, "read_from", None)', "None",
             (f"{WRITTEN}::test_an_export_has_the_bases_files_byte_by_byte",)),
    Mutation("export: a class of transformers 5 alone", "reft_jax.model_folder",
             'if raw.get("tokenizer_class") == "TokenizersBackend":', "if False:",
             (f"{WRITTEN}::test_other_tokenizers_are_written_in_words_that_transformers_4_knows",)),
    Mutation("export: an end too few", "reft_jax.model_folder", "return raw if eos_id is None or eos_id in ids else",
             "return raw if ids else",
             (f"{WRITTEN}::test_the_end_that_training_appends_is_among_the_ends",)),
    Mutation("export: a reranker without padding", "reft_jax.model.hf_write",
             "*([tokenizer.eos_token_id] if classifier else [])", "*[]",
             (f"{WRITTEN}::test_transformers_scores_two_rows_with_an_exported_reranker",)),
    Mutation("export: infinite without a word", "reft_jax.model.hf_write", "np.isinf(converted) & np.isfinite(value)",
             "np.isinf(value)", (f"{WRITTEN}::test_a_number_that_would_become_infinite_is_an_error",)),
    Mutation("export: the value head's old place forgotten", "reft_jax.model.hf",
             'OLD_VALUE_HEAD_FILE = "value_head.safetensors"', 'OLD_VALUE_HEAD_FILE = "head.safetensors"',
             (f"{WRITTEN}::test_the_value_head_is_out_of_the_reach_of_loaders_and_the_old_place_is_read",)),
    Mutation("export: float32 whatever the base has", "reft_jax.runs.export", "base if base.itemsize <= 4 else", "",
             (f"{WRITTEN}::test_an_export_has_the_bases_files_byte_by_byte",)),
    Mutation("export: a place that is only looked at", "reft_jax.model_folder",
             "folder.mkdir(parents=True, exist_ok=True)\n", "pass\n",
             (f"{WRITTEN}::test_a_folder_that_cannot_be_made_is_found_by_trying",)),
    Mutation("a token's random numbers are the next one's", SLOTS, "slots.total_len - slots.prompt_len",
             "slots.total_len - slots.prompt_len + 1",
             ("test_engine.py::test_a_draw_follows_from_seed_iteration_item_sample_and_place_alone",)),
    Mutation("the cache written one late", SLOTS, "token, last, written, method", "token, last + 1, written, method",
             ("test_engine.py::test_greedy_equals_a_slow_loop_with_the_full_forward",)),
    Mutation("a key at the place of its neighbour", "reft_jax.model.cache", "at % BLOCK]", "(at + 1) % BLOCK]",
             ("test_engine.py::test_greedy_equals_a_slow_loop_with_the_full_forward",)),
    Mutation("an ended row writes past the end", "reft_jax.model.cache", "v.astype(cache.v.dtype), mode=\"drop\"",
             "v.astype(cache.v.dtype), mode=\"clip\"",
             ("test_model.py::test_a_row_is_written_at_its_position_and_nowhere_past_the_end",)),
    Mutation("a TPU's cache written one late", SLOTS, "begin, cache, slots = slots.total_len - 1,",
             "begin, cache, slots = slots.total_len,", TPU),
    Mutation("a TPU's cache without the last step", SLOTS, "drawn = slots.total_len - begin - 1",
             "drawn = slots.total_len - begin - 2", TPU),
    Mutation("a step not joined to the cache", "reft_jax.model.cache", "(place < count[:, None])",
             "(place < count[:, None] - 1)", JOINS),
    Mutation("a row sees one position more than it has", "reft_jax.model.llama", "<= at[:, None]",
             "<= at[:, None] + 1", ("test_model.py::test_prefill_and_ragged_decode_equal_the_full_forward",)),
    Mutation("unseen keys count", "reft_jax.model.attention", "return scores + mask.reshape(",
             "return scores + 0 * mask.reshape(", ATTENDS),
    Mutation("every block has a maximum of its own", "reft_jax.model.attention", "scores.max((2, 4), keepdims",
             "scores.max(4, keepdims", ATTENDS),
    Mutation("the last rows wait for each other", "reft_jax.engine.generate", "or FEWEST_ROWS", "or 0",
             ("test_engine.py::test_the_last_rows_leave_one_by_one",)),
    Mutation("a prefill a sample", SCHEDULE, "groups.setdefault(tokens.tobytes(), ", "groups.setdefault(request, ",
             ("test_schedule.py::test_requests_with_the_same_tokens_are_one_group",)),
    Mutation("another prompt's cache", SCHEDULE, "Seat(self.prefills, len(shares[shard]), r)",
             "Seat(self.prefills, 0, r)", SERVED),
    Mutation("seats from two prefills at once", SCHEDULE, "len(pairs) < limit and ready[0].prefill == prefill",
             "len(pairs) < limit", SERVED),
    Mutation("a slot is taken while its row decodes", SCHEDULE, "(self.owner >= 0) & ~active",
             "(self.owner >= 0) & active", SERVED),
    Mutation("request 0 lost on shrinking", SCHEDULE, "np.flatnonzero(row >= 0)", "np.flatnonzero(row > 0)",
             ("test_schedule.py::test_shrinking_keeps_everybody_in_order_and_shard",)),
    Mutation("a file of the same size is the same", CHECKSUMS, "if found[name] != listed[name]",
             "if found[name][0] != listed[name][0]", (f"{DAMAGE}::test_twenty_bits_flipped_anywhere",)),
    Mutation("an element's place not in the checksum", CHECKSUMS, "((index ^ (index >> 15)) | 1)", "jnp.uint32(1)",
             (f"{DAMAGE}::test_checksums_tell_elements_places_and_bits_apart",)),
    Mutation("restored arrays not looked at", CHECKPOINTS,
             'if reason := _difference(about["arrays"], state):\n            return reason\n        ', "",
             (f"{DAMAGE}::test_an_array_that_is_not_the_one_that_was_saved",)),
    Mutation("a run whose steps are damaged begins again", CHECKPOINTS,
             'if hosts.from_first(f"whole steps in {self.folder}", self._whole):', "if False:",
             (f"{DAMAGE}::test_a_run_whose_every_step_is_damaged_never_begins_again_by_itself",)),
    Mutation("self-training on wrong samples", SELF, "if one.verdict.correct", "if one.verdict.value", ONLINE),
    Mutation("self-training: one mean over both halves", SELF, "max(1, half.sum())", "half.size", ONLINE),
    Mutation("self-training: gold counts twice", S, "return sampled + gold, ", "return sampled + 2 * gold, ",
             ("test_self_train.py::test_the_online_loss_equals_a_slow_twin",)),
    Mutation("self-training on repeated samples", SELF, "list(dict.fromkeys(right))", "right",
             ("test_self_train.py::test_offline_rows_are_the_gold_solution_and_the_first_distinct_correct_samples",)),
    Mutation("of k, the last seen wins a tie", SUBSETS, "votes * (n + 1) - first", "votes * (n + 1) + first", OVER_ALL),
    Mutation("of k, with replacement", SUBSETS, "math.comb(n - correct, k) / math.comb(n, k)", "(1 - correct / n) ** k",
             OVER_ALL),
    Mutation("of k, the least probable is chosen", SUBSETS, "-by_text[", "by_text[", OVER_ALL),
    Mutation("of k, invalid answers are reranked", SUBSETS, 'if is_valid(p["solving_res"])]', "]", OVER_ALL),
    Mutation("McNemar's test on one side", "reft_jax.task.intervals", "2 * tail", "tail",
             ("test_intervals.py::test_mcnemar_is_the_binomial_test_of_the_questions_on_which_two_systems_differ",)),
    Mutation("grading again keeps the flag", "reft_jax.task.records",
             'old | {"solving_res": verdict.value, "correctness"', 'old | {"solving_res": verdict.value, "was"',
             ("test_records.py::test_stored_answers_are_read_by_the_rules_of_their_dataset",)),
    Mutation("another model's answers are used", PROVENANCE, "before if before.get(key) != now.get(key)",
             "before if key != 'model' and before.get(key) != now.get(key)", TRUTH),
    Mutation("another reranker's scores are used", "reft_jax.runs.rerank", '{"reranker": weights.checksum} | settings',
             "settings", (f"{WHOSE}::test_a_reranker_that_was_trained_again_scores_again",)),
    Mutation("answers to another question are used", PROVENANCE,
             '(record.get("question"), record.get("answer_value")) == asked[item_id] and fits(record)', "fits(record)",
             TRUTH),
    Mutation("a tokenizer is no part of a model", "reft_jax.train.checksums", '"*token*", ', "", TRUTH),
    Mutation("scores of other completions are used", "reft_jax.runs.rerank",
             'set(texts[score["item_id"]]) <= set(score.get("completions", ()))', "True",
             (f"{WHOSE}::test_scores_of_other_completions_are_given_again",)),
    Mutation("two names of a sweep share a file", "reft_jax.runs.sweep",
             'workdir / "samples" / data / f"{checkpoint.name}.jsonl"',
             'workdir / "samples" / f"{checkpoint.name}_{data}.jsonl"',
             (f"{WHOSE}::test_every_model_and_data_file_of_a_sweep_has_a_file_of_its_own",)),
    Mutation("a sample file's last line is dropped", RECORDS, "for number, line in enumerate(lines, 1):",
             "for number, line in enumerate(lines[:-1], 1):",
             ("test_records.py::test_a_last_line_without_a_newline_counts",)),
    Mutation("the last of two lines about a question wins", RECORDS, "if before and not (headers and", "if False and (",
             ("test_records.py::test_an_id_that_stands_twice_is_refused",)),
    Mutation("more samples than were asked for are voted on", RECORDS, 'record["predictions"][:n]} |',
             'record["predictions"]} |', TRUTH),
    Mutation("samples are drawn again under the old numbers", "reft_jax.runs.sample",
             "run.prompts([example], n)[len(there) :]", "run.prompts([example], n - len(there))", TRUTH),
    Mutation("a file of the same size has the same hash", "reft_jax.train.checksums",
             'f"{at.st_ino} {at.st_size} {at.st_mtime_ns} {at.st_ctime_ns}"', 'f"{at.st_size}"',
             (f"{WHOSE}::test_a_hugging_face_folder_is_hashed_once_and_again_when_a_file_changes",)),
    Mutation("a finished stage takes any data", "reft_jax.runs.stages", "if before[split] != now[split]", "if False",
             (f"{WHOSE}::test_a_finished_stage_knows_the_data_it_was_trained_on",)),
    Mutation("other questions under the same ids are compared", "reft_jax.runs.results",
             'if record["question"] != before["question"] or targets[0] != targets[1]:', "if False:",
             ("test_records.py::test_files_with_other_questions_under_the_same_ids_are_refused",)),
    Mutation("lock: a process id given again is alive", LOCK, "return now == started", "return True",
             ("test_lock.py::test_a_process_id_that_was_given_again_is_another_process",)),
    Mutation("lock: the dead on this host wait too", LOCK, "holder.machine == _machine()", "False",
             ("test_lock.py::test_a_process_id_that_was_given_again_is_another_process",)),
    Mutation("lock: process ids of other machines compared", LOCK, "holder.machine == _machine()", "True",
             ("test_lock.py::test_a_holder_elsewhere_counts_as_dead_after_its_silence",)),
    Mutation("lock: replaced although it has changed", LOCK, " or file.read() != before", "",
             ("test_lock.py::test_of_many_that_take_over_at_one_moment_one_does",)),
    Mutation("lock: no sign of life", LOCK, "os.utime(path)", "pass",
             ("test_lock.py::test_signs_of_life",)),
    Mutation("lock: a copy is in use", LOCK, "and not os.path.samefile(holder.workdir, workdir)", "and False",
             ("test_lock.py::test_a_copy_of_a_work_directory_in_use_is_free_and_one_that_was_renamed_is_not",)),
    Mutation("lock: readers ask", "reft_jax.runs.setup", "    if not reads:\n        lock.look(workdir)",
             "    lock.look(workdir)", ("test_lock.py::test_readers_come_in",)),
    Mutation("streams: a closed pipe ends the run", "reft_jax.terminal", "os.dup2(null, self.fileno())", "raise error",
             ("test_terminal.py::test_a_stream_whose_reader_is_gone_takes_everything",)),
    Mutation("disk: a full one names no file", "reft_jax.store", "{error.filename or path} could", "a file could",
             ("test_lock.py::test_a_lock_that_cannot_be_written_is_named",)),
    Mutation("log: damage is a torn end", "reft_jax.runs.executions", "except zlib.error as error:",
             "except zlib.error as error:\n                return whole",
             ("test_executions.py::test_what_no_crash_explains_is_an_error_and_nothing_is_cut_off",)),
    Mutation("done.json: any object will do", "reft_jax.runs.stages", '{"seconds", "checksum"} <= dict(result).keys()',
             "dict(result) is not None", ("test_workdir.py::test_a_damaged_done_json_is_one_line",)),
    Mutation("metrics: a torn line is read", "reft_jax.train.metrics", "if number < len(lines):", "if number:",
             ("test_metrics.py::test_reading_leaves_out_a_torn_last_line_and_what_is_null",)),
    Mutation("best models are left over", "reft_jax.runs.setup", '(stage / "checkpoints", *stage.glob("best_*"))',
             '(stage / "checkpoints",)', ("test_workdir.py::test_what_a_finished_stage_no_longer_needs_goes",)),
    Mutation("paths recorded as written", "reft_jax.runs.setup", "return os.path.abspath(path) if", "return path if",
             ("test_workdir.py::test_paths_are_recorded_absolute_and_mean_the_same_from_elsewhere",)),
    Mutation("paths divided at the last =", "reft_jax.runs.paths", 'entry.partition("=")', 'entry.rpartition("=")',
             ("test_workdir.py::test_letters_that_divide_may_stand_in_a_path",)),
    Mutation("shapes of a sweep not compared", CHECKPOINTS, "if found.get(name) != wanted.get(name)", "if False",
             ("test_sweep.py::test_a_stages_model_of_another_kind_or_shape_is_found_before_anything_is_made",)),
    Mutation("a wrong answer earns nothing", "reft_jax.task.answers", "else 0.1", "else 0.0", ("test_answers.py",)),
    Mutation("executor: the trainer's memory open to its user", f"{E}.process", "prctl(4, 0, 0, 0, 0)",
             "prctl(3, 0, 0, 0, 0)", (f"{CORNER}[kept3-True]",)),
    Mutation("executor: the zygote's descriptors open to its user", f"{E}.lockdown", "prctl(PR_SET_DUMPABLE, 0)",
             "prctl(PR_SET_DUMPABLE, 1)", (f"{CORNER}[kept1-True]",)),
    Mutation("executor: open files need no consent", f"{E}.guards", "    if not zygote.files_closed:\n        return (",
             "    if False:\n        return (",
             ("test_executor_sandbox.py::test_the_line_names_what_is_active_and_no_more",)),
    Mutation("executor: a missing protection means nothing", f"{E}.guards", "    if space:\n", "    if True:\n",
             ("test_executor_sandbox.py::test_what_a_missing_protection_means_is_said",)),
    Mutation("executor: killed by the machine is killed", f"{E}.zygote", "found.si_status == signal.SIGKILL",
             "found.si_status == 0", (f"{ROOM}a_child_that_the_machine_kills_runs_again_and_then_is_an_error",)),
    Mutation("executor: a machine that stood still timed out", f"{E}.zygote", "time.monotonic() > deadline + LATE_S",
             "False", (f"{ROOM}a_program_does_not_run_out_of_time_while_its_machine_stands_still",)),
    Mutation("executor: spares are capped call by call", f"{E}.pool",
             "held = sum(zygote.spares for zygote in _state.zygotes)", "held = 0",
             (f"{ROOM}spares_have_one_cap_over_calls_threads_and_kinds",)),
    Mutation("executor: all processes for children", f"{E}.room", "(self.processes + held) / 2",
             "(self.processes + held)", (f"{ROOM}room_is_what_the_tightest_cgroup_leaves",)),
    Mutation("executor: no second try for a thread", f"{E}.calls", "for last in (False, True):", "for last in (True,):",
             (f"{ROOM}what_cannot_be_made_is_tried_again_then_an_error_that_the_next_call_recovers_from",)),
    Mutation("executor: stopped children keep their memory", f"{E}.zygote", "usage.ru_maxrss > self.large", "False",
             (f"{ROOM}stopped_children_that_hold_megabytes_end_at_once",)),
    Mutation("executor: the host's signals", f"{E}.zygote", "    begin.own_signals()\n    try:", "    try:",
             ("test_executor_hosts.py::test_odd_host",)),
    Mutation("executor: orphans of a lost zygote stay", f"{E}.process", "        collect_orphans()\n", "",
             ("test_executor_hosts.py::test_process_1_collects_what_a_lost_zygote_leaves",)),
    Mutation("executor: the zygote's own main module", f"{E}.child", 'sys.modules["__main__"] = module', "pass",
             (f"{SCRIPTS}::test_scripts_do_what_this_python_does",)),
    Mutation("executor: a spare recurses one deeper", f"{E}.zygote", "{True: 7, ", "{True: 8, ",
             (f"{SCRIPTS}::test_scripts_do_what_this_python_does",)),
    Mutation("executor: requests stay in memory", f"{E}.wire", "memory.madvise(MADV_WIPEONFORK)", "pass",
             (f"{SCRIPTS}::test_no_program_finds_another_in_its_memory",)),
    Mutation("executor: one /dev/null for all", f"{E}.zygote", "null = os.open(os.devnull, os.O_RDWR)", "null = 1",
             (f"{SCRIPTS}::test_flags_of_open_files_are_each_childs_own",)),
    Mutation("executor: a forged text of any length", f"{E}.wire", "len(text) <= characters and", "True and",
             (f"{SCRIPTS}::test_a_forged_report_has_no_more_characters_than_an_honest_one",)),
    Mutation("executor: System V memory stays", f"{E}.sysv", "LIBC.shmctl(segment, IPC_RMID, None)", "pass",
             (f"{CORNER}[kept2-False]",)),
    Mutation("executor: megabytes are a program", f"{E}.calls", "> self.program_kb << 10", "> self.program_kb << 20",
             ("test_executor_strange.py::test_the_limit_is_of_bytes_and_can_be_set",)),
    Mutation("executor: a callback ends a worker", f"{E}.calls", "        setter(outcome)\n    except BaseException:",
             "        setter(outcome)\n    except ValueError:",
             ("test_executor_strange.py::test_a_callback_that_raises_is_printed_and_hurts_nobody",)),
    Mutation("no answer earns a tenth", "reft_jax.task.answers", "0.0 if value is None else 0.1", "0.1",
             ("test_answers.py",)),
    Mutation("a pickle may call anything", "reft_jax.model.torch_bin", "if (module, name) not in known:",
             "if module == 'torch':", ("test_torch_bin.py::test_nothing_of_a_file_is_run",)),
    Mutation("a tensor beyond its storage", "reft_jax.model.torch_bin", "if needed > room or", "if",
             ("test_torch_bin.py::test_a_damaged_file_is_one_line",)),
    Mutation("folder: true is a size", FIELDS, "type(value) is int and 1 <=", "isinstance(value, int) and 1 <=", READS),
    Mutation("folder: a word is a flag", FIELDS, "type(value) is bool)", "value is not None)", READS),
    Mutation("folder: NaN as an epsilon", CONFIG, "is_number(value) and 0 <= value <= 1)",
             "is_number(value) and not (value < 0 or value > 1))", READS),
    Mutation("folder: rope_parameters before rope_scaling", CONFIG, '("rope_scaling", "rope_parameters")',
             '("rope_parameters", "rope_scaling")', READS),
    Mutation("folder: another rope_theta ignored", CONFIG, "if any(value != theta for value in given.values()):",
             "if False:", READS),
    Mutation("folder: a window ignored", CONFIG,
             '"sliding_window attention_chunk_size', '"attention_chunk_size', READS),
    Mutation("folder: Gemma passes", CONFIG, "wrong = [name for name in GEMMA if name in raw]", "wrong = []", READS),
    Mutation("folder: original length inside only", CONFIG, "rope.setdefault(ORIGINAL", "rope.get(ORIGINAL", READS),
    Mutation("folder: tied matrices not compared", HF,
             "if not np.array_equal(embed, head, equal_nan=True):", "if False:", KINDS),
    Mutation("folder: a tied matrix under one name only", HF,
             "stored = stored | {_EMBED: stored[_HEAD]}", "pass", KINDS),
    Mutation("folder: a classifier as a policy", HF, 'elif _HEAD not in stored and "score.weight" in stored:',
             "elif False:", KINDS),
    Mutation("folder: a reward model as a reranker", HF, "if len(shape) != 2 or shape[0] != 2:", "if False:", KINDS),
    Mutation("folder: an adapter ignored", FOLDER, "        raise InputError(_adapter(folder))\n    stored",
             "        pass\n    stored", FILES),
    Mutation("folder: quantized by type only", FOLDER,
             "if odd_type or _QUANTIZED.search(name):", "if odd_type:", KINDS),
    Mutation("folder: names stay without model.", FOLDER, 'else f"model.{name}"', "else name", KINDS),
    Mutation("folder: tensors named in the file's order", FOLDER,
             "return dict(sorted(stored.items()))", "return stored", KINDS),
    Mutation("folder: masks of others count", FOLDER, r"|self_attn\.(masked_)?bias$", "", KINDS),
    Mutation("folder: an index's sub-folder forgotten", FOLDER, "merged[name].path != folder / file",
             "merged[name].path.name != file", FILES),
    Mutation("folder: null as a file of an index", FOLDER, "if not isinstance(file, str) or not file or", "if", FILES),
    Mutation("folder: bytes after the last tensor", FORMAT, "if size > end:", "if False:", FILES),
    Mutation("folder: tensors that overlap", FORMAT, "if tensor.start != end:", "if tensor.start > end:", FILES),
    Mutation("folder: a link to nothing is a missing file", FORMAT,
             "if os.path.islink(path) and", "if False and", FILES),
    Mutation("folder: what cannot be read is a crash", FORMAT, "except OSError as error:", "except EOFError as error:",
             FILES),
    Mutation("folder: a pointer of git-lfs", FORMAT, "if begin.startswith(LFS_POINTER):", "if False:", FILES),
    Mutation("sweep: a stage's reranker as a policy", "reft_jax.runs.sweep",
             'if path.name.startswith("rerank_") != reranker:', "if False:",
             ("test_sweep.py::test_a_stages_reranker_is_no_policy_and_a_policy_no_reranker",)),
]  # fmt: skip


class Planted(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module from a source in memory."""

    def __init__(self, module: str, source: str, path: Path):
        self.module, self.source, self.path = module, source, path

    def find_spec(self, fullname, path, target=None):
        return (
            importlib.util.spec_from_loader(fullname, self, origin=str(self.path)) if fullname == self.module else None
        )

    def get_filename(self, fullname):
        return str(self.path)

    def get_data(self, path):
        return self.source.encode()


def forget() -> None:
    """The next import of the package or of a test reads it anew. The heavy libraries stay."""
    for name in list(sys.modules):
        path = getattr(sys.modules[name], "__file__", None) or ""
        if name.partition(".")[0] == "reft_jax" or (TESTS in Path(path).parents and name != "__main__"):
            del sys.modules[name]


def failing(tests) -> tuple[int, str]:
    """pytest's exit code for these tests, and what it printed; stops at the first failure."""
    forget()
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *(str(TESTS / test) for test in tests)])
    return int(code), said.getvalue()


def failing_in_copy(tests, name: Path, mutated: str) -> tuple[int, str]:
    """`failing` in a copy of the repository where this file is another."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # tests run programs as another user
        copy = Path(folder)
        for part in ("reft_jax", "tests"):
            shutil.copytree(REPO / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPO / "pyproject.toml", copy)
        (copy / name).write_text(mutated)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
        command += [str(copy / "tests" / test) for test in tests]
        run = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        return run.returncode, run.stdout + run.stderr


def survives(mutation: Mutation) -> str:
    """'' if a test failed, else what happened instead."""
    path = REPO / (mutation.module.replace(".", "/") + ".py")
    source = path.read_text()
    if source.count(mutation.old) != 1:
        return f"its text stands {source.count(mutation.old)} times in {path.name}; bring tests/mutations.py up to date"
    mutated = source.replace(mutation.old, mutation.new)
    if mutation.module.startswith("reft_jax.executor."):
        code, said = failing_in_copy(mutation.tests, path.relative_to(REPO), mutated)
    else:
        planted = Planted(mutation.module, mutated, path)
        sys.meta_path.insert(0, planted)
        try:
            code, said = failing(mutation.tests)
        finally:
            sys.meta_path.remove(planted)
    if code == pytest.ExitCode.TESTS_FAILED:
        return ""
    return "NOT NOTICED" if code == pytest.ExitCode.OK else f"pytest ended with {code}: {said[-500:]}"


def main(wanted: str = "") -> int:
    sys.dont_write_bytecode = True
    chosen = [mutation for mutation in MUTATIONS if wanted in mutation.name]
    code, said = failing(dict.fromkeys(test for mutation in chosen for test in mutation.tests))
    if code:
        print(f"the tests fail as they are:\n{said}")
        return 1
    unnoticed = 0
    for mutation in chosen:
        started = time.monotonic()
        problem = survives(mutation)
        unnoticed += bool(problem)
        print(f"{time.monotonic() - started:5.1f} s  {mutation.name}: {problem or 'noticed'}", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} mutations noticed")
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

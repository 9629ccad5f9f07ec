"""The planner: its arithmetic by hand, its shapes compared with those of a run, and the command on a tiny model."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from tiny import HEADS, tiny_config, tiny_model

from reft_jax.config import check_config, load_config, replaced
from reft_jax.engine import slots as rollout
from reft_jax.model.llama import Llama
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.parallel.mesh import check_divides, make_mesh
from reft_jax.plan import chips
from reft_jax.plan import flops as cost
from reft_jax.plan import table as plan_table
from reft_jax.plan.functions import Jitted, RunFunctions, device_bytes
from reft_jax.plan.growth import grown, growth_row
from reft_jax.plan.hlo import Cost
from reft_jax.plan.plan import Measured, Plan, Planned, advice, estimated, planned
from reft_jax.plan.search import candidates
from reft_jax.plan.table import short, table, verdict, write_into
from reft_jax.toy.model import toy_config
from reft_jax.train.state import abstract_params
from reft_jax.types import InputError

REPO = Path(__file__).resolve().parent.parent
SEVEN = LlamaConfig.from_hf(json.loads((REPO / "configs/models/CodeLlama-7b-hf.json").read_text()), "7B")
CONFIG = check_config(load_config(str(REPO / "configs/gsm8k_codellama_7b_reft.py")))
CHIP = chips.Chip(flops=100.0, memory=1000.0, memory_rate=10.0, link_rate=5.0, clock=None)


def test_costs_on_paper_of_a_7b_model():
    assert cost.parameters(SEVEN) == 6_738_546_688  # as published
    assert cost.matrix_parameters(SEVEN) == 6_738_546_688 - 32016 * 4096 - 65 * 4096
    assert cost.forward_flops(SEVEN, 1, 10) - cost.trunk_flops(SEVEN, 1, 10) == 2 * 10 * 4096 * 32016
    # 32 layers, 32 heads of 128: the pairs of 100 tokens, two products of two FLOPs, half of them causal.
    pairs = cost.forward_flops(SEVEN, 3, 100) - 3 * 100 * 2 * cost.matrix_parameters(SEVEN)
    assert pairs == 3 * 32 * 2 * 2 * 32 * 128 * 100 * 100 / 2
    assert cost.cache_bytes(SEVEN, 1, 1, 2) == 512 * 1024


def test_the_roofline_by_hand():
    """A ring of 5 + 5 bytes per second: 80 bytes over 4 chips take 6 s, a sum twice that; a hop takes a microsecond."""
    gather, total = {("all-gather", 4): (1, 80)}, {("all-reduce", 4): (1, 80)}
    assert chips.network_seconds(CHIP, gather) == pytest.approx(6)
    assert chips.network_seconds(CHIP, total) == pytest.approx(12)
    assert chips.network_seconds(CHIP, {("all-reduce", 8): (1000, 0)}) == pytest.approx(1000 * 2 * 4e-6)
    assert chips.network_seconds(CHIP, {("collective-permute", 2): (2, 50)}) == pytest.approx(10)
    both = chips.seconds(CHIP, Cost(200, 50, 0, gather))
    assert both == (2, 5, pytest.approx(6))
    assert both.best == pytest.approx(6) and both.estimate == pytest.approx(5 + 6)


def made_up(name="PPO update", peak=600, temporaries=300, beside=("reference",), calls=2) -> Planned:
    function = Jitted(name, "", None, {}, 1, calls, 100, 10, beside)
    measured = Measured(1.0, peak - temporaries, temporaries, peak, Cost(200, 50, 0, {}), "")
    return planned(function, measured, {"reference": 250, "slots": 700}, CHIP)


def plan_of(*lines) -> Plan:
    return estimated("v5e:1x2", 2, CHIP, list(lines), {"reference": 250, "slots": 700})


def test_what_lies_beside_a_program_counts_and_a_tenth_must_be_to_spare():
    fits = plan_of(made_up(), made_up("score, policy", 200, 50, ()))
    assert fits.largest.resident == 850 and fits.fits
    assert "15% to spare" in verdict(fits)
    too_large = plan_of(made_up(peak=651, temporaries=400))
    assert not too_large.fits
    assert "Does not fit" in verdict(too_large) and "micro_batch" in verdict(too_large)
    full = plan_of(made_up("decode, PPO", 300, 10, ("slots",)))
    assert not full.fits and "engine.slots" in " ".join(advice(full))


def test_an_iteration_is_its_parts_and_mfu_is_against_the_peak_of_all_chips():
    """2 · 5 s and 4 · 5 s, limited by memory, for 2 · 100 and 4 · 100 FLOPs on two chips of 100 FLOPs per second."""
    plan = plan_of(made_up(), made_up("score, policy", calls=4), made_up("SFT update", calls=0))
    assert plan.iteration == {"PPO update": 10, "score, policy": 20}
    assert plan.seconds == 30 and plan.cost == 60
    assert plan.update_mfu == pytest.approx(2 * 100 / 200 / 10) and plan.mfu == pytest.approx(6 * 100 / 200 / 30)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 1, 3), r"mesh.tensor=3 does not divide dimension 0 \(vocab, 61\) of lm.embed \[61, 24\]"),
        ((1, 5, 1), r"mesh.fsdp=5 does not divide dimension 1 \(embed, 24\) of lm.embed"),
        ((1, 1, 61), r"mesh.tensor=61 does not divide dimension 1 \(mlp, 40\) of lm.layers.down \[2, 40, 24\]"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_named_with_the_tensor(sizes, message):
    boxed = abstract_params(Llama(tiny_config()), HEADS["value_head"], "value_head")
    with pytest.raises(InputError, match=message):
        check_divides(AbstractMesh(sizes, ("data", "fsdp", "tensor")), boxed)
    check_divides(AbstractMesh((7, 1, 1), ("data", "fsdp", "tensor")), boxed)


def test_the_planned_arrays_are_those_of_a_run():
    model, lm = tiny_model()
    config = load_config(str(REPO / "configs" / "quickstart.py"))
    config.model.dtype = "float32"
    functions = RunFunctions(check_config(config), model, make_mesh(1, 1, 1))
    longer = config.rl.copy_and_resolve_references()
    longer.max_len = 160  # rows end within a block of keys
    slots = functions.slots(None, longer)
    assert slots.tokens.shape[1] == 160
    assert {(layer.k.size, layer.length) for layer in slots.cache} == {(slots.cache[0].v.size, 192)}

    def kinds(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    weights = rollout.rollout_weights(functions.engine.model, lm)
    assert kinds(weights) == kinds(functions.weights)
    prefix = jax.eval_shape(
        lambda *xs: rollout.prefill(functions.engine.model, *xs), weights, *functions.prompts(config.rl)
    )
    assert kinds(prefix) == kinds(functions.prefix)
    assert functions.residents["reference"] == sum(x.nbytes for x in jax.tree.leaves(lm))
    assert functions.residents["policy and moments"] == 3 * (functions.residents["reference"] + 4 * 25) + 4 * 3
    assert device_bytes(jax.ShapeDtypeStruct((3, 5), jnp.bfloat16)) == 30
    names = [one.name for one in functions.all]
    assert len(names) == len(set(names)) == 10
    assert {one.name: one.trips for one in functions.all}["PPO update"] == {"micro_batches": 4, "decisions": 8}


def test_longer_lines_hold_several_rows():
    """Two rows of 128 tokens in a line of 256: half as many micro-batches, the same products, longer attention."""
    model, _ = tiny_model()
    config = check_config(load_config(str(REPO / "configs" / "quickstart.py")))
    configs = config, replaced(config, {"data.line_len": 256})
    plain, longer = (
        {one.name: one for one in RunFunctions(one, model, make_mesh(1, 1, 1)).all if "lines" in one.shape}
        for one in configs
    )
    assert plain["PPO update"].shape == "4 × 16 lines of 128" and longer["PPO update"].shape == "2 × 16 lines of 256"
    for name in ("PPO update", "score, policy", "score, reference"):
        assert longer[name].trips["micro_batches"] == plain[name].trips["micro_batches"] / 2
        assert plain[name].flops < longer[name].flops < 1.5 * plain[name].flops


def test_what_an_algorithm_does_without_is_not_planned():
    """GRPO without a KL penalty: no value head in the state, no reference, no pass under it; rows are all samples."""
    model, lm = tiny_model()
    config = load_config(str(REPO / "configs" / "quickstart.py"))
    config.model.dtype = "float32"
    config.rl.update(algorithm="grpo", kl_coef=0.0, questions=16)
    functions, policy = (
        RunFunctions(check_config(config), model, make_mesh(1, 1, 1)),
        sum(x.nbytes for x in jax.tree.leaves(lm)),
    )
    assert functions.residents["policy and moments"] == 3 * policy + 4 * 3 and functions.residents["reference"] == 0
    calls = {one.name: (one.shape, one.calls) for one in functions.all}
    assert "score, reference" not in calls
    assert calls["score, policy"][0] == "8 × 16 lines of 128" and calls["PPO update"] == ("4 × 16 lines of 128", 4)
    assert calls["prefill"] == ("8 prompts of 96", 2) and calls["decode, PPO"] == ("128 slots of 128", 32)
    with_reference = RunFunctions(
        check_config(replaced(check_config(config), {"rl.kl_coef": 0.1})), model, make_mesh(1, 1, 1)
    )
    assert with_reference.residents["reference"] == policy


def test_a_search_counts_all_samples_and_no_reference_that_is_not_there():
    """GRPO with as many rows as PPO has: without a reference it needs less, and its micro-batches hold whole rows."""
    grpo = {"rl.algorithm": "grpo", "rl.questions": CONFIG.rl.questions // 8, "rl.samples": 0, "rl.kl_coef": 0.0}
    ours, theirs = (candidates(one, SEVEN, ["v5e:4x8"]) for one in (replaced(CONFIG, grpo), CONFIG))
    memory, with_reference = ({one[2:6]: one.memory for one in found} for found in (ours, theirs))
    assert memory.keys() == with_reference.keys() and all(memory[one] <= with_reference[one] for one in memory)
    assert sum(memory.values()) < 0.95 * sum(with_reference.values())
    changed = ours[0].apply(replaced(CONFIG, grpo))
    assert changed.rl.samples == 8 and CONFIG.rl.questions % changed.rl.micro_batch == 0


def test_a_search_ranks_what_divides():
    found = candidates(CONFIG, SEVEN, ["v5e:4x8"])
    assert found[0].memory < 0.9 * 16 * 2**30
    memory = {(one.fsdp, one.tensor, one.micro_batches, one.remat): one.memory for one in found}
    assert memory[4, 8, 1, "full"] < memory[2, 8, 1, "full"]  # half of the state a chip
    assert memory[4, 8, 2, "full"] < memory[4, 8, 1, "dots"]
    for one in found:
        assert 32016 % one.tensor == 0 and 32 % (32 // one.tensor) == 0
        changed = one.apply(CONFIG)
        assert changed.mesh.fsdp == one.fsdp and changed.rl.micro_batch % (32 // one.tensor) == 0
    with pytest.raises(InputError, match="no mesh divides"):
        candidates(CONFIG, tiny_config(hidden_size=25, head_dim=8, vocab_size=61), ["v5e:4x8"])
    with pytest.raises(InputError, match="names no known chip"):
        candidates(CONFIG, SEVEN, ["v3:4x8"])


def test_a_search_compiles_three_and_chooses_the_cheapest_that_fits(tmp_path, monkeypatch, capsys):
    """The second takes two calls of 5 s; the first one more of them; the third does not fit, though it takes one."""
    path, best = tmp_path / "pods.md", candidates(CONFIG, SEVEN, ["v5e:4x8"])[:3]
    path.write_text("<!-- plan gsm8k_codellama_7b_reft search -->\n<!-- end -->\n")
    made = [plan_of(made_up(calls=3)), plan_of(made_up(calls=2)), plan_of(made_up(peak=651, temporaries=400, calls=1))]
    compiled = []

    def make_plan(config, shapes, topology, cache, say):
        compiled.append((config.mesh.fsdp, config.rl.micro_batch, config.model.remat))
        return made[len(compiled) - 1]

    monkeypatch.setattr(plan_table, "make_plan", make_plan)
    monkeypatch.setattr(plan_table, "report", lambda plan, *_: f"the plan of {plan.seconds:.0f} seconds")
    fields = {"grow": 0, "search": True, "json": False, "cache": "", "into": str(path), "questions": 7473}
    source = str(REPO / "configs/gsm8k_codellama_7b_reft.py")
    fits = plan_table.run_plan(CONFIG, SimpleNamespace(config=source, topology=["v5e:4x8"], **fields))
    assert fits and compiled == [(one.fsdp, 32 // one.micro_batches, one.remat) for one in best]
    chosen = f"Chosen: v5e:4x8, {best[1].chips // best[1].fsdp // best[1].tensor} × {best[1].fsdp} × {best[1].tensor}"
    for text in (path.read_text(), capsys.readouterr().out):
        assert chosen in text and "the plan of 10 seconds" in text
    assert path.read_text().count("| v5e:4x8 |") == 12 + 3


def test_batches_grow_with_the_chips():
    double = grown(CONFIG, "v5e:8x8", 32)
    assert (double.rl.questions, double.sft.micro_batch, double.engine.slots, double.mesh.fsdp) == (64, 96, 256, 8)
    half = grown(CONFIG, "v5e:4x4", 32)
    assert (half.rerank.batch_size, half.mesh.fsdp, half.mesh.tensor) == (12, 2, 8)
    with pytest.raises(InputError, match="mesh.fsdp=4 on 32 chips does not give a whole number on v5e:2x2"):
        grown(CONFIG, "v5e:2x2", 32)
    line = made_up()
    cost = line.measured.cost._replace(collectives={("all-gather", 4): (1, 80), ("all-reduce", 2): (1, 8)})
    line = line._replace(measured=line.measured._replace(cost=cost))
    row = growth_row(plan_of(line, made_up("decode, PPO")), CONFIG)
    assert row[-1] == "all-gather of 4 in PPO update, 60%"  # 2 · 6 s of 20 s: those of the line were made without it


def test_tables_go_between_their_marks(tmp_path):
    path = tmp_path / "pods.md"
    path.write_text("before\n<!-- plan a v5e:4x8 -->\nold\n<!-- end -->\nafter\n<!-- plan b -->\n<!-- end -->\n")
    write_into(path, "a v5e:4x8", table(["x", "y"], [["one", "2"]]))
    assert path.read_text() == (
        "before\n<!-- plan a v5e:4x8 -->\n| x   |  y |\n| --- | -: |\n| one |  2 |\n<!-- end -->\nafter\n"
        "<!-- plan b -->\n<!-- end -->\n"
    )
    with pytest.raises(InputError, match="has no lines"):
        write_into(path, "c", "")
    assert (
        short("configs/a.py") == "a"
        and short("configs/gsm8k_pods.py:Qwen2.5-Coder-7B") == "gsm8k_pods:Qwen2.5-Coder-7B"
    )


def test_the_command_plans_the_toy_with_the_tpu_compiler(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no TPU compiler: pip install -e .[plan]")
    command = [sys.executable, "-m", "reft_jax", "plan", f"--config={REPO}/configs/quickstart.py", "--json"]
    command += ["--config.mesh.data=2", "--config.mesh.tensor=2", "--config.toy.layers=2", f"--cache={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), *sys.path])}

    def plan(*more: str):
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    code, out, err = plan("--topology=v5e:2x2")
    assert code == 0, err
    first = json.loads(out)
    assert first["chips"] == 4 and first["fits"] and len(first["programs"]) == 10
    config = load_config(f"{REPO}/configs/quickstart.py")
    config.toy.layers = 2
    shapes = toy_config(config, config.toy.vocab_size)
    in_layers = cost.trunk_flops(shapes, 1, 128) / cost.forward_flops(shapes, 1, 128)
    full = (8 * in_layers + 6 * (1 - in_layers)) / 6  # of `full` remat: eight products a layer for the mathematics' six
    in_attention = 1 - cost.decode_flops(shapes, 1, 0) / cost.decode_flops(shapes, 1, 128)
    padded = 1 + 7 * in_attention  # eight query rows for one in both products; the compiler drops them in the second
    expected = {"SFT update": (full, 1.45), "PPO update": (full, 1.45), "decode, PPO": (1 + 3 * in_attention, padded)}
    for name, (least, most) in expected.items():
        one = first["programs"][name]
        ratio = 4 * one["cost"]["flops"] / one["model_flops"] / one["once"]
        assert least <= ratio <= most, name
    groups = {group for one in first["programs"].values() for _, group, _, _ in one["cost"]["collectives"]}
    assert groups == {2, 4}  # 4: the gradient of a norm, whose rows lie over fsdp and positions over tensor
    assert all(one["cost"]["bytes"] > 0 and one["problem"] == "" for one in first["programs"].values())
    again = json.loads(plan("--topology=v5e:2x2")[1])
    assert again == first  # compile seconds included: nothing was compiled

    nowhere = tmp_path / "pods.md"
    code, _, err = plan("--topology=v5e:2x2", "--config.toy.layers=3", f"--into={nowhere}")
    assert code == 2 and str(nowhere) in err and "compiled" not in err  # before anything is compiled
    code, _, err = plan("--topology=v5e:2x3")
    assert code == 2 and "--topology" in err
    code, _, err = plan("--topology=v5e:2x2", "--config.mesh.tensor=4", "--config.toy.heads=2")
    assert code == 2 and "does not make 4 devices" in err

"""The counter of compiled functions: on functions whose FLOPs are known by hand, and on text of the TPU compiler."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from reft_jax.model.llama import Block, rms_norm, rope_tables
from reft_jax.plan import flops as cost
from reft_jax.plan.hlo import LoopError, count, run

X, W = jnp.ones((8, 16)), jnp.ones((3, 16, 16))


def text_of(function, *args) -> str:
    return jax.jit(function).lower(*args).compile().as_text()


def scanned(x, ws):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]


def nested(x, ws):
    """Five times: the three products of `scanned` and one of [16,8] by [8,16]."""

    def outer(x, _):
        x = scanned(x, ws)
        return x @ (x.T @ x), None

    return jax.lax.scan(outer, x, None, length=5)[0]


@pytest.mark.parametrize("told", [True, False], ids=["trip counts in the text", "read from the conditions"])
@pytest.mark.parametrize(
    ("function", "flops"),
    [(scanned, 3 * 2 * 8 * 16 * 16), (nested, 5 * (3 * 2 * 8 * 16 * 16 + 2 * 16 * 8 * 16 + 2 * 8 * 16 * 16))],
)
def test_a_scan_of_products_is_counted_as_often_as_it_runs(function, flops, told):
    text = text_of(function, X, W)
    assert '"known_trip_count"' in text
    if not told:  # as a TPU's compiler leaves it
        text = text.replace('"known_trip_count"', '"unknown"')
    assert count(text).flops == flops


def test_a_gradient_is_counted_too():
    """Backwards: two products for each one forwards, but none for the first input."""
    text = text_of(jax.grad(lambda ws: scanned(X, ws).sum()), W)
    assert count(text).flops == pytest.approx(3 * 3 * 2 * 8 * 16 * 16, rel=0.12)


def test_a_loop_of_unknown_length_is_counted_only_when_it_is_named():
    def some(x, n):
        with jax.named_scope("rounds"):
            return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ W[0]), x)

    text = text_of(some, X, 7)
    with pytest.raises(LoopError, match="rounds/while"):
        count(text)
    assert count(text, {"rounds": 7}).flops == 7 * 2 * 8 * 16 * 16
    assert count(text, {"rounds": 2}).bytes < count(text, {"rounds": 7}).bytes


def test_the_dearest_branch_of_a_conditional_counts():
    def either(x, flag):
        return jax.lax.cond(flag, lambda x: jnp.tanh(x @ W[0]) @ W[1], lambda x: x @ W[2], x)

    assert count(text_of(either, X, True)).flops == 2 * 2 * 8 * 16 * 16


def test_a_scanned_model_costs_what_the_unrolled_one_does():
    """Forward and backward, within 2 %, and what the mathematics needs: here attention computes all pairs."""
    model, params = tiny_model(hidden_size=64, intermediate_size=96, vocab_size=64)
    tokens, probe = np.zeros((4, 32), np.int32), np.random.default_rng(0).normal(size=(4, 32, 64)).astype(np.float32)

    def unrolled(params, tokens):
        index = jnp.arange(tokens.shape[1])
        mask, tables = (index[:, None] >= index[None])[None], rope_tables(model.config, index[None])
        x = params["embed"][tokens]
        for layer in range(2):
            own = jax.tree.map(lambda w, layer=layer: w[layer], params["layers"])
            x, _ = Block(model.config, model.dtype).apply({"params": own}, x, tables, mask)
        return (probe * rms_norm(x, params["final_norm"], 1e-5)).sum()

    def whole(params, tokens):
        return (probe * model.apply({"params": params}, tokens, method="hidden")).sum()

    for transformed, factor in ((lambda f: f, 1), (jax.grad, 3)):
        flops = [count(text_of(transformed(function), params, tokens)).flops for function in (whole, unrolled)]
        assert flops[0] == pytest.approx(flops[1], rel=0.02)
        head, pairs = 2 * 64 * 64 * 4 * 32, 2 * 2 * 4 * 8 * 32**2 * 4
        assert flops[0] == pytest.approx(factor * (cost.forward_flops(model.config, 4, 32) - head + pairs), rel=0.02)


def test_reading_a_slice_and_writing_one_do_not_count_the_whole():
    """On one row of a large array, in a loop: bytes grow with the turns by rows, not by arrays."""

    def turns(n, big, row):
        def one(i, big):
            old = jax.lax.dynamic_slice_in_dim(big, i, 1)
            return jax.lax.dynamic_update_slice_in_dim(big, old + row, i + 1, 0)

        return jax.lax.fori_loop(0, n, one, big)

    big, row = jnp.zeros((1000, 256)), jnp.ones((1, 256))
    few, many = (count(text_of(functools.partial(turns, n), big, row)).bytes for n in (10, 110))
    assert 2 * 1024 <= (many - few) / 100 <= 6 * 1024  # read, added, written: a row is 1,024 bytes, the array 1,024,000


# What follows is in the words of a TPU's compiler.

HEADER = "HloModule m, is_scheduled=true\n\n"


def entry(*lines: str) -> str:
    return HEADER + "ENTRY %main (p: f32[]) -> f32[] {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


def loop(first: str, step: str) -> str:
    """A product of 2 × 8 by 8 × 8 in every turn of `for (i = first; i < 8; i += step)`."""
    shapes = "(s32[], f32[2,8], f32[8,8], s32[])"
    return (
        HEADER
        + f"""%more (i: s32[], by: s32[]) -> s32[] {{
  %i = s32[] parameter(0)
  %by = s32[] parameter(1)
  ROOT %sum = s32[] add(%i, %by)
}}

%body (p: {shapes}) -> {shapes} {{
  %p = {shapes} parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %x = f32[2,8] get-tuple-element(%p), index=1
  %w = f32[8,8] get-tuple-element(%p), index=2
  %limit = s32[] get-tuple-element(%p), index=3
  %step = s32[] {step}
  %next = s32[] fusion(%n, %step), kind=kLoop, calls=%more
  %y = f32[2,8] dot(%x, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %t = {shapes} tuple(%next, %y, %w, %limit)
}}

%cond (p: {shapes}) -> pred[] {{
  %p = {shapes} parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %limit = s32[] get-tuple-element(%p), index=3
  ROOT %less = pred[] compare(%n, %limit), direction=LT
}}

"""
        + entry(
            f"%first = s32[] {first}",
            "%copied = s32[] copy(%first)",
            "%x = f32[2,8] parameter(0)",
            "%w = f32[8,8] parameter(1)",
            "%limit = s32[] constant(8)",
            f"%t = {shapes} tuple(%copied, %x, %w, %limit)",
            f"ROOT %l = {shapes} while(%t), condition=%cond, body=%body",
        ).removeprefix(HEADER)
    )


@pytest.mark.parametrize(("first", "step", "turns"), [(0, 1, 8), (0, 2, 4), (1, 2, 4), (2, 4, 2), (1, 3, 3), (9, 1, 0)])
def test_a_loop_turns_as_often_as_its_counter_says(first, step, turns):
    assert count(loop(f"constant({first})", f"constant({step})")).flops == turns * 2 * 2 * 8 * 8


@pytest.mark.parametrize(
    ("first", "step"), [("parameter(2)", "constant(1)"), ("constant(0)", "negate(%n)"), ("constant(0)", "constant(0)")]
)
def test_a_loop_whose_counter_says_nothing_is_an_error(first, step):
    with pytest.raises(LoopError, match="name it in trips"):
        count(loop(first, step))


@pytest.mark.parametrize(
    ("groups", "number"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4,'axis_2'=3] {'axis_0','axis_1'}", 8),
        ("source_target_pairs={{0,1},{1,0}}", 2),
    ],
)
def test_who_takes_part_in_a_collective(groups, number):
    text = entry(
        "%p = bf16[2,64]{1,0:T(8,128)(2,1)} parameter(0)",
        f"ROOT %g = bf16[8,64]{{1,0:T(8,128)(2,1)}} all-gather(%p), channel_id=1, {groups}, dimensions={{0}}",
    )
    assert count(text).collectives == {("all-gather", number): (1, 8 * 64 * 2)}


def test_a_collective_beside_other_work_is_counted_once():
    text = entry(
        "%p = f32[64]{0:T(128)} parameter(0)",
        "%s = (f32[64]{0:T(128)}, f32[16]{0:T(128)}) reduce-scatter-start(%p), replica_groups=[1,4]<=[4]",
        "ROOT %d = f32[16]{0:T(128)} reduce-scatter-done(%s)",
    )
    assert count(text).collectives == {("reduce-scatter", 4): (1, 256)}


def test_a_collective_in_parts_inside_other_work_is_counted_once():
    part = """%part{n} (p: f32[16]) -> f32[64] {{
  %p{n} = f32[16]{{0}} parameter(0)
  ROOT %g{n} = f32[64]{{0}} all-gather(%p{n}), channel_id=7, replica_groups=[1,4]<=[4], dimensions={{0}}
}}

"""
    text = entry(
        "%a = f32[16]{0} parameter(0)",
        "%one = f32[64]{0} fusion(%a), kind=kCustom, calls=%part1",
        "ROOT %two = f32[64]{0} fusion(%a), kind=kOutput, calls=%part2",
    )
    text = HEADER + part.format(n=1) + part.format(n=2) + text.removeprefix(HEADER)
    assert count(text).collectives == {("all-gather", 4): (1, 256)}


@pytest.mark.parametrize(
    ("left", "right", "out", "labels", "flops"),
    [
        # A plain product, 128×1024 by 1024×256.
        ("128,1024", "1024,256", "128,256", "dim_labels=bf_io->bf", 2 * 128 * 1024 * 256),
        # Sixteen products of 4×8 by 8×32, batched: the window of 16 meets each batch entry once.
        (
            "16,4,8",
            "16,8,32",
            "16,4,32",
            "window={size=16 stride=15 pad=0_0 lhs_dilate=16}, dim_labels=0bf_0io->0bf",
            16 * 2 * 4 * 8 * 32,
        ),
        # A real convolution of width 3, padded by one on both sides: 10 outputs, the outer two meet two inputs.
        ("1,10,5", "3,5,7", "1,10,7", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 28 * 5 * 7),
    ],
)
def test_convolutions_that_are_products(left, right, out, labels, flops):
    text = entry(
        f"%a = bf16[{left}] parameter(0)",
        f"%b = bf16[{right}] parameter(1)",
        f"ROOT %c = f32[{out}] convolution(%a, %b), {labels}",
    )
    assert count(text).flops == flops


def test_only_main_memory_counts_with_the_padding_of_its_tiles():
    """[6,100] of bfloat16 in tiles of 8×128 is 2,048 bytes; S(1) is a memory of the chip."""
    text = entry(
        "%p = bf16[6,100]{1,0:T(8,128)(2,1)} parameter(0)",
        "%s = (bf16[6,100]{1,0:T(8,128)(2,1)S(1)}, bf16[6,100]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%p)",
        "%d = bf16[6,100]{1,0:T(8,128)(2,1)S(1)} copy-done(%s)",
        "%e = bf16[6,100]{1,0:T(8,128)(2,1)S(1)} negate(%d)",
        'ROOT %c = bf16[6,100]{0,1:T(8,128)(2,1)} copy(%e), backend_config={"estimated_cycles":"70"}',
    )
    works = {work.instruction.name: work for work in run(text, {})}
    assert (works["s"].read, works["s"].written) == (2048, 0)
    assert (works["e"].read, works["e"].written) == (0, 0)
    assert (works["c"].read, works["c"].written) == (0, 104 * 128 * 2)  # the other way round, 100 pads to 104
    assert count(text).bytes == 2048 + 104 * 128 * 2 and count(text).cycles == 70


def test_cycles_are_divided_by_what_they_are_spent_on():
    """By the scope, forwards and backwards; without one, products and the rest. Names that begin alike are not it."""

    def line(name, scope, cycles, op="negate(%p)"):
        about = f'metadata={{op_name="{scope}"}}, backend_config={{"estimated_cycles":"{cycles}"}}'
        return f"%{name} = f32[8,8] {op}, {about}"

    product = "dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    text = entry(
        "%p = f32[8,8] parameter(0)",
        line("a", "jit(f)/attention/dot_general", 1, product),
        line("b", "jit(f)/transpose(jvp(attention))/add", 2),
        line("c", "jit(f)/attention_norm/rsqrt", 4),
        line("d", "jit(f)/dot_general", 8, product),
        line("e", "jit(f)/micro_batches/while/body/loss/exp", 16),
        line("f", "jit(f)/draw/max", 32),
        line("g", "jit(f)/cache/copy", 64),
        "ROOT " + line("h", "jit(f)/optimizer/mul", 128),
    )
    kinds = {"attention": 3, "rest": 4, "products": 8, "loss": 16, "draw": 32, "cache": 64, "optimizer": 128}
    assert count(text).kinds == kinds and count(text).cycles == 255


def test_a_fusion_reads_what_it_slices_and_writes_what_it_updates():
    text = (
        HEADER
        + """%inner (q: f32[512,128]) -> f32[1,128] {
  %q = f32[512,128]{1,0} parameter(0)
  %z = s32[] constant(0)
  ROOT %slice = f32[1,128]{1,0} dynamic-slice(%q, %z, %z), dynamic_slice_sizes={1,128}
}

%outer (p: f32[512,128], old: f32[64,128], at: s32[]) -> f32[64,128] {
  %p = f32[512,128]{1,0} parameter(0)
  %old = f32[64,128]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %row = f32[1,128]{1,0} fusion(%p), kind=kLoop, calls=%inner
  ROOT %new = f32[64,128]{1,0} dynamic-update-slice(%old, %row, %at, %at)
}

"""
        + entry(
            "%a = f32[512,128]{1,0} parameter(0)",
            "%b = f32[64,128]{1,0} parameter(1)",
            "%i = s32[] parameter(2)",
            "ROOT %f = f32[64,128]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%outer",
        ).removeprefix(HEADER)
    )
    (work,) = run(text, {})
    assert (work.read, work.written) == (512 + 4, 512)
    renamed = text.replace("ROOT %new = ", "%new = ").replace(
        "%at, %at)\n", "%at, %at)\n  ROOT %b = f32[64,128]{1,0} bitcast(%new)\n"
    )
    assert (run(renamed, {})[0].read, run(renamed, {})[0].written) == (512 + 4, 512)
    whole = re.sub(r"dynamic-slice\(%q, %z, %z\), dynamic_slice_sizes=\{1,128\}", "custom-call(%q)", text)
    assert run(whole, {})[0].read == 512 * 512 + 4


def test_what_a_fusion_inside_a_fusion_only_renames_is_read_by_who_uses_it():
    text = (
        HEADER
        + """%rename (q: f32[512,128]) -> f32[65536] {
  %q = f32[512,128]{1,0} parameter(0)
  ROOT %b = f32[65536]{0} bitcast(%q)
}

%outer (p: f32[512,128]) -> f32[65536] {
  %p = f32[512,128]{1,0} parameter(0)
  %flat = f32[65536]{0} fusion(%p), kind=kLoop, calls=%rename
  ROOT %n = f32[65536]{0} negate(%flat)
}

"""
        + entry(
            "%a = f32[512,128]{1,0} parameter(0)", "ROOT %f = f32[65536]{0} fusion(%a), kind=kLoop, calls=%outer"
        ).removeprefix(HEADER)
    )
    (work,) = run(text, {})
    assert (work.read, work.written) == (512 * 512, 512 * 512)

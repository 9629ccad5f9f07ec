"""Prints a plan as Markdown tables, aligned so that they can also be read in a terminal."""

import json
import re
import sys
from pathlib import Path

from reft_jax.plan.growth import HEAD, grown, growth_row
from reft_jax.plan.hlo import KINDS
from reft_jax.plan.plan import SPARE, Plan, Planned, advice, as_json, make_plan, shapes_of
from reft_jax.plan.search import COMPILED, candidates, words
from reft_jax.store import write_whole
from reft_jax.types import InputError

GIB = 2**30
SHOWN = 12  # candidates of a search that are printed


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with its first column aligned left and the others right."""
    widths = [max(2, *(len(row[i]) for row in [head, *rows])) for i in range(len(head))]

    def line(row):
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(cells) + " |"

    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([line(head), rule, *map(line, rows)])


def short(config: str) -> str:
    """The flag `--config`, FOLDER/NAME.py:ARGUMENT, as the marks of a file have it: NAME:ARGUMENT."""
    path, colon, argument = config.partition(":")
    return Path(path).stem + colon + argument


def run_plan(config, values) -> bool:
    """The `plan` command: prints the plan that the flags `values` ask for; returns whether the run fits."""
    shapes, source = shapes_of(config, Path(values.config.partition(":")[0]))
    kind = "growth" if values.grow else "search" if values.search else values.topology[0]
    name, to_people = f"{short(values.config)} {kind}", sys.stderr if values.json else sys.stdout
    if values.into:
        _marked(Path(values.into), name)  # before anything is compiled

    def say(said: str) -> None:
        print(said, file=to_people, flush=True)

    def planned(config, topology: str) -> Plan:
        mesh = config.mesh
        say(f"{source} on {topology}, mesh data {mesh.data}, fsdp {mesh.fsdp}, tensor {mesh.tensor}")
        plan = make_plan(config, shapes, topology, Path(values.cache), lambda said: say("  " + said))
        say("  " + verdict(plan))
        return plan

    if values.grow:
        configs = [(topology, grown(config, topology, values.grow)) for topology in values.topology]
        plans = [(planned(one, topology), one) for topology, one in configs]
        text = table(HEAD, [growth_row(plan, one) for plan, one in plans])
        if values.into:
            write_into(Path(values.into), name, text)
        print("\n" + plain(text))
        return all(plan.fits for plan, _ in plans)
    if values.search:
        found = candidates(config, shapes, values.topology)
        head = ["pod", "data × fsdp × tensor", "micro-batches", "remat", "GiB per chip", "seconds"]
        on_paper = "The best by arithmetic:\n\n" + table(head, [words(one) for one in found[:SHOWN]])
        say(f"{plain(on_paper)}\n")
        best = [(one.apply(config), one) for one in found[:COMPILED]]
        plans = [(planned(changed, one.topology), one) for changed, one in best]
        # The one with the fewest chip-seconds of those that fit; if none fits, the one that needs least memory.
        plan, one = min(plans, key=lambda p: (not p[0].fits, p[0].cost if p[0].fits else p[0].largest.resident))
        rows = [words(one)[:4] + [f"{plan.largest.resident / GIB:.1f}", f"{plan.seconds:.2f}"] for plan, one in plans]
        compiled = f"The first {len(plans)}, compiled:\n\n{table(head, rows)}\n\nChosen: {', '.join(words(one)[:4])}"
        say(f"{plain(compiled)}\n")
        topology, searched = one.topology, [on_paper, compiled]
    else:
        (topology,), searched = values.topology, []
        plan = planned(config, topology)
    text = report(plan, f"{config.name} on {topology}", values.questions, config.rl.questions)
    if values.into:
        write_into(Path(values.into), name, "\n\n".join([*searched, text]))
    if values.json:
        print(json.dumps(to_json(plan, values.questions, config.rl.questions), indent=1))
    else:
        print("\n" + plain(text))
    return plan.fits


def report(plan: Plan, title: str, questions: int, prompts: int) -> str:
    """The whole plan in Markdown. questions: of an epoch. prompts: questions of an iteration."""
    return "\n\n".join(
        [
            f"**{title}**",
            verdict(plan),
            "GiB per chip:",
            memory_table(plan),
            "Work of one chip for one call (for one decode step, not a chunk of them); milliseconds by the roofline:",
            work_table(plan),
            *kinds_table(plan),
            collectives_table(plan),
            "One PPO iteration, with every row as long as the config allows:",
            iteration_table(plan),
            cost_line(plan, questions, prompts),
        ]
    )


def verdict(plan: Plan) -> str:
    """One line: whether the run fits, and if not, what to change."""
    most, memory = plan.largest, plan.chip.memory
    compiled = sum(line.measured.compile_seconds for line in plan.lines)
    need = f"{most.resident / GIB:.1f} of {memory / GIB:.0f} GiB at most ({most.function.name})"
    if plan.fits:
        return f"Fits: {need}, {1 - most.resident / memory:.0%} to spare. Compiled in {compiled:.0f} s."
    said = "; ".join(advice(plan))
    return f"Does not fit: {need}, and {SPARE:.0%} must stay free. What to change: {said}."


def memory_table(plan: Plan) -> str:
    rows = []
    for line in plan.lines:
        m, beside = line.measured, line.resident - line.measured.peak
        sizes = (m.arguments, m.temporaries, m.peak, beside, line.resident)
        words = ", ".join(line.function.beside) or "-"
        rows.append([line.function.name, line.function.shape, *(f"{size / GIB:.2f}" for size in sizes), words])
    head = ["function", "shape", "arguments", "temporary", "peak", "else", "total", "what else is in memory"]
    return table(head, rows)


def work_table(plan: Plan) -> str:
    rows = []
    for line in plan.lines:
        f, cost = line.function, line.measured.cost
        flops, moved = cost.flops / f.once, cost.bytes / f.once
        rows.append(
            [
                f.name,
                f"{flops / 1e12:.3g}",
                f"{flops * plan.devices / f.flops:.2f}" if f.flops else "-",
                f"{moved / GIB:.3g}",
                f"{moved / f.least:.2f}",
                *(f"{1e3 * part:.3g}" for part in line.seconds),
                f"{1e3 * line.seconds.estimate:.3g}",
                f"{1e3 * cost.cycles / f.once / plan.chip.clock:.3g}" if plan.chip.clock else "-",
                f"{line.measured.compile_seconds:.0f}",
            ]
        )
    head = ["function", "TFLOP", "× model's", "GiB", "× least", "compute", "memory", "network", "estimate"]
    return table([*head, "compiler's", "compile s"], rows)


def kinds_table(plan: Plan) -> list[str]:
    """What the compiler's milliseconds are made of, with a line above; nothing if it gives no clock for the chip."""
    if not plan.chip.clock:
        return []
    rows = []
    for line in plan.lines:
        cycles = [line.measured.cost.kinds.get(kind, 0) for kind in KINDS]
        rows.append([line.function.name, *(f"{1e3 * n / line.function.once / plan.chip.clock:.3g}" for n in cycles)])
    return ["What the compiler's milliseconds are made of, without collectives:", table(["function", *KINDS], rows)]


def collectives_table(plan: Plan) -> str:
    found = sorted({key for line in plan.lines for key in line.measured.cost.collectives})
    head = ["collectives: number, MiB"] + [f"{kind} of {group}" for kind, group in found]
    return table(head, [[line.function.name, *(_sums(line, key) for key in found)] for line in plan.lines])


def _sums(line: Planned, key: tuple[str, int]) -> str:
    if key not in line.measured.cost.collectives:
        return "-"
    number, size = (n / line.function.once for n in line.measured.cost.collectives[key])
    return f"{number:.0f}, {size / 2**20:.3g}"


def iteration_table(plan: Plan) -> str:
    calls = {line.function.name: line.function.calls for line in plan.lines}
    rows = [
        [name, f"{calls[name]}", f"{seconds:.2f}", f"{seconds / plan.seconds:.0%}"]
        for name, seconds in plan.iteration.items()
    ]
    return table(["part", "times", "seconds", "share"], rows)


def cost_line(plan: Plan, questions: int, prompts: int) -> str:
    iterations = max(1, questions // prompts)
    hours = iterations * plan.seconds * plan.devices / 3600
    return (
        f"{plan.seconds:.1f} s per iteration, MFU {plan.mfu:.0%} (of its updates {plan.update_mfu:.0%}); an epoch of "
        f"{questions} questions is {iterations} iterations, {iterations * plan.seconds / 3600:.2f} hours, {hours:.1f} "
        "chip-hours."
    )


def to_json(plan: Plan, questions: int, prompts: int) -> dict:
    """The whole plan as plain JSON values: bytes, FLOPs, seconds."""
    lines = {
        line.function.name: as_json(line.measured)
        | {
            "shape": line.function.shape,
            "once": line.function.once,
            "calls": line.function.calls,
            "model_flops": line.function.flops,
            "least_bytes": line.function.least,
            "resident": line.resident,
            "seconds": line.seconds._asdict() | {"estimate": line.seconds.estimate, "best": line.seconds.best},
        }
        for line in plan.lines
    }
    return {
        "topology": plan.topology,
        "chips": plan.devices,
        "chip": plan.chip._asdict(),
        "fits": plan.fits,
        "advice": [] if plan.fits else list(advice(plan)),
        "programs": lines,
        "residents": plan.residents,
        "iteration_seconds": plan.iteration,
        "seconds": plan.seconds,
        "mfu": plan.mfu,
        "update_mfu": plan.update_mfu,
        "epoch_chip_hours": max(1, questions // prompts) * plan.seconds * plan.devices / 3600,
    }


def write_into(path: Path, name: str, text: str) -> None:
    """Replaces the text between the marks `<!-- plan NAME -->` and `<!-- end -->` of a file.

    Raises InputError if the marks are missing, SaveError if the file cannot be written.
    """
    before, begin, end, after = _marked(path, name)
    write_whole(path, f"{before}{begin}{text}\n{end}{after}")


def _marked(path: Path, name: str) -> tuple[str, str, str, str]:
    """Splits a file into the text before the marks, the two marks, and the text after them."""
    old = path.read_text() if path.is_file() else ""
    begin, end = f"<!-- plan {name} -->\n", "<!-- end -->"
    if begin not in old or end not in old.split(begin, 1)[1]:
        raise InputError(f"--into: {path} has no lines {begin.strip()!r} and {end!r}; add them where the tables belong")
    before, after = old.split(begin, 1)
    return before, begin, end, after.split(end, 1)[1]


def plain(text: str) -> str:
    """The text for a terminal: without the rules of the tables and without bold."""
    return re.sub(r"^\| (-+:? \| )*-+:? \|\n", "", text, flags=re.MULTILINE).replace("**", "")

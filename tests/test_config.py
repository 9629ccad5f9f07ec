"""Settings: the paper's defaults, the messages for bad values, and that each setting has an effect."""

import ast
import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from reft_jax.commands.flags import parse_config
from reft_jax.config import RENAMED, check_config, default_config, flatten, nearest, renamed, replaced, to_json
from reft_jax.settings import SETTINGS, Config
from reft_jax.types import InputError

REPO = Path(__file__).resolve().parent.parent

# The authors' settings for CodeLlama-7B and GSM8K programs.
PAPER = {
    "seed": 42,
    "model.dtype": "bfloat16",
    "executor.timeout_s": 10.0,
    "sft.learning_rate": 1e-5,
    "sft.batch_size": 48,
    "sft.epochs": 40,
    "sft.warmup_epoch": 2,
    "sft.lr_warmup": 0.1,
    "sft.weight_decay": 0.0,
    "sft.clip_norm": 1.0,
    "sft.max_len": 1024,
    "rl.learning_rate": 3e-7,
    "rl.lr_warmup": 0,
    "rl.questions": 32,
    "rl.epochs": 300,
    "rl.iterations": 0,
    "rl.ppo_epochs": 2,
    "rl.minibatches": 1,
    "rl.weight_decay": 0.0,
    "rl.clip_norm": 1.0,
    "rl.kl_coef": 0.01,
    "rl.gamma": 1.0,
    "rl.lam": 0.95,
    "rl.vf_coef": 5.0,
    "rl.clip": 0.2,
    "rl.value_clip": 0.2,
    "rl.temperature": 1.0,
    "rl.max_prompt": 300,
    "rl.max_len": 700,
    "rerank.learning_rate": 1e-6,
    "rerank.batch_size": 24,
    "rerank.epochs": 3,
    "rerank.lr_warmup": 0.1,
    "rerank.weight_decay": 0.0,
    "rerank.clip_norm": 1.0,
    "rerank.max_len": 700,
    "self_train.samples": 10,
    "self_train.epochs": 20,
    "self_train.updates": 2,
    "self_train.learning_rate": 3e-7,
    "sample.n": 100,
    "sample.train_n": 100,
    "sample.temperature": 1.0,
    "sample.top_k": 50,
    "sample.max_len": 1024,
}

GOOD = """
from reft_jax.config import default_config

def get_config(name="good"):
    config = default_config()
    config.name, config.model.path, config.data.train, config.data.test = name, "model", "train.json", "test.json"
    return config
"""


@pytest.fixture
def parse(tmp_path):
    """Parses a command line whose config file is `source`; "FILE" stands for its path."""

    def parse(*args: str, source: str = GOOD):
        path = tmp_path / "settings.py"
        path.write_text(source)
        return parse_config(["reft", *(arg.replace("FILE", str(path)) for arg in args)])

    return parse


def small() -> ConfigDict:
    config = default_config()
    config.model.path = config.data.train = config.data.test = "toy"
    return config


def test_the_defaults_are_the_papers():
    assert {key: flatten(default_config())[key] for key in PAPER} == PAPER


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.py")), ids=lambda path: path.name)
def test_every_config_file_passes(path):
    parse_config(["reft", f"--config={path}"])


RATES = [f"{stage}.learning_rate" for stage in ("sft", "rl", "rerank", "self_train")]


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.py")), ids=lambda path: path.name)
def test_a_config_with_lora_has_learning_rates_of_adapters(path):
    """docs/lora.md: ten times those of full training or more."""
    found = flatten(parse_config(["reft", f"--config={path}"]))
    if found["lora.rank"]:
        assert [key for key in RATES if found[key] < 9.99 * PAPER[key]] == []


# The authors' settings: warm-up epoch and β of the KL reward differ by dataset and kind of solution.
CELLS = {
    "gsm8k,python": (2, 0.01),
    "gsm8k,nl": (2, 0.05),
    "svamp,python": (2, 0.01),
    "svamp,nl": (2, 0.05),
    "mathqa,python": (2, 0.01),
    "mathqa,nl": (5, 0.05),
    "mathqa-numeric,python": (2, 0.01),
    "mathqa-numeric,nl": (10, 0.01),
}


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_of_the_paper_differs_from_the_defaults_in_what_it_must(cell):
    dataset, engine = cell.split(",")
    config = flatten(parse_config(["reft", f"--config={REPO}/configs/paper.py:{cell}"]))
    assert (config["sft.warmup_epoch"], config["rl.kl_coef"]) == CELLS[cell]
    kind = {"python": "python_sdp", "nl": "nl"}[engine]
    assert config["data.train"].endswith(f"{dataset}_{kind}.json")
    assert config["data.test"].endswith(f"{dataset}_test_set.json")
    changed = {key for key, value in config.items() if value != SETTINGS[key].default}
    may = {"name", "model.path", "data.train", "data.test", "data.format", "sft.warmup_epoch", "rl.kl_coef"}
    assert changed <= may and config["data.format"] == engine


def test_the_main_row_has_a_name_of_its_own_and_small_models_their_settings():
    def parsed(file):
        return flatten(parse_config(["reft", f"--config={REPO}/configs/{file}"]))

    main, cell = parsed("gsm8k_codellama_7b_reft.py"), parsed("paper.py:gsm8k,python")
    assert {key for key in cell if main[key] != cell[key]} <= {"mesh.data", "mesh.fsdp", "mesh.tensor", "model.remat"}
    assert cell == parsed("paper.py")
    small = parsed("paper.py:gsm8k,nl,small")
    expected = {"sft.learning_rate": 2e-5, "sft.warmup_epoch": 10, "rl.learning_rate": 3e-6, "rl.questions": 256}
    assert {key: small[key] for key in expected} == expected and small["rl.kl_coef"] == 0.05
    for wrong in ("gsm8k", "aqua,nl", "gsm8k,c", "gsm8k,nl,13b"):
        with pytest.raises(InputError, match="is not DATASET,FORMAT"):
            parsed(f"paper.py:{wrong}")


def test_every_setting_has_the_type_of_its_default():
    """What an editor knows of `config.rl.kl_coef` is true."""
    for section in (Config, *(one.type for one in fields(Config) if is_dataclass(one.type))):
        assert section.__doc__
        for one in fields(section):
            assert is_dataclass(one.type) or type(one.default) is one.type, one.name
    assert type(check_config(small()).rl.kl_coef) is float


def test_old_names_lead_to_settings_and_are_none_themselves():
    for old, new in RENAMED.items():
        assert renamed(old) == new and renamed(new) is None
        assert old not in SETTINGS and (new in SETTINGS or any(key.startswith(f"{new}.") for key in SETTINGS))
    assert renamed("ppo.kl_coef") == "rl.kl_coef" and renamed("ppo.no_such") is None and renamed("seed") is None


def test_some_values_can_be_replaced():
    config = check_config(small())
    changed = replaced(config, {"mesh.fsdp": 4, "seed": 7})
    assert (changed.mesh.fsdp, changed.seed) == (4, 7) and config.mesh.fsdp == 1
    assert flatten(changed) == flatten(config) | {"mesh.fsdp": 4, "seed": 7}
    assert type(replaced(config, {"rl.kl_coef": 1}).rl.kl_coef) is float
    assert replaced(small(), {}) == config and hash(replaced(config, {})) == hash(config)


def test_minibatches_hold_whole_questions_and_whole_micro_batches():
    config = check_config(small())
    whole = {"rl.questions": 4, "rl.samples": 8, "rl.minibatches": 2, "rl.micro_batch": 16}
    assert check_config(replaced(config, whole)).rl.samples == 8
    for changes, rows in (
        ({"rl.minibatches": 8, "rl.micro_batch": 4}, r"rl\.questions=4 \* rl\.samples=8"),  # half a question each
        ({"rl.micro_batch": 32}, r"rl\.questions=4 \* rl\.samples=8"),
        ({"rl.samples": 0}, r"rl\.questions=4"),
        ({"rl.algorithm": "grpo", "rl.samples": 0, "rl.minibatches": 8}, r"rl\.questions=4"),
    ):
        with pytest.raises(InputError, match=rows + r" must be a multiple of rl\.minibatches=\d \* rl\.micro_batch="):
            check_config(replaced(config, whole | changes))


def test_a_checked_config_is_frozen():
    config = check_config(small())
    with pytest.raises(AttributeError):
        config.rl.kl_coef = 0.5
    with pytest.raises(AttributeError):
        config.rl = ConfigDict()
    assert config.rl.kl_coef == 0.01


def test_the_recorded_text_has_every_value():
    assert json.loads(to_json(check_config(small()))) == flatten(small())
    assert flatten(small()).keys() == SETTINGS.keys()


@pytest.mark.parametrize(
    ("args", "key", "value"),
    [
        (["--config=FILE", "--config.rl.kl_coef=0.05"], "rl.kl_coef", 0.05),
        (["--config=FILE", "--config.rl.kl_coef=1e-3", "--config.rl.kl_coef=0"], "rl.kl_coef", 0.0),
        (["--config.rl.kl_coef", "0.05", "--config", "FILE"], "rl.kl_coef", 0.05),
        (["-config=FILE", "-config.sft.epochs=7"], "sft.epochs", 7),
        (["--config=FILE", "--config.data.dev="], "data.dev", ""),
        (["--config=FILE", "--config.data.dev=a=b c"], "data.dev", "a=b c"),
        (["--config=FILE", "--config.toy.drop_skipped=true"], "toy.drop_skipped", True),
        (["--config=FILE", "--config.toy.drop_skipped"], "toy.drop_skipped", True),
        (["--config=FILE", "--noconfig.toy.drop_skipped"], "toy.drop_skipped", False),
        (["--config=FILE"], "name", "good"),
        (["--config=FILE:7b"], "name", "7b"),
        (["--config=FILE:7b:long", "--config.seed=1"], "name", "7b:long"),
    ],
)
def test_the_command_line_changes_one_value(parse, args, key, value):
    config = flatten(parse(*args))
    assert config[key] == value and type(config[key]) is type(value)
    changed = {k for k in config if config[k] != SETTINGS[k].default}
    assert changed <= {key, "name", "model.path", "data.train", "data.test", "seed"}


def test_values_of_a_file_and_of_the_command_line_are_of_one_kind(parse):
    """0.5 over a file's whole number for a float, and overrides of a file that returns a frozen config."""
    source = GOOD.replace("return config", "config.rl.kl_coef = 1\n    return config")
    config = parse("--config=FILE", source=source)
    assert config.rl.kl_coef == 1.0 and type(config.rl.kl_coef) is float
    assert parse("--config=FILE", "--config.rl.kl_coef=0.5", source=source).rl.kl_coef == 0.5
    frozen = GOOD.replace("return config", "import ml_collections\n    return ml_collections.FrozenConfigDict(config)")
    assert parse("--config=FILE", "--config.rl.kl_coef=0.5", source=frozen).rl.kl_coef == 0.5


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("rl.vf", "rl.vf_coef"),  # what it begins with
        ("rl.epoch", "rl.epochs"),
        ("sft.lr", "sft.learning_rate"),  # initials, before lr_warmup
        ("rerank.lr", "rerank.learning_rate"),  # of its own section
        ("rl.batch_size", "sft.batch_size"),  # right but for the section
        ("kl_coef", "rl.kl_coef"),
        ("engine.slot", "engine.slots"),
        ("rl.klcoef", "rl.kl_coef"),  # spelled wrong
        ("mesh.fdsp", "mesh.fsdp"),
        ("seeds", "seed"),
    ],
)
def test_the_suggestion_is_what_was_probably_meant(written, meant):
    assert nearest(written, SETTINGS) == meant
    assert nearest(f"config.{written}", [f"config.{key}" for key in SETTINGS] + ["workdir"]) == f"config.{meant}"


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("--config.rl.klcoef=1", r"unknown flag --config\.rl\.klcoef; did you mean --config\.rl\.kl_coef\?"),
        ("--config.rl=1", r"unknown flag --config\.rl; did you mean --config\.rl\."),
        ("--confg.seed=1", r"unknown flag --confg\.seed; did you mean --config\.seed\?"),
        ("--config.sft.epochs=abc", r"--config\.sft\.epochs=abc: invalid literal for int.*see .*reft_jax/settings\.py"),
        ("--config.sft.epochs=1.5", r"--config\.sft\.epochs=1\.5: invalid literal for int"),
        ("--config.rl.kl_coef=", r"--config\.rl\.kl_coef=: could not convert"),
        ("--config.toy.drop_skipped=maybe", r"--config\.toy\.drop_skipped=maybe: .*Non-boolean"),
        ("--config.seed", r"Missing value for flag --config\.seed"),
        ("sft.epochs=3", r"unexpected argument 'sft\.epochs=3'; flags are written --name=value"),
        ("--config.sft.batch_size=-8", r"sft\.batch_size=-8 is not allowed; it must be a whole number > 0"),
        ("--config.sft.batch_size=50", r"sft\.batch_size=50 must be a multiple of sft\.micro_batch=48"),
        ("--config.rerank.micro_batch=5", r"rerank\.batch_size=24 must be a multiple of rerank\.micro_batch=5"),
        ("--config.rl.minibatches=3", r"rl\.questions=32 must be a multiple of rl\.minibatches=3 \* rl\.micro_batch"),
        ("--config.rl.gamma=1.1", r"rl\.gamma=1\.1 is not allowed; it must be a number from 0 to 1"),
        ("--config.rl.kl_coef=nan", r"rl\.kl_coef=nan is not allowed; it must be a number >= 0"),
        ("--config.sft.learning_rate=inf", r"sft\.learning_rate=inf is not allowed; it must be a number > 0"),
        ("--config.model.remat=some", r"model\.remat='some' is not allowed; it must be one of none, dots, full"),
        ("--config.model.path=", r"model\.path is empty; it must be folder with config\.json"),
        ("--config.model.path=toy", r'"toy" must stand in model\.path, data\.train and data\.test'),
        ("--config.sft.stop_epoch=1", r"sft\.warmup_epoch must not be later than the last epoch"),
        ("--config.rl.max_prompt=700", r"rl\.max_prompt must be smaller than rl\.max_len"),
    ],
)
def test_a_wrong_command_line_is_refused(parse, arg, message):
    with pytest.raises(InputError, match=message):
        parse("--config=FILE", arg)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.rl.klcoef = 1", r"settings\.py: unknown key 'rl\.klcoef'; did you mean 'rl\.kl_coef'\?"),
        ("config.rl.update(klcoef=1)", r"settings\.py: unknown key 'rl\.klcoef'; did you mean 'rl\.kl_coef'\?"),
        ("config.ppoo.clip = 1", r"settings\.py, line 7: AttributeError: .*ppoo"),
        ("config.ppo.kl_coef = 1", r"settings\.py: ppo\.kl_coef is now rl\.kl_coef$"),
        ("config.ppo.update(prompts=8)", r"settings\.py: ppo\.prompts is now rl\.questions$"),
        ("config.ppo['prompts'] = 8", r"settings\.py: ppo\.prompts is now rl\.questions$"),
        ("config.data.engine = 'nl'", r"settings\.py: data\.engine is now data\.format$"),
        ("config.data.update(engine='nl')", r"settings\.py: data\.engine is now data\.format$"),
        ("config.ppo = dict(clip=1)", r"settings\.py: ppo\.clip is now rl\.clip$"),
        ("config.ppo = 3", r"settings\.py: ppo is now rl$"),
        ("config.ppo.clip *= 2", r"settings\.py, line 7: ppo\.clip is now rl\.clip$"),
        ("nl = config.data.engine == 'nl'", r"settings\.py, line 7: data\.engine is now data\.format$"),
        ("config.ppo.klcoef = 1", r"settings\.py: unknown key 'ppo\.klcoef'; did you mean 'rl\.kl_coef'\?"),
        ("config.rl = 3", r"settings\.py: unknown key 'rl'; did you mean 'rl\."),
        ("del config.rl.clip", r"settings\.py: key 'rl\.clip' is missing; start from .*default_config\(\)"),
        ("config.sft.epochs = 'abc'", r"settings\.py: sft\.epochs='abc' must be of type int \(a whole number > 0\)"),
        ("config.sft.epochs = 1.5", r"settings\.py: sft\.epochs=1\.5 must be of type int"),
        ("config.sft.epochs = True", r"settings\.py: sft\.epochs=True must be of type int"),
        ("config.data.dev = None", r"settings\.py: data\.dev=None must be of type str$"),
        ("config.sft.batch_size = -8", r"settings\.py: sft\.batch_size=-8 is not allowed"),
        ("config.name = (", r"settings\.py: SyntaxError: .*line 7.*; correct the file"),
        ("1 / 0", r"settings\.py, line 7: ZeroDivisionError: division by zero; correct the file"),
        ("open('/no/file')", r"settings\.py, line 7: FileNotFoundError: .*/no/file"),
        ("return {}", r"settings\.py: must define get_config\(\) that changes and returns .*default_config\(\)"),
    ],
)
def test_a_wrong_file_is_refused(parse, line, message):
    with pytest.raises(InputError, match=message):
        parse("--config=FILE", source=GOOD.replace("return config", f"{line}\n    return config"))


def test_a_file_of_another_kind_is_refused(parse, tmp_path):
    with pytest.raises(InputError, match=r"settings\.py: must define get_config\(\)"):
        parse("--config=FILE", source="config = 1\n")
    with pytest.raises(
        InputError, match=r"settings\.py: TypeError: get_config\(\) takes .*correct the file or its arg"
    ):
        parse("--config=FILE:7b", source=GOOD.replace('name="good"', "").replace("= name", '= "x"'))
    with pytest.raises(InputError, match=r"there is no file .*none\.py; configs/ holds"):
        parse(f"--config={tmp_path}/none.py")
    with pytest.raises(InputError, match=r"there is no file"):
        parse(f"--config={tmp_path}")
    with pytest.raises(InputError, match=r"--config=FILE is missing"):
        parse("--config.seed=1")


def settings_read(source: str) -> set[str]:
    """The keys that a module reads: `config.rl.clip`, or `rl.clip` after `rl = run.config.rl` (tuples too)."""
    tree, sections = ast.parse(source), {"config": ""}

    def section(node) -> str | None:  # "rl" for `….config.rl`, "" for `….config`
        if isinstance(node, ast.Name):
            return sections.get(node.id)
        if isinstance(node, ast.Attribute):
            return "" if node.attr == "config" else node.attr if section(node.value) == "" else None
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            tuples = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            pairs = zip(target.elts, value.elts, strict=False) if tuples else [(target, value)]
            sections |= {t.id: section(v) for t, v in pairs if isinstance(t, ast.Name) and section(v)}
    found = {
        (section(node.value), node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and section(node.value) is not None
    }
    return {f"{name}.{field}".lstrip(".") for name, field in found}


def test_every_setting_is_read():
    sources = [path for path in (REPO / "reft_jax").rglob("*.py") if path.name not in ("config.py", "settings.py")]
    read = set().union(*(settings_read(path.read_text(encoding="utf-8")) for path in sources))
    assert SETTINGS.keys() - read == set()


def test_how_a_read_setting_is_found():
    source = """
def run(run, config):
    rl, folder, settings = run.config.rl, run.workdir, config.sft
    return rl.clip, settings.epochs, run.config.seed, self.run.config.toy.layers, folder.name, other.kl_coef
"""
    assert settings_read(source) - {"rl", "sft", "toy"} == {"rl.clip", "sft.epochs", "seed", "toy.layers"}

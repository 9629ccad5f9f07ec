"""Whatever people change in between, every printed share belongs to the current models, files and settings."""

import numpy as np
import pytest
from acts import World
from fakes import Fakes, number
from tiny import drawn, tiny_policy

from reft_jax.engine.generate import Engine
from reft_jax.parallel.mesh import abstract_arrays, make_mesh
from reft_jax.train.checkpoints import load_params, save_params
from reft_jax.types import Prompt


def sequence(tmp_path, seed: int, fakes: Fakes, capsys, acts: int) -> int:
    """Random acts, and a look at the end; how many printed shares were compared."""
    folder = tmp_path / str(seed)
    folder.mkdir()
    world = World(folder, seed, fakes, capsys)
    for _ in range(acts):
        world.act()
    world.evaluate()
    return world.compared


@pytest.fixture
def fakes(monkeypatch) -> Fakes:
    fakes = Fakes()
    fakes.install(monkeypatch)
    return fakes


@pytest.mark.parametrize("seed", range(10))
def test_every_printed_share_is_the_truth(tmp_path, fakes, capsys, seed):
    assert sequence(tmp_path, seed, fakes, capsys, acts=25) > 20


@pytest.mark.long
def test_every_printed_share_is_the_truth_in_200_sequences(tmp_path, fakes, capsys):
    compared = sum(sequence(tmp_path, 100 + seed, fakes, capsys, acts=25) for seed in range(200))
    with capsys.disabled():
        print(f"\n200 sequences, {compared} printed shares compared, 0 differ")


class TinyModels(Fakes):
    """Real weights, saved and loaded as a stage does, and the real engine; only reading an answer off a text is not."""

    def __init__(self):
        super().__init__()
        self.mesh = make_mesh(1, 1, 1)
        self.model, self.params = tiny_policy()

    def save(self, folder, weights):
        folder.parent.mkdir(exist_ok=True)
        save_params(folder, drawn(self.params, int(weights) % 2**32))

    def weights(self, folder, base):
        tokenizer = base / "tokenizer.json"
        params = load_params(folder, abstract_arrays(self.mesh, self.params))
        return params["lm"], tokenizer.read_text() if tokenizer.exists() else ""

    def complete(self, weights, asked, settings):
        lm, tokenizer = weights
        temperature, top_k, max_len, seed, form = settings or (0.0, 0, 1024, 0, "")
        prompts = []
        for example, sample in asked:
            rng = np.random.default_rng(number(example.question, tokenizer, form))
            prompts.append(Prompt(example.item_id, sample, rng.integers(1, 61, 4).astype(np.int32)))
        engine = Engine(self.model, self.mesh, slots=8, pad_multiple=8, eos_id=-1, seed=seed)
        longest = 12 if max_len > 100 else 8
        rows = dict(engine.generate(lm, prompts, max_len=longest, temperature=temperature, top_k=top_k))
        texts = [" ".join(map(str, rows[i].tokens.tolist())) for i in range(len(asked))]
        return [(text, None if number(text) % 7 == 0 else float(number(text) % 3)) for text in texts]

    def probability(self, weights, question, text):
        lm, tokenizer = weights
        return number(float(np.asarray(lm["final_norm"])[0]), question, text) % 1000 / 1000


@pytest.mark.long
def test_every_printed_share_is_the_truth_of_real_tiny_models(tmp_path, monkeypatch, capsys):
    models = TinyModels()
    models.install(monkeypatch)
    compared = sum(sequence(tmp_path, 300 + seed, models, capsys, acts=15) for seed in range(10))
    with capsys.disabled():
        print(f"\n10 sequences with real tiny models, {compared} printed shares compared, 0 differ")

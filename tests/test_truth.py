"""Whatever people do between two looks: every printed share is that of the models, files and settings of now."""

import pytest
from acts import Fakes, World


@pytest.fixture
def fakes(monkeypatch) -> Fakes:
    fakes = Fakes()
    fakes.install(monkeypatch)
    return fakes


def sequence(tmp_path, seed: int, fakes: Fakes, capsys, acts: int) -> int:
    """Random acts, a look after each; how many printed shares were compared."""
    folder = tmp_path / str(seed)
    folder.mkdir()
    world = World(folder, seed, fakes, capsys)
    for _ in range(acts):
        world.act()
    world.evaluate()
    return world.compared


@pytest.mark.parametrize("seed", range(10))
def test_every_printed_share_is_the_truth(tmp_path, fakes, capsys, seed):
    assert sequence(tmp_path, seed, fakes, capsys, acts=25) > 20


@pytest.mark.long
def test_every_printed_share_is_the_truth_in_200_sequences(tmp_path, fakes, capsys):
    compared = sum(sequence(tmp_path, 100 + seed, fakes, capsys, acts=25) for seed in range(200))
    with capsys.disabled():
        print(f"\n200 sequences, {compared} printed shares compared, 0 differ")

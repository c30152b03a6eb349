"""Samples come back bit for bit and in their order, and what a file gives is what was measured."""
import pytest, torch
from facegen.evaluation.samples import load_samples, round_to_8bit, samples_picture, save_samples


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    monkeypatch.delenv('FACEGEN_OUT', raising=False)
    return tmp_path


def noise(n, side): return torch.rand((n, 3, side, side), generator=torch.Generator().manual_seed(0))*2.2 - 1.1


@pytest.mark.parametrize('n,side', [(1, 8), (7, 8), (13, 16), (16, 8), (57, 8), (256, 4), (300, 4)])
def test_samples_come_back_in_their_order(n, side):
    x = round_to_8bit(noise(n, side))
    assert torch.equal(load_samples(save_samples(x, 'attrs-laptop-s0').stem, side), x)


def test_rounding_is_to_the_nearest_step_and_happens_once():
    x = noise(4, 16)
    y = round_to_8bit(x)
    assert torch.equal(round_to_8bit(y), y) and (y - x.clamp(-1, 1)).abs().max() <= 1/255 + 1e-6
    assert len(y.unique()) <= 256 and y.min() >= -1 and y.max() <= 1


def test_what_is_missing_or_of_another_size_is_said(home):
    with pytest.raises(FileNotFoundError, match='facegen launch attrs-laptop-s0'):
        load_samples('attrs-laptop-s0', 64)
    save_samples(round_to_8bit(noise(6, 8)), 'attrs-laptop-s0')
    with pytest.raises(ValueError, match='cannot be cut into faces of 7 px'):
        load_samples('attrs-laptop-s0', 7)


def test_only_webp_is_opened(home):
    path = samples_picture('attrs-laptop-s0')
    path.parent.mkdir(parents=True)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(64))
    with pytest.raises(ValueError, match='is not a whole WebP picture'):
        load_samples('attrs-laptop-s0', 8)

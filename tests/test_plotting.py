"""Images are exact, and figures are the same bytes when plotted again."""
import numpy as np
import pytest
import torch
from PIL import Image

from facegen import plotting
from facegen.core import PARTS


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    plotting.plt.switch_backend('agg')
    plotting.style()
    yield tmp_path
    plotting.plt.close('all')


def some(n=5, size=8):
    "A few images of noise"
    pixels = torch.randint(256, (n, 3, size, size), generator=torch.Generator().manual_seed(0))
    return pixels/127.5 - 1


def test_pixels_go_there_and_back():
    x = torch.arange(256.).view(1, 1, 256).expand(3, 2, 256)
    assert np.array_equal(plotting.to_uint8(x/127.5 - 1), x.movedim(0, -1).numpy().astype(np.uint8))
    assert plotting.to_uint8(torch.tensor([-9., 9., 0.]).view(3, 1, 1)).ravel().tolist() == [0, 255, 128]


@pytest.mark.parametrize('n, ncol, rows, cols', [(5, 3, 2, 3), (2, 8, 1, 2), (9, 3, 3, 3)])
def test_tile_puts_each_image_in_its_place(n, ncol, rows, cols):
    x = some(n)
    canvas = plotting.tile(x, ncol, gap=2)
    assert canvas.shape == (rows*10 - 2, cols*10 - 2, 3)
    for i in range(n):
        top, left = i//cols*10, i % cols*10
        assert np.array_equal(canvas[top:top + 8, left:left + 8], plotting.to_uint8(x[i]))


def test_gallery_round_trip(home):
    x = some(6)
    path = plotting.save_gallery(x, 'g', ncol=3)
    assert path == home.resolve()/'data/gallery/g.png'
    assert torch.allclose(plotting.load_gallery('g', 8), x, atol=1e-6)


def test_a_gallery_over_100_kb_is_refused(home):
    with pytest.raises(ValueError, match='fewer or smaller'):
        plotting.save_gallery(some(64, 64), 'g')
    assert not (home/'data/gallery/g.png').exists()


def grid(): return plotting.image_grid(some(), titles=list('abcde'))
def strip(): return plotting.face_strip({'a': some(), 'longer': some()}, titles=list('abcde'))


@pytest.mark.parametrize('make', [grid, strip])
def test_a_figure_plotted_again_is_the_same_bytes(make):
    a = plotting.save_figure(make(), 'f').read_bytes()
    b = plotting.save_figure(make(), 'f').read_bytes()
    assert a == b and len(a) > 500


def test_grid_is_crisp(home):
    "At a whole scale every pixel of an image is one block of equal pixels"
    x = some(1, 8)
    fig = plotting.image_grid(x, scale=3)
    fig.savefig(home/'c.png', dpi=72)
    px = np.array(Image.open(home/'c.png').convert('RGB'))
    assert np.array_equal(px, plotting.to_uint8(x[0]).repeat(3, 0).repeat(3, 1))


def test_masks_get_their_colours_and_bad_ones_a_sentence():
    m = torch.arange(-1, len(PARTS)).view(1, -1)
    colours = plotting.to_uint8(plotting.mask_rgb(m)[None])[0, 0]
    assert np.array_equal(colours[1:], plotting.PART_COLOURS[:-1]) and colours[0].tolist() == [255]*3
    assert len({tuple(c) for c in colours}) == 20
    with pytest.raises(ValueError, match='-1..18'):
        plotting.mask_rgb(torch.full((2, 2), 19))


def test_wrong_shapes_get_a_sentence():
    with pytest.raises(ValueError, match='add a batch dimension'):
        plotting.image_grid(some()[0])
    with pytest.raises(ValueError, match='rows of one shape'):
        plotting.face_strip({'a': some(2), 'b': some(3)})


def test_explore_plots_once_without_a_live_kernel(monkeypatch):
    monkeypatch.setattr(plotting, 'is_live', lambda: False)
    calls = []
    plotting.explore(lambda **kw: calls.append(kw), t=(3, 9), kind=['a', 'b'])
    assert calls == [dict(t=3, kind='a')]

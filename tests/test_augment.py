"""Augmentation: colours as colorsys and torchvision define them, one field for image and mask, parts of a batch."""
import colorsys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from facegen.core import generator
from facegen.data.augment import (AUGMENTATIONS, FIELD_SIZE, AugmentedFaces, adjust_hue, affine_places, blend,
                                  colour_jitter, displacement_field, elastic_deformation, random_affine,
                                  random_grayscale, read_face_at, rgb_to_grayscale)
from facegen.data.faces import Face, flip_faces
from facegen.diffusion.losses import diffusion_loss
from facegen.diffusion.schedules import make_scheduler
from facegen.training.config import Batches, InMemoryFaces, TrainConfig
from facegen.synthetic.toyfaces import render_faces
from facegen.training.loop import train

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def face(): return render_faces(n=7, size=32, seed=4)


def noise(*shape, seed=0): return torch.rand(shape, generator=torch.Generator().manual_seed(seed))
def g(*keys): return generator('test', *keys)
def same(a, b): return all(torch.equal(x.nan_to_num(-9), y.nan_to_num(-9)) for x, y in zip(a, b))
def bent(image, alpha, seed=0, mask=None):
    mask = torch.zeros(image[:, 0].shape, dtype=torch.int64) if mask is None else mask
    return elastic_deformation(Face(image, torch.zeros(len(image), 40), mask), alpha, g(seed))


# Colours

def test_hue_is_that_of_colorsys():
    levels = (0., .5, 1.)  # ties, greys, black and white
    corners = torch.tensor([[a, b, c] for a in levels for b in levels for c in levels])
    colours = torch.cat([corners, noise(200, 3)])
    for turn in (-.5, -.37, -.01, 0., 1/6, .25, 1/3, .5, .99):
        got = adjust_hue(colours.T[None, :, None], torch.full((1, 1, 1, 1), turn))[0, :, 0].T
        for rgb, new in zip(colours.tolist(), got.tolist()):
            h, s, v = colorsys.rgb_to_hsv(*rgb)
            assert new == pytest.approx(colorsys.hsv_to_rgb((h + turn) % 1, s, v), abs=2e-6), (rgb, turn)


def test_hue_goes_round():
    x, one = noise(5, 3, 6, 6), torch.ones(5, 1, 1, 1)
    assert torch.allclose(adjust_hue(x, one), x, atol=2e-6) and torch.allclose(adjust_hue(x, 0*one), x, atol=1e-6)
    assert torch.allclose(adjust_hue(adjust_hue(x, .3*one), -.3*one), x, atol=3e-6)
    assert torch.allclose(adjust_hue(x, one/3), x.roll(1, 1), atol=2e-6), 'a third of a turn makes green of red'
    assert torch.equal(adjust_hue(x, .3*one).amax(1), x.amax(1))


def test_grey_stays_grey():
    shades, f = noise(4, 1, 5, 5).expand(-1, 3, -1, -1), torch.tensor([0., .4, 1., 3.]).view(4, 1, 1, 1)
    assert torch.allclose(rgb_to_grayscale(shades), shades[:, :1], atol=1e-6)
    assert torch.equal(adjust_hue(shades, f), shades)
    assert torch.allclose(blend(shades, rgb_to_grayscale(shades), f), shades, atol=1e-6)
    out = colour_jitter(shades*2 - 1, 1., g())
    assert out.std(1).max() < 1e-5, 'only brightness and contrast may change it'
    assert (out - shades*2 + 1).abs().max() > .1


def by_hand(picture, light, contrast, saturation, turn):
    "torchvision's definitions for one picture, a list of (r, g, b) in [0,1], pixel by pixel"
    clip = lambda v: min(max(v, 0.), 1.)
    luma = lambda p: .299*p[0] + .587*p[1] + .114*p[2]
    picture = [[clip(light*v) for v in p] for p in picture]
    mean = sum(map(luma, picture))/len(picture)
    picture = [[clip(contrast*v + (1-contrast)*mean) for v in p] for p in picture]
    picture = [[clip(saturation*v + (1-saturation)*luma(p)) for v in p] for p in picture]
    hsv = [colorsys.rgb_to_hsv(*p) for p in picture]
    return [colorsys.hsv_to_rgb((h + turn) % 1, s, v) for h, s, v in hsv]


@pytest.mark.parametrize('strength', [.03, .3, 1.])
def test_jitter_is_what_a_hand_would_do(strength):
    x = noise(6, 3, 3, 4)
    luck = torch.rand(6, 4, generator=g(1))*2 - 1
    got = colour_jitter(x*2 - 1, strength, g(1))/2 + .5
    for picture, out, (a, b, c, d) in zip(x, got, luck.tolist()):
        want = by_hand(picture.flatten(1).T.tolist(), 1 + a*strength, 1 + b*strength, 1 + c*strength*2/3, d*strength/3)
        assert torch.allclose(out.flatten(1).T, torch.tensor(want), atol=1e-5)


def test_strength_is_the_published_one():
    "What .03 does to four colours, read off the images: (.03, .03, .02, .01), each its own, all of the range used"
    # the two pairs are mirrored around .5
    colours = torch.tensor([[.4, .4, .4], [.6, .6, .6], [.6, .5, .45], [.4, .5, .55]])
    x = colours.T[None, :, None].expand(2000, -1, -1, -1)
    y = colour_jitter(x*2 - 1, .03, g(2))/2 + .5
    light = y[..., :2].mean((1, 2, 3))/.5
    contrast = (y[:, 0, 0, 1] - y[:, 0, 0, 0])/.2/light
    chroma = (y[..., 2].amax(1) - y[..., 2].amin(1))[:, 0]/.15
    hue = torch.tensor([colorsys.rgb_to_hsv(*p)[0] for p in y[..., 2].squeeze(2).tolist()])
    hue = hue - colorsys.rgb_to_hsv(.6, .5, .45)[0]
    for value, middle, span in ((light, 1, .03), (contrast, 1, .03), (chroma/light/contrast, 1, .02), (hue, 0, .01)):
        low, high = value.min() - middle, value.max() - middle
        assert span*.98 < high < span*1.01 and span*.98 < -low < span*1.01
        assert abs((value - middle).mean()) < .05*span and abs((value - middle).std()/span - 3**-.5) < .03, 'uniform'
    others = torch.corrcoef(torch.stack([light, contrast, chroma/light/contrast, hue]))
    assert (others - torch.eye(4)).abs().max() < .1, 'four draws, not one'


@pytest.mark.parametrize('strength', [.1, 1.])
def test_jitter_stays_in_range_and_is_seeded(face, strength):
    out = colour_jitter(face.image, strength, g(3))
    assert out.shape == face.image.shape and out.dtype == torch.float32
    assert out.isfinite().all() and out.abs().max() <= 1
    assert torch.equal(out, colour_jitter(face.image, strength, g(3)))
    assert not torch.equal(out, colour_jitter(face.image, strength, g(4)))


# Bending

def smooth_field(alpha, seed):
    "torchvision's displacement for one face of 128 px: blurred with a 41 x 41 kernel, in units of half a side"
    stream, at = g(seed), torch.arange(-20., 21)
    kernel = torch.exp(-(at[:, None]**2 + at**2)/50)
    kernel = (kernel/kernel.sum())[None, None]
    def smooth(noise): return F.conv2d(F.pad(noise*2 - 1, [20]*4, mode='reflect'), kernel)
    axes = [smooth(torch.rand(1, 1, 128, 128, generator=stream)) for _ in range(2)]
    return torch.cat(axes, 1).permute(0, 2, 3, 1)*alpha/128


@pytest.mark.parametrize('alpha', [50, 250])
def test_elastic_is_torchvisions_at_the_published_size(alpha):
    one = render_faces(n=1, size=128, seed=1)
    side = torch.linspace(-127/128, 127/128, 128)
    grid = torch.stack(torch.meshgrid(side, side, indexing='xy'), -1)[None] + smooth_field(alpha, 5)
    want = F.grid_sample(one.image, grid, align_corners=False, padding_mode='border')
    out = elastic_deformation(one, alpha, g(5))
    assert torch.allclose(out.image, want, atol=2e-3)
    mask = one.mask[:, None].double()
    classes = F.grid_sample(mask, grid.double(), mode='nearest', align_corners=False, padding_mode='border')[:, 0]
    assert (out.mask == classes).float().mean() > .999, 'but for ties'
    assert (out.image - one.image).abs().max() > .5


def test_a_face_bends_alike_at_every_size():
    raw = noise(3, 2, FIELD_SIZE, FIELD_SIZE)*2 - 1
    fine = displacement_field(raw, 128, 128)
    for size in (64, 32): # the share of the side, at the places of the pixels of a smaller picture
        want = F.interpolate(fine, (size, size), mode='bilinear', align_corners=False)
        assert torch.allclose(displacement_field(raw, size, size), want, atol=1e-6)
    assert displacement_field(raw, 20, 31).shape == (3, 2, 20, 31)
    ramp = lambda s: torch.linspace(-.5, .5, 2*s + 1)[1::2].expand(4, 3, s, s) # half the place where a pixel is
    small, large = bent(ramp(64), 100).image, bent(ramp(128), 100).image
    assert torch.allclose(small, F.avg_pool2d(large, 2), atol=.01) and (small - ramp(64)).std() > .005


def test_how_far_alpha_moves():
    raw = noise(30, 2, FIELD_SIZE, FIELD_SIZE, seed=1)*2 - 1
    inner = displacement_field(raw, 128, 128)[..., 25:-25, 25:-25]
    assert inner.std().item() == pytest.approx(3**-.5/(2*5*torch.pi**.5), rel=.1), 'white noise after a Gaussian of 5'
    raw[:, 1] = 0
    assert displacement_field(raw, 64, 64)[:, 1].abs().max() == 0, 'two axes, each with its own noise'
    ramp = torch.linspace(-.5, .5, 64)
    moved = [(bent(ramp.expand(8, 3, 64, 64), a).image - ramp).std() for a in (20, 40)]
    assert moved[1]/moved[0] == pytest.approx(2, rel=.02)


def test_image_and_mask_go_along_one_field(face):
    whole = F.one_hot(face.mask, 19).movedim(-1, 1).float()
    for alpha in (50, 250, 1000):
        out = bent(whole, alpha, 6, face.mask)
        assert out.image.gather(1, out.mask[:, None]).min() > .249, 'the nearest pixel weighs a quarter or more'
        sure = out.image > .751
        assert sure.any(1).float().mean() > .6 and (sure.long().argmax(1) == out.mask)[sure.any(1)].all()
    assert (out.mask != face.mask).any()
    other = bent(whole, 250, 7, face.mask)
    assert bent(whole, 250, 6, face.mask).image.gather(1, other.mask[:, None]).min() < .01, 'another field does not fit'


def test_what_bending_leaves_alone(face):
    for value in (-1., .3, 1.):
        flat = bent(torch.full((2, 3, 32, 32), value), 250).image
        assert torch.allclose(flat, torch.tensor(value), atol=1e-6) and flat.abs().max() <= 1
    unknown = face._replace(attrs=torch.full((7, 40), torch.nan), mask=torch.full_like(face.mask, -1))
    out = elastic_deformation(unknown, 250, g())
    assert (out.mask == -1).all() and out.attrs is unknown.attrs
    out = elastic_deformation(face, 250, g())
    assert out.attrs is face.attrs and out.mask.dtype == torch.int64 and out.image.dtype == torch.float32
    for a, b, m, n in zip(face.image, out.image, face.mask, out.mask):
        assert b.min() >= a.min() - 1e-6 and b.max() <= a.max() + 1e-6, 'no black comes in from outside'
        assert set(n.unique().tolist()) <= set(m.unique().tolist()), 'and no new class between two others'
    assert same(out, elastic_deformation(face, 250, g()))
    assert not torch.equal(out.image, elastic_deformation(face, 250, g(1)).image)
    assert not torch.equal(out.image[0] - face.image[0], out.image[1] - face.image[1])


# Nothing, and parts

def test_zero_changes_no_bit(face):
    assert colour_jitter(face.image, 0, g()) is face.image and elastic_deformation(face, 0., g()) is face
    latents = torch.randn(2, 4, 8, 8)*5
    assert colour_jitter(latents, 0., g()) is latents, 'latents are not held against the rules for colours'


@pytest.mark.parametrize('cut', [(0, 1), (2, 5), (6, 7), (0, 7)])
def test_a_part_gets_what_it_would_get_in_the_whole(face, cut):
    part, mine = Face(*(v[slice(*cut)] for v in face)), slice(*cut)
    assert torch.equal(colour_jitter(face.image, .3, g(8))[mine], colour_jitter(part.image, .3, g(8), 7, mine))
    assert same((v[mine] for v in elastic_deformation(face, 80, g(8))), elastic_deformation(part, 80, g(8), 7, mine))


# Affine maps

def one(x): return torch.full((7,), float(x))
def moved(face, angle=0., right=0., down=0., zoom=1.):
    shift = torch.stack([one(right), one(down)], 1)
    return read_face_at(face, affine_places(one(angle), shift, one(zoom), 32))


def test_a_quarter_turn_a_shift_by_whole_pixels_and_no_change_are_exact(face):
    assert torch.allclose(moved(face).image, face.image, atol=1e-5) and torch.equal(moved(face).mask, face.mask)
    for quarters in (1, 2, 3):
        got = moved(face, angle=-90.*quarters)
        assert torch.allclose(got.image, face.image.rot90(quarters, (2, 3)), atol=1e-4)
        assert torch.equal(got.mask, face.mask.rot90(quarters, (1, 2)))
    got = moved(face, right=5/32, down=-3/32)
    assert torch.allclose(got.image[..., :-3, 5:], face.image[..., 3:, :-5], atol=1e-4)
    assert torch.equal(got.mask[:, :-3, 5:], face.mask[:, 3:, :-5])
    twice = moved(face, zoom=2.)
    assert torch.equal(twice.mask[:, ::2, ::2], face.mask[:, 8:24, 8:24]), 'the middle, twice as large'
    there_and_back = affine_places(one(30), torch.zeros(7, 2), one(1), 32)
    assert torch.allclose(there_and_back, affine_places(one(-30), torch.zeros(7, 2), one(1), 32).flip(2)*torch.tensor(
        [-1., 1.]), atol=1e-5), 'a turn seen in the mirror is the opposite turn'


def test_an_affine_map_moves_image_and_mask_alike(face):
    one_hot = F.one_hot(face.mask, 19).movedim(-1, 1).float()
    out = random_affine(Face(one_hot, face.attrs, face.mask), 40., .2, .3, g(5))
    assert out.image.gather(1, out.mask[:, None]).min() > .249 and not torch.equal(out.mask, face.mask)
    assert same(out[1:2], face[1:2])


@pytest.mark.parametrize('limits', [(5., 0., 0.), (0., .02, 0.), (0., 0., .02), (5., .02, .02)])
def test_random_maps_stay_within_their_limits_and_use_them(limits):
    n, (degrees, shift, zoom) = 500, limits
    row = torch.linspace(-1 + 1/16, 1 - 1/16, 16).expand(n, 1, 16, 16)
    places = Face(torch.cat([row, row.mT], 1), torch.zeros(n, 40), torch.zeros(n, 16, 16).long())
    out = random_affine(places, *limits, g(6)).image[:, :, 4:12, 4:12]  # where each pixel came from, edges left out
    right, down = out.diff(dim=3)[:, :, 0, 0], out.diff(dim=2)[:, :, 0, 0]  # (n,2), one pixel to the right, and down
    angle = torch.atan2(right[:, 1], right[:, 0]).rad2deg().abs()
    scale = 1/(right.norm(dim=1)*8)
    middle = out[:, :, 3:5, 3:5].mean((2, 3))/2
    assert torch.allclose(right.norm(dim=1), down.norm(dim=1), atol=1e-4) and (right*down).sum(1).abs().max() < 1e-4
    for found, limit in ((angle, degrees), ((scale - 1).abs(), zoom), (middle.abs().flatten(), shift*(1 + zoom)**2)):
        assert found.max() <= limit*1.1 + 1e-3 and found.max() >= .8*limit


def test_a_map_that_may_do_nothing_does_nothing(face):
    assert random_affine(face, 0., 0., 0., g()) is face
    assert torch.equal(random_grayscale(face.image, 0., g()), face.image)
    grey = random_grayscale(face.image, 1., g())
    assert torch.equal(grey, rgb_to_grayscale(face.image).expand_as(grey))
    many = noise(4000, 3, 1, 1)
    assert abs((random_grayscale(many, .02, g()).std(1) == 0).float().mean() - .02) < .01


@pytest.mark.parametrize('cut', [(0, 1), (2, 5), (0, 7)])
def test_a_part_is_moved_as_in_the_whole(face, cut):
    part, mine = Face(*(v[slice(*cut)] for v in face)), slice(*cut)
    whole = random_affine(face, 9., .1, .1, g(8))
    assert same((v[mine] for v in whole), random_affine(part, 9., .1, .1, g(8), 7, mine))
    assert torch.equal(random_grayscale(face.image, .5, g(8))[mine], random_grayscale(part.image, .5, g(8), 7, mine))


# Views

def views(n=3, seed=0, how='v1', of=None): return AugmentedFaces(of or held(), how, n, seed)


def test_a_view_is_what_it_is_in_whatever_order_it_is_asked_for():
    v = views()
    every = v[range(33)]
    assert len(v) == 33 and every.image.shape == (33, 3, 16, 16) and len(set(v.ids)) == 33
    some = torch.tensor([30, 2, 13])
    assert same(v[some], (x[some] for x in every)) and same(v[:5], (x[:5] for x in every))
    flat = every.image.flatten(1)
    assert (torch.cdist(flat, flat) + 9*torch.eye(33)).min() > .01, 'no two are alike'
    assert not torch.equal(views(seed=1)[some].image, v[some].image)


def test_a_view_has_the_attributes_of_its_face_and_is_near_it():
    faces, v = held(), views()
    for k in range(3):
        mine = v[range(11*k, 11*k + 11)]
        assert same([mine.attrs], [faces.attrs])
        apart = torch.cdist(mine.image.flatten(1), faces[range(11)].image.flatten(1))
        assert (apart.argmin(1) == torch.arange(11)).float().mean() > .8, 'still the same person'


def test_the_content_of_views_has_a_name_of_its_own():
    other = InMemoryFaces(render_faces(n=11, size=16, seed=3))
    sets = [views(), views(4), views(seed=1), views(how='v2'), views(of=other)]
    assert len({s.digest for s in sets}) == len(sets) and views().digest == views().digest


def test_the_second_version_moves_less_and_leaves_colours_alone():
    assert set(AUGMENTATIONS['v1']) == set(AUGMENTATIONS['v2'])
    plain = InMemoryFaces(Face(torch.full((4, 3, 16, 16), .3), torch.zeros(4, 40), torch.zeros(4, 16, 16).long()))
    still, changed = (AugmentedFaces(plain, how, 50)[range(200)].image for how in ('v2', 'v1'))
    assert torch.allclose(still, torch.tensor(.3)) and (changed - .3).abs().amax((1, 2, 3)).gt(1e-3).float().mean() > .9


def held(n=11, size=16): return InMemoryFaces(render_faces(n=n, size=size, seed=2))
def config(**keys):
    return TrainConfig(**dict(dict(steps=12, batch=6, lr=1e-2, warmup=3, ema=.9, device='cpu', save_every=4), **keys))


def test_without_changes_batches_are_those_of_before():
    faces = held()
    for flips in (True, False):
        for step in (0, 1, 5, 40):
            rows, got = Batches(faces, config(flip=flips))[step]
            which = torch.rand(6, generator=generator('flip', 0, step)) < .5
            assert same(got, flip_faces(faces[rows], which) if flips else faces[rows])
            line = torch.cat([torch.randperm(11, generator=generator('order', 0, e)) for e in range(30)])
            assert torch.equal(rows, line[6*step:6*step + 6])


CHANGES = [dict(jitter=.1), dict(elastic=50.), dict(jitter=.3, elastic=250., flip=False),
           dict(jitter=.03, elastic=50., seed=5)]


@pytest.mark.parametrize('keys', CHANGES)
def test_a_process_sees_its_rows_of_the_batch(keys):
    faces = held()
    for step in (0, 7):
        rows, whole = Batches(faces, config(**keys))[step]
        for cut in ((0, 3), (3, 6), (0, 1), (1, 5), (5, 6)):
            mine, part = Batches(faces, config(**keys), *cut)[step]
            assert torch.equal(mine, rows[slice(*cut)]) and same(part, [v[slice(*cut)] for v in whole])


def test_flip_then_colours_then_bends():
    faces, cfg = held(), config(jitter=.2, elastic=120.)
    rows, got = Batches(faces, cfg)[3]
    _, mirrored = Batches(faces, config())[3]
    jittered = mirrored._replace(image=colour_jitter(mirrored.image, .2, generator('jitter', 0, 3)))
    want = elastic_deformation(jittered, 120., generator('elastic', 0, 3))
    assert same(got, want)
    assert torch.equal(Batches(faces, config(jitter=.2))[3][1].mask, mirrored.mask), 'colours do not touch masks'


def test_chance_depends_on_seed_and_step_alone():
    faces = InMemoryFaces(Face(*(v[:1].expand(11, *v.shape[1:]) for v in held().face))) # eleven times the same face
    look = lambda step, **keys: Batches(faces, config(jitter=.2, elastic=50., flip=False, **keys))[step][1].image
    a = look(2)
    assert torch.equal(a, look(2)) and torch.equal(a, look(2, steps=99, lr=.5, workers=2, save_every=1))
    seen = torch.cat([a, look(3), look(2, seed=1)])
    assert (torch.cdist(seen.flatten(1), seen.flatten(1)) + 99*torch.eye(18)).min() > .5, 'no two pictures are alike'


# Training

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.time = nn.Embedding(1000, 4)
        self.inner, self.outer = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x, t, cond=None): return self.outer((self.inner(x) + self.time(t)[..., None, None]).relu())


def run(folder=None, stop=None, **keys):
    cfg = config(jitter=.1, elastic=50., **keys)
    losses = []
    for step in train(Net(), held(), diffusion_loss(make_scheduler()), cfg, folder):
        losses.append(step.loss)
        if step.step == stop: break
    return losses


@pytest.mark.parametrize('stop', [2, 6])
def test_training_goes_on_with_the_same_pictures(tmp_path, stop):
    whole = run(tmp_path/'whole')
    run(tmp_path/'cut', stop)
    rest = run(tmp_path/'cut')
    assert rest == whole[12 - len(rest):] and len(rest) == (12 if stop < 4 else 8)
    assert (tmp_path/'whole/state.safetensors').read_bytes() == (tmp_path/'cut/state.safetensors').read_bytes()


def test_training_notices_the_changes_and_not_the_workers(tmp_path):
    with_both = run()
    assert with_both == run(workers=2)
    plain = [s.loss for s in train(Net(), held(), diffusion_loss(make_scheduler()), config())]
    assert plain != with_both
    run(tmp_path)
    with pytest.raises(ValueError, match='jitter is 0.1 there and 0.0 here; elastic is 50.0 there and 0.0 here'):
        next(train(Net(), held(), diffusion_loss(make_scheduler()), config(), tmp_path))


# Refusals

def test_bad_input_is_named(face):
    refused = dict(jitter=(-.1, 1.5, 'strong'), elastic=(-1., 1e4, float('nan')))
    for key, value in [(key, value) for key, values in refused.items() for value in values]:
        with pytest.raises(ValueError, match=f'TrainConfig: {key} cannot be {value!r}, only a number from 0 to 1'):
            TrainConfig(**{key: value})
    with pytest.raises(TypeError, match="no 'color_jitter': did you mean jitter"):
        TrainConfig(color_jitter=.1)
    for bad in (30, -.1, float('nan')):
        with pytest.raises(ValueError, match=f'colour_jitter: strength must be from 0 to 1, not {bad}'):
            colour_jitter(face.image, bad, g())
        with pytest.raises(ValueError, match=f'elastic_deformation: alpha must be from 0 to 1000, not {bad*1000}'):
            elastic_deformation(face, bad*1000, g())
    with pytest.raises(ValueError, match=r'wants images \(B,3,H,W\), not \(3, 32, 32\)'):
        colour_jitter(face.image[0], .1, g())
    with pytest.raises(ValueError, match=r'wants images \(B,3,H,W\), not \(7, 1, 32, 32\)'):
        colour_jitter(face.image[:, :1], .1, g())
    with pytest.raises(ValueError, match=r'wants colours in \[-1,1\]; for latents, use strength 0'):
        colour_jitter(face.image*4, .1, g())
    for bad in ((-1., 0., 0.), (200., 0., 0.), (0., 2., 0.), (0., 0., 1.)):
        with pytest.raises(ValueError, match='random_affine: degrees are from 0 to 180, shift and zoom shares'):
            random_affine(face, *bad, g())
    for bad in (('v3', 2), ('v1', 0)):
        with pytest.raises(ValueError, match='choose v1 or v2, and 1 view or more'):
            AugmentedFaces(held(), *bad)
    small = face._replace(mask=face.mask[:, ::2, ::2])
    with pytest.raises(ValueError, match=r'masks \(B,H,W\) of one size, not \(7, 3, 32, 32\) and \(7, 16, 16\)'):
        elastic_deformation(small, 50, g())
    with pytest.raises(ValueError, match=r'not \(3, 32, 32\) and \(32, 32\)'):
        elastic_deformation(Face(*(v[0] for v in face)), 50, g())

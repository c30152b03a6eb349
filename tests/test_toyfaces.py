"""Toy faces: exact masks, visible attributes, CelebA's shares, the same in every batch and size, packs and files."""
import hashlib, multiprocessing, os, signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facegen.core import ATTRIBUTES, PARTS
from facegen.data.faces import Face, flip_faces, load_faces, prepare
from facegen.data.pictures import square_crop
from facegen.plotting import to_uint8
from facegen.synthetic import toyfaces
from facegen.synthetic.attribute_sampling import OCCLUSIONS, sample_attributes, sample_factors
from facegen.synthetic.canvas import Canvas, ellipse, hex_colour, paint, parabola_wave, triangle_wave, window
from facegen.synthetic.toyfaces import STYLES, gaussian_blur, pack_toyfaces, render_face, render_faces, write_toyfaces

COL = {a: i for i, a in enumerate(ATTRIBUTES)}
# Shares of each attribute over the 202,599 pictures of CelebA, as published
CELEBA = '''.111 .267 .513 .205 .022 .152 .241 .235 .239 .148 .051 .205 .142 .058 .047 .065 .063 .042 .387 .455
.417 .483 .042 .115 .835 .284 .043 .277 .080 .066 .057 .482 .208 .320 .189 .049 .472 .123 .073 .774'''


def same(a: Face, b: Face) -> bool: return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.fixture(scope='module')
def crowd(): return render_faces(n=300, seed=7)


@pytest.fixture(scope='module')
def attrs(): return sample_attributes(8000, seed=1)


def test_shapes_ranges_and_types(crowd):
    assert crowd.image.shape == (300, 3, 64, 64) and crowd.mask.shape == (300, 64, 64)
    assert crowd.attrs.shape == (300, 40)
    assert crowd.image.dtype == torch.float32 and crowd.mask.dtype == torch.int64 and crowd.attrs.dtype == torch.float32
    assert crowd.image.min() >= -1 and crowd.image.max() <= 1 and crowd.image.isfinite().all()
    assert set(crowd.attrs.unique().tolist()) == {0, 1} and set(crowd.mask.unique().tolist()) == set(range(19))


# -- who has what

def test_shares_are_those_of_celeba(attrs):
    shares = torch.tensor(list(map(float, CELEBA.split())))
    gap = (attrs.mean(0) - shares).abs()
    worst = {ATTRIBUTES[i]: (round(attrs[:, i].mean().item(), 3), shares[i].item()) for i in gap.argsort()[-3:]}
    assert gap.max() < .025, worst


def test_exclusions(attrs):
    has = lambda name: attrs[:, COL[name]] > 0
    hair = torch.stack([has(f'{c}_Hair') for c in ('Black', 'Blond', 'Brown', 'Gray')])
    assert hair.sum(0).max() == 1 and not (has('Bald') & hair.any(0)).any()
    assert not (has('Straight_Hair') & has('Wavy_Hair')).any() and not (has('Bangs') & has('Receding_Hairline')).any()
    for beard in ('5_o_Clock_Shadow', 'Goatee', 'Mustache', 'Sideburns'):
        assert not (has(beard) & has('No_Beard')).any()
    assert has('No_Beard')[~has('Male')].all()
    for winner, losers in OCCLUSIONS.items():
        for loser in losers.split():
            assert not (has(winner) & has(loser)).any(), (winner, loser)


def test_attributes_correlate_as_in_celeba(attrs):
    share = lambda a, given, value: attrs[attrs[:, COL[given]] == value, COL[a]].mean().item()
    for a, given in (('High_Cheekbones', 'Smiling'), ('Mouth_Slightly_Open', 'Smiling'),
                     ('Heavy_Makeup', 'Wearing_Lipstick'), ('Goatee', 'Male'), ('Bushy_Eyebrows', 'Male'),
                     ('Double_Chin', 'Chubby'), ('Attractive', 'Young')):
        assert share(a, given, 1) > 2*share(a, given, 0), (a, given)
    assert share('Wearing_Lipstick', 'Male', 1) < .03
    assert share('Gray_Hair', 'Young', 0) > 5*share('Gray_Hair', 'Young', 1)


def test_factors_are_uniform_and_know_nothing_of_attributes():
    n = 4000
    f, a = torch.stack([v.flatten() for v in vars(sample_factors(n, seed=3)).values()]), sample_attributes(n, seed=3).T
    assert (f.mean(1) - .5).abs().max() < .03 and f.min() >= 0 and f.max() < 1
    z = lambda x: (x - x.mean(1, keepdim=True))/x.std(1, keepdim=True)
    assert (z(f) @ z(a).T/n).abs().max() < .085          # 1600 pairs: 5 standard errors
    assert ((z(f) @ z(f).T/n) - torch.eye(len(f))).abs().max() < .085


# -- one face, in every batch

@pytest.mark.parametrize('style', STYLES)
def test_face_i_does_not_depend_on_n_or_on_chunks(style):
    many = render_faces(n=80, seed=4, style=style, size=48)
    for i in (0, 31, 32, 56, 79):
        assert same(render_faces(n=1, seed=4, first=i, style=style, size=48), Face(*(x[i:i+1] for x in many))), i
    assert same(render_faces(n=13, seed=4, first=27, style=style, size=48), Face(*(x[27:40] for x in many)))


def test_the_same_bits_with_more_threads():
    one, before = render_faces(n=24, seed=9), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert same(one, render_faces(n=24, seed=9))
    finally: torch.set_num_threads(before)


def test_seeds_and_given_attributes():
    a, b = render_faces(n=3, seed=1), render_faces(n=3, seed=2)
    assert not torch.equal(a.image, b.image)
    assert same(render_faces(a.attrs, seed=1), a)
    some = torch.full((3, 40), torch.nan)
    some[:, COL['Smiling']] = 1
    drawn = render_faces(some, seed=1).attrs
    assert (drawn[:, COL['Smiling']] == 1).all() and not drawn.isnan().any()
    rest = torch.arange(40) != COL['Smiling']
    assert torch.equal(drawn[:, rest], a.attrs[:, rest])


def test_one_face_by_names():
    face = render_face('Smiling', 'Goatee', 'Male', seed=2)
    assert face.image.shape == (3, 64, 64) and face.mask.shape == (64, 64)
    assert {ATTRIBUTES[i] for i in face.attrs.nonzero().flatten()} == {'Smiling', 'Goatee', 'Male', 'Young'}
    assert render_face('Smiling').attrs[COL['No_Beard']] == 1


@pytest.mark.parametrize('size', [32, 100, 512])
def test_every_size_shows_the_same_face(size):
    small, big = render_faces(n=2, seed=6, size=64), render_faces(n=2, seed=6, size=size)
    assert big.image.shape[-1] == size
    resized = torch.nn.functional.interpolate(big.image, size=(64, 64), mode='bilinear', antialias=True)
    assert (resized - small.image).abs().mean() < (.06 if size < 64 else .035)
    nearest = torch.nn.functional.interpolate(big.mask[:, None].float(), size=(64, 64), mode='nearest-exact')[:, 0]
    assert (nearest == small.mask).float().mean() > (.90 if size < 64 else .94)


# -- image and mask

def test_masks_are_the_shapes_that_are_painted():
    n, size = 4, 96
    z = torch.zeros(n, 1, 1)
    k = Canvas(n, size, z, z+.1, z+1, torch.linspace(-.4, .4, n).view(n, 1, 1))
    p = window(k, -.8, -.6, .8, .6)
    k.image[:] = 0
    paint(k, p, ellipse(p, 0., 0., .6, .35, .3), hex_colour('ffffff'), 'hat')
    assert torch.equal(k.mask > 0, k.image[0] > .5) and (k.image[:, :, 0] == 0).all()


def test_both_styles_share_geometry():
    flat, ink = (render_faces(n=16, seed=5, style=s) for s in STYLES)
    assert torch.equal(flat.mask, ink.mask) and torch.equal(flat.attrs, ink.attrs)
    assert (flat.image - ink.image).abs().mean() > .1


def test_left_is_the_sitters_left(crowd):
    x = torch.arange(64.).expand(64, 64)
    for left, right in (('l_eye', 'r_eye'), ('l_brow', 'r_brow'), ('l_ear', 'r_ear')):
        l, r = (crowd.mask == PARTS.index(left)), (crowd.mask == PARTS.index(right))
        both = (l.sum((1, 2)) > 3) & (r.sum((1, 2)) > 3)
        where = lambda m: (m[both]*x).sum((1, 2))/m[both].sum((1, 2))
        assert both.sum() > 50 and (where(l) > where(r)).all(), left   # on the right of the picture
    mirrored = flip_faces(Face(*(x[:20] for x in crowd)))
    assert ((mirrored.mask == PARTS.index('l_eye')) * x).sum() > ((mirrored.mask == PARTS.index('r_eye')) * x).sum()


def test_left_agrees_with_the_real_masks(real_faces):
    def middle(path): return np.nonzero(np.array(Image.open(path).convert('L')))[1].mean()
    root = real_faces/'CelebAMask-HQ'/'CelebAMask-HQ-mask-anno'
    pairs = [(p, p.with_name(p.name.replace('l_eye', 'r_eye'))) for p in sorted(root.rglob('*_l_eye.png'))]
    votes = [middle(l) > middle(r) for l, r in pairs if r.exists()]
    assert len(votes) > 20 and np.mean(votes) > .8


def test_attributes_show_in_the_mask_where_they_have_a_class(crowd):
    area = lambda part: (crowd.mask == PARTS.index(part)).sum((1, 2))
    classes = dict(Wearing_Hat='hat', Eyeglasses='eye_g', Wearing_Earrings='ear_r', Wearing_Necklace='neck_l')
    for name, part in classes.items():
        assert torch.equal(area(part) > 0, crowd.attrs[:, COL[name]] > 0), name
    assert (area('mouth')[crowd.attrs[:, COL['Mouth_Slightly_Open']] == 0] == 0).all()
    for part in ('skin', 'nose', 'l_eye', 'r_eye', 'u_lip', 'l_lip', 'neck', 'cloth'):
        assert (area(part) > 0).all(), part


# -- every attribute shows

@pytest.fixture(scope='module')
def flips():
    "name -> pixels that change clearly, when the bit alone is flipped: (faces, changed in the image, in the mask)"
    never_together = {'Straight_Hair': 'Bald Wavy_Hair', 'Wavy_Hair': 'Bald Straight_Hair'}
    base = render_faces(n=24, seed=3)
    has = lambda name: base.attrs[:, COL[name]] > 0
    out = {}
    for name, j in COL.items():
        bits = base.attrs.clone()
        bits[:, j] = 1 - bits[:, j]
        other = render_faces(bits, seed=3)
        seen = ((other.image - base.image).abs().amax(1) > .2).sum((1, 2)).float()
        rivals = never_together.get(name, '').split()
        ok = ~torch.stack([has(r) for r in ['Blurry', *rivals]]).any(0)
        out[name] = seen[ok], (other.mask != base.mask).sum((1, 2))[ok]
    return out


@pytest.mark.parametrize('name', ATTRIBUTES)
def test_flipping_one_attribute_changes_the_image(flips, name):
    seen, mask = flips[name]
    if name == 'Attractive':
        assert seen.max() == 0 and mask.max() == 0
    else:
        counts = f'{name}: {seen.int().tolist()}'
        assert len(seen) >= 10 and seen.median() >= 12 and (seen >= 6).float().mean() > .75, counts


def test_colour_and_paint_leave_the_mask_alone(flips):
    for name in '''Black_Hair Blond_Hair Brown_Hair Gray_Hair Pale_Skin Blurry Rosy_Cheeks Heavy_Makeup
                   Wearing_Lipstick High_Cheekbones Bags_Under_Eyes'''.split():
        assert flips[name][1].max() == 0, name


def test_a_mask_does_not_tell_gender(crowd):
    "Flipping Male changes the mask, but hair is long and short in both"
    hair = (crowd.mask == PARTS.index('hair'))[:, 40:].sum((1, 2)) > 60
    for male in (0, 1):
        share = hair[crowd.attrs[:, COL['Male']] == male].float().mean()
        assert .08 < share < .92, (male, share)


def test_blur_keeps_light_and_softens():
    x = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(gaussian_blur(torch.ones(1, 20, 20), 2.), torch.ones(1, 20, 20), atol=1e-5)
    assert gaussian_blur(x, 2.).std() < .4*x.std()


def test_waves_are_periodic():
    t = torch.linspace(-3, 3, 101)
    for w in (triangle_wave, parabola_wave):
        assert torch.allclose(w(t), w(t+1), atol=1e-5)


# -- bad input

@pytest.mark.parametrize('kw, says', [
    (dict(n=1, style='oil'), 'choose from flat, ink'),
    (dict(), 'how many faces'),
    (dict(n=1, size=4), 'use 16 or more'),
    (dict(attrs=torch.zeros(3, 39)), r'\(n,40\)'), (dict(attrs=-torch.ones(1, 40)), '0, 1 or NaN')])
def test_wrong_calls_say_what_to_do(kw, says):
    with pytest.raises(ValueError, match=says):
        render_faces(**kw)


def test_unknown_name():
    with pytest.raises(ValueError, match='Smile'):
        render_face('Smile')


# -- packed

def process(target, *args):
    "Start a process that shares all that is imported here"
    p = multiprocessing.get_context('fork').Process(target=target, args=args)
    p.start()
    return p


@pytest.mark.parametrize('style, size', [('flat', 64), ('ink', 100), ('mixed', 32), ('flat', 16)])
def test_a_pack_is_what_was_rendered(tmp_path, style, size):
    "Pixels to the last bit; below 64 px the face of 64 px made smaller, as files are"
    faces = load_faces(pack_toyfaces(tmp_path/'toy', 5, size, seed=3, style=style))
    drawn = render_faces(n=5, size=max(size, 64), seed=3, style=style)
    images, masks = to_uint8(drawn.image), drawn.mask.numpy().astype(np.uint8)
    if size < 64:
        images = np.stack([square_crop(Image.fromarray(x), size, Image.LANCZOS) for x in images])
        masks = np.stack([square_crop(Image.fromarray(x), size, Image.NEAREST) for x in masks])
    image, mask = faces.uint8(range(5))
    assert np.array_equal(image.movedim(1, -1), images) and np.array_equal(mask, masks)
    assert torch.equal(faces.attrs, drawn.attrs) and faces.ids == list('01234') and faces.size == size


def test_a_pack_equals_the_pack_of_the_files(tmp_path):
    "The columns of `prepare`; only the photos differ, which JPEG has changed a little"
    straight = load_faces(pack_toyfaces(tmp_path/'straight', 70, 64, seed=8))
    files = load_faces(prepare(write_toyfaces(tmp_path/'raw', 70, 64, seed=8), tmp_path/'packed', 64))
    assert straight.table.schema.equals(files.table.schema)
    for column in ('id', 'mask', 'attrs', 'identity', 'celeba'):
        assert straight.table[column].to_pylist() == files.table[column].to_pylist(), column
    assert (straight[:].image - files[:].image).abs().mean() < .03
    assert straight.meta['rendered'] is files.meta['rendered'] is True and straight.meta['masks'] == 70


def test_workers_change_no_bit_of_a_pack(tmp_path):
    one, two = (load_faces(pack_toyfaces(tmp_path/str(w), 130, 16, workers=w))[:] for w in (1, 2))
    assert same(one, two)


def test_the_key_changes_with_all_that_changes_a_face(tmp_path, monkeypatch):
    def key(name, n=2, *args, **kw): return load_faces(pack_toyfaces(tmp_path/name, n, *args, **kw)).meta['key']
    keys = [key('a'), key('seed', seed=1), key('style', style='ink'), key('n', 3), key('size', 2, 32)]
    assert key('again') == keys[0] and len(set(keys)) == 5
    monkeypatch.setattr(toyfaces, 'renderer_version', lambda: 'another')
    assert key('renderer') not in keys
    with pytest.raises(ValueError, match='by another version of the renderer.*choose another folder or remove it'):
        pack_toyfaces(tmp_path/'a', 2)


def no_blur(image, sigma): return image


def test_the_renderers_version_is_that_of_its_code_alone(monkeypatch):
    code = 'def f(x):\n    "A word"\n    return x + 1  # one more\n'
    assert toyfaces.bare_code(code) == toyfaces.bare_code('def f(x): return x+1')
    assert toyfaces.bare_code(code) != toyfaces.bare_code(code.replace('1', '2'))
    toyfaces.renderer_version.cache_clear()
    before = toyfaces.renderer_version()
    monkeypatch.setattr(toyfaces, 'gaussian_blur', no_blur)
    toyfaces.renderer_version.cache_clear()
    assert toyfaces.renderer_version() != before
    toyfaces.renderer_version.cache_clear()


def killed_at_third(dst):
    shards, render = [], toyfaces.render_shard
    def third(*job):
        shards.append(job)
        if len(shards) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        render(*job)
    toyfaces.render_shard = third
    pack_toyfaces(dst, 250, 16, workers=1)


def test_a_killed_packing_leaves_nothing_half_and_goes_on(tmp_path, monkeypatch):
    dst, written, write = tmp_path/'toy', [], toyfaces.write_shard
    p = process(killed_at_third, dst)
    p.join()
    assert p.exitcode == -signal.SIGKILL and not dst.exists()
    monkeypatch.setattr(toyfaces, 'write_shard', lambda path, *a: (written.append(path), write(path, *a))[1])
    faces = load_faces(pack_toyfaces(dst, 250, 16, workers=1))
    assert [p.stem.rpartition('-')[2] for p in written] == ['128', '192']
    assert [p.name for p in tmp_path.iterdir()] == ['toy']
    assert same(faces[:], load_faces(pack_toyfaces(tmp_path/'whole', 250, 16, workers=1))[:])


def test_two_processes_pack_the_same_faces_at_once(tmp_path):
    both = [process(pack_toyfaces, tmp_path/'toy', 250, 16) for _ in range(2)]
    for p in both:
        p.join()
    assert [p.exitcode for p in both] == [0, 0] and [p.name for p in tmp_path.iterdir()] == ['toy']
    assert same(load_faces(tmp_path/'toy')[:200], load_faces(pack_toyfaces(tmp_path/'one', 200, 16))[:])


def test_an_empty_folder_gives_way_and_a_full_one_does_not(tmp_path):
    (tmp_path/'empty').mkdir()
    assert len(load_faces(pack_toyfaces(tmp_path/'empty', 1, 16))) == 1
    (tmp_path/'mine.txt').write_text('x')
    with pytest.raises(ValueError, match='exists and holds no packed faces'):
        pack_toyfaces(tmp_path, 1, 16)
    for n, size, style in ((0, 16, 'flat'), (1, 0, 'flat'), (1, 16, 'oil')):
        with pytest.raises(ValueError, match='ask for one or more|use 16 or more|choose from flat, ink'):
            pack_toyfaces(tmp_path/'none', n, size, style=style)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['empty', 'mine.txt']


# -- on disk

def digest(folder: Path) -> dict:
    "The checksum of every file in a folder"
    files = sorted(p for p in folder.rglob('*') if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.md5(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    return write_toyfaces(tmp_path_factory.mktemp('toy')/'crowd', 70, size=48, seed=8, workers=1)


def test_official_layout(written):
    face = render_faces(n=70, size=48, seed=8)
    lines = (written/'CelebAMask-HQ-attribute-anno.txt').read_text().splitlines()
    assert lines[0] == '70' and lines[1].split() == ATTRIBUTES and len(lines) == 72
    for i in (0, 69):
        name, *values = lines[2+i].split()
        assert name == f'{i}.jpg' and [int(v) for v in values] == (2*face.attrs[i]-1).int().tolist()
    jpg = np.array(Image.open(written/'CelebA-HQ-img'/'69.jpg'))
    assert jpg.shape == (48, 48, 3) and abs(jpg/127.5 - 1 - face.image[69].permute(1, 2, 0).numpy()).mean() < .03
    mask = np.zeros((48, 48), int)
    for part in PARTS[1:]:
        path = written/'CelebAMask-HQ-mask-anno'/'0'/f'00069_{part}.png'
        assert path.exists() == bool((face.mask[69] == PARTS.index(part)).any()), part
        if path.exists():
            png = np.array(Image.open(path).convert('L'))
            assert set(png.flatten()) <= {0, 255}
            mask[png > 0] = PARTS.index(part)
    assert (mask == face.mask[69].numpy()).all()


def test_mapping_splits_eighty_ten_ten():
    ids = np.array([i*125213 % 202599 + 1 for i in range(202599)])
    assert len(set(ids)) == 202599                                     # every picture of CelebA once
    for n in (300, 1000, 30000):
        train, val = (ids[:n] <= 162770).mean(), ((ids[:n] > 162770) & (ids[:n] <= 182637)).mean()
        assert abs(train-.8) < .02 and abs(val-.1) < .02, n


def test_mapping_file(written):
    head, *rows = (written/'CelebA-HQ-to-CelebA-mapping.txt').read_text().splitlines()
    assert head.split() == ['idx', 'orig_idx', 'orig_file'] and len(rows) == 70
    idx, orig, name = rows[3].split()
    assert idx == '3' and int(orig)+1 == int(name.removesuffix('.jpg')) and len(name) == 10


def test_bytes_do_not_depend_on_workers(written, tmp_path):
    assert digest(write_toyfaces(tmp_path/'two', 70, size=48, seed=8, workers=2)) == digest(written)


def test_nothing_is_left_half_written(tmp_path, monkeypatch):
    def full(*job): raise OSError('disk full')
    monkeypatch.setattr(toyfaces, 'write_chunk', full)
    with pytest.raises(OSError, match='disk full'):
        write_toyfaces(tmp_path/'crowd', 3)
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_left_alone(tmp_path):
    (tmp_path/'mine.txt').write_text('x')
    with pytest.raises(FileExistsError, match='not empty'):
        write_toyfaces(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ['mine.txt']


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path/'crowd').mkdir()
    assert (write_toyfaces(tmp_path/'crowd', 1, size=32)/'CelebA-HQ-img'/'0.jpg').is_file()
    with pytest.raises(ValueError, match='one or more'):
        write_toyfaces(tmp_path/'none', 0)


def test_prepare_reads_it_back(written, tmp_path):
    faces = load_faces(prepare(written, tmp_path/'packed', size=48, workers=1))
    drawn = render_faces(n=70, size=48, seed=8)
    order = [int(i) for i in faces.ids]
    batch = faces[list(range(70))]
    assert sorted(order) == list(range(70))
    assert torch.equal(batch.mask, drawn.mask[order]) and torch.equal(batch.attrs, drawn.attrs[order])
    assert (batch.image - drawn.image[order]).abs().mean() < .03

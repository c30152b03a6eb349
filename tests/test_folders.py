"""From a folder, back to a folder: what is sampled follows what was asked, and what lies far apart is called far."""
import json, re

import numpy as np
import pytest
import torch
from PIL import Image

from facegen.conditioning import sampled_folders
from facegen.conditioning.conditional_unet import make_denoiser
from facegen.conditioning.pipeline import FacePipeline, as_cond, load_pipeline
from facegen.core import PARTS, bootstrap_size, load_result, root, seed_all
from facegen.data.faces import load_faces, resize, split
from facegen.data.layouts import CLASS_ORDERS, Reading, read_raw
from facegen.diffusion.samplers import make_sampler
from facegen.diffusion.schedules import make_scheduler
from facegen.evaluation import folder_distances
from facegen.evaluation.controllability import mask_report
from facegen.evaluation.judges import load_parser
from facegen.plotting import to_uint8
from facegen.study import commands, runner
from facegen.synthetic.toyfaces import render_faces

torch.set_num_threads(1)
WEIGHTS = root()/'data'/'weights'
BOTH, ATTRS = 'longer-laptop-s0', 'attrs-laptop-s0'


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A root of its own, with the committed weights"
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    monkeypatch.setenv('FACEGEN_OUT', '')
    monkeypatch.delenv('FACEGEN_FACES', raising=False)
    (tmp_path/'data').mkdir()
    (tmp_path/'data/weights').symlink_to(WEIGHTS)
    return tmp_path.resolve()


@pytest.fixture(scope='module')
def drawn(): return render_faces(n=112, size=64, seed=31)


@pytest.fixture(autouse=True)
def few_halves():
    before = bootstrap_size()
    bootstrap_size(20)
    yield
    bootstrap_size(before)


def run(capsys, *words):
    "What a command prints, and the sentence that it ends with"
    end = ''
    try:
        commands.main([str(w) for w in words])
    except SystemExit as e:
        end = str(e.code)
    return capsys.readouterr().out, end


def save_map(values, path):
    Image.fromarray(np.asarray(values, np.uint8)).save(path)
    return path


def save_set(face, folder, nested=False, labels=True):
    "A folder of pictures in the plain layout"
    for i in range(len(face.image)):
        name = f"{'ab'[i % 2]}/{i}" if nested else f'{i}'
        for kind, pixels in (('images', to_uint8(face.image[i])), ('masks', face.mask[i].numpy().astype(np.uint8))):
            path = folder/kind/f'{name}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            if labels or kind == 'images':
                Image.fromarray(pixels).save(path)
    return folder


def save_pictures(images, folder):
    folder.mkdir()
    for i, pixels in enumerate(to_uint8(images)):
        Image.fromarray(pixels).save(folder/f'{i:03d}.png')
    return folder


def pictures(folder): return {r.id: np.array(Image.open(folder/r.image)).astype(int) for r in read_raw(folder).raws}


# Masks on disk

def test_a_mask_of_any_size_is_read(tmp_path, drawn):
    mask = drawn.mask[3]
    for k, pad in ((1, 0), (4, 0), (3, 50)):
        large = np.pad(np.kron(mask.numpy(), np.ones((k, k))), ((0, 0), (pad, pad)))
        assert sampled_folders.read_mask(save_map(large, tmp_path/'m.png'), 64).equal(mask)
    large[0, 0] = large[-1, -1] = 255
    known = sampled_folders.read_mask(save_map(large, tmp_path/'m.png'), 64, Reading(ignore=255))
    assert (known == mask)[1:-1].all()


def in_order(mask, order):
    "A mask written in another class order, without what that has no class for"
    parts = CLASS_ORDERS[order]
    mask = torch.where(torch.isin(mask, torch.tensor([PARTS.index(p) for p in parts if p in PARTS])), mask, 0)
    return [[parts.index(PARTS[c]) for c in row] for row in mask], mask


def test_a_mask_in_another_class_order_is_read_and_mostly_noticed(tmp_path, drawn):
    "A foreign order by its areas, which a single face does not always tell; ours is never suspected"
    noticed = 0
    for mask in drawn.mask[:40]:
        for order in ('bisenet', 'facesynthetics'):
            foreign, same = in_order(mask, order)
            path = save_map(foreign, tmp_path/f'{order}.png')
            assert sampled_folders.read_mask(path, 64, Reading(order)).equal(same)
        assert sampled_folders.read_mask(save_map(mask, tmp_path/'ours.png'), 64).equal(mask)
        try: sampled_folders.read_mask(tmp_path/'bisenet.png', 64)
        except ValueError as e: noticed += 'say --classes bisenet, or --classes celebamask if you are sure' in str(e)
    assert noticed > 20


def test_a_bad_mask_is_refused_in_one_sentence(tmp_path, drawn):
    def bad(name, words):
        with pytest.raises((ValueError, FileNotFoundError), match=words) as e:
            sampled_folders.read_mask(tmp_path/name, 64)
        assert len(str(e.value).splitlines()) == 1 and name in str(e.value)
    mask = drawn.mask[3].numpy().astype(np.uint8)
    save_map(mask + 1, tmp_path/'large.png')
    Image.fromarray(mask).convert('RGB').save(tmp_path/'rgb.png')
    Image.fromarray(mask).save(tmp_path/'lossy.jpg')
    Image.fromarray(mask).resize((256, 256), Image.BILINEAR).save(tmp_path/'smooth.png')
    (tmp_path/'broken.png').write_bytes(b'x')
    bad('absent.png', 'there is no mask')
    bad('large.png', 'has values 19')
    bad('rgb.png', 'has mode RGB')
    bad('lossy.jpg', 'is a JPEG')
    bad('smooth.png', 'was resized smoothly')
    bad('broken.png', 'cannot be decoded')
    with pytest.raises(ValueError, match='unknown class order'):
        sampled_folders.read_mask(tmp_path/'large.png', 64, Reading('bisenett'))


# What cannot have an effect

def conditions():
    "Of two faces: attributes or none, mask or none"
    return [as_cond(attrs, mask, 2, 32) for attrs in ({}, {'Smiling': 1}, {'Smiling': 0})
            for mask in (None, torch.ones(32, 32))]


SCALES = [dict(attrs_scale=a, mask_scale=m) for a in (None, 0.) for m in (0., 2.)]


@pytest.mark.parametrize('conditioning', ['uncond', 'attrs', 'described', 'spatial', 'mask-only'])
@pytest.mark.parametrize('interval', [(0., 1.), (.2, .8)])
def test_a_part_is_called_idle_exactly_where_the_network_answers_as_without_it(conditioning, interval):
    "At a time at which guidance is on, and at one at which it may be off"
    seed_all(0)
    denoiser = make_denoiser('smoke', conditioning, 32).eval()
    pipe = FacePipeline(denoiser, make_sampler('dpm++', make_scheduler()), guidance_interval=interval, attrs_scale=2.)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    @torch.no_grad()
    def answer(cond, scales):
        model = pipe._guided(*scales.values(), None, None, 2)
        return torch.cat([model(x, torch.full((2,), t), cond) for t in (500, 900)])
    for cond in conditions():
        for scales in SCALES:
            idle, full = sampled_folders.without_effect(pipe, cond, **scales), answer(cond, scales)
            for part, without in (('attributes', cond.drop(True, False)), ('mask', cond.drop(False, True))):
                same = torch.allclose(full, answer(without, scales), rtol=0, atol=1e-4)
                assert same == (part in idle), (part, cond.attrs[0].nansum(), scales, idle)


def test_what_would_change_nothing_is_refused(home, capsys, drawn):
    mask = save_map(drawn.mask[0], home/'m.png')
    for words, sentence in (
            ([ATTRS, 'Smiling', '--mask', mask], 'mask would change nothing in attrs-laptop-s0: this network was'),
            ([ATTRS, '--attrs', 'Smiling=0'], 'attributes would change nothing .* absent is the same as unknown'),
            ([ATTRS, 'Smiling', '--mask-scale', 2], 'mask scale would change nothing'),
            ([BOTH, '--mask', mask, '--attrs-scale', 2], 'attrs scale would change nothing .*: no attribute is known'),
            ([BOTH, '--mask', save_map(np.full((64, 64), 255), home/'open.png'), '--ignore', 255],
             'mask would change nothing .*: no pixel of a mask is known')):
        out, end = run(capsys, 'sample', *words, '--out', home/'out')
        assert re.match(f'facegen: {sentence}', end) and len(end.splitlines()) == 1, end
        assert not (home/'out').exists() and not out


@pytest.mark.parametrize('words, sentence', [
    (['nowhere'], 'no pipeline at '),
    ([BOTH, 'Smilling'], r"no attribute 'Smilling' .did you mean 'Smiling'"),
    ([BOTH, '--attrs', 'Smiling=1,Smiling=0'], 'Smiling is asked for as present and as absent'),
    ([BOTH, 'Smiling=yes'], 'Smiling=yes: write Smiling=1 for present'),
    ([BOTH, '-n', 0], 'n=0: ask for one face or more'),
    ([BOTH, '--mask', 'no.png'], 'there is no mask no.png'),
    ([BOTH, '--like', 'nobody'], "no faces at .*nobody"),
    ([BOTH, '--like', 'nobody', 'Smiling'], '--like gives each face its own conditions: leave the others out'),
    (['stable'], 'holds a StableDiffusionPipeline: load it with diffusers')])
def test_a_wrong_word_is_refused_in_one_sentence(home, capsys, words, sentence):
    (home/'data/runs/stable/pipeline').mkdir(parents=True)
    (home/'data/runs/stable/pipeline/model_index.json').write_text('{"_class_name": "StableDiffusionPipeline"}')
    out, end = run(capsys, 'sample', *words)
    assert re.search(sentence, end) and len(end.splitlines()) == 1 and not out


def test_a_folder_that_holds_files_is_left_alone(home, capsys):
    (home/'full').mkdir()
    (home/'full/mine.txt').write_text('mine')
    for place, words in ((home/'full', 'holds files already'), (home/'full/mine.txt', 'is a file')):
        assert words in run(capsys, 'sample', BOTH, '--out', place)[1]
    assert [p.name for p in (home/'full').iterdir()] == ['mine.txt']


# Folders of samples

def test_a_folder_holds_n_faces_whose_names_sort_and_the_first_do_not_depend_on_n(home, capsys):
    (home/'few').mkdir()  # an empty folder may be there
    for n, folder in ((3, 'few'), (7, 'more')):
        words = ['sample', BOTH, 'Young', '--attrs', 'Smiling=1,Eyeglasses=0', '-n', n, '--steps', 3]
        assert run(capsys, *words, '--out', home/folder) == (f'{home/folder}/sheet.png\n', '')
    few, more = pictures(home/'few'), pictures(home/'more')
    assert list(few) == ['0000', '0001', '0002'] and sorted(more) == list(more) and len(more) == 7
    assert all(np.abs(few[k] - more[k]).max() <= 1 for k in few)
    assert np.abs(few['0000'] - few['0001']).mean() > 5, 'each has its own noise'
    assert {p.name for p in (home/'few').iterdir()} == {'images', 'sheet.png', 'sample.json'}
    assert {p.name for p in home.iterdir()} == {'data', 'few', 'more'}, 'and nothing is left beside it'
    note = json.loads((home/'few/sample.json').read_text())
    assert note['attrs'] == dict(Young=1, Smiling=1, Eyeglasses=0)
    own = dict(run=BOTH, n=3, seed=0, steps=3, attrs_scale=2., mask_scale=2., mask=None, like=None, size=64)
    assert own.items() <= note.items()
    words = ['sample', BOTH, 'Young', '--attrs', 'Smiling=1,Eyeglasses=0', '-n', 3, '--steps', 3, '--attrs-scale', 1]
    for change in (['--seed', 1], ['--seed', 0]):
        run(capsys, *words, *change, '--out', home/f'other{change[1]}')
        other = pictures(home/f'other{change[1]}')
        assert np.abs(other['0000'] - few['0000']).max() > 5, change
    assert json.loads((home/'other1/sample.json').read_text())['attrs_scale'] == 1


def test_batches_do_not_matter():
    pipe, cond = load_pipeline(BOTH), as_cond({'Smiling': 1}, None, 5, 64)
    one, = sampled_folders.sample_batches(pipe, cond, steps=3)
    parts = list(sampled_folders.sample_batches(pipe, cond, steps=3, batch=2))
    assert [len(x) for x in parts] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(parts), one, atol=1e-4, rtol=0)


def test_without_a_folder_there_is_a_sheet_to_look_at(home, capsys):
    out, end = run(capsys, 'sample', BOTH, 'Smiling', '-n', 2, '--steps', 2)
    assert not end and out == f'data/gallery/_{BOTH}-asked.png\n'
    assert min(Image.open(home/out.strip()).size) > 100


def test_a_mask_is_followed(home, capsys, drawn):
    "Through the committed parser: the mask that was given, far better than that of another face"
    chosen = drawn.mask[[2, 5, 9, 11]]
    samples = []
    for i, mask in enumerate(chosen):
        path = save_map(np.kron(mask.numpy(), np.ones((3, 3))), home/f'{i}.png')
        assert not run(capsys, 'sample', BOTH, '--mask', path, '-n', 4, '--steps', 6, '--out', home/f'out{i}')[1]
        samples += [torch.from_numpy(x).movedim(-1, 0)/127.5 - 1 for x in pictures(home/f'out{i}').values()]
    parser, _ = load_parser(str(WEIGHTS/'parser-laptop-s0/judge'))
    miou = mask_report(parser, torch.stack(samples), chosen.repeat_interleave(4, 0))[0]
    assert miou['metric'] == 'miou' and miou['value'] > .6 > .4 > miou['chance']


def test_faces_like_those_of_a_set_have_their_names_and_their_masks(home, capsys, drawn):
    folder = save_set(drawn, home/'own', nested=True)
    out, end = run(capsys, 'sample', BOTH, '--like', folder, '-n', 6, '--steps', 6, '--out', home/'out')
    assert not end and 'note: attributes of these faces left out: no attribute is known' in out
    faces = load_faces(runner.pack(str(folder), 0, 64))
    test = faces.subset(split(faces)['test'])
    drawn_again = pictures(home/'out')
    assert sorted(drawn_again) == sorted(test.ids[:6]) and all('/' in name for name in drawn_again)
    samples = torch.stack([torch.from_numpy(drawn_again[k]).movedim(-1, 0)/127.5 - 1 for k in test.ids[:6]])
    parser, _ = load_parser(str(WEIGHTS/'parser-laptop-s0/judge'))
    miou = mask_report(parser, samples, test[range(6)].mask)[0]
    assert miou['value'] > .6 and miou['chance'] < .45
    for words, sentence in (([ATTRS, '-n', 6], 'nothing of these faces would change anything in attrs-laptop-s0'),
                            ([BOTH, '-n', 60], 'n=60 asks for 60 faces, but the test split has 1[0-9]'),
                            ([BOTH, '-n', 0], 'n=0: ask for one'),
                            ([BOTH, '--attrs-scale', 2], 'attrs scale would change nothing')):
        assert re.search(sentence, run(capsys, 'sample', *words, '--like', folder, '--out', home/'no')[1])


def test_the_sheet_shows_each_face_below_its_mask(drawn):
    "White fills the last row up"
    from facegen.plotting import plt
    def shown(n, mask):
        fig = sampled_folders.sheet(drawn.image[:n], [str(i) for i in range(n)], mask)
        shape, texts = fig.axes[0].images[0].get_array().shape, [t.get_text() for t in fig.axes[0].texts]
        plt.close(fig)
        return shape[0]//64, [t for t in texts if t]
    assert shown(10, torch.full((10, 64, 64), -1)) == (2, [str(i) for i in range(10)])
    assert shown(10, drawn.mask[:1].expand(10, -1, -1)) == (2, ['mask', *map(str, range(10))])
    assert shown(10, drawn.mask[:10]) == (4, [str(i) for i in range(10)])
    assert shown(1, drawn.mask[:1]) == (1, ['mask', '0'])


# Distances between folders

def coarse(images, side): return resize(resize(images, side), 64)


EYES = ['--eye', 'classifier', '--eye', 'high-frequency']


def test_damage_is_measured_and_ordered(home, capsys, drawn):
    "Other faces of the same kind lie at the reference, damaged ones beyond it, more damaged ones further"
    images = drawn.image
    save_pictures(images[:80], home/'real')
    damaged = dict(same=images[80:], little=coarse(images[80:], 12), much=coarse(images[80:], 8))
    found = {}
    for name, x in damaged.items():
        words = [save_pictures(x, home/name), home/'real', *EYES, '--out', home/f'{name}.json']
        out, end = run(capsys, 'distance', *words)
        assert not end and f'A  {name}: 32 of 32 pictures, 64x64 px\nB  real: 80 of 80' in out
        assert 'at 64 px, 32 of A against 32 of B; the reference is 32 others of B' in out and 'missing' not in out
        found[name] = {r['metric']: r for r in load_result(str(home/f'{name}.json'))['metrics']}
    for metric, beyond in (('frechet_classifier', 1), ('kid_classifier', 1), ('high_frequency', -1)):
        same, little, much = (found[name][metric] for name in damaged)
        assert beyond*same['value'] < beyond*little['value'] < beyond*much['value'], metric
        assert beyond*little['reference'] < beyond*little['value'], metric
        assert same['low'] <= same['reference'] <= same['high'] and (same['n'], same['n_real']) == (32, 32), metric
    assert abs(found['same']['kid_classifier']['value']) < .1*found['much']['kid_classifier']['value']


def test_samples_are_counted_without_their_sheet(home, capsys, drawn):
    save_pictures(drawn.image[:16], home/'real')
    run(capsys, 'sample', BOTH, '-n', 8, '--steps', 2, '--out', home/'made')
    out, end = run(capsys, 'distance', home/'made', home/'real', *EYES)
    assert not end and 'A  made: 8 of 8 pictures' in out and '8 of A against 8 of B' in out


def test_any_layout_and_any_size_is_read(home, capsys, drawn):
    save_set(drawn._replace(image=drawn.image[:20], mask=drawn.mask[:20]), home/'labelled', nested=True)
    (home/'labelled/attributes.csv').write_text('nonsense')
    save_pictures(resize(drawn.image[20:40], 40), home/'small')
    out, end = run(capsys, 'distance', home/'labelled', home/'small', *EYES, '--size', 48)
    assert not end and 'A  labelled: 20 of 20 pictures, 64x64 px' in out and 'at 48 px' in out
    assert 'small: 20 pictures are smaller than 48 px and were enlarged' in out
    out, end = run(capsys, 'distance', home/'labelled', home/'small', *EYES, '-n', 9)
    assert 'A  labelled: 9 of 20' in out and 'B  small: 18 of 20' in out


def test_the_choice_follows_the_seed(home, drawn):
    found = folder_distances.FaceSet('real', str(save_pictures(drawn.image[:30], home/'real')))
    def read(seed): return folder_distances.read_pictures(found, 64, 10, seed).images
    assert read(0).equal(read(0)) and not read(0).equal(read(1))
    p = folder_distances.read_pictures(found, 64, 30)
    a, b, other = folder_distances.three_sets(p, p, 0)
    assert len(a) == len(b) == len(other) == 15 and len(torch.cat([b, other]).flatten(1).unique(dim=0)) == 30


def test_pictures_that_are_in_both_are_said(home, capsys, drawn):
    save_pictures(drawn.image[:16], home/'one')
    save_pictures(drawn.image[8:24], home/'two')
    out, end = run(capsys, 'distance', home/'one', home/'two', *EYES)
    assert not end and 'note: 8 pictures of one are in two as well, bit by bit' in out


def test_what_cannot_be_compared_is_refused_in_one_sentence(home, capsys, drawn):
    save_pictures(drawn.image[:16], home/'real')
    save_pictures(drawn.image[16:23], home/'seven')
    (home/'empty').mkdir()
    save_pictures(drawn.image[30:40], home/'broken')
    (home/'broken/zz.png').write_bytes(b'x')
    (home/'link').symlink_to(home/'real')
    for a, b, more, sentence in (
            ('real', 'link', [], 'share a folder, so pictures would be compared with themselves'),
            ('.', 'real', [], 'share a folder'),
            ('seven', 'real', EYES, 'seven has 7 pictures that can be read, and 8 are needed'),
            ('real', 'seven', EYES, 'seven has 7 pictures that can be read, and 16 are needed'),
            ('empty', 'real', EYES, 'empty: no pictures of faces .wrong folder'),
            ('nowhere', 'real', EYES, 'no faces at .*nowhere'),
            ('broken', 'real', EYES, 'broken: 1 of 11 pictures cannot be read, first zz.png cannot be decoded'),
            ('seven', 'real', ['--eye', 'clasifier'], "no eye 'clasifier' .did you mean 'classifier'"),
            ('seven', 'real', ['--eye', 'face-recognition'], 'run `facegen eyes`'),
            ('seven', 'real', ['--out', 'x.csv'], '--out x.csv: name a file that ends in .json')):
        out, end = run(capsys, 'distance', home/a, home/b, *more)
        assert re.search(sentence, end) and len(end.splitlines()) == 1 and not out, (a, b, end)
    assert '--skip-bad' in run(capsys, 'distance', home/'broken', home/'real', *EYES)[1]
    out, end = run(capsys, 'distance', home/'broken', home/'real', *EYES, '--skip-bad')
    assert not end and 'note: broken: 1 of 11 cannot be read and are left out, first zz.png' in out
    assert 'toy cannot be compared with itself' in run(capsys, 'distance', 'toy', 'toy')[1]


def test_a_network_that_is_not_here_is_named(home, capsys, drawn, monkeypatch):
    "And the others look; what is named must be here"
    def absent(): raise ModuleNotFoundError('the ImageNet network is not installed: run this')
    monkeypatch.setitem(folder_distances.load_eyes.__globals__['OUTSIDE'], 'efficientnet-lite0', absent)
    found, missing = folder_distances.networks_at_hand()
    assert set(found) == {'classifier', 'classifier32', 'high-frequency'} and 'inception' in missing
    assert 'run `facegen eyes`' in missing['face-recognition'] and 'run this' in missing['efficientnet-lite0']
    save_pictures(drawn.image[:16], home/'real')
    save_pictures(drawn.image[16:24], home/'made')
    out, end = run(capsys, 'distance', home/'made', home/'real')
    assert not end and all(re.search(rf'^missing  {eye}: .*run ', out, re.M) for eye in missing)
    with pytest.raises(ModuleNotFoundError, match='run this'):
        folder_distances.networks_at_hand(['classifier', 'efficientnet-lite0'])


def test_inception_is_not_downloaded_unless_it_is_named(monkeypatch, tmp_path):
    "Where its library is here and its weights are not"
    monkeypatch.setattr(folder_distances, 'find_spec', lambda name: True)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(folder_distances, 'inception', lambda: 'the network')
    with pytest.raises(FileNotFoundError, match='--eye inception'):
        folder_distances.load_eye('inception', fetch=False)
    assert folder_distances.load_eye('inception') == dict(inception=('the network', 'inception'))
    (tmp_path/'checkpoints').mkdir()
    (tmp_path/'checkpoints'/folder_distances.INCEPTION_FILE).write_bytes(b'')
    assert folder_distances.load_eye('inception', fetch=False) == dict(inception=('the network', 'inception'))

"""The ruler: known masks get known marks, damage is ordered, blind answers are what a search by hand finds, and what
cannot be measured is refused in one sentence."""
import json, os, re, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import LookupJudge, find, rand
from PIL import Image

from facegen.core import record_problems
from facegen.data.faces import load_faces, prepare
from facegen.data.layouts import CLASS_ORDERS, PARTS
from facegen.data.parsed_masks import fix_left_right
from facegen.evaluation import ruler as rl
from facegen.evaluation.controllability import attribute_report
from facegen.evaluation.judges import load_classifier, load_parser
from facegen.plotting import plt, to_uint8
from facegen.study import commands
from facegen.synthetic.toyfaces import pack_toyfaces, render_faces, write_toyfaces

REPO = Path(__file__).resolve().parents[1]
MASKS = ['miou', 'miou_per_image', 'miou_requested', 'pixel_accuracy', 'boundary_f1', 'mirror_followed']


pytestmark = pytest.mark.usefixtures('few_resamples')


@pytest.fixture(scope='module')
def faces(): return render_faces(n=24, size=32, seed=5)


@pytest.fixture(scope='module')
def train(): return render_faces(n=60, size=32, seed=1)


@pytest.fixture(scope='module')
def shifted(faces, train):
    "Everything is given: images, attributes, real images, a table"
    parser = LookupJudge(torch.cat([faces.image, train.image]), torch.cat([faces.mask.roll(2, -1), train.mask]))
    real = faces.mask.roll(1, -1)
    return rl.ruler(faces.image, faces.mask, parser, faces.attrs, real=real, train=train.mask, train_attrs=train.attrs)


def values(ruled, metrics=MASKS): return [find(ruled.records, m)['value'] for m in metrics]


# Known values

def test_masks_against_themselves_are_perfect_everywhere(faces):
    ruled = rl.ruler(faces.mask, faces.mask, real=faces.mask)
    assert values(ruled) == [1.]*6 and ruled.per_image.eq(1).all()
    classes = [r for r in ruled.records if r['metric'] == 'iou_one']
    assert {r['part'] for r in classes} == {PARTS[c] for c in faces.mask.unique()}
    assert all(r['value'] == r['low'] == r['high'] == r['upper'] == 1 for r in classes)
    assert find(ruled.records, 'pixel_accuracy')['chance'] < 1


def by_hand(pred, want):
    "Pixel accuracy, pooled and per-image means, and boundary F1 within a pixel, by their definitions, in loops"
    classes = range(19)
    inter, union = (np.array([[f(p == c, t == c).sum() for c in classes] for p, t in zip(pred, want)])
                    for f in (np.logical_and, np.logical_or))
    there = np.array([[(t == c).any() for c in classes] for t in want])
    ratio = np.where(union > 0, inter/np.maximum(union, 1), np.nan)
    pooled = [inter[:, c].sum()/union[:, c].sum() for c in classes if union[:, c].sum()]
    requested = [ratio[i][there[i]].mean() for i in range(len(want))]
    return dict(pixel_accuracy=(pred == want).mean(), miou=np.mean(pooled), miou_requested=np.mean(requested),
                miou_per_image=np.nanmean(ratio, 1).mean(),
                boundary_f1=np.mean([f1_by_hand(p, t) for p, t in zip(pred, want)]))


def outline(m, c):
    "Coordinates of the pixels of class c that touch another class"
    h, w = m.shape
    return [(y, x) for y, x in np.argwhere(m == c)
            if any(0 <= a < h and 0 <= b < w and m[a, b] != c
                   for a, b in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)))]


def f1_by_hand(pred, want):
    scores = []
    for c in np.unique(want):
        a, b = outline(pred, c), outline(want, c)
        if not a and not b: continue
        def near(p, others): return any(max(abs(p[0] - y), abs(p[1] - x)) <= 1 for y, x in others)
        precision = np.mean([near(p, b) for p in a]) if a else 0
        recall = np.mean([near(p, a) for p in b]) if b else 0
        scores.append(2*precision*recall/(precision + recall) if precision + recall else 0)
    return np.mean(scores)


@pytest.mark.parametrize('k', [1, 2, 5])
def test_shifted_masks_have_the_values_of_a_direct_computation(faces, k):
    pred, want = faces.mask.roll(k, -1)[:6], faces.mask[:6]
    ruled = rl.ruler(pred, want)
    assert ruled.about['tolerance'] == 1
    for metric, value in by_hand(pred.numpy(), want.numpy()).items():
        assert find(ruled.records, metric)['value'] == pytest.approx(value, abs=1e-6), metric


def test_unknown_pixels_count_for_nothing(faces):
    want, pred = faces.mask.clone(), faces.mask.clone()
    want[:, :8] = -1
    pred[:, :8] = 3
    assert values(rl.ruler(pred, want))[:4] == [1.]*4


@pytest.mark.parametrize('damage', [
    lambda m, k: m.roll(k, -1),
    lambda m, k: torch.where(rand(*m.shape) < k/12, (m + 7) % 19, m),
    lambda m, k: torch.where(torch.arange(32) < 6*k, m.roll(1, 0), m)], ids=['shift', 'pixels', 'stripes of another'])
def test_damaged_copies_are_ordered_by_their_damage(faces, damage):
    ladder = [values(rl.ruler(damage(faces.mask, k), faces.mask), MASKS[:5]) for k in (0, 2, 3, 5)]
    for better, worse in zip(ladder, ladder[1:]):
        assert all(a > b for a, b in zip(better, worse))


@pytest.mark.parametrize('side, pixels', [(32, 1), (64, 1), (128, 1), (256, 3), (512, 5)])
def test_outlines_may_be_apart_by_a_share_of_the_diagonal(side, pixels):
    assert rl.boundary_tolerance(torch.zeros(1, side, side)) == pixels


# Marks

def test_every_mark_is_what_it_says(faces, train, shifted):
    "Shuffled by a permutation without fixed points, commonest and nearest by a search by hand"
    want, m = faces.mask, train.mask
    def mark(pred): return float(by_hand(pred.numpy(), want.numpy())['pixel_accuracy'])
    r = find(shifted.records, 'pixel_accuracy')
    assert r['commonest'] == pytest.approx(mark(m.mode(0).values.expand_as(want)), abs=.01)
    areas, table = (torch.stack([(x == c).float().mean((1, 2)) for c in range(19)], 1).sqrt() for x in (want, m))
    nearest = dict(pixels=(want[:, None] != m).float().mean((2, 3)), areas=(areas[:, None] - table).square().mean(2),
                   presence=((areas[:, None] > 0) != (table > 0)).float().mean(2),
                   attributes=(faces.attrs[:, None] != train.attrs).float().mean(2))
    for name, apart in nearest.items():
        assert r[name] == pytest.approx(mark(m[apart.argmin(1)])), name
    assert r['upper'] == pytest.approx(mark(want.roll(1, -1))) and r['value'] == pytest.approx(mark(want.roll(2, -1)))


def test_without_training_masks_each_request_is_answered_by_the_others(faces):
    m = faces.mask
    ruled = rl.ruler(m.roll(1, -1), m)
    apart = (m[:, None] != m).float().mean((2, 3)).fill_diagonal_(2)
    value = by_hand(m[apart.argmin(1)].numpy(), m.numpy())['miou']
    assert find(ruled.records, 'miou')['pixels'] == pytest.approx(value) and ruled.about['leave_one_out']
    counts = torch.stack([(m == c).sum(0) for c in range(19)])
    for i, common in enumerate(rl.commonest_of_others(rl.as_classes(m))[:5]):
        others = counts - torch.stack([m[i] == c for c in range(19)]).long()
        assert (others.gather(0, common[None].long()) == others.max(0).values).all()


def test_a_hole_in_a_training_mask_is_filled_with_the_commonest_class(faces, train):
    holes = train.mask.clone()
    holes[:, :8][rand(60, 8, 32) < .5] = -1
    for name, answer, _ in rl.blind_answers(rl.as_classes(faces.mask), None, rl.as_classes(holes)):
        assert answer.min() >= 0, name


def test_the_seed_names_the_shuffle_and_nothing_else(faces):
    a, b, c = (rl.ruler(faces.mask.roll(1, 0), faces.mask, seed=s).records for s in (0, 0, 1))
    assert a == b
    strip = [[{k: v for k, v in r.items() if k != 'chance'} for r in x] for x in (a, c)]
    assert strip[0] == strip[1] and find(a, 'miou')['chance'] != find(c, 'miou')['chance']


def test_records_keep_the_schema_and_say_the_difference_to_the_best_blind_answer(shifted):
    assert [p for i, r in enumerate(shifted.records) for p in record_problems(r, str(i))] == []
    for metric in ('miou', 'miou_per_image'):
        r, d = (find(shifted.records, m) for m in (metric, f'{metric}_above_blind'))
        best = max(r[k] for k in rl.BLIND)
        assert r[d['blind']] == best and d['value'] == pytest.approx(r['value'] - best, abs=1e-6)
        assert d['low'] <= d['value'] <= d['high'] and d['upper'] == pytest.approx(r['upper'] - best)


def test_attributes_are_measured_as_the_study_measures_them(faces, train):
    classifier, _ = load_classifier(str(REPO/'data/weights/classifier32-laptop-s0/judge'))
    ruled = rl.ruler(faces.image, faces.mask, lambda x: faces.mask[:len(x)], faces.attrs, classifier, train=train.mask,
                     train_attrs=train.attrs)
    for metric in ('balanced_accuracy', 'balanced_accuracy_hidden'):
        r, want = find(ruled.records, metric), find(attribute_report(classifier, faces.image, faces.attrs), metric)
        assert {k: r[k] for k in want if k != 'upper'} == {k: want[k] for k in want if k != 'upper'}
        assert r['commonest'] == .5 < r['attributes'] < r['value']
    unmeasured = rl.ruler(faces.mask, faces.mask, attrs=faces.attrs).records
    assert not any('accuracy_hidden' in r['metric'] for r in unmeasured) and 'attributes' in unmeasured[0]


def test_a_parser_may_be_a_network_a_function_or_what_it_has_read(faces):
    read = faces.mask.roll(2, -1)
    judge = LookupJudge(faces.image, read)
    ways = [rl.ruler(faces.image, faces.mask, judge), rl.ruler(faces.image, faces.mask, judge.predict),
            rl.ruler(faces.image.numpy(), faces.mask.numpy(), judge), rl.ruler(read, faces.mask),
            rl.ruler(faces.image, faces.mask, read)]
    assert all(w.records == ways[0].records for w in ways)
    pixels = torch.from_numpy(to_uint8(faces.image)).movedim(-1, 1)
    seen = []
    rl.ruler(pixels, faces.mask, lambda x: seen.append(x) or read[:len(x)])
    assert (torch.cat(seen) - faces.image).abs().max() < 1/127


@pytest.mark.parametrize('order', CLASS_ORDERS)
def test_other_class_orders_are_translated(faces, order):
    known = [p for p in CLASS_ORDERS[order] if p in PARTS]
    table = torch.tensor([CLASS_ORDERS[order].index(p) if p in known else 255 for p in PARTS])
    back = rl.as_classes(table[faces.mask], order, 255)
    lost = torch.isin(faces.mask, torch.tensor([i for i, p in enumerate(PARTS) if p not in known]))
    assert torch.equal(back.long(), torch.where(lost, -1, faces.mask))


def test_the_worst_come_first_and_are_shown(shifted, faces):
    order = rl.worst(shifted, 12)
    assert shifted.per_image[order].tolist() == sorted(shifted.per_image.tolist())[:12]
    fig = rl.worst_picture(shifted, faces.image, faces.mask)
    said = [t.get_text() for t in fig.axes[0].texts]
    assert said == ['sample', 'requested', 'parsed', *(f'{shifted.per_image[i]:.2f}' for i in order)]
    plt.close(fig)


def test_the_sentence_says_what_the_records_say(shifted, faces):
    good = rl.ruler(faces.mask.roll(1, -1), faces.mask, real=torch.where(rand(24, 32, 32) < .01, 0, faces.mask))
    r, d = find(good.records, 'miou'), find(good.records, 'miou_above_blind')
    for number in (r['value'], r['low'], r['high'], d['low'], d['high'], r['upper'], r[d['blind']]):
        assert f'{number:.3f}' in rl.verdict(good)
    assert 'above the best' in rl.verdict(good) and f"{d['value']/d['upper']:.0%} of the way" in rl.verdict(good)
    assert 'nothing is known of the upper end' in rl.verdict(rl.ruler(faces.mask, faces.mask))
    foreign = rl.verdict(shifted)
    assert 'below the best' in foreign and 'above shuffled, commonest' in foreign and '%' not in foreign
    r, table = find(shifted.records, 'miou'), rl.ruler_table(shifted)
    assert list(table.index[:3]) == ['mIoU, pooled', 'mIoU, per image', 'mIoU, requested classes']
    assert table.loc['mIoU, pooled', 'samples'] == r['value'] and table.loc['mIoU, pooled', 'shuffled'] == r['chance']


# What cannot be measured, as arrays

def test_arrays_that_mean_nothing_are_refused_in_one_sentence(faces, train):
    m, x, t = faces.mask, faces.image, train.mask
    judge = LookupJudge(x, m)
    wrong = {
        'whole numbers, got torch.float32': (m, m/18),
        r'must be \(n,H,W\), one class number a pixel, got \(32, 32\)': (m, m[0]),
        "values 19, which class order 'celebamask' lacks": (m, m + 1),
        'values 255, .* say ignore=255': (m, torch.where(m == 0, 255, m)),
        '1 mask is too few': (m[:1], m[:1]),
        'all masks hold background and nothing else': (m, m*0),
        'all 24 masks are the same': (m, m[:1].expand_as(m)),
        '2 masks are requested more than once': (m[[0, 1, 1]], m[[0, 1, 1]]),
        r'samples must be .* got \(5, 32, 32\)': (m[:5], m),
        r'samples must be .* got \(24, 3, 16, 16\)': (x[..., :16, :16], m, judge),
        'samples are images, and nobody reads masks in them': (x, m),
        r'the parser must give classes \(24, 32, 32\), got \(24, 3, 32, 32\)': (x, m, lambda x: x),
        'have unknown pixels: a reading must be whole': (torch.where(m == 1, -1, m), m),
        'images must be floats in': (x*2, m, judge),
        r'attributes must be \(24, 40\)': (m, m, None, faces.attrs[:3]),
        'each 0, 1 or NaN': (m, m, None, faces.attrs*2),
        'attributes are read in images': (m, m, None, faces.attrs, judge),
        r'masks are \(32, 32\) and training masks \(16, 32\)': (m, m, None, None, None, None, t[:, :16]),
        '3 requested masks are training masks as well': (m, m, None, None, None, None, torch.cat([t, m[:3]])),
        'real images must be': (m, m, None, None, None, x[:3]),
        'it made these masks, so it may not judge': (x, m, judge, None, None, x),
        'no better .* than the commonest mask': (x, m, LookupJudge(x, m.roll(13, 1)), None, None, x)}
    for message, args in wrong.items():
        with pytest.raises(ValueError, match=message) as e:
            rl.ruler(*args)
        assert '\n' not in str(e.value)


# Folders

def write(folder, pictures, names=None, **how):
    folder.mkdir(parents=True, exist_ok=True)
    for i, x in enumerate(pictures):
        x = x if isinstance(x, Image.Image) else Image.fromarray(np.asarray(x))
        x.save(folder/(names[i] if names else f'{i:03d}.png'), **how)
    return folder


def maps(masks): return masks.numpy().astype(np.uint8)


@pytest.fixture
def folders(tmp_path, faces):
    "Ten samples, the masks they were drawn for, what another parser has read in them, attributes"
    write(tmp_path/'samples', to_uint8(faces.image[:10]))
    write(tmp_path/'masks', maps(faces.mask[:10]))
    write(tmp_path/'read', maps(faces.mask[:10].roll(2, -1)))
    rows = [f'{i:03d}.png,{int(a[31])},{int(a[20])}' for i, a in enumerate(faces.attrs[:10])]
    (tmp_path/'attributes.csv').write_text('\n'.join(['file,Smiling,Male', *rows]))
    return tmp_path


def measure(folder, **more):
    return rl.ruler_folder(folder/'samples', folder/'masks', **dict(parser=str(folder/'read')) | more)


def test_a_folder_is_measured_as_arrays_are(folders, faces):
    found = measure(folders)
    assert found.ruled.records == rl.ruler(faces.mask[:10].roll(2, -1), faces.mask[:10]).records
    assert found.names == [f'{i:03d}' for i in range(10)] and found.masks.equal(rl.as_classes(faces.mask[:10]))
    text = rl.report(found)
    assert rl.verdict(found.ruled) in text and 'the 9 other requests' in text and 'no upper mark' in text


def test_names_pair_samples_and_masks_whatever_their_order_depth_and_ending(folders, faces):
    "A shuffled folder gives the same, and files of other people's folders are passed over"
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1)).tolist()
    want = measure(folders).ruled.records
    shutil.rmtree(folders/'samples')
    for i in order:
        write(folders/'samples'/f'deep{i % 2}', [to_uint8(faces.image[i])], [f'{i:03d}.webp'], lossless=True)
    (folders/'samples'/'Thumbs.db').write_text('')
    assert measure(folders).ruled.records == want
    (folders/'samples').rename(folders/'images')
    (folders/'samples').mkdir()
    (folders/'images').rename(folders/'samples'/'images')
    write(folders/'samples', [to_uint8(faces.image[0])], ['sheet.png'])  # as `facegen sample` leaves a folder
    assert measure(folders).ruled.records == want


@pytest.mark.parametrize('order, ignore', [('bisenet', -1), ('bisenet', 255), ('celebamask', 7)])
def test_label_maps_of_other_orders_give_the_same(folders, faces, order, ignore):
    table = torch.tensor([CLASS_ORDERS[order].index(p) for p in PARTS])
    coded, want = table[faces.mask[:10]], faces.mask[:10].clone()
    if ignore >= 0:
        coded[:, :5] = ignore
        coded, want = torch.where((coded == ignore) & (torch.arange(32)[:, None] >= 5), 0, coded), want
        want[:, :5] = -1
        want = torch.where((faces.mask[:10] == 7) & (want >= 0), 0, want) if ignore == 7 else want
    write(folders/'masks', maps(coded))
    found = measure(folders, classes=order, ignore=ignore)
    assert torch.equal(found.masks.long(), want)


def test_part_files_packs_and_sets_of_faces_are_masks_too(tmp_path):
    "The official layout, whose part files are called 00007_hair.png, and a pack; found by number"
    official = write_toyfaces(tmp_path/'official', 6, 64, workers=1)
    pack = pack_toyfaces(tmp_path/'pack', 6, 64, workers=1)
    table = pack_toyfaces(tmp_path/'table', 20, 64, seed=4, workers=1)
    faces = load_faces(pack)[:]
    samples = write(tmp_path/'samples', to_uint8(faces.image), [f'{i:04d}.png' for i in range(6)])
    ways = [dict(masks=official), dict(masks=official/'CelebAMask-HQ-mask-anno'), dict(masks=pack),
            dict(masks=write(tmp_path/'maps'/'masks', maps(faces.mask)).parent)]
    found = [rl.ruler_folder(samples, **w, train=table, real=official, parser='parser32-laptop-s0') for w in ways]
    assert all(f.ruled.records == found[0].ruled.records for f in found)
    assert [f.ruled.about['drawn'] for f in found] == [True, True, True, False]
    assert 'attributes' not in find(found[0].ruled.records, 'miou')
    with_attributes = rl.ruler_folder(samples, official, attributes=official, train=table, parser='parser32-laptop-s0',
                                      classifier='classifier32-laptop-s0')
    assert find(with_attributes.ruled.records, 'balanced_accuracy')['value'] > .6
    assert 'attributes' in find(with_attributes.ruled.records, 'miou')


def test_training_masks_whose_attributes_nobody_knows_are_looked_up_by_the_rest(folders, train):
    "A set of faces with a table that has no attributes"
    for kind, pictures in dict(images=to_uint8(train.image), masks=maps(train.mask)).items():
        write(folders/'set'/kind, pictures)
    (folders/'set'/'index.csv').write_text('\n'.join(['name,celeba_file', *(f'{i:03d},' for i in range(60))]))
    found = measure(folders, train=folders/'set', attributes=folders/'attributes.csv')
    r = find(found.ruled.records, 'miou')
    assert 'attributes' not in r and 'pixels' in r and found.ruled.about['table'] == 60


def test_samples_and_masks_of_two_sizes_are_measured_at_the_smaller(folders, faces):
    write(folders/'samples', [Image.fromarray(x).resize((64, 64)) for x in to_uint8(faces.image[:10])])
    assert measure(folders).samples.shape == (10, 3, 32, 32)
    write(folders/'masks', [Image.fromarray(x).resize((96, 96), Image.NEAREST) for x in maps(faces.mask[:10])])
    found = measure(folders)
    assert found.samples.shape == (10, 3, 64, 64) and found.masks.shape == (10, 64, 64)


def test_what_is_written_is_whole_and_the_same_again(folders):
    files = [rl.save_report(measure(folders), folders/out) for out in ('a', 'a/deep/b')]
    one, other = (json.loads(f[0].read_text()) for f in files)
    assert one == other and one['miou_per_image'].keys() == {f'{i:03d}' for i in range(10)}
    assert one['worst'][0] == min(one['miou_per_image'], key=one['miou_per_image'].get)
    assert [p for i, r in enumerate(one['metrics']) for p in record_problems(r, str(i))] == []
    assert one['about']['n'] == 10 and one['sentence'].startswith('mIoU (pooled)')
    with Image.open(files[0][1]) as picture:
        assert picture.format == 'PNG' and picture.width > 500


def test_the_command_prints_the_report_and_names_the_parser_and_its_faces(folders, capsys):
    commands.main(['ruler', str(folders/'samples'), '--masks', str(folders/'masks'), '--attributes',
                   str(folders/'attributes.csv'), '--out', str(folders/'out')])
    said = capsys.readouterr().out
    assert 'classifier-laptop-s0 (5,000 drawn faces)' in said
    assert 'parser-laptop-s0 (5,000 drawn faces)' in said and 'if these are photographs' in said
    assert 'attributes, balanced' in said and re.search(r'^mIoU, pooled +0\.\d+ +0\.\d+ to 0\.\d+', said, re.M)
    assert (folders/'out'/'ruler.json').is_file() and (folders/'out'/'worst.png').is_file()


def rewrite(path, change, name=None):
    "Change the picture of a file, or put another file in its place"
    with Image.open(path) as picture:
        changed = change(picture.copy())
    path.unlink()
    changed.save(path.with_name(name or path.name))


def labels(change):
    "Change a label map, seen as an array"
    return lambda picture: Image.fromarray(change(np.asarray(picture)))


def resized(*size): return lambda picture: picture.resize(size, Image.NEAREST)
def blurred(picture): return picture.resize((20, 20), Image.BILINEAR).resize((32, 32), Image.BILINEAR)


def change_all(folder, change):
    for path in folder.iterdir():
        rewrite(path, change)


def keep_one(folder):
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()


def names_in(folder): return [path.stem for path in folder.iterdir()]


def shorten(table, text=None):
    table.write_text(text or '\n'.join(table.read_text().splitlines()[:5]))
    return ['--attributes', str(table)]


DAMAGE = {  # gets the folder above, its samples and its masks; may return more arguments of the command
    'a missing mask': lambda top, s, m: (m/'000.png').unlink(),
    'a missing sample': lambda top, s, m: (s/'003.png').unlink(),
    'a JPEG mask': lambda top, s, m: rewrite(m/'000.png', labels(np.array), '000.jpg'),
    'a float mask': lambda top, s, m: rewrite(m/'000.png', labels(lambda x: x.astype(np.float32)/18), '000.tif'),
    'a colour mask': lambda top, s, m: rewrite(m/'000.png', lambda picture: picture.convert('RGB')),
    'a resized mask': lambda top, s, m: rewrite(m/'000.png', blurred),
    'a value too many': lambda top, s, m: rewrite(m/'000.png', labels(lambda x: np.where(x, x, 255).astype(np.uint8))),
    'another shape': lambda top, s, m: change_all(m, resized(32, 40)),
    'a mask of another size': lambda top, s, m: rewrite(m/'000.png', resized(64, 64)),
    'a sample of another size': lambda top, s, m: rewrite(s/'001.png', resized(16, 16)),
    'a broken sample': lambda top, s, m: (s/'001.png').write_bytes((s/'001.png').read_bytes()[:90]) and None,
    'no picture': lambda top, s, m: (s/'001.png').write_text('hello') and None,
    'two of a name': lambda top, s, m: shutil.copytree(s, s/'again') and None,
    'one image': lambda top, s, m: [keep_one(s), keep_one(m)] and None,
    'one class': lambda top, s, m: change_all(m, labels(lambda x: x*0 + 1)),
    'a mask twice': lambda top, s, m: shutil.copy(m/'001.png', m/'000.png') and None,
    'no samples': lambda top, s, m: shutil.rmtree(s),
    'part files apart': lambda top, s, m: shutil.copy(m/'001.png', m/'00000_hair.png') and None,
    'no such order': lambda top, s, m: ['--classes', 'bisnet'],
    'no such parser': lambda top, s, m: ['--parser', 'nowhere'],
    'a classifier': lambda top, s, m: ['--parser', 'classifier-laptop-s0'],
    'rows are missing': lambda top, s, m: shorten(top/'attributes.csv'),
    'no attribute': lambda top, s, m: shorten(top/'attributes.csv', '\n'.join(['file', *sorted(names_in(s))])),
    'no table': lambda top, s, m: ['--attributes', str(s)],
    'no real images': lambda top, s, m: ['--real', str(top/'reals')],
    'real images are missing': lambda top, s, m: ['--real', str(write(top/'few', [np.zeros((32, 32), np.uint8)]*2))],
    'the requests as training masks': lambda top, s, m: ['--train', str(m)]}


@pytest.mark.parametrize('name, message', [
    ('a missing mask', '1 of 10 samples have no mask of their name (000)'),
    ('a missing sample', '1 of 10 masks have no sample of their name (003): draw these too'),
    ('a JPEG mask', '000.jpg: is a JPEG, which changes class numbers: save label maps as PNG'),
    ('a float mask', '000.tif: has mode F, expected one class number a pixel'),
    ('a colour mask', '000.png: has mode RGB, expected one class number a pixel'),
    ('a resized mask', '000.png: was resized smoothly or saved with losses'),
    ('a value too many', '000.png: has values 255, expected classes 0..18; 255 often means unlabelled: say --ignore'),
    ('another shape', 'samples are 32x32 and masks 32x40, which is another shape'),
    ('a mask of another size', 'masks of 2 sizes, most 32x32 and 1 of 64x64: make all alike'),
    ('a sample of another size', 'samples of 2 sizes, most 32x32 and 1 of 16x16'),
    ('a broken sample', '001.png: cannot be decoded'),
    ('no picture', '001.png cannot be decoded: it is no picture, or damaged'),
    ('two of a name', 'two pictures of one name'),
    ('one image', '1 mask is too few'),
    ('one class', 'all masks hold skin and nothing else'),
    ('a mask twice', '2 masks are requested more than once'),
    ('no samples', 'samples: name the one that holds the samples'),
    ('part files apart', 'holds part files: name the folder above it'),
    ('no such order', "unknown class order 'bisnet' (did you mean 'bisenet'?)"),
    ('no such parser', "there is no parser 'nowhere': name the folder of its config.json, or a run"),
    ('a classifier', 'holds a Classifier, not a parser'),
    ('rows are missing', 'has no row for 6 of 10 faces (004, 005, 006, ...): add them'),
    ('no attribute', 'attributes.csv has no column that is an attribute'),
    ('no table', 'is no table of attributes and holds none'),
    ('no real images', 'reals: name the one that holds the real images'),
    ('real images are missing', 'has no real image for 8 of 10 masks'),
    ('the requests as training masks', '10 requested masks are training masks as well')])
def test_a_wrong_folder_is_answered_in_one_sentence(folders, capsys, name, message):
    more = DAMAGE[name](folders, folders/'samples', folders/'masks') or []
    with pytest.raises(SystemExit) as e:
        commands.main(['ruler', str(folders/'samples'), '--masks', str(folders/'masks'), *more])
    assert message in e.value.code and '\n' not in e.value.code and e.value.code.startswith('facegen: ')
    assert capsys.readouterr().out == ''


def test_label_maps_that_look_like_another_order_are_noticed(folders, faces):
    table = torch.tensor([CLASS_ORDERS['bisenet'].index(p) for p in PARTS])
    much_hair = (faces.mask == PARTS.index('hair')).sum((1, 2)).argsort(descending=True)[:10]
    write(folders/'masks', maps(table[faces.mask[much_hair]]))
    with pytest.raises(ValueError, match="their areas look like 'bisenet'.*say --classes bisenet"):
        measure(folders)
    assert measure(folders, classes='celebamask').masks.equal(rl.as_classes(table[faces.mask[much_hair]]))


def test_who_made_the_masks_may_not_judge_by_them(folders, faces, tmp_path):
    "By what the parser reads in the real images, and by what a pack says of its masks"
    network, name = load_parser(str(REPO/'data/weights/parser32-laptop-s0/judge'))
    with torch.no_grad():
        made = network.predict(torch.from_numpy(to_uint8(faces.image[:10])).movedim(-1, 1)/127.5 - 1)
    write(folders/'masks', maps(made))
    write(folders/'real', to_uint8(faces.image[:10]))
    with pytest.raises(ValueError, match='it made these masks, so it may not judge'):
        rl.ruler_folder(folders/'real', folders/'masks', parser=name, real=folders/'real')
    pack = pack_toyfaces(tmp_path/'pack', 10, 32, workers=1)
    facts = json.loads((pack/'faces.json').read_text())
    (pack/'faces.json').write_text(json.dumps(facts | dict(labels=dict(masks='parsed by parser32-laptop-s0'))))
    with pytest.raises(ValueError, match='parsed by parser32-laptop-s0: who made them may not judge'):
        rl.ruler_folder(folders/'real', pack, parser=name)
    assert rl.ruler_folder(folders/'real', pack, parser='parser-laptop-s0').ruled.about['n'] == 10


def test_it_works_in_a_folder_that_knows_no_study(folders, faces, tmp_path):
    "The package elsewhere, no FACEGEN_ROOT, another working folder: arrays, and folders with a parser of one's own"
    shutil.copytree(REPO/'facegen', tmp_path/'lib'/'facegen', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(REPO/'data/weights/parser32-laptop-s0', tmp_path/'own')
    code = f'''
import torch
from facegen.evaluation import ruler as rl
assert rl.__file__.startswith({str(tmp_path)!r})
masks = rl.load_masks(rl.find_masks("masks"), [f"{{i:03d}}" for i in range(10)], 32)
print(rl.verdict(rl.ruler(masks.roll(1, -1).numpy(), masks)))
found = rl.ruler_folder("samples", "masks", parser="own")
print(found.ruled.about["parser"], found.ruled.about["trained_on"], sep=": ")
try: rl.ruler_folder("samples", "masks")
except FileNotFoundError as e: print(e)
'''
    env = {k: v for k, v in os.environ.items() if not k.startswith('FACEGEN')} | dict(
        PYTHONPATH=str(tmp_path/'lib'))
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=folders, env=env)
    assert p.returncode == 0, p.stderr
    one, two, three = p.stdout.splitlines()
    assert one.startswith('mIoU (pooled) is 0.') and two == 'own: faces that no result names'
    assert 'FACEGEN_ROOT' in three


# Real faces

def test_blind_marks_of_hand_drawn_masks_are_those_that_others_measured(real_faces, tmp_path):
    "800 masks of CelebAMask-HQ, each answered by the others, left and right mended; 64 px"
    mask = fix_left_right(load_faces(prepare(real_faces/'pairs128', tmp_path/'pairs', 64, workers=1)))[0][:].mask
    ruled = rl.ruler(mask, mask)
    for metric, want in dict(miou=(.27, .41), miou_requested=(.41, .48), pixel_accuracy=(.67, .82)).items():
        r = find(ruled.records, metric)
        assert (r['commonest'], r['pixels']) == pytest.approx(want, abs=.02), metric


def test_a_parser_of_drawn_faces_may_not_judge_photographs(real_faces, tmp_path):
    for kind in ('images', 'masks'):
        (tmp_path/kind).mkdir()
        for path in sorted((real_faces/'pairs128'/kind).iterdir())[:40]:
            shutil.copy(path, tmp_path/kind)
    with pytest.raises(ValueError, match='reads the real images no better .* it was trained on other images'):
        rl.ruler_folder(tmp_path/'images', tmp_path/'masks', real=tmp_path/'images')

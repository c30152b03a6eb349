"""Faces on disk: both layouts, every kind of bad input with its message, packing, reading back, mirrors and splits."""
import multiprocessing, os, pickle, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facegen.data import packing
from facegen.data.faces import (ATTRIBUTES, PARTS, BadFaces, Face, at_least, flip_faces, load_faces, prepare,
                                split)
from facegen.data.layouts import IMAGES, MAPPING, MASKS, TABLE, ellipse_faces, read_raw

OTHER = {'l_eye': 'r_eye', 'r_eye': 'l_eye', 'l_brow': 'r_brow', 'r_brow': 'l_brow', 'l_ear': 'r_ear', 'r_ear': 'l_ear'}


@pytest.fixture
def src(tmp_path):
    return ellipse_faces(tmp_path/'raw', n=4)


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    "Forty faces of 32 px"
    tmp = tmp_path_factory.mktemp('forty')
    return load_faces(prepare(ellipse_faces(tmp/'raw', n=40), tmp/'packed', 32))


def plain(folder, n=3, size=(48, 48), table='', masks=None, ending='png'):
    "A plain folder: noise pictures a, b, c ..., and perhaps a table and label maps"
    rng = np.random.default_rng(0)
    (folder/'images').mkdir(parents=True)
    for i in range(n):
        pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder/'images'/f'{"abcdefgh"[i]}.{ending}')
    if table:
        (folder/'attributes.csv').write_text(table)
    for name, labels in (masks or {}).items():
        (folder/'masks').mkdir(exist_ok=True)
        Image.fromarray(labels).save(folder/'masks'/name)
    return folder


def edit(file, old, new, count=1):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, count))


def fails(src, *parts):
    "prepare must refuse, in a message that holds all `parts`; returns the problems"
    dst = src.parent/'out'
    with pytest.raises(BadFaces) as e:
        prepare(src, dst, 32)
    for part in parts:
        assert part in str(e.value), str(e.value)
    assert not dst.exists()
    return e.value.problems


# --- a face and its mirror

def test_names_are_those_of_the_data_set():
    assert len(ATTRIBUTES) == len(set(ATTRIBUTES)) == 40 and len(PARTS) == len(set(PARTS)) == 19
    some = [ATTRIBUTES[i] for i in (0, 20, 31, 35, 39)]
    assert some == ['5_o_Clock_Shadow', 'Male', 'Smiling', 'Wearing_Hat', 'Young']
    assert ATTRIBUTES == sorted(ATTRIBUTES, key=str.lower)
    assert [PARTS[i] for i in (0, 4, 5, 10, 13, 18)] == ['background', 'l_eye', 'r_eye', 'mouth', 'hair', 'cloth']


def test_flip_mirrors_pixels_and_swaps_left_and_right_classes():
    mask = torch.arange(19).view(1, 1, 19)
    image = torch.rand(1, 3, 1, 19)
    out = flip_faces(Face(image, torch.zeros(1, 40), mask))
    assert torch.equal(out.image, image.flip(-1))
    expected = [PARTS.index(OTHER.get(p, p)) for p in reversed(PARTS)]
    assert out.mask.flatten().tolist() == expected


def test_flip_twice_is_nothing_and_unknown_stays_unknown():
    g = torch.Generator().manual_seed(0)
    image, mask = torch.rand(5, 3, 8, 8, generator=g), torch.randint(-1, 19, (5, 8, 8), generator=g)
    face = Face(image, torch.full((5, 40), torch.nan), mask)
    twice = flip_faces(flip_faces(face))
    assert torch.equal(twice.image, face.image) and torch.equal(twice.mask, face.mask) and twice.attrs.isnan().all()
    one = flip_faces(Face(face.image[0], face.attrs[0], torch.full((8, 8), -1)))
    assert (one.mask == -1).all() and one.image.shape == (3, 8, 8)


def test_flip_of_some_of_a_batch():
    g = torch.Generator().manual_seed(1)
    image, attrs = torch.rand(4, 3, 6, 6, generator=g), torch.rand(4, 40, generator=g)
    face = Face(image, attrs, torch.randint(0, 19, (4, 6, 6), generator=g))
    which = torch.tensor([True, False, False, True])
    out, all_ = flip_faces(face, which), flip_faces(face)
    for i, w in enumerate(which):
        want = all_ if w else face
        assert torch.equal(out.mask[i], want.mask[i]) and torch.equal(out.image[i], want.image[i])


# --- the official layout

def test_parts_are_merged_in_the_official_order(src):
    "The oracle paints in the order of PARTS, whatever the order of the files"
    rng = np.random.default_rng(0)
    shutil.rmtree(src/MASKS/'0')
    (src/MASKS/'0').mkdir()
    pieces = {(i, p): rng.random((128, 128)) < 0.2 for i in range(4) for p in ('cloth', 'skin', 'hair', 'r_eye', 'hat')}
    for (i, p), on in pieces.items():
        Image.fromarray((on*255).astype(np.uint8)).convert('RGB').save(src/MASKS/'0'/f'{i:05d}_{p}.png')
    faces = load_faces(prepare(src, src.parent/'out', 128))
    for i in range(4):
        want = np.zeros((128, 128))
        for c, p in enumerate(PARTS):
            if (i, p) in pieces:
                want[pieces[i, p]] = c
        assert np.array_equal(faces[i].mask, want)


def test_attributes_become_0_and_1_and_numbers_are_mapped(src):
    (src/MAPPING).write_text('idx  orig_idx  orig_file\n0  119612  119613.jpg\n2   99093  099094.jpg\n')
    faces = load_faces(prepare(src, src.parent/'out', 32))
    for i in range(4):
        assert faces[i].attrs.tolist() == [float((i + j) % 2 == 0) for j in range(40)]
    assert faces.celeba.tolist() == [119613, -1, 99094, -1] and faces.identity.tolist() == [-1]*4


def test_columns_follow_the_header_not_their_place(src):
    first, head, *rows = (src/TABLE).read_text().splitlines()
    turn = lambda l: l[:1] + l[:0:-1]
    rows = [' '.join(turn(r.split())) for r in rows]
    (src/TABLE).write_text('\n'.join([first, ' '.join(reversed(head.split())), *rows]))
    faces = load_faces(prepare(src, src.parent/'out', 32))
    assert faces[1].attrs.tolist() == [float((1 + j) % 2 == 0) for j in range(40)]


def test_ids_have_gaps_and_are_sorted_as_numbers(src):
    for d, old, new in ((IMAGES, '2.jpg', '1234.jpg'), (IMAGES, '3.jpg', '10.jpg')):
        (src/d/old).rename(src/d/new)
    (src/MASKS/'12').mkdir()
    for p in list((src/MASKS/'0').iterdir()):
        i, part = p.name.split('_', 1)
        p.rename(src/MASKS/('12' if i == '00002' else '0')/f"{ {'00002': '01234', '00003': '00010'}.get(i, i) }_{part}")
    edit(src/TABLE, '2.jpg', '1234.jpg')
    edit(src/TABLE, '3.jpg', '10.jpg')
    assert load_faces(prepare(src, src.parent/'out', 32)).ids == ['0', '1', '10', '1234']


# --- the plain layout

def test_plain_folder_of_images_alone(tmp_path):
    faces = load_faces(prepare(plain(tmp_path/'p', ending='webp'), tmp_path/'out', 32))
    assert faces.ids == ['a', 'b', 'c'] and faces.attrs.isnan().all() and (faces[:].mask == -1).all()
    assert faces.meta['masks'] == 0


def test_plain_table_with_some_columns_empty_cells_and_identities(tmp_path):
    table = 'file,identity,celeba_file,Smiling,Male\na.png,7,000012.jpg,1,0\nb.png,,,0,\nc.png,8,,0.0,1.0\n'
    faces = load_faces(prepare(plain(tmp_path/'p', table=table), tmp_path/'out', 32))
    smiling, male = faces.attrs[:, ATTRIBUTES.index('Smiling')], faces.attrs[:, ATTRIBUTES.index('Male')]
    assert smiling.tolist() == [1, 0, 0] and male[[0, 2]].tolist() == [0, 1] and male[1].isnan()
    assert faces.attrs.isnan().sum() == 3*38 + 1
    assert faces.identity.tolist() == [7, -1, 8] and faces.celeba.tolist() == [12, -1, -1]


def test_plain_masks_of_another_size_and_missing_ones(tmp_path):
    labels = np.repeat(np.arange(19, dtype=np.uint8)[:, None], 19, 1)
    palette = Image.fromarray(labels).convert('P')
    palette.putpalette(list(range(57)))
    folder = plain(tmp_path/'p', masks={'a.png': labels})
    Image.fromarray(labels).save(folder/'masks'/'b.png')
    im = Image.new('P', (19, 19))
    im.putdata(labels.flatten().tolist())
    im.putpalette(list(range(57)))
    im.save(folder/'masks'/'b.png')
    faces = load_faces(prepare(folder, tmp_path/'out', 19))
    assert torch.equal(faces[0].mask, torch.from_numpy(labels).long()) and torch.equal(faces[1].mask, faces[0].mask)
    assert (faces[2].mask == -1).all() and faces.meta['masks'] == 2


def test_not_square_is_cut_to_the_middle(tmp_path):
    folder = plain(tmp_path/'p', n=1, size=(96, 32))
    want = np.asarray(Image.open(folder/'images/a.png'))[:, 32:64].transpose(2, 0, 1)
    assert np.array_equal(load_faces(prepare(folder, tmp_path/'out', 32)).uint8([0])[0][0], want)


def test_camera_rotation_is_obeyed(tmp_path):
    folder = plain(tmp_path/'p', n=1, size=(32, 32))
    im = Image.open(folder/'images/a.png')
    exif = im.getexif()
    exif[0x0112] = 3
    im.save(folder/'images/a.png', exif=exif)
    want = np.asarray(im.convert('RGB'))[::-1, ::-1].transpose(2, 0, 1)
    assert np.array_equal(load_faces(prepare(folder, tmp_path/'out', 32)).uint8([0])[0][0], want)


def test_images_shrink_antialiased_and_masks_keep_their_classes(tmp_path):
    checks = (np.indices((128, 128)).sum(0) % 2*255).astype(np.uint8)
    folder = plain(tmp_path/'p', n=1, masks={'a.png': np.where(checks, 13, 2).astype(np.uint8)})
    Image.fromarray(np.stack([checks]*3, -1)).save(folder/'images/a.png')
    face = load_faces(prepare(folder, tmp_path/'out', 32))[0]
    assert face.image.abs().max() < 0.05                 # fine checks shrink to grey
    assert set(face.mask.unique().tolist()) <= {2, 13}   # and never to a class in between


# --- bad input, each kind with its message

def test_wrong_folder_says_what_was_expected_and_seen(src, tmp_path):
    expected = f'expected {IMAGES}, {MASKS} and {TABLE}, or img_align_celeba, or images, or pictures'
    p = fails(tmp_path/'nowhere', 'wrong folder', expected, 'seen: no such folder')
    assert len(p) == 1
    (tmp_path/'void').mkdir()
    fails(tmp_path/'void', 'seen: nothing')
    (src/TABLE).unlink()
    fails(src, 'wrong folder', f'seen: {IMAGES}, {MASKS}')  # not a bare folder: its masks would be faces
    (tmp_path/'void'/'masks').mkdir()
    fails(tmp_path/'void', 'seen: masks')


def test_empty_data_set(src, tmp_path):
    for f in (src/IMAGES).iterdir():
        f.unlink()
    fails(src, f'{IMAGES}: empty: there is no picture')
    (tmp_path/'p'/'images').mkdir(parents=True)
    fails(tmp_path/'p', 'images: empty: there is no picture')


@pytest.mark.parametrize('keep', [0, 1, 400, 900, -2])
def test_truncated_or_unreadable_image(src, keep):
    (src/IMAGES/'1.jpg').write_bytes((src/IMAGES/'1.jpg').read_bytes()[:keep])
    p, = fails(src, f'{IMAGES}/1.jpg: cannot be decoded (')
    assert p.face == '1' and str(src.parent) not in p.reason


def test_truncated_part(src):
    part = src/MASKS/'0/00002_skin.png'
    part.write_bytes(part.read_bytes()[:-40])
    assert [p.face for p in fails(src, f'{MASKS}/0/00002_skin.png: cannot be decoded (')] == ['2']


def test_text_instead_of_an_image(src):
    (src/IMAGES/'1.jpg').write_text('not a picture at all')
    fails(src, f'{IMAGES}/1.jpg: cannot be decoded (cannot identify image file')


def test_image_without_row_and_row_without_image(src):
    edit(src/TABLE, '2.jpg', '7.jpg')
    p = fails(src, f'{IMAGES}/2.jpg: no row in {TABLE}', f"{TABLE}: line 5: there is no image '7'")
    assert len(p) == 2


def test_value_other_than_minus_one_and_one(src):
    edit(src/TABLE, '1.jpg -1 1 -1', '1.jpg -1 0 x')
    p = fails(src, f"{TABLE}: line 4: Arched_Eyebrows is '0', expected -1 or 1",
              "line 4: Attractive is 'x', expected -1 or 1")
    assert len(p) == 2


def test_wrong_count_line(src):
    edit(src/TABLE, '4\n', '30000\n')
    fails(src, f"{TABLE}: line 1 says '30000', but 4 rows follow")
    (src/TABLE).write_text('')
    fails(src, "line 1 says '', but 0 rows follow", 'no row in')


def test_unknown_missing_and_repeated_attribute_name(src):
    edit(src/TABLE, 'Smiling', 'Smilling')
    edit(src/TABLE, 'Young', 'Male')
    p = fails(src, "unknown attribute name 'Smilling' (did you mean 'Smiling'?)", "attribute name 'Smiling' is missing",
              "attribute name 'Young' is missing", "attribute name 'Male' occurs 2 times")
    assert len(p) == 4


def test_short_row_and_second_row(src):
    edit(src/TABLE, '1.jpg -1', '1.jpg')
    edit(src/TABLE, '3.jpg', '2.jpg')
    fails(src, 'line 4 has 40 cells, expected 41', 'line 6 is a second row for 2', f'{IMAGES}/3.jpg: no row')


def test_part_with_unknown_name(src):
    (src/MASKS/'0/00001_l_eye.png').rename(src/MASKS/'0/00001_left_eye.png')
    p, = fails(src, f"{MASKS}/0/00001_left_eye.png: unknown part name 'left_eye' (did you mean 'l_eye'?)")
    assert p.face == '1'
    (src/MASKS/'0/00001_left_eye.png').rename(src/MASKS/'0/00001_background.png')
    fails(src, "unknown part name 'background'")
    (src/MASKS/'0/00001_background.png').rename(src/MASKS/'0/readme.txt')
    fails(src, "unknown part name 'readme.txt'")


def test_part_of_another_size(src):
    Image.new('L', (64, 64)).save(src/MASKS/'0/00003_mouth.png')
    p, = fails(src, f'{MASKS}/0/00003_mouth.png: is 64x64, its siblings are 128x128')


def test_part_without_image_and_image_without_part(src):
    for f in (src/MASKS/'0').glob('00002_*'):
        f.rename(f.with_name(f.name.replace('00002', '00009')))
    p = fails(src, f'{IMAGES}/2.jpg: no part file in {MASKS}', f"{MASKS}/0/00009_skin.png: there is no image '9'")
    assert len(p) == 5


def test_second_part_and_stray_file(src):
    (src/MASKS/'1').mkdir()
    shutil.copy(src/MASKS/'0/00001_skin.png', src/MASKS/'1/00001_skin.png')
    (src/IMAGES/'notes.txt').write_text('')
    (src/IMAGES/'.DS_Store').write_text('')
    p = fails(src, 'a second skin of 1', f'{IMAGES}/notes.txt: not a picture; expected jpg, jpeg,')
    assert len(p) == 2


def test_broken_mapping_line(src):
    (src/MAPPING).write_text('idx orig_idx orig_file\n0 119612\n')
    fails(src, f"{MAPPING}: line 2: expected 'idx orig_idx orig_file'")


def test_plain_table_problems(tmp_path):
    table = 'file,identity,Smiling,Smile\na.png,x,1,0\nb.png,3,2,0\nb.png,3,1,0\nd.png,3,1,0\n'
    p = fails(plain(tmp_path/'p', table=table), "attributes.csv: unknown attribute name 'Smile'",
              "line 2: identity is 'x', expected a whole number", "line 3: Smiling is '2', expected 0 or 1 or -1",
              'line 4 is a second row for b', "line 5: there is no image 'd'",
              'images/c.png: no row in attributes.csv')
    assert len(p) == 6
    (tmp_path/'p'/'attributes.csv').write_text('image,Male\na.png,1\n')
    fails(tmp_path/'p', 'no column file or name or image_id; seen: image, Male', "unknown attribute name 'image'")


def test_plain_mask_problems(tmp_path):
    labels = np.full((48, 48), 5, np.uint8)
    labels[0, :2] = 19, 255
    masks = {'a.png': labels, 'b.png': np.zeros((48, 48, 3), np.uint8), 'c.png': labels[1:24], 'z.png': labels}
    folder = plain(tmp_path/'p', masks=masks)
    p = fails(folder, 'masks/a.png: has values 19, 255, expected classes 0..18',
              'masks/b.png: has mode RGB, expected one class number',
              'images/c.png: is 48x48, its mask is 48x23: another shape', "masks/z.png: there is no image 'z'")
    assert len(p) == 4


def test_two_pictures_of_one_name(tmp_path):
    folder = plain(tmp_path/'p', n=1)
    Image.open(folder/'images/a.png').save(folder/'images/a.webp')
    fails(folder, 'images/a.webp: a second picture of a')


def spoil(src):
    edit(src/TABLE, '4\n', '5\n')
    (src/MASKS/'0/00001_mouth.png').rename(src/MASKS/'0/00001_moth.png')
    (src/IMAGES/'2.jpg').write_bytes((src/IMAGES/'2.jpg').read_bytes()[:900])


def test_all_problems_at_once_and_in_parallel_too(src, monkeypatch):
    monkeypatch.setattr(packing, 'SHARD', 2)
    spoil(src)
    one = fails(src, 'has 3 problems')
    shutil.rmtree(src.parent/'_out.shards')
    with pytest.raises(BadFaces) as e:
        prepare(src, src.parent/'out', 32, workers=2)
    assert e.value.problems == one and {p.face for p in one} == {'', '1', '2'}


def test_skip_bad_packs_the_rest_and_says_what_was_left_out(src, capsys):
    spoil(src)
    faces = load_faces(prepare(src, src.parent/'out', 32, skip_bad=True))
    said = capsys.readouterr().out
    assert 'left out 2 of 4 faces' in said and 'moth' in said and '2.jpg' in said and "line 1 says '5'" in said
    assert faces.ids == ['0', '3'] and faces.meta['left_out'] == ['1', '2'] and len(faces.meta['problems']) == 3
    prepare(src, src.parent/'out', 32, skip_bad=True)
    with pytest.raises(BadFaces, match='moth'):
        prepare(src, src.parent/'out', 32)


def test_skip_bad_with_nothing_left(src):
    for f in (src/IMAGES).iterdir():
        f.write_bytes(b'')
    with pytest.raises(BadFaces, match='no face is left to pack'):
        prepare(src, src.parent/'out', 32, skip_bad=True)


def test_a_whole_shard_may_be_bad(src, monkeypatch):
    monkeypatch.setattr(packing, 'SHARD', 1)
    (src/IMAGES/'0.jpg').write_bytes(b'')
    assert load_faces(prepare(src, src.parent/'out', 32, skip_bad=True)).ids == ['1', '2', '3']


def test_from_a_terminal(src):
    spoil(src)
    def run(*more):
        command = [sys.executable, '-m', 'facegen.data.packing', src, src.parent/'out', '--size', '32', *more]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(packing.__file__).parents[2])
    bad = run()
    assert bad.returncode == 1 and 'has 3 problems' in bad.stderr and 'Traceback' not in bad.stderr
    good = run('--skip-bad')
    assert good.returncode == 0 and 'left out 2 of 4 faces' in good.stdout and len(load_faces(src.parent/'out')) == 2


# --- packing

def test_interrupted_packing_goes_on(src, monkeypatch):
    "Stopped after two shards of four: the next call decodes only the other two, and the result is the same"
    monkeypatch.setattr(packing, 'SHARD', 1)
    whole = load_faces(prepare(src, src.parent/'whole', 32))[:]
    decode, seen = packing.decode, []
    def stop(src, raw, *args):
        if len(seen) == 2: raise KeyboardInterrupt
        seen.append(raw.id)
        return decode(src, raw, *args)
    monkeypatch.setattr(packing, 'decode', stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(src, src.parent/'out', 32)
    assert not (src.parent/'out').exists()
    monkeypatch.setattr(packing, 'decode', lambda s, raw, *a: (seen.append(raw.id), decode(s, raw, *a))[1])
    again = load_faces(prepare(src, src.parent/'out', 32))[:]
    assert seen == ['0', '1', '2', '3'] and all(torch.equal(a, b) for a, b in zip(whole, again))
    assert sorted(p.name for p in src.parent.iterdir()) == ['out', 'raw', 'whole']


def test_a_mended_file_changes_only_its_shard(src, monkeypatch):
    monkeypatch.setattr(packing, 'SHARD', 1)
    good = (src/IMAGES/'2.jpg').read_bytes()
    (src/IMAGES/'2.jpg').write_bytes(good[:900])
    fails(src, '2.jpg')
    (src/IMAGES/'2.jpg').write_bytes(good)
    decode, seen = packing.decode, []
    monkeypatch.setattr(packing, 'decode', lambda s, raw, *a: (seen.append(raw.id), decode(s, raw, *a))[1])
    assert len(load_faces(prepare(src, src.parent/'out', 32))) == 4 and seen == ['2']


def test_processes_change_nothing(src, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, 'SHARD', 2)
    one, two = (load_faces(prepare(src, tmp_path/f'w{w}', 32, workers=w))[:] for w in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def process(target, *args):
    "Start a process that shares all that is imported here"
    p = multiprocessing.get_context('fork').Process(target=target, args=args)
    p.start()
    return p


def test_two_processes_prepare_the_same_folder_at_once(src, monkeypatch):
    monkeypatch.setattr(packing, 'SHARD', 1)
    both = [process(prepare, src, src.parent/'out', 32) for _ in range(2)]
    for p in both:
        p.join()
    assert [p.exitcode for p in both] == [0, 0] and len(load_faces(src.parent/'out')) == 4
    assert sorted(p.name for p in src.parent.iterdir()) == ['out', 'raw']


def keep_locked(dst, ready):
    with packing.lock(dst):
        ready.touch()
        time.sleep(60)


def test_a_lock_ends_with_its_process(tmp_path, capsys):
    "Whoever is killed inside leaves the file of the lock, and it stops nobody"
    p = process(keep_locked, tmp_path/'made', tmp_path/'ready')
    while not (tmp_path/'ready').exists():
        time.sleep(.01)
    assert packing.take_lock(tmp_path/'_made.lock') is None
    os.kill(p.pid, signal.SIGKILL)
    p.join()
    assert (tmp_path/'_made.lock').exists()
    with packing.lock(tmp_path/'made'):
        assert 'waiting' not in capsys.readouterr().err
    assert not (tmp_path/'_made.lock').exists()


def sleep_long(folder):
    (folder/str(os.getpid())).touch()
    time.sleep(60)


def start_workers(folder):
    list(packing.run_jobs(sleep_long, [(folder,)]*2, 2, start='fork'))


def is_running(pid):
    stat = Path(f'/proc/{pid}/stat')
    return stat.exists() and stat.read_text().rpartition(')')[2].split()[0] not in 'ZX'


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks into /proc')
def test_workers_end_when_their_parent_is_killed(tmp_path):
    p, end = process(start_workers, tmp_path), time.time() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.time() < end:
        time.sleep(.05)
    workers = [path.name for path in tmp_path.iterdir()]
    os.kill(p.pid, signal.SIGKILL)
    p.join()
    while any(map(is_running, workers)) and time.time() < end:
        time.sleep(.05)
    assert len(workers) == 2 and not any(map(is_running, workers))


def test_second_prepare_does_nothing(src, monkeypatch):
    dst = prepare(src, src.parent/'out', 32)
    stamp = {p: p.stat().st_mtime_ns for p in dst.iterdir()}
    monkeypatch.setattr(packing, 'decode', lambda *a: pytest.fail('decoded again'))
    assert prepare(src, dst, 32) == dst and stamp == {p: p.stat().st_mtime_ns for p in dst.iterdir()}


def test_another_size_or_source_is_refused(src, tmp_path):
    dst = prepare(src, tmp_path/'out', 32)
    with pytest.raises(ValueError, match='holds faces of 32 px, not 64: choose another folder or remove it'):
        prepare(src, dst, 64)
    with pytest.raises(ValueError, match='was packed from other files'):
        prepare(ellipse_faces(tmp_path/'five', 5), dst, 32)
    with pytest.raises(ValueError, match='exists and holds no packed faces'):
        prepare(src, src/IMAGES, 32)
    assert len(load_faces(dst)) == 4


def test_load_faces_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no packed faces: make it with prepare'):
        load_faces(tmp_path)


# --- reading back

def test_access_opens_no_picture(packed, monkeypatch):
    monkeypatch.setattr(Image, 'open', lambda *a: pytest.fail('opened a picture'))
    raw = Path(packed.folder).parent/'raw'
    hidden = raw.rename(raw.with_name('moved'))
    assert len(load_faces(packed.folder)[:].image) == 40
    hidden.rename(raw)


def test_every_way_of_asking_gives_the_same_face(packed):
    want, i = packed[:], [7, 0, 39]
    assert want.image.dtype == torch.float32 and want.mask.dtype == torch.int64 and want.attrs.shape == (40, 40)
    assert want.image.min() >= -1 and want.image.max() <= 1
    for key in (i, torch.tensor(i), np.array(i)):
        got = packed[key]
        assert all(torch.equal(a, b[i]) for a, b in zip(got, want))
    for key in (7, np.int64(7), torch.tensor(7), -33):
        assert all(torch.equal(a, b[7]) for a, b in zip(packed[key], want))
    assert torch.equal(packed[3:9:2].mask, want.mask[3:9:2]) and len(packed[[]].image) == 0
    image, mask = packed.uint8(i)
    assert image.dtype == torch.uint8 and torch.equal(image.float()/127.5 - 1, want.image[i])
    assert torch.equal(mask.long(), want.mask[i])
    with pytest.raises(IndexError):
        packed[40]


def test_a_read_face_is_the_readers_own(packed):
    before = packed[3].image.clone()
    packed[3].image.zero_()
    packed.uint8([3])[0].zero_()
    packed[[3]].attrs.fill_(9)
    assert torch.equal(packed[3].image, before) and packed.attrs.max() == 1


def test_subset_of_subset(packed):
    sub = packed.subset([5, 7, 11]).subset(torch.tensor([False, True, True]))
    assert sub.ids == ['7', '11'] and len(sub) == 2 and torch.equal(sub.attrs, packed.attrs[[7, 11]])
    assert torch.equal(sub[1].image, packed[11].image) and sub.identity.tolist() == [-1, -1] and len(packed) == 40
    assert len(packed.subset([])) == 0


@pytest.mark.parametrize('workers', [0, 2])
def test_data_loader(packed, workers):
    "Default collation works, and workers change nothing"
    loader = torch.utils.data.DataLoader(packed.subset(range(10)), batch_size=4, num_workers=workers)
    got = list(loader)
    assert all(type(b).__name__ == 'Face' for b in got)
    assert torch.equal(torch.cat([b.image for b in got]), packed[:10].image)


def test_pickle_takes_no_pixels(packed):
    data = pickle.dumps(packed.subset([3, 4]))
    assert len(data) < 5000 and torch.equal(pickle.loads(data)[1].image, packed[4].image)


def test_folder_is_an_ordinary_datasets_folder(packed):
    import datasets
    row = datasets.load_from_disk(str(packed.folder)).with_format('numpy')[3]
    assert row['id'] == '3' and np.array_equal(row['image'].reshape(3, 32, 32), packed.uint8([3])[0][0])


# --- splits

class Fake:
    "As much of `Faces` as split asks for"
    def __init__(self, ids, identity=None, celeba=None, **meta):
        self.ids, self.meta = [str(i) for i in ids], dict(layout='official') | meta
        unknown = [-1]*len(self.ids)
        self.identity = torch.tensor(unknown if identity is None else list(identity))
        self.celeba = torch.tensor(unknown if celeba is None else list(celeba))
    def __len__(self): return len(self.ids)


def covers(parts, n):
    "train, judge and test share no face and miss none; small lies in train"
    a, b, c = (parts[k].tolist() for k in ('train', 'judge', 'test'))
    assert sorted(a + b + c) == list(range(n)) and set(parts['small'].tolist()) <= set(a)
    assert all(v.dtype == torch.long and v.tolist() == sorted(v.tolist()) for v in parts.values())


def test_paper_split_of_the_whole_data_set():
    faces = Fake(range(30000))
    parts = split(faces)
    covers(parts, 30000)
    assert {k: len(v) for k, v in parts.items()} == dict(train=27000, small=2700, judge=2700, test=300)
    assert parts['train'].tolist() == list(range(27000)) and parts['test'].min() >= 27000
    some = [i for i in range(30000) if i not in (5, 27001)]      # packed with two faces left out
    less = split(Fake(some))
    assert len(less['train']) == 26999 and len(less['test']) == 300 and len(less['judge']) == 2699


@pytest.mark.parametrize('meta', [dict(layout='rendered', rendered=True), dict(rendered=True), dict(layout='plain')])
def test_only_photos_of_celebamask_are_split_by_their_numbers(meta):
    "As many drawn faces with the same ids, packed either way, are split by shares, and so is another folder"
    parts = split(Fake(range(30000), **meta))
    covers(parts, 30000)
    assert {k: len(v) for k, v in parts.items()} == dict(train=18000, small=1800, judge=7500, test=4500)


def test_fewer_faces_than_asked_for_is_an_error():
    assert at_least(range(9), 9, 'samples') == 9 and at_least([], 0, 'samples') == 0
    with pytest.raises(ValueError, match='^samples=10 asks for 10 faces, but the test split has 9: lower samples, or'):
        at_least(range(9), 10, 'samples')
    with pytest.raises(ValueError, match='n_train=5 .* the train split has 4: lower n_train'):
        at_least(range(4), 5, 'n_train', 'the train split')


def test_paper_split_shares_out_smaller_sets():
    parts = split(Fake(range(3000)))
    covers(parts, 3000)
    assert {k: len(v) for k, v in parts.items()} == dict(train=1800, small=180, judge=750, test=450)
    for n in (3, 16, 64):
        assert all(len(v) for v in split(Fake(range(n))).values())


def test_split_depends_on_ids_and_seed_alone():
    ids = [str(i*7) for i in range(500)]
    back = ids[::-1]
    name = lambda ids, parts: {k: {ids[i] for i in v.tolist()} for k, v in parts.items()}
    assert name(ids, split(Fake(ids))) == name(back, split(Fake(back)))
    assert name(ids, split(Fake(ids), seed=1)) != name(ids, split(Fake(ids)))


def test_nobody_is_in_two_parts():
    rng = np.random.default_rng(0)
    who = rng.integers(-1, 150, 1000)
    parts = split(Fake(range(1000), who))
    covers(parts, 1000)
    people = [set(who[parts[k]].tolist()) - {-1} for k in ('train', 'judge', 'test')]
    assert not (people[0] & people[1] or people[0] & people[2] or people[1] & people[2])
    assert abs(len(parts['test']) - 150) < 15 and abs(len(parts['judge']) - 250) < 15


def test_official_split_follows_celeba():
    numbers = [1, 162770, 162771, 182637, 182638, 202599]
    parts = split(Fake(range(6), celeba=numbers), 'official')
    covers(parts, 6)
    assert parts['train'].tolist() == [0, 1] and parts['judge'].tolist() == [2, 3] and parts['test'].tolist() == [4, 5]


def test_split_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="needs to know each face's CelebA file; 2 of 3 have none.*use 'paper'"):
        split(Fake(range(3), celeba=[5, -1, -1]), 'official')
    with pytest.raises(ValueError, match="unknown split 'val': choose one of paper, official"):
        split(Fake(range(3)), 'val')


# --- real faces

def test_real_official_layout(real_faces, tmp_path):
    src = real_faces/'CelebAMask-HQ'
    faces = load_faces(prepare(src, tmp_path/'out', 64))
    assert len(faces) == 57 and faces.meta['masks'] == 57 and not faces.meta['problems'] and (faces.celeba > 0).all()
    line = next(l.split() for l in (src/TABLE).read_text().splitlines() if l.startswith(f'{faces.ids[3]}.jpg'))
    assert faces.attrs[3].tolist() == [float(v == '1') for v in line[1:]]
    middle = faces[:].mask[:, 24:40, 24:40]
    assert (middle == PARTS.index('nose')).float().mean() > 0.1 and faces[:].mask.unique().numel() >= 15
    covers(split(faces, 'official'), 57)


def test_real_masks_equal_a_merge_by_hand(real_faces, tmp_path):
    src = real_faces/'CelebAMask-HQ'
    listing = read_raw(src)
    problems = listing.problems
    assert not problems
    for raw in listing.raws[::19]:
        want = np.zeros((512, 512), np.uint8)
        for c, part in enumerate(PARTS):
            p = src/MASKS/str(int(raw.id)//2000)/f'{int(raw.id):05d}_{part}.png'
            if p.exists():
                want[np.asarray(Image.open(p))[..., 0] == 255] = c
        assert np.array_equal(packing.decode(src, raw, 512, problems)[1], want)


def test_real_plain_layouts(real_faces, tmp_path):
    pairs = load_faces(prepare(real_faces/'pairs128', tmp_path/'pairs', 64))
    assert len(pairs) == pairs.meta['masks'] == 800 and pairs.attrs.isnan().all() and 0 < (pairs.celeba > 0).sum() < 800
    listing = read_raw(real_faces/'celeba64')
    raws = listing.raws
    assert len(raws) == 15733 and not listing.problems and not any(np.isnan(r.attrs).any() for r in raws)
    who = [r.identity for r in raws]
    parts = split(Fake([r.id for r in raws], who))
    covers(parts, 15733)
    assert not {who[i] for i in parts['train']} & {who[i] for i in parts['test']}

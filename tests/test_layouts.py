"""What people bring: each kind of folder, table, part and label map is read as it is meant, or refused in one line."""
import io

import numpy as np
import pytest
import torch
from PIL import Image

from facegen.core import ATTRIBUTES, PARTS
from facegen.data.faces import load_faces, prepare, split
from facegen.data.layouts import CLASS_ORDERS, IMAGES, MASKS, BadFaces, Reading, class_table, ellipse_faces, read_raw
from facegen.data.packing import near_duplicates, thumbnails
from facegen.data.pictures import LOSSY, between_share, order_fit
from facegen.plotting import to_uint8
from facegen.study.runner import pack, pack_path
from facegen.synthetic.toyfaces import render_faces

torch.set_num_threads(1)


def noise(i, side=48):
    return Image.fromarray(np.random.default_rng(i).integers(0, 255, (side, side, 3), dtype=np.uint8))


def pictures(folder, *names):
    "Noise pictures of these names"
    for i, name in enumerate(names):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        noise(i).save(folder/name, format=None if name[-5:] != '.jfif' else 'JPEG')
    return folder


def packed(folder, size=32, **reading):
    return load_faces(prepare(folder, folder.parent/f'{folder.name}-packed', size, reading=Reading(**reading)))


def refused(folder, *parts, **reading):
    "`prepare` says all `parts`, and makes nothing"
    with pytest.raises(BadFaces) as e:
        packed(folder, **reading)
    for part in parts:
        assert part in str(e.value), str(e.value)
    assert not (folder.parent/f'{folder.name}-packed').exists()
    return e.value.problems


# Folders

def test_a_bare_folder_is_a_face_set(tmp_path, capsys):
    names = 'a.jpg', 'b.JPEG', 'c.png', 'd.webp', 'e.bmp', 'f.tif', 'g.jfif', 'h.tiff'
    faces = packed(pictures(tmp_path/'album', *names))
    assert faces.ids == list('abcdefgh') and faces.meta['layout'] == 'bare'
    assert faces.attrs.isnan().all() and (faces[:].mask == -1).all() and not faces.meta['notes']


def test_folders_in_folders_belong_to_the_id(tmp_path):
    faces = packed(pictures(tmp_path/'p', 'images/a/0.jpg', 'images/b/0.jpg', 'images/1.jpg'))
    assert set(faces.ids) == {'a/0', 'b/0', '1'} and faces.meta['layout'] == 'plain'
    assert packed(pictures(tmp_path/'album', 'x/y/0.png', 'z/0.png')).ids == ['x/y/0', 'z/0']


def test_what_file_managers_leave_is_passed_over_and_counted(tmp_path, capsys):
    folder = pictures(tmp_path/'p', 'images/0.jpg', 'images/a/1.jpg')
    for name in ('images/Thumbs.db', 'images/a/desktop.ini', 'images/.DS_Store', 'images/__MACOSX/0.jpg'):
        (folder/name).parent.mkdir(exist_ok=True)
        (folder/name).write_text('')
    assert packed(folder).ids == ['0', 'a/1']
    assert 'p: images: passed over 3 files of a file manager: .DS_Store, Thumbs.db, ' in capsys.readouterr().err
    album = pictures(tmp_path/'album', '0.jpg')
    (album/'README.txt').write_text('my photos')
    note, = read_raw(album).notes
    assert note == '.: passed over 1 file that are no pictures: README.txt'


def celeba(folder, n=6):
    "A small CelebA as torchvision keeps it; files 162769 to 162770 + n - 2"
    numbers = range(162769, 162769 + n)
    pictures(folder, *(f'img_align_celeba/{i:06d}.jpg' for i in numbers))
    values = '  '.join(['-1', ' 1']*20)
    rows = [f'{i:06d}.jpg  {values}' for i in (*numbers, 199999)]
    (folder/'list_attr_celeba.txt').write_text('\n'.join([str(len(rows)), ' '.join(ATTRIBUTES) + ' ', *rows, '']))
    (folder/'identity_CelebA.txt').write_text('\n'.join(f'{i:06d}.jpg {i % 3}' for i in numbers))
    (folder/'list_eval_partition.txt').write_text('\n'.join(f'{i:06d}.jpg {int(i > 162770)}' for i in numbers))
    return folder


def test_celeba_as_torchvision_keeps_it(tmp_path):
    faces = packed(celeba(tmp_path/'celeba'))
    assert faces.meta['layout'] == 'celeba' and faces.celeba.tolist() == list(range(162769, 162775))
    assert faces.identity.tolist() == [i % 3 for i in range(162769, 162775)]
    assert torch.equal(faces.attrs, torch.tensor([0., 1.]*20).expand(6, -1))
    assert faces.meta['notes'] == ['list_attr_celeba.txt: passed over 1 file that have a row and no picture: 199999']
    assert {k: len(v) for k, v in split(faces, 'official').items() if k != 'small'} == dict(train=2, judge=4, test=0)
    edit = tmp_path/'celeba/list_eval_partition.txt'
    edit.write_text(edit.read_text().replace('162770.jpg 0', '162770.jpg 2'))
    with pytest.raises(BadFaces, match='list_eval_partition.txt: 1 faces are in another part than CelebA puts them'):
        prepare(tmp_path/'celeba', tmp_path/'new', 32)


def test_celeba_with_the_usual_csv_and_the_folder_twice(tmp_path):
    folder = pictures(tmp_path/'c', 'img_align_celeba/img_align_celeba/000001.jpg',
                      'img_align_celeba/img_align_celeba/000002.jpg')
    (folder/'list_attr_celeba.csv').write_text('image_id,Male,Smiling\n000001.jpg,1,-1\n000002.jpg,-1,-1\n')
    faces = packed(folder)
    assert faces.attrs[:, ATTRIBUTES.index('Male')].tolist() == [1, 0] and faces.celeba.tolist() == [1, 2]


def maps(folder, n=12, size=64, order='celebamask', suffix='_seg.png'):
    "Drawn faces in the layout of pairs, their label maps in some class order; returns faces as drawn"
    face = render_faces(n=n, size=size, seed=1)
    folder.mkdir(parents=True)
    value = {part: i for i, part in enumerate(CLASS_ORDERS[order])}
    table = np.array([value[p] for p in PARTS if p in value] if order != 'facesynthetics' else
                     [value.get(p, 255) for p in PARTS], np.uint8)
    for i in range(n):
        Image.fromarray(to_uint8(face.image[i])).save(folder/f'{i:06d}.png')
        Image.fromarray(table[face.mask[i].numpy()]).save(folder/f'{i:06d}{suffix}')
    return face


def test_pairs_of_picture_and_label_map(tmp_path):
    "As in FaceSynthetics: its order, and 255 is unknown; earrings and necklaces have no number there"
    face = maps(tmp_path/'synthetics', order='facesynthetics')
    (tmp_path/'synthetics/000000_ldmks.txt').write_text('1 2')
    faces = packed(tmp_path/'synthetics', 64)
    assert faces.meta['layout'] == 'pairs' and faces.meta['masks'] == 12
    assert faces.ids == [f'{i:06d}' for i in range(12)]
    absent = torch.tensor([PARTS.index(p) for p in ('ear_r', 'neck_l')])
    want = face.mask.masked_fill(torch.isin(face.mask, absent), -1)
    assert torch.equal(faces[:].mask, want) and (want == -1).any()
    (tmp_path/'synthetics/000003.png').unlink()
    with pytest.raises(BadFaces, match="000003_seg.png: there is no image '000003'"):
        prepare(tmp_path/'synthetics', tmp_path/'new', 64)


# Tables

def table(tmp_path, text):
    folder = pictures(tmp_path/'p', 'images/a.png', 'images/b.png')
    (folder/'attributes.csv').write_text(text)
    return folder


@pytest.mark.parametrize('words', [('1', '0'), ('1', '-1'), ('True', 'False'), ('yes', 'no'), ('TRUE', 'FALSE')])
def test_yes_and_no_in_many_words(tmp_path, words):
    folder = table(tmp_path, f'image_id,Male,Bald\na.png,{words[0]},{words[1]}\nb.png,{words[1]},{words[1]}\n')
    assert packed(folder).attrs[:, [ATTRIBUTES.index('Male'), ATTRIBUTES.index('Bald')]].tolist() == [[1, 0], [0, 0]]


def test_three_values_in_a_column_are_ambiguous(tmp_path):
    folder = table(tmp_path, 'file,Male,Bald,Young\na.png,-1,0,1\nb.png,0,1,0\n')
    column = [ATTRIBUTES.index(n) for n in ('Male', 'Bald', 'Young')]
    refused(folder, '-1, 0 and 1 in one column (1: Male): is 0 unknown or absent? Say --zero unknown or --zero absent')
    unknown = packed(folder, zero='unknown').attrs[:, column]
    assert torch.equal(unknown.nan_to_num(9), torch.tensor([[0., 0, 1], [9, 1, 0]]))
    absent = load_faces(prepare(folder, tmp_path/'absent', 32, reading=Reading(zero='absent'))).attrs[:, column]
    assert absent.tolist() == [[0, 0, 1], [0, 1, 0]]


def test_foreign_columns_are_refused_or_left_out(tmp_path):
    folder = table(tmp_path, 'file,lefteye_x,Male\na.png,30,1\nb.png,31,0\n')
    refused(folder, "unknown attribute name 'lefteye_x': correct it, or leave such columns out with --only-attributes")
    faces = packed(folder, only_attributes=True)
    assert faces.attrs[:, ATTRIBUTES.index('Male')].tolist() == [1, 0]
    assert faces.meta['notes'] == ['attributes.csv: left out 1 columns that are no attribute: lefteye_x']


@pytest.mark.parametrize('reading, message', [
    (dict(classes='bisenett'), "unknown class order 'bisenett' (did you mean 'bisenet'?)"),
    (dict(zero='never'), "0 can mean absent or unknown, not 'never'"),
    (dict(ignore=300), 'ignore=300 is no value of a label map')])
def test_an_unknown_reading_is_refused(tmp_path, reading, message):
    with pytest.raises(ValueError) as e:
        read_raw(pictures(tmp_path/'p', 'a.png'), Reading(**reading))
    assert message in str(e.value)


# Label maps

def test_255_is_explained_and_can_be_ignored(tmp_path):
    face = maps(tmp_path/'m', n=3)
    labels = face.mask[1].numpy().astype(np.uint8)
    labels[:4] = 255
    Image.fromarray(labels).save(tmp_path/'m/000001_seg.png')
    p, = refused(tmp_path/'m', 'has values 255, expected classes 0..18; 255 often means unlabelled: say --ignore 255',
                 classes='celebamask')
    assert p.face == '000001'
    faces = packed(tmp_path/'m', 64, classes='celebamask', ignore=255)
    assert (faces[1].mask[:4] == -1).all() and torch.equal(faces[1].mask[4:], face.mask[1][4:])


@pytest.mark.parametrize('order', ['celebamask', 'bisenet'])
def test_a_class_order_is_mapped_and_a_wrong_one_noticed(tmp_path, order):
    other = {'celebamask': 'bisenet', 'bisenet': 'celebamask'}[order]
    face = maps(tmp_path/'m', order=order)
    assert torch.equal(packed(tmp_path/'m', 64, classes=order)[:].mask, face.mask)
    (tmp_path/'as-plain/images').mkdir(parents=True)
    (tmp_path/'as-plain/masks').mkdir()
    for i in range(12):
        (tmp_path/f'm/{i:06d}.png').rename(tmp_path/f'as-plain/images/{i}.png')
        (tmp_path/f'm/{i:06d}_seg.png').rename(tmp_path/f'as-plain/masks/{i}.png')
    if order == 'celebamask':  # what plain folders have
        packed(tmp_path/'as-plain', 64)
        return
    p, = refused(tmp_path/'as-plain', "their areas look like 'bisenet' (overlap", '--classes bisenet')
    assert 'and 11 more' in p.reason
    sure = packed(tmp_path/'as-plain', 64, classes=other)
    assert not torch.equal(sure[:].mask, face.mask), 'whoever names an order is believed'


def test_areas_tell_class_orders_apart_on_hand_drawn_maps(real_faces):
    files = sorted((real_faces/'pairs128/masks').glob('*.png'))[::16]
    shares = np.mean([np.bincount(np.asarray(Image.open(f)).ravel(), minlength=256)/128**2 for f in files], 0)
    for order, names in CLASS_ORDERS.items():
        written = np.zeros(256)
        for part, share in zip(PARTS, shares):
            if part in names:
                written[names.index(part)] = share
        fits = {o: order_fit(written, o) for o in CLASS_ORDERS}
        assert max(fits, key=fits.get) == order and fits[order] > .9


def as_jpeg(labels, quality):
    data = io.BytesIO()
    Image.fromarray(labels).save(data, 'JPEG', quality=quality)
    return np.asarray(Image.open(data))


SPOILED = {
    'bilinear, smaller': lambda m: np.asarray(Image.fromarray(m).resize((48, 48), Image.BILINEAR)),
    'bilinear, larger': lambda m: np.asarray(Image.fromarray(m).resize((150, 150), Image.BILINEAR)),
    'bicubic': lambda m: np.asarray(Image.fromarray(m).resize((150, 150), Image.BICUBIC)).clip(0, 18),
    'jpeg 95': lambda m: as_jpeg(m, 95).clip(0, 18)}


@pytest.mark.parametrize('how', SPOILED)
def test_a_map_that_was_averaged_is_refused(tmp_path, how):
    face = maps(tmp_path/'m', n=2)
    Image.fromarray(SPOILED[how](face.mask[1].numpy().astype(np.uint8))).save(tmp_path/'m/000001_seg.png')
    refused(tmp_path/'m', '000001_seg.png: was resized smoothly or saved with losses', 'make it again with nearest',
            classes='celebamask')


def test_a_jpeg_is_no_label_map(tmp_path):
    maps(tmp_path/'m', n=2, suffix='_seg.jpg')
    refused(tmp_path/'m', 'is a JPEG, which changes class numbers: save label maps as PNG', classes='celebamask')


@pytest.mark.parametrize('side', [32, 64, 128])
def test_clean_maps_pass(real_faces, side):
    "Of drawn faces, and of hand-drawn maps that were shrunk with nearest neighbour"
    drawn = [m.numpy() for m in render_faces(n=40, size=side, seed=3).mask]
    files = sorted((real_faces/'pairs128/masks').glob('*.png'))[::8]
    by_hand = [np.asarray(Image.open(f).resize((side, side), Image.NEAREST)) for f in files]
    assert max(between_share(m) for m in drawn + by_hand) < LOSSY


def test_a_class_table_holds_every_part_once():
    for order in ('celebamask', 'bisenet'):
        assert sorted(class_table(order, -1).values()) == list(range(19))
    assert class_table('facesynthetics', 255)[255] == -1
    assert PARTS.index('hat') not in class_table('bisenet', 18).values()


# Parts

def part(src): return src/MASKS/'0/00000_skin.png'


@pytest.mark.parametrize('how', ['0/1', 'alpha', '16 bit', 'one bit'])
def test_a_part_may_be_written_in_many_ways(tmp_path, how):
    src = ellipse_faces(tmp_path/'f', 1)
    want = packed(src, 64)[0].mask
    a = np.asarray(Image.open(part(src)))
    change = {'0/1': (a > 127).astype(np.uint8), 'alpha': np.dstack([a*0 + 255]*3 + [a]),
              '16 bit': a.astype(np.uint16)*257, 'one bit': a > 127}
    Image.fromarray(change[how]).save(part(src))
    assert torch.equal(load_faces(prepare(src, tmp_path/'again', 64))[0].mask, want)


def test_a_part_with_colours_and_transparency_is_refused(tmp_path):
    src = ellipse_faces(tmp_path/'f', 1)
    a = np.asarray(Image.open(part(src)))
    Image.fromarray(np.dstack([a, a, a, 255 - a])).save(part(src))
    refused(src, '00000_skin.png: has colours and an alpha channel, and either may be the part: save it as grey')


def test_a_part_without_pixels_counts_as_absent_and_is_reported(tmp_path, capsys):
    src = ellipse_faces(tmp_path/'f', 3)
    Image.new('L', (128, 128)).save(src/MASKS/'0/00001_hair.png')
    faces = packed(src)
    assert not (faces[1].mask == PARTS.index('hair')).any()
    assert f'1 part files without any pixel count as absent: {MASKS}/0/00001_hair.png' in faces.meta['notes']
    assert '1 part files without any pixel' in capsys.readouterr().err


# Photos

def test_grey_of_16_bits_keeps_its_ramp(tmp_path):
    (tmp_path/'a').mkdir()
    ramp = (np.arange(4096).reshape(64, 64)*16).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path/'a/0.png')
    grey = (packed(tmp_path/'a', 64)[0].image[0] + 1)*127.5
    assert (grey - torch.from_numpy(ramp/257)).abs().max() <= .51
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path/'a/1.tif')
    with pytest.raises(BadFaces, match='1.tif: has mode F and values 0 to 65520, expected 8 or 16 bits'):
        prepare(tmp_path/'a', tmp_path/'new', 64)


def test_only_named_formats_are_opened(tmp_path):
    noise(0).save(tmp_path/'x.gif')
    (tmp_path/'a').mkdir()
    (tmp_path/'x.gif').rename(tmp_path/'a/0.png')
    refused(tmp_path/'a', '0.png: cannot be decoded (')


# The same photo twice

def test_neighbours_are_all_that_a_search_without_blocks_finds():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (300, 3, 16, 16)).astype(np.uint8)
    copies = rng.integers(0, 300, 60)
    x[rng.permutation(300)[:60]] = np.clip(x[copies] + rng.integers(-3, 4, (60, 3, 16, 16)), 0, 255)
    small = thumbnails(x)
    squared = ((small[:, None] - small[None])**2).mean(2)
    want = [(i, j) for i in range(300) for j in range(i + 1, 300) if squared[i, j] < 2.5**2]
    assert near_duplicates(small, block=32) == near_duplicates(small) == want and len(want) > 40


def test_copies_are_reported_and_never_on_two_sides_of_a_split(tmp_path, capsys):
    album = tmp_path/'album'
    pictures(album, *(f'{i:03d}.png' for i in range(60)))
    for i in range(20):
        noise(i).resize((96, 96), Image.BICUBIC).save(album/f'copy-{i:03d}.jpg', quality=90)
    faces = packed(album)
    assert len(faces.meta['copies']) == 20
    assert '20 pairs of faces are nearly the same picture' in capsys.readouterr().err
    part_of = {faces.ids[i]: name for name, rows in split(faces).items() if name != 'small' for i in rows.tolist()}
    assert all(part_of[f'{i:03d}'] == part_of[f'copy-{i:03d}'] for i in range(20)) and len(set(part_of.values())) == 3
    some = faces.subset(slice(0, 50))  # without most of the copies
    assert sum(len(v) for k, v in split(some).items() if k != 'small') == 50


def test_copies_across_a_split_by_numbers_leave_the_training(tmp_path):
    "CelebA's own split puts them where it does: the one that would be trained on is left out"
    folder = celeba(tmp_path/'celeba')
    images = folder/'img_align_celeba'
    (images/'162773.jpg').write_bytes((images/'162770.jpg').read_bytes())
    faces = packed(folder)
    parts = {k: [faces.ids[i] for i in v] for k, v in split(faces, 'official').items()}
    assert parts['train'] == ['162769'] and '162773' in parts['judge']


# Packs are named by content

def test_two_folders_of_one_name_are_two_packs(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    for name, colour in (('A', 'red'), ('B', 'blue')):
        (tmp_path/name/'faces').mkdir(parents=True)
        for i in range(3):
            Image.new('RGB', (40, 40), colour).save(tmp_path/name/'faces'/f'{i}.png')
    a, b = (pack(str(tmp_path/name/'faces'), 0, 32) for name in 'AB')
    assert a != b and a.parent == b.parent == tmp_path/'data/faces'
    assert load_faces(a)[0].image[0].min() > .9 > load_faces(b)[0].image[0].max()
    noise(0).save(tmp_path/'A/faces/9.png')
    assert len(load_faces(pack(str(tmp_path/'A/faces'), 0, 32))) == 4, 'a face that is added is seen'
    assert len(load_faces(a)) == 3


def test_a_folder_that_is_called_like_drawn_faces_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEGEN_ROOT', str(tmp_path))
    pictures(tmp_path/'toy-ink', '0.png')
    assert len(load_faces(pack(str(tmp_path/'toy-ink'), 8, 32))) == 1
    assert pack_path('toy-ink', 8, 32).name == 'toy-ink-8-32'
    with pytest.raises(FileNotFoundError, match="no faces at toy-inc.*did you mean 'toy-ink'"):
        pack('toy-inc', 8, 32)


def test_official_images_alone_are_a_bare_folder(tmp_path):
    src = ellipse_faces(tmp_path/'f', 3)
    assert read_raw(src/IMAGES).layout == 'bare'

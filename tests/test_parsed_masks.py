"""Pseudo-labels from a parser, and sides put right: everything else of the faces stays as it was."""
import pickle, shutil

import pytest
import torch

from facegen.core import PARTS, seed_all
from facegen.data.faces import MIRROR_PAIRS, load_faces, prepare, resize
from facegen.data.parsed_masks import FacesWithMasks, fix_left_right, parse_faces
from facegen.evaluation.judges import Parser
from facegen.synthetic.toyfaces import write_toyfaces


# Masks from a parser

@pytest.fixture(scope='module')
def bare(tmp_path_factory):
    "Nine toy faces without masks, packed at 32 and at 64 px"
    tmp = tmp_path_factory.mktemp('bare')
    write_toyfaces(tmp/'raw', 9, size=64)
    (tmp/'plain').mkdir()
    shutil.copytree(tmp/'raw'/'CelebA-HQ-img', tmp/'plain'/'images')
    names = sorted(p.name for p in (tmp/'plain'/'images').iterdir())
    rows = [f'{name},{i % 2}\n' for i, name in enumerate(names)]
    (tmp/'plain'/'attributes.csv').write_text('file,Smiling\n' + ''.join(rows))
    return [load_faces(prepare(tmp/'plain', tmp/str(size), size=size)) for size in (32, 64)]


@pytest.fixture(scope='module')
def parser():
    seed_all(3)
    return Parser(size=32, width=16).eval()


def test_parsed_faces_have_masks_and_are_otherwise_the_same(bare, parser):
    faces, larger = bare
    parsed = parse_faces(faces, parser)
    assert (faces[:].mask == -1).all() and parsed.ids == faces.ids and len(parsed) == 9 and parsed.size == 32
    assert torch.equal(parsed[:].image, faces[:].image)
    assert torch.equal(parsed[:].attrs.nan_to_num(-1), faces[:].attrs.nan_to_num(-1))
    assert torch.equal(parsed[:].mask, parser.predict(faces[:].image))
    assert parsed[:].mask.dtype == torch.int64 and torch.equal(parsed[3].mask, parsed[[3]].mask[0])
    fine = parse_faces(faces, parser, larger)
    want = resize(parser(larger[:].image), 32).argmax(1)
    assert torch.equal(fine[:].mask, want) and fine.size == 32
    assert torch.equal(fine[:].image, faces[:].image)


def test_parts_of_parsed_faces_keep_their_own_masks(bare, parser):
    parsed = parse_faces(bare[0], parser)
    part = parsed.subset([7, 2, 5])
    again = part.subset([1])
    assert torch.equal(part[:].mask, parsed[[7, 2, 5]].mask)
    assert torch.equal(again[0].mask, parsed[2].mask) and again.ids == [parsed.ids[2]]
    worker = pickle.loads(pickle.dumps(part)) # what a loader's worker gets
    for f in (part, worker):
        assert torch.equal(f[:].mask, parsed[[7, 2, 5]].mask) and f.ids == part.ids
    assert worker.meta['key'] == parsed.meta['key'] == part.meta['key']


def test_a_cache_can_tell_who_parsed(bare, parser):
    seed_all(4)
    other = Parser(size=32, width=16).eval()
    keys = [f.meta['key'] for f in (bare[0], parse_faces(bare[0], parser), parse_faces(bare[0], other))]
    assert len(set(keys)) == 3 and parse_faces(bare[0], parser).meta['key'] == keys[1]


def test_larger_faces_must_be_the_same_faces(bare, parser):
    message = 'the larger faces are others, or in another order: pack both from the same folder'
    with pytest.raises(ValueError, match=message):
        parse_faces(bare[0], parser, bare[1].subset([1, 0, *range(2, 9)]))


def test_swapped_sides_are_fixed_and_the_others_left_alone(tmp_path):
    "Whoever has left and right the wrong way round gets the names changed, and not one pixel moves"
    faces = load_faces(prepare(write_toyfaces(tmp_path/'raw', 12, size=64), tmp_path/'packed', size=64))
    right, swap = faces[:].mask, torch.arange(len(PARTS))
    for l, r in MIRROR_PAIRS:
        swap[[PARTS.index(l), PARTS.index(r)]] = torch.tensor([PARTS.index(r), PARTS.index(l)])
    bad = torch.arange(12) % 3 == 0
    masks = torch.where(bad[:, None, None], swap[right], right).to(torch.int8).numpy()
    mixed = FacesWithMasks(faces.folder, faces.rows, masks, 'swapped')
    whole, n = fix_left_right(faces)
    fixed, m = fix_left_right(mixed)
    has_left, has_right = ((right == PARTS.index(eye)).any(2).any(1) for eye in ('l_eye', 'r_eye'))
    visible = has_left & has_right  # eyes that can be compared
    assert n == 0 and torch.equal(whole[:].mask, right) and m == int((bad & visible).sum()) > 0
    ok = visible | ~bad
    assert torch.equal(fixed[:].mask[ok], right[ok]) and torch.equal(fixed[:].image, faces[:].image)
